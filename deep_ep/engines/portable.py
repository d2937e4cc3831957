"""The portable engine: torch, the C++ loops of `ops`, and messages between processes.

It serves any device and any machine, and is the reference that every kernel is compared with bit for bit. A dispatch
is: agree (headers carry the counts), metadata, rows. Rows are received straight into the output, because the order
that the interface promises (source rank, source token) is the order in which blocks arrive. A combine sends back
slices of x as they lie, and the token's home sums them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist

from .. import handles, ops
from ..errors import BufferDestroyed, BufferOverflow
from ..event import EventHandle, EventOverlap
from ..fp8 import ScaleFormat
from ..handles import Handle, Route, parse_handle
from ..layout import DispatchLayout, compute_dispatch_layout, first_local_expert, num_local_experts
from ..topology import Topology
from ..traffic import TrafficStats
from . import protocol
from .calls import Call
from .mesh import Members, Mesh
from .protocol import METADATA_PHASE, ROWS_PHASE, Header, dtype_code
from .shared import SharedRows
from .short_cuts import ShortCuts
from .transfer import Staging, Transfer, as_bytes, split_records


@dataclass(slots=True)
class DispatchRequest:
    """Checked arguments of one dispatch.

    Attributes:
        rows: [T, H] of any dtype, contiguous; ``scales``: [T, S] of any strides, or None.
        in_rank: bool [T, R] on the device of ``rows``.
        route: the parsed handle of a cached call, else None; what `route` of the engine returned.
        topk_idx, topk_weights: [T, K] or None.
        num_tokens_per_expert: CPU int32 [E] of an uncached call.
        num_worst_tokens: fixed number of output rows, 0 for the exact number.
        num_channels: C of the handle's channel matrices.
        num_sms: SM budget of kernels.
        num_tokens_per_rank: int32 [R] of an uncached call.
        scale_format: the rows are to be quantised on the way, by an engine that serves them so.
        on_device: kernels move the rows; see `PortableEngine.serves`.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    in_rank: torch.Tensor
    route: Any = None
    topk_idx: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    num_tokens_per_expert: torch.Tensor | None = None
    num_worst_tokens: int = 0
    num_channels: int = 1
    num_sms: int = 0
    num_tokens_per_rank: torch.Tensor | None = None
    scale_format: ScaleFormat | None = None
    on_device: bool = False


