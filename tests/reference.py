"""Dense single-process reference of dispatch and combine, written from the interface alone.

Everything takes the inputs of all ranks (lists by rank) and yields the outputs of all ranks. Plain loops and torch
indexing, nothing shared with the library: where both agree bit for bit, both follow the same text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

# ---------------------------------------------------------------------------------------------------------------
# Placement and layout


def experts_of_rank(num_experts: int, num_ranks: int) -> list[range]:
    """Contiguous ranges; the first `num_experts % num_ranks` ranks own one expert more."""
    ranges, start = [], 0
    for rank in range(num_ranks):
        size = num_experts // num_ranks + (1 if rank < num_experts % num_ranks else 0)
        ranges.append(range(start, start + size))
        start += size
    return ranges


def rank_of_expert(num_experts: int, num_ranks: int) -> list[int]:
    return [rank for rank, owned in enumerate(experts_of_rank(num_experts, num_ranks)) for _ in owned]


@dataclasses.dataclass
class Layout:
    num_tokens_per_rank: torch.Tensor  # [R] int32
    num_tokens_per_rdma_rank: torch.Tensor | None  # [N] int32, None on one node
    num_tokens_per_expert: torch.Tensor  # [E] int32
    is_token_in_rank: torch.Tensor  # [T, R] bool


def layout(topk_idx: torch.Tensor, num_experts: int, num_ranks: int, domain: int | None = None) -> Layout:
    """`domain`: ranks per node (None: one node)."""
    owner = rank_of_expert(num_experts, num_ranks)
    domain = num_ranks if domain is None else domain
    num_nodes = num_ranks // domain
    per_rank = [0] * num_ranks
    per_node = [0] * num_nodes
    per_expert = [0] * num_experts
    in_rank = torch.zeros(topk_idx.size(0), num_ranks, dtype=torch.bool)
    for token, row in enumerate(topk_idx.tolist()):
        experts = [e for e in row if e >= 0]
        for expert in experts:
            per_expert[expert] += 1
        for rank in {owner[e] for e in experts}:
            per_rank[rank] += 1
            in_rank[token, rank] = True
        for node in {owner[e] // domain for e in experts}:
            per_node[node] += 1

    def as_i32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return Layout(as_i32(per_rank), as_i32(per_node) if num_nodes > 1 else None, as_i32(per_expert), in_rank)


# ---------------------------------------------------------------------------------------------------------------
# Normal mode


@dataclasses.dataclass
class Routes:
    """Where every received row comes from: `sources[rank]` = list of (source rank, source token), in receive order."""

    sources: list[list[tuple[int, int]]]
    num_tokens: list[int]

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    def num_recv(self, rank: int) -> int:
        return len(self.sources[rank])

    def row_of(self, rank: int) -> dict[tuple[int, int], int]:
        return {source: row for row, source in enumerate(self.sources[rank])}


def routes(is_token_in_rank: Sequence[torch.Tensor]) -> Routes:
    num_ranks = len(is_token_in_rank)
    sources = [
        [(src, int(token)) for src in range(num_ranks) for token in is_token_in_rank[src][:, dst].nonzero().flatten()]
        for dst in range(num_ranks)
    ]
    return Routes(sources, [mask.size(0) for mask in is_token_in_rank])


def gather(parts: Sequence[torch.Tensor], route: Routes, rank: int) -> torch.Tensor:
    """Rows of `parts` (by source rank) as `rank` receives them; contiguous; bytes untouched."""
    sample = parts[0]
    out = torch.zeros((route.num_recv(rank), *sample.shape[1:]), dtype=sample.dtype)
    raw = out.view(torch.uint8) if out.numel() else out
    for row, (src, token) in enumerate(route.sources[rank]):
        if raw.numel():
            raw[row] = parts[src][token].clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return out


def recv_topk(
    topk_idx: Sequence[torch.Tensor], topk_weights: Sequence[torch.Tensor], route: Routes, num_experts: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Local expert indices (-1 elsewhere, dtype as given) and weights (0.0 elsewhere) of the received rows."""
    own = experts_of_rank(num_experts, route.num_ranks)[rank]
    idx, weights = gather(topk_idx, route, rank), gather(topk_weights, route, rank)
    mine = (idx >= own.start) & (idx < own.stop)
    return torch.where(mine, idx - own.start, torch.full_like(idx, -1)), torch.where(mine, weights, torch.zeros(()))


