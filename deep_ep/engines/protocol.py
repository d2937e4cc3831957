"""The header that every portable operation starts with: ranks tell each other what they are about to do.

It carries the counts, which the operation needs anyway, and a signature, which turns a disagreement between ranks
(another shape, another operation, a handle of another step, arguments that one rank refused) into the same typed
error on every rank instead of a hang or garbage.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError, PeerError
from .mesh import Mesh

OPERATIONS = ("dispatch", "combine", "low_latency_dispatch", "low_latency_combine")
HEADER_PHASE, METADATA_PHASE, ROWS_PHASE = 0, 1, 2

_SIGNATURE_FIELDS = (
    "dtype",
    "row_bytes",
    "scales_per_token",
    "scales_dtype",
    "num_topk",
    "topk_idx_bytes",
    "with_topk_weights",
    "num_experts",
    "cached",
    "num_max_dispatch_tokens_per_rank",
    "options",
)
_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_TEXT_WORDS = 64
UNKNOWN = -1


def dtype_code(dtype: torch.dtype | None) -> int:
    """A number for a dtype that is the same in every process; 0 for None."""
    return 0 if dtype is None else zlib.crc32(str(dtype).encode())


def _describe(name: str, value: int) -> str:
    if name in ("dtype", "scales_dtype"):
        known = {dtype_code(dtype): str(dtype) for dtype in _DTYPES}
        return f"{name}={known.get(value, 'none' if value == 0 else 'another')}"
    return f"{name}={value}"


@dataclass
class Header:
    """What one rank tells all others at the start of an operation.

    Attributes:
        operation: one of `OPERATIONS`.
        signature: values that must be equal on all ranks, by the names of `_SIGNATURE_FIELDS`; missing ones are 0.
        num_tokens: T of this rank.
        capacity: rows that this rank can take (``num_worst_tokens``), 0 for any number.
        send_counts: rows that this rank sends to each rank.
        expected: rows that this rank expects from each rank, `UNKNOWN` where it has no handle to tell.
        node_counts: rows that this rank sends into each node, padded with 0 to the number of ranks.
        payload_bytes: bytes that this rank sends to each rank where rows have no fixed size.
        in_memory: this rank's rows lie in its shared memory file for the ranks that map it.
        refusal: why this rank gave the operation up, empty if it did not.
    """

    operation: str
    num_ranks: int
    signature: dict[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    capacity: int = 0
    send_counts: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)
    node_counts: list[int] = field(default_factory=list)
    payload_bytes: list[int] = field(default_factory=list)
    in_memory: bool = False
    refusal: str = ""

    def pack(self) -> torch.Tensor:
        """int64 [size that depends on the number of ranks alone]."""
        text = self.refusal.encode()[: _TEXT_WORDS * 8].ljust(_TEXT_WORDS * 8, b"\0")
        num_ranks = self.num_ranks
        words = [OPERATIONS.index(self.operation), int(bool(self.refusal)), self.num_tokens, self.capacity]
        words.append(int(self.in_memory))
        words += [self.signature.get(name, 0) for name in _SIGNATURE_FIELDS]
        words += (self.send_counts or [0] * num_ranks) + (self.expected or [UNKNOWN] * num_ranks)
        words += self.node_counts + [0] * (num_ranks - len(self.node_counts))
        words += self.payload_bytes or [0] * num_ranks
        packed = torch.frombuffer(bytearray(text), dtype=torch.int64)
        return torch.cat([torch.tensor(words, dtype=torch.int64), packed])

    @staticmethod
    def unpack(message: torch.Tensor, num_ranks: int) -> Header:
        text = message[-_TEXT_WORDS:].contiguous().numpy().tobytes().rstrip(b"\0").decode(errors="replace")
        words = message[:-_TEXT_WORDS].tolist()
        lists = words[5 + len(_SIGNATURE_FIELDS) :]
        return Header(
            operation=OPERATIONS[words[0]],
            num_ranks=num_ranks,
            signature=dict(zip(_SIGNATURE_FIELDS, words[5:], strict=False)),
            num_tokens=words[2],
            capacity=words[3],
            in_memory=bool(words[4]),
            send_counts=lists[:num_ranks],
            expected=lists[num_ranks : 2 * num_ranks],
            node_counts=lists[2 * num_ranks : 3 * num_ranks],
            payload_bytes=lists[3 * num_ranks :],
            refusal=text if words[1] else "",
        )


def refuse(mesh: Mesh, operation: str, error: Exception) -> None:
    """Tell the peers that this rank gives ``operation`` up, and wait for nobody."""
    mesh.begin(operation)
    reason = f"{type(error).__name__}: {error}"
    message = Header(operation, mesh.size, refusal=reason).pack()
    for peer in range(mesh.size):
        if peer != mesh.rank:
            mesh.post(HEADER_PHASE, peer, message)


def agree(
    mesh: Mesh, mine: Header, *, peers: list[int] | None = None, mask_after_s: float = 0.0
) -> tuple[dict[int, Header], list[int]]:
    """Begin an operation: exchange headers and check that they fit together.

    Args:
        peers: ranks that take part besides this one; all by default.
        mask_after_s: above 0, the operation's deadline in seconds, and lost peers are reported instead of raised.

    Returns:
        headers by rank, and the peers lost.

    Raises:
        PeerError: a peer refused the operation or is in another one.
        ConfigError: ranks disagree about shapes, or a handle expects other counts than the peers send.
        CommTimeout: a peer did not come.
    """
    mesh.begin(mine.operation, mask_after_s)
    others = [rank for rank in range(mesh.size) if rank != mesh.rank] if peers is None else peers
    messages, lost = mesh.all_gather(
        HEADER_PHASE, "header", mine.pack(), others, lambda message: bool(message[1]), tolerate=mask_after_s > 0
    )
    headers = {rank: Header.unpack(message, mesh.size) for rank, message in sorted(messages.items())}
    _check_headers(headers, mesh.rank)
    return headers, lost


def _check_headers(headers: dict[int, Header], rank: int) -> None:
    """Every rank sees the same headers and applies the same rules, so all raise or none does."""
    mine = headers[rank]
    for peer, header in headers.items():
        if header.refusal:
            raise PeerError(
                f"{mine.operation}: rank {peer} gave the operation up because of its own arguments: {header.refusal}",
                operation=mine.operation,
                peer=peer,
            )
    first_rank, first = next(iter(headers.items()))
    for peer, header in headers.items():
        if header.operation != first.operation:
            raise PeerError(
                f"{mine.operation}: rank {first_rank} is in {first.operation} while rank {peer} is in "
                f"{header.operation}; all ranks must call the same operations in the same order",
                operation=mine.operation,
                peer=peer,
            )
    for peer, header in headers.items():
        different = [name for name in _SIGNATURE_FIELDS if header.signature[name] != first.signature[name]]
        if different:
            here = ", ".join(_describe(name, first.signature[name]) for name in different)
            there = ", ".join(_describe(name, header.signature[name]) for name in different)
            raise ConfigError(
                f"{mine.operation}: rank {first_rank} has {here} but rank {peer} has {there}; these must be equal on "
                "all ranks"
            )
    for sender, header in headers.items():
        for receiver, other in headers.items():
            sent, expected = header.send_counts[receiver], other.expected[sender]
            if expected not in (UNKNOWN, sent):
                raise ConfigError(
                    f"{mine.operation}: by its handle rank {sender} sends {sent} rows to rank {receiver}, which "
                    f"expects {expected} by its own; pass on every rank the handle of the same dispatch"
                )
