"""Low-latency dispatch and combine on the portable engine.

A token goes once to each rank that owns one of its experts, and is fanned out there to its experts' rows, in (source
rank, source token) order. Combine sends one row for each (token, expert) home, together with the token's index. The
messages of an operation are exchanged in the call; outputs are written by `finish`, which is the receive hook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import fp8, logfmt, ops
from ..errors import ConfigError
from ..layout import first_local_expert, num_local_experts, token_in_rank
from . import protocol
from .portable import PortableEngine
from .protocol import ROWS_PHASE, Header, dtype_code
from .transfer import as_bytes, split_records

_MARK_DTYPE = torch.int32


@dataclass(slots=True, eq=False)
class LowLatencyDispatch:
    """Checked arguments of one low-latency dispatch.

    Attributes:
        topk_weights: None where they come with the combine only. Sums at home, as here, need them no earlier.
        scale_format: None for bf16 rows, else as in `deep_ep.fp8`.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    num_max_tokens: int
    num_experts: int
    scale_format: fp8.ScaleFormat | None
    recv_stats: torch.Tensor | None
    wait_stats: torch.Tensor | None


@dataclass(slots=True, eq=False)
class LowLatencyOutput:
    """Tensors of a low-latency dispatch, written by its `finish`."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    count: torch.Tensor
    src_info: torch.Tensor
    layout_range: torch.Tensor


@dataclass(slots=True, eq=False)
class LowLatencyCombine:
    """Checked arguments of one low-latency combine."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    src_info: torch.Tensor
    layout_range: torch.Tensor
    num_max_tokens: int
    num_experts: int
    use_logfmt: bool
    sum_at_home: bool
    out: torch.Tensor
    wait_stats: torch.Tensor | None


def dispatch(
    engine: PortableEngine, request: LowLatencyDispatch, masked: set[int], mask_after_s: float
) -> tuple[LowLatencyOutput, Callable[[], None]]:
    """Exchange the tokens.

    Args:
        masked: ranks that are left out.
        mask_after_s: above 0, ranks that are lost, or have not come after so many seconds, are added to ``masked``.

    Returns:
        the outputs, and the function that writes them.
    """
    mesh, num_experts, device = engine.mesh, request.num_experts, request.x.device
    num_ranks, rank = mesh.size, mesh.rank
    rows, scales = request.x, None
    if request.scale_format is not None:
        rows, scales = fp8.quantize_1x128(rows, scale_format=request.scale_format)
    topk_idx = request.topk_idx.cpu().to(_MARK_DTYPE)
    in_rank = token_in_rank(topk_idx, num_experts, num_ranks)
    in_rank[:, sorted(masked)] = False
    tokens = torch.arange(rows.shape[0], dtype=_MARK_DTYPE)[:, None]
    fields = [rows.cpu(), topk_idx, tokens] if scales is None else [rows.cpu(), scales.cpu(), topk_idx, tokens]
    table = torch.cat([as_bytes(field) for field in fields], dim=1)

    signature = {
        "dtype": dtype_code(rows.dtype),
        "row_bytes": table.shape[1],
        "scales_dtype": dtype_code(None if scales is None else scales.dtype),
        "num_topk": topk_idx.shape[1],
        "with_topk_weights": int(request.topk_weights is not None),
        "num_experts": num_experts,
        "num_max_dispatch_tokens_per_rank": request.num_max_tokens,
    }
    send_counts = in_rank.sum(0).tolist()
    header = Header("low_latency_dispatch", num_ranks, signature, num_tokens=rows.shape[0], send_counts=send_counts)
    peers = [peer for peer in range(num_ranks) if peer != rank and peer not in masked]
    headers, lost = protocol.agree(mesh, header, peers=peers, mask_after_s=mask_after_s)
    sends: list[torch.Tensor | None] = [None] * num_ranks
    recvs: list[torch.Tensor | None] = [None] * num_ranks
    for peer in headers:
        sends[peer] = ops.gather_rows(table, in_rank[:, peer].nonzero()[:, 0])
        recvs[peer] = torch.empty((headers[peer].send_counts[rank], table.shape[1]), dtype=torch.uint8)
    recvs[rank] = sends[rank]
    lost += mesh.exchange(ROWS_PHASE, "rows", sends, recvs, tolerate=mask_after_s > 0)
    masked.update(lost)
    engine.traffic.add_dispatch(
        sum(send_counts),
        as_bytes(rows[:1]).shape[1] + (0 if scales is None else 4 * scales.shape[1]),
        str(rows.dtype).removeprefix("torch."),
    )
    blocks = [
        torch.empty((0, table.shape[1]), dtype=torch.uint8) if block is None or source in masked else block
        for source, block in enumerate(recvs)
    ]

    num_local = num_local_experts(num_experts, num_ranks, rank)
    capacity = num_ranks * request.num_max_tokens
    output = LowLatencyOutput(
        rows=torch.zeros((num_local, capacity, rows.shape[1]), dtype=rows.dtype, device=device),
        # Stored with tokens innermost, the order in which grouped GEMMs fetch scales.
        scales=None
        if scales is None
        else torch.zeros((num_local, scales.shape[1], capacity), dtype=scales.dtype, device=device).transpose(1, 2),
        count=torch.zeros(num_local, dtype=torch.int32, device=device),
        src_info=torch.full((num_local, capacity), -1, dtype=torch.int32, device=device),
        layout_range=torch.zeros((num_local, num_ranks), dtype=torch.int64, device=device),
    )
    waits = torch.tensor(mesh.last_wait_ns, dtype=torch.int64)

    def finish() -> None:
        _fan_out(blocks, fields, first_local_expert(num_experts, num_ranks, rank), output)
        if request.recv_stats is not None:
            request.recv_stats.add_(output.count)
        if request.wait_stats is not None:
            request.wait_stats.add_(waits.to(request.wait_stats.device))

    return output, finish