@dataclass(slots=True)
class DispatchResult:
    """What a dispatch brought. ``handle`` and the per-expert counts are None in a cached call."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    num_recv_tokens_per_expert: list[int] | None = None
    handle: Handle | None = None


@dataclass(frozen=True)
class Metadata:
    """Received beside the rows. ``fields``: tensors with one record per received row; ``blobs``: uint8 per source."""

    fields: dict[str, torch.Tensor]
    blobs: list[torch.Tensor]


class PortableEngine(ShortCuts):
    """Dispatch and combine over a :class:`Mesh`. Also what callers find as ``buffer.runtime``.

    Args:
        mesh: connections between the ranks.
        shared: memory shared with the ranks of this host.
        topology: ranks and nodes.
        group: the caller's process group, used for the rows where it reaches the rows' device; or None.
        device: where scratch memory lives.
        num_nvl_bytes, num_rdma_bytes: sizes of the scratch tensors that `get_local_buffer_tensor` hands out.
    """

    name = "portable"
    #: Kernels for low-latency operations (`LowLatencyKernels`), where the engine has them.
    low_latency: Any = None
    #: Ranks of the group that share this rank's GPU, this one included.
    ranks_per_gpu = 1

    def __init__(
        self,
        mesh: Mesh,
        shared: SharedRows,
        topology: Topology,
        group: dist.ProcessGroup | None,
        device: torch.device,
        num_nvl_bytes: int,
        num_rdma_bytes: int,
    ) -> None:
        self.mesh = mesh
        self._shared = shared
        self.topology = topology
        self.device = device
        self.traffic = TrafficStats()
        # Two Python threads on one buffer are normal; operations of a buffer run one at a time.
        self.lock = threading.RLock()
        self._group = group
        self._device_collectives = _device_types_of(group)
        self._scratch_bytes = {False: num_nvl_bytes, True: num_rdma_bytes}
        self._scratch: dict[bool, torch.Tensor] = {}
        self._staging = Staging()
        self._comm_stream: Any = None

    # What callers read from `buffer.runtime`.

    def is_available(self) -> bool:
        """True: construction is collective and has finished."""
        return True

    def get_num_rdma_ranks(self) -> int:
        """Number of nodes."""
        return self.topology.num_nodes

    def get_rdma_rank(self) -> int:
        """Index of this rank's node."""
        return self.topology.node

    def get_root_rdma_rank(self, is_global: bool) -> int:
        """Rank of index 0 in this node if ``is_global`` is False, else of this rank's index in node 0."""
        return self.topology.index_in_node if is_global else 0

    def get_local_device_id(self) -> int:
        """CUDA device index of the scratch memory, -1 on CPU."""
        if self.device.type != "cuda":
            return -1
        return torch.cuda.current_device() if self.device.index is None else self.device.index

    def get_comm_stream(self) -> Any:
        """The communication stream: a `torch.cuda.Stream` where there is CUDA, else the CPU's stream object."""
        if self._comm_stream is None:
            if torch.cuda.is_available():
                device = self.device if self.device.type == "cuda" else None
                self._comm_stream = torch.cuda.Stream(device=device)
            else:
                self._comm_stream = torch.cpu.current_stream()
        return self._comm_stream

    def get_local_buffer_tensor(self, use_rdma_buffer: bool) -> torch.Tensor:
        """uint8 scratch of ``num_rdma_bytes`` or ``num_nvl_bytes`` bytes, made when first asked for."""
        if use_rdma_buffer not in self._scratch:
            size = self._scratch_bytes[use_rdma_buffer]
            self._scratch[use_rdma_buffer] = torch.zeros(size, dtype=torch.uint8, device=self.device)
        return self._scratch[use_rdma_buffer]

    def recover(self, members: Members) -> None:
        """Make the engine usable again after a `CommTimeout` or `PeerError` (collective over ``members``).

        All ranks have to be alive and out of their operations. Rows that were under way are lost.

        Raises:
            BufferDestroyed, TopologyError: see `Mesh.recover`.
        """
        with self.lock:
            self.mesh.recover(members)
            # Rows in shared memory need nothing: all ranks are here, so none reads them any more. Packed rows may still
            # belong to messages that were given up.
            self._staging.clear()

    def destroy(self) -> None:
        """Close the connections and drop the scratch memory. Waits for no peer."""
        with self.lock:
            self.mesh.close()
            self._shared.close()
            self._scratch.clear()
            self._staging.clear()

    def refuse(self, operation: str, error: Exception) -> None:
        """Tell the peers that this rank gave ``operation`` up, so that they fail at once instead of waiting."""
        with self.lock:
            try:
                protocol.refuse(self.mesh, operation, error)
            except BufferDestroyed:
                return

    def serves(self, x: object, use_fp8: bool = False) -> bool:
        """Whether kernels move rows like these, as FP8 with ``use_fp8``.

        No argument is read back from the device then, and quantising is the engine's part.
        """
        return False

    def call(
        self,
        operation: str,
        x: object,
        use_fp8: bool,
        inputs: object,
        previous_event: EventOverlap | EventHandle | None,
        async_finish: bool,
    ) -> Call:
        """The surroundings of an operation on the rows ``x``, whatever the caller passed as such."""
        return Call(self, operation, inputs, previous_event, async_finish)

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        """Counts of `Buffer.get_dispatch_layout`."""
        return compute_dispatch_layout(topk_idx, num_experts, self.topology.num_ranks, self.topology.num_nodes)

    def route(self, handle: Handle, operation: str, rows: torch.Tensor) -> Any:
        """Read a handle, for an operation on ``rows``."""
        return parse_handle(handle, self.topology, operation)

    def empty_combine_input(self, num_rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for the rows of a combine, where peers can read it if the engine has such memory."""
        return torch.empty((num_rows, hidden), dtype=dtype, device=self.device)

    def check(self) -> None:
        """Raise what failed in the background; nothing runs there on this engine."""

    def memory_usage(self) -> dict[str, int]:
        """Symmetric memory in bytes; this engine has none."""
        return {}

    # Dispatch.

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Send every token once to each rank that needs it.

        Raises:
            BufferOverflow: some rank would receive more than its ``num_worst_tokens``; raised on all ranks.
            ConfigError, PeerError, CommTimeout: see `protocol.agree` and `Batch.wait`.
        """
        topology, rank = self.topology, self.mesh.rank
        in_rank = request.in_rank.cpu() if request.route is None else request.route.in_rank
        send_counts = in_rank.sum(0).tolist()
        headers, _ = protocol.agree(self.mesh, self._dispatch_header(request, in_rank, send_counts))
        _check_capacity("dispatch", headers)
        recv_counts = [headers[source].send_counts[rank] for source in range(topology.num_ranks)]
        num_rows = request.num_worst_tokens or (request.route.num_rows if request.route else sum(recv_counts))
        tokens_by_dst = list(in_rank.t().nonzero()[:, 1].split(send_counts))

        rows = request.rows.new_empty((num_rows, request.rows.shape[1]))
        # All messages are under way before the first is waited for. Metadata goes after the rows that lie in memory, so
        # that its arrival says that they are there.
        finish_rows = self._start_rows(request.rows, tokens_by_dst, headers, rows)
        metadata = self._start_metadata(request, headers, in_rank, tokens_by_dst, recv_counts)()
        finish_rows(metadata.fields["src_idx"][:, 0])
        scales = None
        if request.scales is not None:
            scales = _padded(metadata.fields["scales"], num_rows).to(rows.device)
        self.traffic.add_dispatch(
            sum(send_counts),
            as_bytes(request.rows[:1]).shape[1] + (0 if request.scales is None else 4 * request.scales.shape[1]),
            str(request.rows.dtype).removeprefix("torch."),
        )
        if request.route is not None:
            return DispatchResult(rows, scales)
        return self._finish_dispatch(request, headers, in_rank, recv_counts, metadata, rows, scales)

    def _dispatch_header(self, request: DispatchRequest, in_rank: torch.Tensor, send_counts: list[int]) -> Header:
        route, scales, topk_idx = request.route, request.scales, request.topk_idx
        per_expert = request.num_tokens_per_expert
        signature = {
            "dtype": dtype_code(request.rows.dtype),
            "row_bytes": request.rows.shape[1] * request.rows.element_size(),
            "scales_per_token": 0 if scales is None else scales.shape[1],
            "scales_dtype": dtype_code(None if scales is None else scales.dtype),
            "num_topk": 0 if topk_idx is None else topk_idx.shape[1],
            "topk_idx_bytes": 0 if topk_idx is None else topk_idx.element_size(),
            "num_experts": 0 if per_expert is None else per_expert.shape[0],
            "cached": int(route is not None),
        }
        domain, num_nodes = self.topology.domain, self.topology.num_nodes
        return Header(
            "dispatch",
            self.mesh.size,
            signature,
            num_tokens=in_rank.shape[0],
            capacity=request.num_worst_tokens,
            send_counts=send_counts,
            expected=route.recv_counts if route is not None else [],
            node_counts=in_rank.view(-1, num_nodes, domain).any(2).sum(0).tolist(),
            in_memory=self._reserve(request.rows, request.rows.shape[0]),
        )

    def _start_metadata(
        self,
        request: DispatchRequest,
        headers: dict[int, Header],
        in_rank: torch.Tensor,
        tokens_by_dst: Sequence[torch.Tensor],
        recv_counts: Sequence[int],
    ) -> Callable[[], Metadata]:
        """Everything beside the rows themselves, in one message to each peer: a record for each row, and what the
        peer needs once (counts of its experts, and the rows that it would forward inside its node).

        Returns:
            the function that waits for the peers' messages and takes them apart.
        """
        topology, rank = self.topology, self.mesh.rank
        num_tokens, num_ranks = in_rank.shape
        # Every receiver needs to know which tokens it gets, to pick them and to make the handle.
        fields = {"src_idx": torch.arange(num_tokens, dtype=torch.int32)[:, None]}
        blobs: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)] * num_ranks
        blob_bytes = [0] * num_ranks
        if request.scales is not None:
            fields["scales"] = request.scales.cpu()
        if request.route is None:
            if request.topk_idx is not None and request.topk_weights is not None:
                fields["topk_idx"] = request.topk_idx.cpu()
                fields["topk_weights"] = request.topk_weights.cpu()
            if topology.num_nodes > 1:
                fields["in_rank"] = in_rank.to(torch.uint8)
            per_expert = cast(torch.Tensor, request.num_tokens_per_expert).cpu()
            num_experts = per_expert.shape[0]
            split = [num_local_experts(num_experts, num_ranks, r) for r in range(num_ranks)]
            blobs = [part.contiguous().view(torch.uint8) for part in per_expert.split(split)]
            blob_bytes = [4 * split[rank]] * num_ranks
            if topology.num_nodes > 1:
                for node in range(topology.num_nodes):
                    forwarder = node * topology.domain + topology.index_in_node
                    blobs[forwarder] = torch.cat(
                        [
                            blobs[forwarder],
                            self._forwarding_rows(headers, in_rank, node).reshape(-1).view(torch.uint8),
                        ]
                    )
                for source in range(topology.index_in_node, num_ranks, topology.domain):
                    blob_bytes[source] += headers[source].node_counts[topology.node] * 4 * (1 + topology.domain)
        records = torch.cat([as_bytes(field) for field in fields.values()], dim=1)
        record_bytes = records.shape[1]
        sends: list[torch.Tensor] = []
        for dst in range(num_ranks):
            sends.append(torch.cat([blobs[dst], ops.gather_rows(records, tokens_by_dst[dst]).view(-1)]))
        recvs = [
            torch.empty(blob_bytes[source] + recv_counts[source] * record_bytes, dtype=torch.uint8)
            for source in range(num_ranks)
        ]
        recvs[rank] = sends[rank]
        batch = self.mesh.batch(METADATA_PHASE, "metadata")
        for peer in self.mesh.peers(-1):
            batch.recv(peer, recvs[peer])
        for peer in self.mesh.peers(1):
            batch.send(peer, sends[peer])

        def finish() -> Metadata:
            batch.wait()
            table = torch.cat([message[size:] for message, size in zip(recvs, blob_bytes, strict=True)])
            columns = split_records(table.view(-1, record_bytes), fields.values())
            blobs = [message[:size] for message, size in zip(recvs, blob_bytes, strict=True)]
            return Metadata(dict(zip(fields, columns, strict=True)), blobs)

        return finish

    def _forwarding_rows(self, headers: dict[int, Header], in_rank: torch.Tensor, node: int) -> torch.Tensor:
        """int32 [tokens of this rank that go to ``node``, 1 + domain]: token, and its row at each rank or -1."""
        first = node * self.topology.domain
        columns = slice(first, first + self.topology.domain)
        base = [sum(headers[s].send_counts[d] for s in range(self.mesh.rank)) for d in range(self.mesh.size)][columns]
        rows = handles.ordinals(in_rank)[:, columns]
        rows = torch.where(rows >= 0, rows + torch.tensor(base, dtype=torch.int32), rows)
        tokens = in_rank[:, columns].any(1).nonzero()
        return torch.cat([tokens.to(torch.int32), rows[tokens[:, 0]]], dim=1)

    def _reserve(self, rows: torch.Tensor, num_rows: int) -> bool:
        """Whether the rows of the operation that is about to begin lie in shared memory for the ranks of this host."""
        if rows.device.type in self._device_collectives:
            return False
        return self._shared.reserve(num_rows * rows.shape[1] * rows.element_size())

    def _start_rows(
        self,
        rows: torch.Tensor,
        tokens_by_dst: Sequence[torch.Tensor],
        headers: dict[int, Header],
        out: torch.Tensor,
    ) -> Callable[[torch.Tensor], None]:
        """Send the rows on their way.

        In shared memory a rank lays down its tokens once, for all ranks of its host to pick from; to other ranks it
        sends what they need.

        Returns:
            the function that fills the first rows of ``out``, in rank order, given the source token of each.
        """
        rank = self.mesh.rank
        send_counts = headers[rank].send_counts
        recv_counts = [headers[source].send_counts[rank] for source in range(self.mesh.size)]
        if rows.device.type in self._device_collectives:
            packed = ops.gather_rows(as_bytes(rows), torch.cat(list(tokens_by_dst)).to(rows.device))
            received = as_bytes(out[: sum(recv_counts)])
            dist.all_to_all_single(received, packed, recv_counts, send_counts, group=self._group)
            return lambda _: None
        table = as_bytes(rows.cpu())
        target = out if out.device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype)
        landing = as_bytes(target)[: sum(recv_counts)].split(recv_counts)
        memory = {peer for peer in self._shared.peers if headers[peer].in_memory}
        batch = self.mesh.batch(ROWS_PHASE, "rows")
        for peer in self.mesh.peers(-1):
            if peer not in memory:
                batch.recv(peer, landing[peer].view(-1))
        by_socket = self.mesh.peers(1)
        if headers[rank].in_memory:
            self._shared.table(rank, *table.shape).copy_(table)
            by_socket = [peer for peer in by_socket if peer not in self._shared.peers]
        # Rows for one peer are on their way while those for the next are being packed.
        parts = self._staging.rows(sum(send_counts[peer] for peer in by_socket), table.shape[1])
        for peer, part in zip(by_socket, parts.split([send_counts[peer] for peer in by_socket]), strict=True):
            batch.send(peer, ops.gather_rows(table, tokens_by_dst[peer], out=part).view(-1))

        def finish(src_idx: torch.Tensor) -> None:
            batch.wait()
            for source, picked in enumerate(src_idx.split(recv_counts)):
                if source == rank:
                    ops.gather_rows(table, picked, out=landing[source])
                elif source in memory:
                    lain = self._shared.table(source, headers[source].num_tokens, table.shape[1])
                    ops.gather_rows(lain, picked, out=landing[source])
            if target is not out:
                out.copy_(target)

        return finish

    def _finish_dispatch(
        self,
        request: DispatchRequest,
        headers: dict[int, Header],
        in_rank: torch.Tensor,
        recv_counts: list[int],
        metadata: Metadata,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
    ) -> DispatchResult:
        rank, num_ranks = self.mesh.rank, self.mesh.size
        per_expert = cast(torch.Tensor, request.num_tokens_per_expert).cpu()
        num_local = num_local_experts(per_expert.shape[0], num_ranks, rank)
        first = first_local_expert(per_expert.shape[0], num_ranks, rank)
        counts = torch.stack([blob[: 4 * num_local].clone().view(torch.int32) for blob in metadata.blobs]).sum(0)
        topk_idx = topk_weights = None
        if request.topk_idx is not None:
            topk_idx, topk_weights = metadata.fields["topk_idx"], metadata.fields["topk_weights"]
            local = (topk_idx >= first) & (topk_idx < first + num_local)
            topk_idx = _padded(torch.where(local, topk_idx - first, -1), rows.shape[0], fill=-1).to(rows.device)
            topk_weights = _padded(torch.where(local, topk_weights, 0.0), rows.shape[0]).to(rows.device)
        facts = handles.DispatchFacts(
            topology=self.topology,
            in_rank=in_rank,
            counts=torch.tensor([headers[source].send_counts for source in range(num_ranks)], dtype=torch.int64),
            src_idx=metadata.fields["src_idx"][:, 0],
            src_num_tokens=[headers[source].num_tokens for source in range(num_ranks)],
            num_rows=rows.shape[0],
            num_channels=request.num_channels,
        )
        if self.topology.num_nodes == 1:
            handle = handles.build_intranode(facts)
        else:
            nodes = [headers[source].node_counts[: self.topology.num_nodes] for source in range(num_ranks)]
            landings = [
                metadata.blobs[source][4 * num_local :].clone().view(torch.int32).view(-1, 1 + self.topology.domain)
                for source in range(self.topology.index_in_node, num_ranks, self.topology.domain)
            ]
            handle = handles.build_internode(
                facts, torch.tensor(nodes, dtype=torch.int64), metadata.fields["in_rank"].bool(), landings
            )
        handle = tuple(tensor.to(rows.device) for tensor in handle)
        return DispatchResult(rows, scales, topk_idx, topk_weights, counts.tolist(), handle)

    # Combine.

    def combine(
        self,
        rows: torch.Tensor,
        topk_weights: torch.Tensor | None,
        bias: Sequence[torch.Tensor],
        route: Any,
        num_sms: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Send rows [num_rows, H] back to where their tokens came from and sum them there.

        Returns:
            rows [T, H] and, if given, the weights [T, K] summed over the ranks.
        """
        num_ranks = self.mesh.size
        header = Header(
            "combine",
            num_ranks,
            {
                "dtype": dtype_code(rows.dtype),
                "row_bytes": rows.shape[1] * rows.element_size(),
                "num_topk": 0 if topk_weights is None else topk_weights.shape[1],
                "with_topk_weights": int(topk_weights is not None),
            },
            num_tokens=route.num_tokens,
            send_counts=route.recv_counts,
            expected=route.send_counts,
            in_memory=self._reserve(rows, route.num_recv - route.recv_counts[self.mesh.rank]),
        )
        headers, _ = protocol.agree(self.mesh, header)
        slots = route.ordinals().to(rows.device)
        combined_weights = None
        if topk_weights is not None:
            parts = self._return_rows(METADATA_PHASE, topk_weights, route, None)
            combined_weights = ops.reduce_rows(parts, slots)
        parts = self._return_rows(ROWS_PHASE, rows, route, headers)
        round_every = self.topology.domain if self.topology.num_nodes > 1 else 0
        combined = ops.reduce_rows(parts, slots, bias=bias, round_every=round_every)
        self.traffic.add_combine(route.num_recv, rows.shape[1] * rows.element_size())
        return combined, combined_weights

    def _return_rows(
        self, phase: int, rows: torch.Tensor, route: Route, headers: dict[int, Header] | None
    ) -> list[torch.Tensor]:
        """What each rank sends back of this rank's tokens, in the order in which they went there.

        With ``headers`` the parts may lie in memory that the next operation uses again.
        """
        rank = self.mesh.rank
        own = rows[: route.num_recv].split(route.recv_counts)
        width, row_bytes = rows.shape[1], rows.shape[1] * rows.element_size()
        if rows.device.type in self._device_collectives:
            landing = rows.new_empty((sum(route.send_counts), width))
            sent = as_bytes(rows[: route.num_recv])
            dist.all_to_all_single(as_bytes(landing), sent, route.send_counts, route.recv_counts, group=self._group)
            return list(landing.split(route.send_counts))
        counts = [0 if source == rank else count for source, count in enumerate(route.send_counts)]
        size = sum(counts)
        staging = self._staging.rows(size, row_bytes) if headers else torch.empty((size, row_bytes), dtype=torch.uint8)
        transfer = Transfer(
            self.mesh, self._shared, self._staging, phase, headers or {}, row_bytes, list(staging.split(counts))
        )
        parts = transfer.outgoing()
        for peer in self.mesh.peers(1):
            sent = as_bytes(own[peer].cpu())
            if transfer.in_memory(peer):
                sent = parts[peer].copy_(sent)
            transfer.send(peer, sent)
        received = [part.view(-1).view(rows.dtype).view(-1, width).to(rows.device) for part in transfer.wait()]
        received[rank] = own[rank]
        return received


def _check_capacity(operation: str, headers: dict[int, Header]) -> None:
    for receiver, header in headers.items():
        total = sum(sender.send_counts[receiver] for sender in headers.values())
        if header.capacity and total > header.capacity:
            raise BufferOverflow(
                f"{operation}: rank {receiver} would receive {total} tokens but num_worst_tokens is {header.capacity}; "
                f"pass at least {total} (tokens of a rank x ranks is always enough)"
            )


def _padded(tensor: torch.Tensor, num_rows: int, *, fill: float = 0) -> torch.Tensor:
    """``tensor`` with rows of ``fill`` appended up to ``num_rows``."""
    if tensor.shape[0] == num_rows:
        return tensor
    out = tensor.new_full((num_rows, *tensor.shape[1:]), fill)
    out[: tensor.shape[0]] = tensor
    return out


def _device_types_of(group: dist.ProcessGroup | None) -> frozenset[str]:
    """Device types that the caller's group reaches with a backend better than staging through the host."""
    if group is None or dist.get_world_size(group) == 1:
        return frozenset()
    pairs = [entry.partition(":") for entry in dist.get_backend_config(group).split(",")]
    return frozenset(device for device, _, backend in pairs if device != "cpu" and backend not in ("gloo", "fake"))