def counts_list(recv_idx: torch.Tensor, num_local: int, alignment: int = 1) -> list[int]:
    """Received (token, k) pairs per local expert, rounded up to `alignment`."""
    counts = [int((recv_idx == e).sum()) for e in range(num_local)]
    return [-(-count // alignment) * alignment for count in counts]


def rank_prefix_matrix(route: Routes) -> torch.Tensor:
    """[R, R] int32: entry (i, j) = rows that ranks 0..i send to rank j."""
    num_ranks = route.num_ranks
    matrix = torch.zeros(num_ranks, num_ranks, dtype=torch.int32)
    for dst in range(num_ranks):
        for i in range(num_ranks):
            matrix[i, dst] = sum(1 for src, _ in route.sources[dst] if src <= i)
    return matrix


def combine(
    rows: Sequence[torch.Tensor], route: Routes, home: int, bias: Sequence[torch.Tensor] = (), domain: int | None = None
) -> torch.Tensor:
    """Sum at `home`, [T, H] in the rows' dtype.

    FP32: +0.0, each bias in order, then the ranks' rows in rank order, one rounding. On several nodes a node's rows
    are summed in FP32 and rounded to the rows' dtype first, and the rounded sums are added in node order.
    """
    dtype = rows[0].dtype
    num_ranks = route.num_ranks
    positions = [route.row_of(rank) for rank in range(num_ranks)]
    num_tokens, hidden = route.num_tokens[home], rows[0].size(1)
    out = torch.zeros(num_tokens, hidden, dtype=torch.float32)
    nodes = (
        [range(num_ranks)]
        if domain is None or domain == num_ranks
        else [range(first, first + domain) for first in range(0, num_ranks, domain)]
    )
    for token in range(num_tokens):
        acc = torch.zeros(hidden, dtype=torch.float32)
        for b in bias:
            acc = acc + b[token].float()
        for node in nodes:
            present = [positions[r][home, token] for r in node if (home, token) in positions[r]]
            ranks = [r for r in node if (home, token) in positions[r]]
            if len(nodes) == 1:
                for rank, row in zip(ranks, present, strict=True):
                    acc = acc + rows[rank][row].float()
            elif ranks:
                partial = torch.zeros(hidden, dtype=torch.float32)
                for rank, row in zip(ranks, present, strict=True):
                    partial = partial + rows[rank][row].float()
                acc = acc + partial.to(dtype).float()
        out[token] = acc
    return out.to(dtype)


def combine_weights(weights: Sequence[torch.Tensor], route: Routes, home: int) -> torch.Tensor:
    """Sum of the received rows' weights per (token, k), FP32, rank order."""
    out = torch.zeros(route.num_tokens[home], weights[0].size(1), dtype=torch.float32)
    for rank in range(route.num_ranks):
        for row, (src, token) in enumerate(route.sources[rank]):
            if src == home:
                out[token] += weights[rank][row]
    return out


# ---------------------------------------------------------------------------------------------------------------
# FP8 (E4M3, 1x128 tiles)


def _e4m3_values() -> torch.Tensor:
    """The 127 finite non-negative values by their code 0..126, float64 (code 127 is NaN)."""
    values = []
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return torch.tensor(values, dtype=torch.float64)


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3, ties to the even code, saturating at 448; NaN stays NaN. Codes by search in the table of values."""
    table = _e4m3_values()
    middle = (table[1:] + table[:-1]) / 2
    magnitude = values.double().abs().nan_to_num(nan=0.0, posinf=448.0).clamp(max=448.0)
    code = torch.searchsorted(middle, magnitude)  # number of midpoints below the value
    tie = (code < middle.numel()) & (middle[code.clamp(max=middle.numel() - 1)] == magnitude)
    code = torch.where(tie & (code % 2 == 1), code + 1, code)
    code = torch.where(values.isnan(), torch.full_like(code, 127), code)
    code = code + 128 * torch.signbit(values)
    return code.to(torch.uint8).view(torch.float8_e4m3fn)


def quantize_1x128(x: torch.Tensor, scale_format: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """`x` [T, H] -> (E4M3 [T, H], scales): float32 [T, ceil(H/128)] for "fp32" and "pow2", packed int32 for "ue8m0".

    amax of a tile ignores NaN and is at least 1e-4; scale = amax / 448 and the factor 448 / amax are FP32 divisions.
    Power-of-two scales round the FP32 quotient up to the next power of two; their factor is exactly 1 / scale.
    """
    num_tokens, hidden = x.shape
    num_tiles = -(-hidden // 128)
    padded = torch.zeros(num_tokens, num_tiles * 128, dtype=torch.float32)
    padded[:, :hidden] = x.float()
    tiles = padded.view(num_tokens, num_tiles, 128)
    amax = tiles.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(dim=2) if num_tokens else torch.zeros(0, num_tiles)
    amax = amax.clamp(min=torch.tensor(1e-4, dtype=torch.float32))
    scale = amax / torch.tensor(448.0)
    factor = torch.tensor(448.0) / amax
    if scale_format != "fp32":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        log2 = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scale = torch.pow(2.0, log2.double()).float()
        factor = torch.pow(2.0, -log2.double()).float()
        if scale_format == "ue8m0":
            num_words = -(-num_tiles // 4)
            octets = torch.zeros(num_tokens, num_words * 4, dtype=torch.int64)
            octets[:, :num_tiles] = log2 + 127
            words = octets.view(num_tokens, num_words, 4)
            packed = words[..., 0] | words[..., 1] << 8 | words[..., 2] << 16 | words[..., 3] << 24
            packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    q = to_e4m3((tiles * factor[..., None]).view(num_tokens, num_tiles * 128)[:, :hidden].contiguous())
    return q, packed if scale_format == "ue8m0" else scale


def dequantize_1x128(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """FP32 value of every element of [..., H]."""
    hidden = q.size(-1)
    if scales.dtype == torch.int32:
        octets = torch.stack([(scales >> shift) & 255 for shift in (0, 8, 16, 24)], dim=-1).flatten(-2)
        scales = torch.pow(2.0, octets.double() - 127).float()
    return q.float() * scales.repeat_interleave(128, dim=-1)[..., :hidden]


def scale_format_of(round_scale: bool, use_ue8m0: bool) -> str:
    return "ue8m0" if use_ue8m0 else "pow2" if round_scale else "fp32"


# ---------------------------------------------------------------------------------------------------------------
# Low-latency mode


@dataclasses.dataclass
class LowLatencyRows:
    """One local expert: its valid rows' sources in order, and each source rank's (begin row, count)."""

    sources: list[tuple[int, int]]
    ranges: list[tuple[int, int]]


def low_latency_rows(
    topk_idx: Sequence[torch.Tensor], num_experts: int, rank: int, masked: Sequence[int] = ()
) -> list[LowLatencyRows]:
    """Per local expert of `rank`: rows from 0 in (source rank, source token) order; masked ranks send nothing."""
    experts = []
    for expert in experts_of_rank(num_experts, len(topk_idx))[rank]:
        sources: list[tuple[int, int]] = []
        ranges = []
        for src, idx in enumerate(topk_idx):
            tokens = [] if src in masked else [t for t, row in enumerate(idx.tolist()) if expert in row]
            ranges.append((len(sources), len(tokens)))
            sources += [(src, token) for token in tokens]
        experts.append(LowLatencyRows(sources, ranges))
    return experts


def low_latency_combine(
    rows: Sequence[torch.Tensor],
    topk_idx: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor],
    num_experts: int,
    home: int,
    sum_at_home: bool = False,
    masked: Sequence[int] = (),
) -> torch.Tensor:
    """`rows[rank]` [L, slots, H] bf16 -> [T, H] bf16 at `home`.

    By default a rank sums what its own experts made of a token (FP32, k order, product rounded before the sum), rounds
    to bf16, and home adds the rank sums in FP32 in rank order. With `sum_at_home` it is one FP32 sum in k order.
    """
    num_ranks = len(rows)
    owner = rank_of_expert(num_experts, num_ranks)
    owned = experts_of_rank(num_experts, num_ranks)
    position: dict[tuple[int, int], tuple[int, int, int]] = {}
    for rank in range(num_ranks):
        for local, packed in enumerate(low_latency_rows(topk_idx, num_experts, rank)):
            for row, (src, token) in enumerate(packed.sources):
                if src == home:
                    position[token, owned[rank].start + local] = (rank, local, row)
    hidden = rows[0].size(-1)
    out = torch.zeros(topk_idx[home].size(0), hidden, dtype=torch.bfloat16)
    for token, experts in enumerate(topk_idx[home].tolist()):
        home_sum = torch.zeros(hidden, dtype=torch.float32)
        partial: dict[int, torch.Tensor] = {}
        for k, expert in enumerate(experts):
            if expert < 0 or owner[expert] in masked:
                continue
            rank, local, row = position[token, expert]
            term = rows[rank][local, row].float() * topk_weights[home][token, k]
            if sum_at_home:
                home_sum = home_sum + term
            else:
                partial[rank] = partial.get(rank, torch.zeros(hidden)) + term
        for rank in sorted(partial):
            home_sum = home_sum + partial[rank].bfloat16().float()
        out[token] = home_sum.bfloat16()
    return out


def low_latency_size_hint(max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes of the low-latency buffer as the published formula gives them."""
    tiles = hidden // 128
    dispatch_row = 16 + max(2 * hidden, hidden + 4 * tiles)
    combine_row = 4 * tiles + 2 * hidden
    send = max(max_tokens * dispatch_row, num_experts * max_tokens * combine_row)
    recv = num_experts * max_tokens * max(dispatch_row, combine_row)
    signal = -(-4 * num_experts // 128) * 128
    total = 2 * (send + recv + signal)
    return (total + 128) // 128 * 128
