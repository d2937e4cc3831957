"""Low-latency dispatch and combine on the portable engine.

A token goes once to each rank that owns one of its experts, and is fanned out there to its experts' rows, in (source
rank, source token) order. Combine sends one row for each (token, expert) home, together with the token's index. With
rows by source instead of by expert (``expert_major=False``) a token has one row on each of these ranks, and combine
sends one row for each (token, rank). The messages of an operation are exchanged in the call; outputs are written by
`finish`, which is the receive hook.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import fp8, logfmt, ops
from ..errors import ConfigError
from ..layout import expert_to_rank, first_local_expert, num_local_experts, token_in_rank
from . import protocol
from .portable import PortableEngine
from .protocol import ROWS_PHASE, Header, dtype_code
from .transfer import as_bytes, split_records

#: Sizes, strides in elements, and dtype.
TensorLayout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

_MARK_DTYPE = torch.int32


@dataclass(slots=True, eq=False)
class LowLatencyDispatch:
    """Checked arguments of one low-latency dispatch.

    Attributes:
        topk_weights: None where they come with the combine only. Sums at home, as here, need them no earlier; where
            rows lie by source they are outputs.
        scale_format: None for bf16 rows, else as in `deep_ep.fp8`.
        out: rows and scales to write to, None for new ones.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    num_max_tokens: int
    num_experts: int
    scale_format: fp8.ScaleFormat | None
    recv_stats: torch.Tensor | None
    wait_stats: torch.Tensor | None
    expert_major: bool = True
    out: tuple[torch.Tensor, torch.Tensor | None] | None = None


@dataclass(slots=True, eq=False)
class LowLatencyOutput:
    """Tensors of a low-latency dispatch, written by its `finish`. By source, src_info is recv_topk_idx and layout_range
    recv_topk_weights."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    count: torch.Tensor
    src_info: torch.Tensor
    layout_range: torch.Tensor


@dataclass(slots=True, eq=False)
class LowLatencyCombine:
    """Checked arguments of one low-latency combine.

    Attributes:
        topk_weights: None only where rows lie by source.
        src_info, layout_range: of the handle: recv_topk_idx and recv_topk_weights where rows lie by source.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    src_info: torch.Tensor
    layout_range: torch.Tensor
    num_max_tokens: int
    num_experts: int
    use_logfmt: bool
    sum_at_home: bool
    out: torch.Tensor
    wait_stats: torch.Tensor | None
    expert_major: bool = True


