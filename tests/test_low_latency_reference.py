"""Low-latency dispatch and combine against the reference: packing, FP8, weights, hooks, statistics, masks."""

import dataclasses
import time

import pytest
import reference as ref
import torch
from cases import to_cpu
from harness import RankContext, expect_bits, run_ranks
from low_latency_cases import FP8_ARGS, LowLatencyCase, check_case, ll_buffer, make_expert_rows, make_inputs

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    given = None


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("fp8", sorted(FP8_ARGS))
def test_formats(num_ranks, fp8):
    check_case(
        LowLatencyCase(
            num_ranks, tuple((3 * r + 5) % 8 for r in range(num_ranks)), fp8=fp8, num_experts=16, mask="some", repeats=2
        )
    )


@pytest.mark.parametrize("finish", ["sync", "async", "hook"])
@pytest.mark.parametrize("sum_at_home", [False, True])
@pytest.mark.parametrize("weights_at_dispatch", [False, True])
@pytest.mark.parametrize(("zero_copy", "out"), [(False, True), (True, False), (True, True)])
def test_ways_to_call(finish, sum_at_home, weights_at_dispatch, zero_copy, out):
    case = LowLatencyCase(4, (8, 0, 3, 1), num_topk=6, finish=finish, sum_at_home=sum_at_home, out=out, repeats=3)
    check_case(dataclasses.replace(case, weights_at_dispatch=weights_at_dispatch, zero_copy=zero_copy))


@pytest.mark.parametrize("mask", ["none", "some", "rows", "all", "skew"])
@pytest.mark.parametrize("tokens", [(0, 0, 0), (8, 8, 8), (1, 0, 7)])
def test_tokens_and_masks(mask, tokens):
    check_case(LowLatencyCase(3, tokens, mask=mask, num_topk=4, num_experts=7, idx_dtype=torch.int32))


@pytest.mark.parametrize(
    ("hidden", "fp8"), [(16, "none"), (128, "fp32"), (136, "none"), (2048, "ue8m0"), (2560, "pow2"), (7168, "ue8m0")]
)
def test_hidden_sizes(hidden, fp8):
    check_case(LowLatencyCase(2, (3, 2), max_tokens=4, hidden=hidden, fp8=fp8))


@pytest.mark.parametrize("num_topk", [1, 8, 11, 16])
def test_top_k(num_topk):
    check_case(LowLatencyCase(4, (4, 5, 6, 7), num_topk=num_topk, num_experts=32, sum_at_home=True, fp8="none"))


def test_on_several_nodes():
    check_case(LowLatencyCase(4, (4, 5, 0, 7), num_topk=4, domain=2))


if given is not None:

    @st.composite
    def ll_cases(draw, num_ranks):
        def pick(options):
            return draw(st.sampled_from(list(options)))

        tokens = tuple(pick((0, 1, 2, 7, 16)) for _ in range(num_ranks))
        finish = pick(("sync", "async", "hook"))
        return LowLatencyCase(
            num_ranks,
            tokens,
            max_tokens=pick((16, 20, 64)),
            hidden=pick((512, 1024, 2048)),
            num_topk=pick(range(1, 12)),
            num_experts=pick((num_ranks, num_ranks + 1, 16, 31)),
            mask=pick(("none", "some", "rows", "skew")),
            idx_dtype=pick((torch.int64, torch.int32)),
            fp8=pick(sorted(FP8_ARGS)),
            finish=finish,
            weights_at_dispatch=pick((True, False)),
            sum_at_home=pick((True, False)),
            zero_copy=pick((True, False)),
            out=pick((True, False)),
            repeats=pick((1, 3)),
            seed=pick(range(100)),
        )

    @pytest.mark.parametrize("num_ranks", [1, 2, 4])
    def test_random_cases(num_ranks):
        settings(max_examples=12)(given(ll_cases(num_ranks))(check_case))()


def run_two_outstanding(ctx: RankContext, weights_at_dispatch: bool):
    """Two hooks open at once (two-batch overlap): each brings its own batch."""
    buffer = ll_buffer(ctx)
    batches = [[t.to(ctx.device) for t in make_inputs(LowLatencyCase(seed=s), ctx.rank)] for s in (1, 2)]
    opened = [
        buffer.low_latency_dispatch(
            x,
            idx,
            8,
            8,
            use_fp8=False,
            return_recv_hook=True,
            topk_weights=weights if weights_at_dispatch else None,
        )
        for x, idx, weights in batches
    ]
    for call in opened:
        call[4]()
    results = []
    for (_x, idx, weights), call in zip(batches, opened, strict=True):
        combined, _, hook = buffer.low_latency_combine(call[0], idx, weights, call[2], return_recv_hook=True)
        results.append((combined, hook))
    for _, hook in results:
        hook()
    return to_cpu([combined for combined, _ in results])


