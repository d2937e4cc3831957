"""The plain tuples of tensors that `Buffer.dispatch` returns as handles, and what combine reads back out of them.

Callers store these tuples with `save_for_backward`, index them, and pass them back rebuilt from saved tensors, so a
handle holds tensors only and everything is recovered from their values and shapes. Handles hold row numbers, never
addresses. Names and shapes follow the interface; "channel" c of C = num_sms // 2 stands for the c-th contiguous
range of ceil(T / C) tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .checks import describe_value
from .errors import ConfigError
from .topology import Topology

INTRANODE_FIELDS = (
    "rank_prefix_matrix",
    "channel_prefix_matrix",
    "recv_channel_prefix_matrix",
    "recv_src_idx",
    "is_token_in_rank",
    "send_head",
)
INTERNODE_FIELDS = (
    "is_token_in_rank",
    "rdma_channel_prefix_matrix",
    "gbl_channel_prefix_matrix",
    "recv_rdma_channel_prefix_matrix",
    "recv_rdma_rank_prefix_sum",
    "recv_gbl_channel_prefix_matrix",
    "recv_gbl_rank_prefix_sum",
    "recv_src_meta",
    "send_rdma_head",
    "send_nvl_head",
)
Handle = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Route:
    """What a handle says about one dispatch, seen from one rank. CPU tensors.

    Attributes:
        in_rank: bool [T, R], tokens of this rank and the ranks they went to.
        send_counts: tokens sent to each rank.
        recv_counts: tokens received from each rank.
        num_rows: rows of the received tensors: the sum of ``recv_counts``, or the worst case that was asked for.
    """

    in_rank: torch.Tensor
    send_counts: list[int]
    recv_counts: list[int]
    num_rows: int

    @property
    def num_tokens(self) -> int:
        return self.in_rank.shape[0]

    @property
    def num_recv(self) -> int:
        return sum(self.recv_counts)

    def ordinals(self) -> torch.Tensor:
        """int32 [T, R]: position of token t among those sent to rank r, or -1."""
        return ordinals(self.in_rank)


def ordinals(mask: torch.Tensor) -> torch.Tensor:
    """int32 of the mask's shape: running number of each True down its column, -1 elsewhere."""
    running = mask.cumsum(0, dtype=torch.int32) - 1
    return torch.where(mask, running, torch.tensor(-1, dtype=torch.int32))


def _channel_of(token: torch.Tensor, num_tokens: int, num_channels: int) -> torch.Tensor:
    return token // max(-(-num_tokens // num_channels), 1)


def send_channel_prefix(mask: torch.Tensor, num_channels: int) -> torch.Tensor:
    """int32 [columns, C]: tokens sent per column of ``mask`` [T, columns], inclusive prefix over channels."""
    num_tokens = mask.shape[0]
    counts = torch.zeros((num_channels, mask.shape[1]), dtype=torch.int32)
    channel = _channel_of(torch.arange(num_tokens), num_tokens, num_channels)
    counts.index_add_(0, channel, mask.to(torch.int32))
    return counts.cumsum(0, dtype=torch.int32).t().contiguous()


