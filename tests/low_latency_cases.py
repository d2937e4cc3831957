"""Cases of low-latency dispatch and combine: inputs from seeds, the rank's side, the comparison with the reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import reference as ref
import torch
from cases import generator, make_topk, to_cpu
from harness import RankContext, expect_bits, run_ranks

from deep_ep import logfmt


@dataclasses.dataclass(frozen=True)
class LowLatencyCase:
    num_ranks: int = 2
    tokens: tuple[int, ...] = (6, 3)
    max_tokens: int = 8
    hidden: int = 512
    num_topk: int = 3
    num_experts: int = 8
    mask: str = "none"
    idx_dtype: torch.dtype = torch.int64
    fp8: str = "fp32"  # none | fp32 | pow2 | ue8m0
    finish: str = "sync"  # sync | async | hook
    weights_at_dispatch: bool = False
    expert_major: bool = True
    sum_at_home: bool = False
    use_logfmt: bool = False  # compared with the reference where rows lie by source
    zero_copy: bool = False
    out: bool = False  # both operations write to tensors of the caller
    domain: int | None = None
    repeats: int = 1
    seed: int = 0


FP8_ARGS: dict[str, dict[str, bool]] = {
    "none": {"use_fp8": False},
    "fp32": {},
    "pow2": {"round_scale": True},
    "ue8m0": {"round_scale": True, "use_ue8m0": True},
}


def make_inputs(case: LowLatencyCase, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = generator(case.seed, rank, 60)
    idx, weights = make_topk(gen, case.tokens[rank], case.num_topk, case.num_experts, case.mask, case.idx_dtype)
    x = torch.randn(case.tokens[rank], case.hidden, generator=gen)
    x = x * torch.exp2(torch.randint(-16, 10, (case.tokens[rank], 1), generator=gen).float())
    x[:, ::5] = 0.0
    return x.bfloat16(), idx, weights


def make_expert_rows(case: LowLatencyCase, rank: int) -> torch.Tensor:
    num_local = len(ref.experts_of_rank(case.num_experts, case.num_ranks)[rank])
    groups = (num_local, case.num_ranks * case.max_tokens) if case.expert_major else (case.num_ranks, case.max_tokens)
    shape = (*groups, case.hidden)
    rows = torch.randn(shape, generator=generator(case.seed, rank, 61))
    if case.use_logfmt:  # of small magnitude most rows are cast, else none is
        rows *= torch.where(torch.arange(rows.shape[-2]) % 5 == 0, 1.0, 0.125)[:, None]
    return rows.bfloat16()


def make_received(case: LowLatencyCase, rank: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Rows for a dispatch to write to, and scales if it has any, full of one value."""
    groups, capacity, hidden = make_expert_rows(case, rank).shape
    if case.fp8 == "none":
        return (torch.full((groups, capacity, hidden), 7.0, dtype=torch.bfloat16, device=device),)
    width, dtype = (-(-hidden // 512), torch.int32) if case.fp8 == "ue8m0" else (-(-hidden // 128), torch.float32)
    rows = torch.full((groups, capacity, hidden), 0x5A, dtype=torch.uint8, device=device)
    scales = torch.full((groups, width, capacity), 7, dtype=dtype, device=device)
    return rows.view(torch.float8_e4m3fn), scales.transpose(1, 2)


def expect_written(
    case: LowLatencyCase, rank: int, out: tuple[torch.Tensor, ...], recv: Any, count: torch.Tensor
) -> None:
    """The tensors given came back, and behind the last row of an expert nothing has changed."""
    parts = recv if isinstance(recv, tuple) else (recv,)
    assert len(parts) == len(out)
    assert all(part is given for part, given in zip(parts, out, strict=True))
    if case.expert_major:
        behind = torch.arange(out[0].shape[1], device=count.device)[None] >= count[:, None]
        for part, fresh in zip(parts, make_received(case, rank, count.device), strict=True):
            integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[part.element_size()]
            assert torch.equal(part.view(integers)[behind], fresh.view(integers)[behind])


def ll_buffer(ctx: RankContext, domain: int | None = None, **kwargs: Any) -> Any:
    return ctx.buffer(domain, low_latency_mode=True, num_rdma_bytes=1 << 24, **kwargs)


def finish_call(case: LowLatencyCase, event: Any, hook: Any) -> None:
    if case.finish == "hook":
        assert callable(hook)
        hook()
    else:
        assert hook is None
        assert (event.event is not None) == (case.finish == "async")
        if case.finish == "async":
            event.current_stream_wait()


def run_case(ctx: RankContext, case: LowLatencyCase, buffer: Any = None) -> dict[str, Any]:
    buffer = ll_buffer(ctx, case.domain) if buffer is None else buffer
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    rows = make_expert_rows(case, ctx.rank).to(ctx.device)
    how = {"async_finish": case.finish == "async", "return_recv_hook": case.finish == "hook"}
    result: dict[str, Any] = {}
    num_local = len(ref.experts_of_rank(case.num_experts, case.num_ranks)[ctx.rank])
    for repeat in range(case.repeats):
        stats = torch.zeros(num_local, dtype=torch.int32, device=ctx.device)
        wait = torch.zeros(ctx.num_ranks, dtype=torch.int64, device=ctx.device)
        received = make_received(case, ctx.rank, ctx.device) if case.out else None
        recv, count, handle, event, hook = buffer.low_latency_dispatch(
            x,
            idx,
            case.max_tokens,
            case.num_experts,
            cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=wait,
            topk_weights=weights if case.weights_at_dispatch else None,
            expert_major=case.expert_major,
            out=received[0] if received is not None and case.fp8 == "none" else received,
            **FP8_ARGS[case.fp8],
            **how,
        )
        finish_call(case, event, hook)
        if received is not None:
            expect_written(case, ctx.rank, received, recv, count)
        if case.zero_copy:
            staging = buffer.get_next_low_latency_combine_buffer(handle)
            assert staging.shape == rows.shape
            assert staging.dtype == torch.bfloat16
            staging.copy_(rows)
        out = (
            torch.full((case.tokens[ctx.rank], case.hidden), 7.0, dtype=torch.bfloat16, device=ctx.device)
            if case.out
            else None
        )
        combined, event, hook = buffer.low_latency_combine(
            torch.zeros_like(rows) if case.zero_copy else rows,
            idx,
            weights if case.expert_major else None,
            handle,
            use_logfmt=case.use_logfmt,
            zero_copy=case.zero_copy,
            out=out,
            sum_at_home=case.sum_at_home,
            combine_wait_recv_cost_stats=wait,
            **how,
        )
        finish_call(case, event, hook)
        assert out is None or combined.data_ptr() == out.data_ptr() or out.numel() == 0
        now = {
            "recv": tuple(recv) if isinstance(recv, tuple) else (recv,),
            "count": count,
            "handle": tuple(handle),
            "stats": stats,
            "strides": recv[1].stride() if isinstance(recv, tuple) else None,
            "combined": combined,
            "wait": wait,
        }
        if repeat == 0:
            result = to_cpu(now)
        else:
            expect_bits(now["combined"], result["combined"], f"combine, repeat {repeat}")
    return result


def check_case(case: LowLatencyCase) -> None:
    """Run the case on its ranks and compare everything a caller can see with the reference."""
    for rank, got in enumerate(run_ranks(case.num_ranks, run_case, case)):
        verify(case, rank, got)


def verify(case: LowLatencyCase, rank: int, got: dict[str, Any]) -> None:
    """Compare what `rank` saw (the result of `run_case`) with the reference."""
    if not case.expert_major:
        verify_by_source(case, rank, got)
        return
    inputs = [make_inputs(case, r) for r in range(case.num_ranks)]
    topk, weights = [i[1] for i in inputs], [i[2] for i in inputs]
    rows = [make_expert_rows(case, r) for r in range(case.num_ranks)]
    sent = [(i[0],) if case.fp8 == "none" else ref.quantize_1x128(i[0], case.fp8) for i in inputs]
    tag = f"rank {rank} of {case}"
    experts = ref.low_latency_rows(topk, case.num_experts, rank)
    slots = case.num_ranks * case.max_tokens
    expect_bits(got["count"], torch.tensor([len(e.sources) for e in experts], dtype=torch.int32), f"{tag}: recv_count")
    expect_bits(got["stats"], got["count"], f"{tag}: cumulative_local_expert_recv_stats")
    assert bool((got["wait"] >= 0).all()), tag
    src_info, layout_range, max_tokens, hidden, num_experts = got["handle"]
    assert (max_tokens, hidden, num_experts) == (case.max_tokens, case.hidden, case.num_experts), tag
    assert (src_info.dtype, layout_range.dtype) == (torch.int32, torch.int64), tag
    assert src_info.shape == (len(experts), slots), tag
    assert layout_range.shape == (len(experts), case.num_ranks), tag
    assert got["recv"][0].shape == (len(experts), slots, case.hidden), tag
    if case.fp8 != "none":
        width = -(-case.hidden // 128) if case.fp8 != "ue8m0" else -(-case.hidden // 512)
        assert got["recv"][1].shape == (len(experts), slots, width), tag
        assert got["strides"][1] == 1, (
            f"{tag}: scales have strides {got['strides']}, expected 1 over tokens (column-major)"
        )
    for e, packed in enumerate(experts):
        num = len(packed.sources)
        expect_bits(src_info[e, :num].tolist(), [t for _, t in packed.sources], f"{tag}: src_info of expert {e}")
        for src, (begin, count) in enumerate(packed.ranges):
            value = int(layout_range[e, src])
            assert value & 0xFFFFFFFF == count, (
                f"{tag}: layout_range[{e}, {src}] counts {value & 0xFFFFFFFF}, expected {count}"
            )
            assert count == 0 or value >> 32 == begin, (
                f"{tag}: layout_range[{e}, {src}] begins at {value >> 32}, expected {begin}"
            )
        for part, values in enumerate(got["recv"]):
            for row, (src, token) in enumerate(packed.sources):
                expect_bits(values[e, row], sent[src][part][token], f"{tag}: part {part} of expert {e}, row {row}")
    want = ref.low_latency_combine(rows, topk, weights, case.num_experts, rank, case.sum_at_home)
    expect_bits(got["combined"], want, f"{tag}: combined")


def verify_by_source(case: LowLatencyCase, rank: int, got: dict[str, Any]) -> None:
    """The same for `expert_major=False`."""
    inputs = [make_inputs(case, r) for r in range(case.num_ranks)]
    rows = [make_expert_rows(case, r) for r in range(case.num_ranks)]
    tag = f"rank {rank} of {case}"
    experts = ref.experts_of_rank(case.num_experts, case.num_ranks)[rank]
    expect_bits(got["count"], torch.tensor(case.tokens, dtype=torch.int32), f"{tag}: recv_count")
    assert bool((got["wait"] >= 0).all()), tag
    packed = ref.low_latency_rows([i[1] for i in inputs], case.num_experts, rank)
    expect_bits(got["stats"], torch.tensor([len(e.sources) for e in packed], dtype=torch.int32), f"{tag}: stats")
    index, weights, max_tokens, hidden, num_experts = got["handle"]
    assert (max_tokens, hidden, num_experts) == (case.max_tokens, case.hidden, case.num_experts), tag
    by_selection = (case.num_ranks, case.max_tokens, case.num_topk)
    assert got["recv"][0].shape == (case.num_ranks, case.max_tokens, case.hidden), tag
    if case.fp8 != "none":
        columns = -(-case.hidden // (512 if case.fp8 == "ue8m0" else 128))
        assert got["recv"][1].shape == (case.num_ranks, case.max_tokens, columns), tag
        assert got["strides"] == (columns * case.max_tokens, 1, case.max_tokens), tag
    want_index = torch.full(by_selection, -1, dtype=torch.int32)
    want_weights = torch.zeros(by_selection)
    for source, (x, topk_idx, topk_weights) in enumerate(inputs):
        here = (topk_idx >= experts.start) & (topk_idx < experts.stop)
        want_index[source, : len(x)] = torch.where(here, topk_idx.long() - experts.start, -1).int()
        want_weights[source, : len(x)] = torch.where(here, topk_weights, 0.0)
        sent = (x,) if case.fp8 == "none" else ref.quantize_1x128(x, case.fp8)
        tokens = here.any(1).nonzero()[:, 0]
        for part, values in enumerate(got["recv"]):
            expect_bits(values[source][tokens], sent[part][tokens], f"{tag}: part {part} of source {source}")
    expect_bits(index, want_index, f"{tag}: recv_topk_idx")
    if case.weights_at_dispatch:
        expect_bits(weights, want_weights, f"{tag}: recv_topk_weights")
    else:
        assert (weights.shape, weights.dtype) == ((0,), torch.float32), tag
    expect_bits(got["combined"], sum_by_source(case, rows, inputs[rank][1], rank), f"{tag}: combined")


def sum_by_source(case: LowLatencyCase, rows: list[torch.Tensor], topk_idx: torch.Tensor, home: int) -> torch.Tensor:
    """bf16 [T, H]: the rows of the ranks that own an expert of a token, added in FP32 in rank order."""
    if case.use_logfmt:
        rows = [logfmt.simulate(r) for r in rows]
    total = torch.zeros(len(topk_idx), case.hidden)
    for rank, experts in enumerate(ref.experts_of_rank(case.num_experts, case.num_ranks)):
        here = ((topk_idx >= experts.start) & (topk_idx < experts.stop)).any(1, keepdim=True)
        total = torch.where(here, total + rows[rank][home, : len(topk_idx)].float(), total)
    return total.bfloat16()