@pytest.mark.parametrize("weights_at_dispatch", [False, True])
def test_two_batches_outstanding(weights_at_dispatch):
    results = run_ranks(2, run_two_outstanding, weights_at_dispatch)
    for batch, seed in enumerate((1, 2)):
        case = LowLatencyCase(seed=seed)
        inputs = [make_inputs(case, r) for r in range(2)]
        topk = [i[1] for i in inputs]
        rows = []
        for rank in range(2):
            experts = ref.low_latency_rows(topk, 8, rank)
            block = torch.zeros(4, 16, case.hidden, dtype=torch.bfloat16)
            for e, packed in enumerate(experts):
                for row, (src, token) in enumerate(packed.sources):
                    block[e, row] = inputs[src][0][token]
            rows.append(block)
        for rank in range(2):
            want = ref.low_latency_combine(rows, topk, [i[2] for i in inputs], 8, rank)
            expect_bits(results[rank][batch], want, f"batch {batch}, rank {rank}")


def run_statistics(ctx: RankContext):
    buffer = ll_buffer(ctx)
    x, idx, _ = (t.to(ctx.device) for t in make_inputs(LowLatencyCase(), ctx.rank))
    stats = torch.full((4,), 100, dtype=torch.int32, device=ctx.device)
    total = torch.full((4,), 100, dtype=torch.int32, device=ctx.device)
    for _ in range(3):
        total += buffer.low_latency_dispatch(x, idx, 8, 8, stats)[1]
    expect_bits(stats, total, "statistics add up over calls")


def test_statistics_accumulate():
    run_ranks(2, run_statistics)


def run_mode_switch(ctx: RankContext):
    """Normal and low-latency calls alternate on one buffer, with and without the clean-up call in between."""
    buffer = ll_buffer(ctx)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(LowLatencyCase(), ctx.rank))
    seen = []
    for clean in (True, False, True):
        lay = buffer.get_dispatch_layout(idx, 8)
        recv, _, w, _, handle, _ = buffer.dispatch(x, None, lay[0], lay[1], lay[3], lay[2], idx, weights)
        normal = buffer.combine(recv, handle, w)[0]
        if clean:
            buffer.clean_low_latency_buffer(8, 512, 8)
        packed, _, ll_handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, 8, use_fp8=False)
        low_latency = buffer.low_latency_combine(packed, idx, weights, ll_handle)[0]
        seen.append((normal, low_latency))
    for now in seen[1:]:
        expect_bits(now, seen[0], "alternating modes")


def test_normal_and_low_latency_alternate():
    run_ranks(2, run_mode_switch)


def run_logfmt(ctx: RankContext, case: LowLatencyCase):
    buffer = ll_buffer(ctx)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    handle = buffer.low_latency_dispatch(x, idx, case.max_tokens, case.num_experts)[2]
    rows = make_expert_rows(case, ctx.rank).to(ctx.device) * 0.125  # below 1: otherwise chunks travel as bf16
    return to_cpu(buffer.low_latency_combine(rows, idx, weights, handle, use_logfmt=True)[0])


@pytest.mark.parametrize("hidden", [512, 2048])
def test_logfmt_is_close(hidden):
    """10 bits: at most 32 octaves over 511 steps, so an element is within half a step (2.2 %) of its value."""
    case = LowLatencyCase(hidden=hidden, num_topk=2)
    inputs = [make_inputs(case, r) for r in range(2)]
    rows = [make_expert_rows(case, r) * 0.125 for r in range(2)]
    topk, weights = [i[1] for i in inputs], [i[2] for i in inputs]
    results = run_ranks(2, run_logfmt, case)
    exact = True
    for rank, got in enumerate(results):
        want = ref.low_latency_combine(rows, topk, weights, 8, rank).float()
        bound = ref.low_latency_combine([r.abs() for r in rows], topk, weights, 8, rank).float() * 0.03 + 1e-6
        assert bool(((got.float() - want).abs() <= bound).all())
        exact = exact and torch.equal(got.float(), want)
    assert not exact, "LogFMT was asked for and left every bit as it was"