def _fan_out(
    blocks: list[torch.Tensor], fields: list[torch.Tensor], first_expert: int, output: LowLatencyOutput
) -> None:
    """Write each received token to the rows of its local experts."""
    table = torch.cat(blocks)
    columns = split_records(table, fields)
    rows, topk_idx, tokens = columns[0], columns[-2], columns[-1][:, 0]
    num_local = output.count.shape[0]
    local = topk_idx.long() - first_expert
    # The last column collects what belongs to other ranks. A token that names an expert twice gets one row.
    hit = torch.zeros((table.shape[0], num_local + 1), dtype=torch.bool)
    hit.scatter_(1, torch.where((local >= 0) & (local < num_local), local, num_local), True)
    hit = hit[:, :num_local]
    per_source = torch.stack([part.sum(0) for part in hit.split([block.shape[0] for block in blocks])], dim=1)
    begin = per_source.cumsum(1) - per_source
    output.layout_range.copy_((begin << 32) | per_source)
    output.count.copy_(hit.sum(0))
    for expert, picked in enumerate(hit.t().nonzero()[:, 1].split(hit.sum(0).tolist())):
        count = len(picked)
        output.rows[expert, :count] = ops.gather_rows(rows, picked).to(output.rows.device)
        output.src_info[expert, :count] = tokens[picked].to(output.src_info.device)
        if output.scales is not None:
            output.scales[expert, :count] = columns[1][picked].to(output.scales.device)