def received_layouts(
    groups: int, capacity: int, hidden: int, scale_format: fp8.ScaleFormat | None
) -> list[TensorLayout]:
    """What a dispatch returns as recv_x: the layout of its rows, and of the scales that FP8 rows have.

    Args:
        groups, capacity: local experts and rows of each; where rows lie by source, ranks and M.
    """
    shape = (groups, capacity, hidden)
    dtype = torch.bfloat16 if scale_format is None else torch.float8_e4m3fn
    layouts: list[TensorLayout] = [(shape, (capacity * hidden, hidden, 1), dtype)]
    if scale_format is not None:
        dtype, columns = fp8.scale_columns(hidden, scale_format)
        # Stored with tokens innermost, the order in which grouped GEMMs fetch scales.
        layouts.append(((groups, capacity, columns), (columns * capacity, 1, capacity), dtype))
    return layouts


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
    mesh, num_experts = engine.mesh, request.num_experts
    num_ranks, rank = mesh.size, mesh.rank
    rows, scales = request.x, None
    if request.scale_format is not None:
        rows, scales = fp8.quantize_1x128(rows, scale_format=request.scale_format)
    topk_idx = request.topk_idx.cpu().to(_MARK_DTYPE)
    in_rank = token_in_rank(topk_idx, num_experts, num_ranks)
    in_rank[:, sorted(masked)] = False
    tokens = torch.arange(rows.shape[0], dtype=_MARK_DTYPE)[:, None]
    fields = [rows.cpu(), topk_idx, tokens] if scales is None else [rows.cpu(), scales.cpu(), topk_idx, tokens]
    if not request.expert_major and request.topk_weights is not None:
        fields.insert(-2, request.topk_weights.cpu())
    table = torch.cat([as_bytes(field) for field in fields], dim=1)

    signature = {
        "dtype": dtype_code(rows.dtype),
        "row_bytes": table.shape[1],
        "scales_dtype": dtype_code(None if scales is None else scales.dtype),
        "num_topk": topk_idx.shape[1],
        "with_topk_weights": int(request.topk_weights is not None),
        "num_experts": num_experts,
        "num_max_dispatch_tokens_per_rank": request.num_max_tokens,
        "options": int(not request.expert_major),
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
    output = _empty_output(request, num_ranks, num_local)
    num_tokens = [
        headers[source].num_tokens if source in headers and source not in masked else 0 for source in range(num_ranks)
    ]
    waits = torch.tensor(mesh.last_wait_ns, dtype=torch.int64)
    first_expert = first_local_expert(num_experts, num_ranks, rank)

    def finish() -> None:
        if request.expert_major:
            _fan_out(blocks, fields, first_expert, output)
            if request.recv_stats is not None:
                request.recv_stats.add_(output.count)
        else:
            _place_by_source(blocks, fields, first_expert, num_local, output, request)
            output.count.copy_(torch.tensor(num_tokens, dtype=torch.int32))
        if request.wait_stats is not None:
            request.wait_stats.add_(waits.to(request.wait_stats.device))

    return output, finish


def _empty_output(request: LowLatencyDispatch, num_ranks: int, num_local: int) -> LowLatencyOutput:
    """Outputs, in groups of an expert's rows, or of a source's."""
    device, num_max = request.x.device, request.num_max_tokens
    if request.expert_major:
        groups, capacity = num_local, num_ranks * num_max
        src_info = torch.full((groups, capacity), -1, dtype=torch.int32, device=device)
        layout_range = torch.zeros((groups, num_ranks), dtype=torch.int64, device=device)
    else:
        groups, capacity = num_ranks, num_max
        by_selection = (groups, capacity, request.topk_idx.shape[1])
        src_info = torch.full(by_selection, -1, dtype=torch.int32, device=device)
        layout_range = torch.zeros(0 if request.topk_weights is None else by_selection, device=device)
    rows, scales = request.out or (None, None)
    if rows is None:
        made = [
            torch.empty_strided(sizes, strides, dtype=dtype, device=device).zero_()
            for sizes, strides, dtype in received_layouts(groups, capacity, request.x.shape[1], request.scale_format)
        ]
        rows, scales = made[0], made[1] if len(made) == 2 else None
    count = torch.zeros(groups, dtype=torch.int32, device=device)
    return LowLatencyOutput(rows, scales, count, src_info, layout_range)


def _place_by_source(
    blocks: list[torch.Tensor],
    fields: list[torch.Tensor],
    first_expert: int,
    num_local: int,
    output: LowLatencyOutput,
    request: LowLatencyDispatch,
) -> None:
    """Write each received token to the row of its source and number."""
    device = output.rows.device
    columns = split_records(torch.cat(blocks), fields)
    rows, local, tokens = columns[0], columns[-2].long() - first_expert, columns[-1][:, 0].long()
    local = torch.where((local >= 0) & (local < num_local), local, -1)
    sources = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor([block.shape[0] for block in blocks]))
    places = (sources.to(device), tokens.to(device))
    output.src_info[places] = local.to(torch.int32).to(device)
    # By bytes: indexing knows no FP8.
    output.rows.view(torch.uint8)[places] = as_bytes(rows).to(device)
    if output.scales is not None:
        output.scales[places] = columns[1].to(device)
    if request.topk_weights is not None:
        output.layout_range[places] = torch.where(local >= 0, columns[-3], 0.0).to(device)
    if request.recv_stats is not None:
        # A token that names an expert twice counts once.
        hit = torch.zeros((len(tokens), num_local + 1), dtype=torch.int32)
        hit.scatter_(1, torch.where(local >= 0, local, num_local), 1)
        request.recv_stats.add_(hit.sum(0, dtype=torch.int32)[:num_local].to(device))


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
    peers = [peer for peer in range(num_ranks) if peer != rank and peer not in masked]
    marks: dict[int, torch.Tensor] = {}
    payloads: dict[int, torch.Tensor] = {}
    made = _made_by_experts if request.expert_major else _made_by_rank
    for dst, (tokens, makers, rows) in made(request, [rank, *peers], num_ranks, rank).items():
        marks[dst] = torch.stack([tokens.long(), makers.long()], dim=1).to(torch.int32).contiguous()
        payloads[dst] = logfmt.encode(rows) if request.use_logfmt else as_bytes(rows.contiguous()).reshape(-1)

    signature = {
        "row_bytes": 2 * hidden,
        "num_topk": request.topk_idx.shape[1],
        "num_experts": request.num_experts,
        "num_max_dispatch_tokens_per_rank": request.num_max_tokens,
        "options": int(request.use_logfmt) + 2 * int(not request.expert_major),
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


#: By home: tokens of that home, what made a row of each (an expert, or a rank), and the rows.
_Made = dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _made_by_experts(request: LowLatencyCombine, homes: list[int], num_ranks: int, rank: int) -> _Made:
    """A row for each (token, local expert)."""
    layout = request.layout_range.cpu()
    begins, counts = (layout >> 32).tolist(), (layout & 0xFFFFFFFF).tolist()
    x, src_info = request.x.cpu(), request.src_info.cpu()
    first = first_local_expert(request.num_experts, num_ranks, rank)
    made = {}
    for dst in homes:
        slices = [
            (expert, slice(begins[expert][dst], begins[expert][dst] + counts[expert][dst]))
            for expert in range(x.shape[0])
        ]
        rows = torch.cat([x[expert, part] for expert, part in slices]) if slices else x.new_empty((0, x.shape[2]))
        tokens = torch.cat([src_info[expert, part] for expert, part in slices]) if slices else src_info.new_empty(0)
        experts = torch.repeat_interleave(
            torch.tensor([first + expert for expert, _ in slices], dtype=torch.int64),
            torch.tensor([counts[expert][dst] for expert, _ in slices], dtype=torch.int64),
        )
        made[dst] = (tokens, experts, rows)
    return made


def _made_by_rank(request: LowLatencyCombine, homes: list[int], num_ranks: int, rank: int) -> _Made:
    """A row for each token that a local expert wants."""
    x, recv_topk_idx = request.x.cpu(), request.src_info.cpu()
    made = {}
    for dst in homes:
        tokens = (recv_topk_idx[dst] >= 0).any(1).nonzero()[:, 0]
        made[dst] = (tokens, torch.full_like(tokens, rank), x[dst, tokens])
    return made


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
    topk_idx = request.topk_idx.cpu().long()
    if len(mark) > 0 and int(mark[:, 0].max()) >= num_tokens:
        raise ConfigError(
            f"low_latency_combine: topk_idx has {num_tokens} tokens, but rows of token {int(mark[:, 0].max())} came "
            "back; pass the topk_idx of the handle's dispatch"
        )
    owner = expert_to_rank(num_experts, num_ranks)
    owners = torch.where(topk_idx >= 0, owner[topk_idx.clamp(min=0)], -1)
    num_makers, makers = (num_experts, topk_idx) if request.expert_major else (num_ranks, owners)
    # Where the row of (token, maker) landed.
    lookup = torch.full((num_tokens * num_makers + 1,), -1, dtype=torch.int32)
    lookup[mark[:, 0] * num_makers + mark[:, 1]] = torch.arange(len(mark), dtype=torch.int32)
    key = torch.arange(num_tokens)[:, None] * num_makers + makers
    slots = lookup[torch.where(makers >= 0, key, -1)]
    missing = (slots < 0) & (topk_idx >= 0)
    for peer in masked:
        missing &= owners != peer
    if bool(missing.any()):
        token, k = (int(i) for i in missing.nonzero()[0])
        raise ConfigError(
            f"low_latency_combine: topk_idx[{token}, {k}] is {int(topk_idx[token, k])}, but no row of that expert "
            "came back for this token; pass the topk_idx of the handle's dispatch (entries may be set to -1)"
        )
    if request.topk_weights is None or not request.expert_major:
        # One row a rank, in rank order.
        in_rank = token_in_rank(topk_idx, num_experts, num_ranks)
        by_rank = lookup[:-1].view(num_tokens, num_ranks)
        request.out.copy_(ops.reduce_rows([landing], torch.where(in_rank, by_rank, -1)))
        return
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