def run_masks(ctx: RankContext):
    buffer = ll_buffer(ctx, enable_shrink=True)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(LowLatencyCase(3, (6, 3, 5), num_experts=6), ctx.rank))
    status = torch.full((3,), 9, dtype=torch.int32, device=ctx.device)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 0]
    full = buffer.low_latency_dispatch(x, idx, 8, 6, use_fp8=False)[1].tolist()
    ctx.barrier()
    if ctx.rank == 2:  # as if it were gone
        ctx.barrier()
        return None
    buffer.low_latency_update_mask_buffer(2, True)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 1]
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, 6, use_fp8=False)
    combined = buffer.low_latency_combine(recv, idx, weights, handle)[0]
    buffer.low_latency_clean_mask_buffer()
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0, 0]
    ctx.barrier()
    return to_cpu((full, count, handle[1], combined))


def test_masked_rank_is_skipped(spawn_fresh):
    case = LowLatencyCase(3, (6, 3, 5), num_experts=6)
    results = spawn_fresh(3, run_masks)
    inputs = [make_inputs(case, r) for r in range(3)]
    topk, weights = [i[1] for i in inputs], [i[2] for i in inputs]
    blocks = []
    for rank in range(3):  # rows as all ranks see them, to look terms up by position
        block = torch.zeros(2, 24, case.hidden, dtype=torch.bfloat16)
        for e, packed in enumerate(ref.low_latency_rows(topk, 6, rank)):
            for row, (src, token) in enumerate(packed.sources):
                block[e, row] = inputs[src][0][token]
        blocks.append(block)
    for rank in (0, 1):
        full, count, layout_range, combined = results[rank]
        assert full == [len(e.sources) for e in ref.low_latency_rows(topk, 6, rank)]
        masked = ref.low_latency_rows(topk, 6, rank, masked=[2])
        assert count.tolist() == [len(e.sources) for e in masked]
        assert (layout_range & 0xFFFFFFFF)[:, 2].tolist() == [0, 0]
        expect_bits(
            combined, ref.low_latency_combine(blocks, topk, weights, 6, rank, masked=[2]), f"combined on rank {rank}"
        )


def run_silent_rank(ctx: RankContext):
    buffer = ll_buffer(ctx, enable_shrink=True, timeout_s=100, mask_timeout_us=1_000_000)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(LowLatencyCase(3, (6, 3, 5), num_experts=6), ctx.rank))
    full = buffer.low_latency_dispatch(x, idx, 8, 6)[1].tolist()
    ctx.barrier()
    if ctx.rank == 2:
        ctx.barrier()
        return None
    started = time.monotonic()
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, 6, use_fp8=False)
    waits = buffer.last_waits()["low_latency_dispatch"]
    combined = buffer.low_latency_combine(recv, idx, weights, handle)[0]
    seconds = time.monotonic() - started
    status = torch.full((3,), 9, dtype=torch.int32, device=ctx.device)
    buffer.low_latency_query_mask_buffer(status)
    later = buffer.low_latency_combine(recv, idx, weights, handle)[0]
    ctx.barrier()
    return to_cpu((full, count, combined, later)), status.tolist(), seconds, waits


def test_a_silent_rank_is_masked_after_its_own_deadline(spawn_fresh):
    results = spawn_fresh(3, run_silent_rank)
    for rank in (0, 1):
        (full, count, combined, later), status, seconds, waits = results[rank]
        assert status == [0, 0, 1]
        assert sum(full) > int(count.sum()) > 0
        assert 0.8 < seconds < 30
        assert waits[2] > 0.8e9 > waits[1 - rank]
        assert waits[rank] == 0
        expect_bits(later, combined, f"rank {rank}: combined again")


@pytest.mark.parametrize(
    "args", [(128, 7168, 8, 288), (128, 7168, 8, 256), (1, 128, 1, 1), (64, 2048, 16, 64), (511, 4096, 32, 160)]
)
def test_size_hint(args):
    import deep_ep

    want = ref.low_latency_size_hint(*args)
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(*args) == want
    names = ("num_max_dispatch_tokens_per_rank", "hidden", "num_ranks", "num_experts")
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(**dict(zip(names, args, strict=True))) == want