def combine(
    engine: PortableEngine, request: LowLatencyCombine, masked: set[int], mask_after_s: float
) -> Callable[[], None]:
    """Send the experts' rows home. Masks are as for `dispatch`.

    Returns:
        the function that sums them into ``request.out``.
    """
    mesh = engine.mesh
    num_ranks, rank = mesh.size, mesh.rank
    hidden = request.x.shape[2]
    layout = request.layout_range.cpu()
    begins, counts = (layout >> 32).tolist(), (layout & 0xFFFFFFFF).tolist()
    x, src_info = request.x.cpu(), request.src_info.cpu()
    first = first_local_expert(request.num_experts, num_ranks, rank)
    peers = [peer for peer in range(num_ranks) if peer != rank and peer not in masked]
    marks: dict[int, torch.Tensor] = {}
    payloads: dict[int, torch.Tensor] = {}
    for dst in [rank, *peers]:
        slices = [
            (expert, slice(begins[expert][dst], begins[expert][dst] + counts[expert][dst]))
            for expert in range(x.shape[0])
        ]
        rows = torch.cat([x[expert, part] for expert, part in slices]) if slices else x.new_empty((0, hidden))
        tokens = torch.cat([src_info[expert, part] for expert, part in slices]) if slices else src_info.new_empty(0)
        experts = torch.repeat_interleave(
            torch.tensor([first + expert for expert, _ in slices], dtype=torch.int64),
            torch.tensor([counts[expert][dst] for expert, _ in slices], dtype=torch.int64),
        )
        marks[dst] = torch.stack([tokens.long(), experts], dim=1).to(torch.int32).contiguous()
        payloads[dst] = logfmt.encode(rows) if request.use_logfmt else as_bytes(rows.contiguous()).reshape(-1)

    signature = {
        "row_bytes": 2 * hidden,
        "num_topk": request.topk_idx.shape[1],
        "num_experts": request.num_experts,
        "num_max_dispatch_tokens_per_rank": request.num_max_tokens,
        "options": int(request.use_logfmt),
    }
    header = Header(
        "low_latency_combine",
        num_ranks,
        signature,
        num_tokens=request.topk_idx.shape[0],
        send_counts=[len(marks[dst]) if dst in marks else 0 for dst in range(num_ranks)],
        payload_bytes=[payloads[dst].numel() if dst in payloads else 0 for dst in range(num_ranks)],
    )
    headers, lost = protocol.agree(mesh, header, peers=peers, mask_after_s=mask_after_s)
    sends: list[torch.Tensor | None] = [None] * num_ranks
    recvs: list[torch.Tensor | None] = [None] * num_ranks
    for peer in headers:
        sends[peer] = torch.cat([as_bytes(marks[peer]).reshape(-1), payloads[peer]])
        size = 8 * headers[peer].send_counts[rank] + headers[peer].payload_bytes[rank]
        recvs[peer] = torch.empty(size, dtype=torch.uint8)
    recvs[rank] = sends[rank]
    lost += mesh.exchange(ROWS_PHASE, "rows", sends, recvs, tolerate=mask_after_s > 0)
    masked.update(lost)
    engine.traffic.add_combine(sum(header.send_counts), 2 * hidden)
    landed = {
        source: (message, headers[source].send_counts[rank])
        for source, message in enumerate(recvs)
        if message is not None and source not in masked
    }
    waits = torch.tensor(mesh.last_wait_ns, dtype=torch.int64)

    def finish() -> None:
        _sum_at_home(request, landed, num_ranks, masked)
        if request.wait_stats is not None:
            request.wait_stats.add_(waits.to(request.wait_stats.device))

    return finish


def _sum_at_home(
    request: LowLatencyCombine, landed: dict[int, tuple[torch.Tensor, int]], num_ranks: int, masked: set[int]
) -> None:
    """Weighted sum of what came back, in the fixed order that both engines share."""
    num_tokens, num_topk = request.topk_idx.shape
    hidden, num_experts = request.x.shape[2], request.num_experts
    marks, rows = [], []
    for _, (message, count) in sorted(landed.items()):
        marks.append(message[: 8 * count].clone().view(torch.int32).view(count, 2))
        payload = message[8 * count :]
        decoded = logfmt.decode(payload, count, hidden) if request.use_logfmt else payload.clone().view(torch.bfloat16)
        rows.append(decoded.view(count, hidden))
    mark, landing = torch.cat(marks).long(), torch.cat(rows)
    # Where the row of (token, expert) landed.
    lookup = torch.full((num_tokens * num_experts + 1,), -1, dtype=torch.int32)
    lookup[mark[:, 0] * num_experts + mark[:, 1]] = torch.arange(len(mark), dtype=torch.int32)
    topk_idx = request.topk_idx.cpu().long()
    key = torch.arange(num_tokens)[:, None] * num_experts + topk_idx
    slots = lookup[torch.where(topk_idx >= 0, key, -1)]
    owner = torch.cat(
        [torch.full((num_local_experts(num_experts, num_ranks, r),), r, dtype=torch.int64) for r in range(num_ranks)]
    )
    owners = torch.where(topk_idx >= 0, owner[topk_idx.clamp(min=0)], -1)
    missing = (slots < 0) & (topk_idx >= 0)
    for peer in masked:
        missing &= owners != peer
    if bool(missing.any()):
        token, k = (int(i) for i in missing.nonzero()[0])
        raise ConfigError(
            f"low_latency_combine: topk_idx[{token}, {k}] is {int(topk_idx[token, k])}, but no row of that expert "
            "came back for this token; pass the topk_idx of the handle's dispatch (entries may be set to -1)"
        )
    weights = request.topk_weights.cpu()
    if not request.sum_at_home:
        # A column for each (rank, k): every rank's partial sum is rounded, then the partials are added in rank order.
        by_rank = owners[:, None, :] == torch.arange(num_ranks)[None, :, None]
        slots = torch.where(by_rank, slots[:, None, :], -1).view(num_tokens, num_ranks * num_topk)
        weights = weights[:, None, :].expand(-1, num_ranks, -1).reshape(num_tokens, num_ranks * num_topk)
    combined = ops.reduce_rows(
        [landing], slots, weights=weights.contiguous(), round_every=0 if request.sum_at_home else num_topk
    )
    request.out.copy_(combined)