def recv_channel_start(
    src_tokens: Sequence[torch.Tensor], src_num_tokens: Sequence[int], num_channels: int
) -> torch.Tensor:
    """int32 [sources, C]: where each channel starts inside the block of rows from a source.

    Args:
        src_tokens: for each source, the token indices of its rows, ascending.
        src_num_tokens: T of each source.
    """
    starts = torch.zeros((len(src_tokens), num_channels), dtype=torch.int32)
    for row, (tokens, num_tokens) in enumerate(zip(src_tokens, src_num_tokens, strict=True)):
        first_tokens = torch.arange(num_channels) * max(-(-num_tokens // num_channels), 1)
        starts[row] = torch.searchsorted(tokens.long(), first_tokens).to(torch.int32)
    return starts


def inclusive_prefix(counts: Sequence[int]) -> torch.Tensor:
    """int32 inclusive prefix sum."""
    return torch.tensor(list(counts), dtype=torch.int64).cumsum(0).to(torch.int32)


@dataclass(frozen=True)
class DispatchFacts:
    """What every handle is made of. CPU tensors.

    Attributes:
        in_rank: bool [T, R].
        counts: int64 [R, R], tokens from source (row) to destination (column).
        src_idx: int32 [received], token index in its source, in receive order.
        src_num_tokens: T of each source.
        num_rows: rows of the output, at least the number received.
        num_channels: C.
    """

    topology: Topology
    in_rank: torch.Tensor
    counts: torch.Tensor
    src_idx: torch.Tensor
    src_num_tokens: list[int]
    num_rows: int
    num_channels: int

    def src_idx_by_rank(self) -> list[torch.Tensor]:
        return list(self.src_idx.split(self.counts[:, self.topology.rank].tolist()))


def build_intranode(facts: DispatchFacts) -> Handle:
    """The tuple of 6 tensors named in `INTRANODE_FIELDS`.

    ``send_head`` holds the row of the token at its destination, or -1.
    """
    rank = facts.topology.rank
    prefix = facts.counts.cumsum(0).to(torch.int32)
    first_row = prefix[rank - 1] if rank > 0 else torch.zeros_like(prefix[0])
    send_head = ordinals(facts.in_rank)
    send_head = torch.where(send_head >= 0, send_head + first_row, send_head)
    return (
        prefix,
        send_channel_prefix(facts.in_rank, facts.num_channels),
        recv_channel_start(facts.src_idx_by_rank(), facts.src_num_tokens, facts.num_channels),
        _with_rows(facts.src_idx, facts.num_rows),
        facts.in_rank,
        send_head,
    )


def build_internode(
    facts: DispatchFacts,
    node_counts: torch.Tensor,
    recv_in_rank: torch.Tensor,
    landings: Sequence[torch.Tensor],
) -> Handle:
    """The tuple of 10 tensors named in `INTERNODE_FIELDS`.

    A token crosses the network once per node, to the rank of the same index there, and lands in (source node, source
    token) order. ``send_rdma_head`` holds its landing slot or -1, ``send_nvl_head`` its final row on each rank of
    the node or -1.

    Args:
        node_counts: int64 [R, N], tokens from each rank into each node.
        recv_in_rank: bool [received, R], `is_token_in_rank` of the received tokens.
        landings: for each source node, int32 [tokens, 1 + domain]: token index, then its row on each rank of this node.
    """
    topology = facts.topology
    domain, num_nodes = topology.domain, topology.num_nodes
    in_node = facts.in_rank.view(-1, num_nodes, domain).any(2)
    rail = node_counts[topology.index_in_node :: domain]
    first_slot = rail[: topology.node].sum(0).to(torch.int32)
    send_rdma_head = ordinals(in_node)
    send_rdma_head = torch.where(send_rdma_head >= 0, send_rdma_head + first_slot, send_rdma_head)

    received = facts.counts[:, topology.rank]
    src_node = torch.repeat_interleave(torch.arange(topology.num_ranks) // domain, received).to(torch.int32)
    own_node = slice(topology.node * domain, (topology.node + 1) * domain)
    bits = torch.tensor([1 << min(i, 31) for i in range(domain)], dtype=torch.int64)
    mask = (recv_in_rank[:, own_node].long() * bits).sum(1).to(torch.int32)
    meta = torch.stack([src_node, mask], dim=1).contiguous().view(torch.uint8).view(-1, 8)

    src_tokens = facts.src_num_tokens[topology.index_in_node :: domain]
    return (
        facts.in_rank,
        send_channel_prefix(in_node, facts.num_channels),
        send_channel_prefix(facts.in_rank, facts.num_channels),
        recv_channel_start([landing[:, 0].contiguous() for landing in landings], src_tokens, facts.num_channels),
        inclusive_prefix([landing.shape[0] for landing in landings]),
        recv_channel_start(facts.src_idx_by_rank(), facts.src_num_tokens, facts.num_channels),
        received.cumsum(0).to(torch.int32),
        _with_rows(meta, facts.num_rows),
        send_rdma_head,
        torch.cat([landing[:, 1:] for landing in landings]).contiguous(),
    )


def _with_rows(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Append rows of -1 (0xff in bytes) up to the fixed number of rows of a worst-case dispatch."""
    if tensor.shape[0] == num_rows:
        return tensor
    out = tensor.new_full((num_rows, *tensor.shape[1:]), 255 if tensor.dtype == torch.uint8 else -1)
    out[: tensor.shape[0]] = tensor
    return out


def check_intranode_handle(
    handle: Sequence[torch.Tensor], topology: Topology, operation: str
) -> dict[str, torch.Tensor]:
    """Fields of an intranode handle by name, checked by their shapes alone.

    Raises:
        ConfigError: wrong length, element type, or shapes of another group.
    """
    fields = check_handle_fields(handle, topology, operation)
    num_ranks = topology.num_ranks
    _check_in_rank(fields["is_token_in_rank"], num_ranks, operation)
    matrix, head, in_rank = fields["rank_prefix_matrix"], fields["send_head"], fields["is_token_in_rank"]
    _check_prefix_matrix(matrix, num_ranks, operation)
    if head.shape != in_rank.shape or head.dtype != torch.int32 or not head.is_contiguous():
        raise ConfigError(
            f"{operation}: the handle's send_head is {head.dtype} {list(head.shape)}; expected contiguous int32 "
            f"{list(in_rank.shape)}"
        )
    return fields


def check_handle_fields(handle: Sequence[torch.Tensor], topology: Topology, operation: str) -> dict[str, torch.Tensor]:
    """Fields of a handle by name.

    Raises:
        ConfigError: wrong length or element type.
    """
    fields = INTRANODE_FIELDS if topology.num_nodes == 1 else INTERNODE_FIELDS
    if not isinstance(handle, (tuple, list)) or len(handle) != len(fields):
        raise ConfigError(
            f"{operation}: handle is a {describe_value(handle)}; a group of {topology.num_ranks} ranks in "
            f"{topology.num_nodes} node(s) uses a tuple of {len(fields)} tensors, the fifth element of what dispatch "
            "returned"
        )
    for name, tensor in zip(fields, handle, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{operation}: handle element {name} is a {type(tensor).__name__}; expected a tensor")
    return dict(zip(fields, handle, strict=True))


def _check_in_rank(in_rank: torch.Tensor, num_ranks: int, operation: str) -> None:
    if in_rank.dim() != 2 or in_rank.shape[1] != num_ranks or in_rank.dtype != torch.bool:
        raise ConfigError(
            f"{operation}: the handle's is_token_in_rank is {in_rank.dtype} {list(in_rank.shape)}; this group has "
            f"{num_ranks} ranks, so bool [T, {num_ranks}] is expected. Was the handle made by another group's buffer?"
        )


def _check_prefix_matrix(matrix: torch.Tensor, num_ranks: int, operation: str) -> None:
    if list(matrix.shape) != [num_ranks, num_ranks]:
        raise ConfigError(
            f"{operation}: the handle's rank_prefix_matrix has shape {list(matrix.shape)}; this group of "
            f"{num_ranks} ranks expects [{num_ranks}, {num_ranks}]"
        )


def parse_handle(handle: Sequence[torch.Tensor], topology: Topology, operation: str) -> Route:
    """Read a handle back, checking that it can belong to this group.

    Raises:
        ConfigError: wrong length, element type, or shapes of another group.
    """
    values = check_handle_fields(handle, topology, operation)
    num_ranks, rank = topology.num_ranks, topology.rank
    in_rank = values["is_token_in_rank"]
    _check_in_rank(in_rank, num_ranks, operation)
    in_rank = in_rank.cpu()
    if topology.num_nodes == 1:
        matrix = values["rank_prefix_matrix"]
        _check_prefix_matrix(matrix, num_ranks, operation)
        ends = matrix[:, rank].cpu()
        num_rows = values["recv_src_idx"].shape[0]
    else:
        ends = values["recv_gbl_rank_prefix_sum"].cpu()
        if list(ends.shape) != [num_ranks]:
            raise ConfigError(
                f"{operation}: the handle's recv_gbl_rank_prefix_sum has shape {list(ends.shape)}; this group of "
                f"{num_ranks} ranks expects [{num_ranks}]"
            )
        num_rows = values["recv_src_meta"].shape[0]
    recv_counts = torch.diff(ends.long(), prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    send_counts = in_rank.sum(0).tolist()
    if min(recv_counts) < 0 or sum(recv_counts) > num_rows or recv_counts[rank] != send_counts[rank]:
        raise ConfigError(
            f"{operation}: the handle contradicts itself on rank {rank} (received per rank {recv_counts}, rows "
            f"{num_rows}, sent to itself {send_counts[rank]}); pass a handle of this rank, unchanged"
        )
    return Route(in_rank, send_counts, recv_counts, num_rows)
