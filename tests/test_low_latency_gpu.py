"""Low-latency kernels under `Buffer`: their bits in all formats, sizes and ways to call them, once and back to back."""

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from cases import generator
from cuda_cases import finished, make_buffer, make_hard_rows
from harness import RankContext, environ, expect_bits, run_ranks, spawn_fresh
from low_latency_cases import FP8_ARGS, LowLatencyCase, check_case, make_expert_rows, make_inputs
from low_latency_soak import Soak, draw_cases, prepare, used_rows
from soak_cases import Mismatches, as_parts
from test_cuda_order import PLANTED_BUGS
from test_low_latency_reference import run_mode_switch, run_statistics, run_two_outstanding

CUDA_ENV = {"DEEP_EP_TEST_DEVICE": "cuda"}
RANKS = [2, 3, 4, 8]


def some_tokens(num_ranks: int, most: int) -> tuple[int, ...]:
    """Uneven counts from 0 to `most`."""
    return tuple((most, 0, most // 2, 1)[rank % 4] for rank in range(num_ranks))


def launches(buffer: Any, kernel: str) -> int:
    return buffer.runtime.kernels.launches.get(kernel, 0)


# ---------------------------------------------------------------------------------------------------------------
# Bits


def run_kernels_are_used(ctx: RankContext) -> None:
    """One launch an operation, two with a hook, the second when it is called."""
    assert ctx.buffer(low_latency_mode=True, num_rdma_bytes=1 << 24).engine == "cuda"
    buffer = make_buffer(ctx)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(LowLatencyCase(), ctx.rank))
    recv, _, handle, _, hook = buffer.low_latency_dispatch(x, idx, 8, 8, use_fp8=False)
    assert hook is None
    buffer.low_latency_combine(recv, idx, weights, handle)
    assert (launches(buffer, "low_latency_dispatch"), launches(buffer, "low_latency_combine")) == (1, 1)
    recv, _, handle, _, hook = buffer.low_latency_dispatch(x, idx, 8, 8, use_fp8=False, return_recv_hook=True)
    assert launches(buffer, "low_latency_dispatch") == 2
    hook()
    hook()
    assert launches(buffer, "low_latency_dispatch") == 3
    hook = buffer.low_latency_combine(recv, idx, weights, handle, return_recv_hook=True)[2]
    assert launches(buffer, "low_latency_combine") == 2
    hook()
    assert launches(buffer, "low_latency_combine") == 3
    finished(buffer)


@pytest.mark.gpu
def test_the_kernels_are_used(on_gpus):
    on_gpus(2)
    run_ranks(2, run_kernels_are_used)


def run_wrong_launches(ctx: RankContext) -> None:
    """What a native launch cannot take is an error like that of any other call, and nothing is enqueued."""
    buffer = make_buffer(ctx)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(LowLatencyCase(), ctx.rank))
    recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, 8, use_fp8=False)
    buffer.low_latency_combine(recv, idx, weights, handle)
    torch.cuda.synchronize()
    plans = buffer.runtime.low_latency._plans
    [dispatch], [combine] = plans._dispatch_of.values(), plans._combine_of.values()
    for run, num_inputs, num_tokens_at, rest in (
        (dispatch.run, 8, 3, (None, False, None, None)),
        (combine.run, 11, 8, (None, False, None)),
    ):
        inputs = [0] * num_inputs
        inputs[num_tokens_at] = 9
        with pytest.raises(ValueError, match="the number of tokens is 9, expected 0 to 8"):
            run(tuple(inputs), *rest)
        with pytest.raises(TypeError, match=r"run\(\) argument 1 is .*, of the wrong type"):
            run((*inputs, 0), *rest)
        with pytest.raises(TypeError, match=rf"run\(\) takes {1 + len(rest)} arguments but 1 were given"):
            run(tuple(inputs))
    recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, 8, use_fp8=False)
    buffer.low_latency_combine(recv, idx, weights, handle)
    assert (launches(buffer, "low_latency_dispatch"), launches(buffer, "low_latency_combine")) == (2, 2)
    finished(buffer)


@pytest.mark.gpu
def test_wrong_launches(on_gpus):
    on_gpus(2)
    run_ranks(2, run_wrong_launches)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, *RANKS])
def test_formats(on_gpus, num_ranks):
    on_gpus(num_ranks)
    for fp8 in sorted(FP8_ARGS):
        for mask in ("none", "some", "skew"):
            tokens = tuple((3 * rank + 5) % 9 for rank in range(num_ranks))
            case = LowLatencyCase(num_ranks, tokens, fp8=fp8, num_experts=16, mask=mask, repeats=2)
            for early in (False, True):
                check_case(dataclasses.replace(case, weights_at_dispatch=early))


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("finish", ["sync", "async", "hook"])
@pytest.mark.parametrize("early", [False, True])
def test_ways_to_call(on_gpus, num_ranks, finish, early):
    on_gpus(num_ranks)
    tokens = some_tokens(num_ranks, 8)
    for sum_at_home in (False, True):
        for zero_copy, out in ((False, False), (False, True), (True, False), (True, True)):
            case = LowLatencyCase(num_ranks, tokens, num_topk=6, finish=finish, sum_at_home=sum_at_home, repeats=3)
            check_case(dataclasses.replace(case, zero_copy=zero_copy, out=out, weights_at_dispatch=early))


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("mask", ["none", "some", "rows", "all", "skew"])
def test_tokens_and_masks(on_gpus, num_ranks, mask):
    on_gpus(num_ranks)
    for tokens in ((0, 0, 0), (8, 8, 8), (1, 0, 7)):
        for finish in ("sync", "hook"):
            case = LowLatencyCase(num_ranks, tokens[:num_ranks], mask=mask, num_topk=4, num_experts=7, finish=finish)
            for early in (False, True):
                check_case(dataclasses.replace(case, idx_dtype=torch.int32, weights_at_dispatch=early))


@pytest.mark.gpu
@pytest.mark.parametrize("finish", ["sync", "hook"])
@pytest.mark.parametrize("early", [False, True])
def test_hidden_sizes(on_gpus, finish, early):
    """Powers of two, what models use, and odd multiples of 16 bytes (bf16) and of 128 columns (FP8)."""
    on_gpus(2)
    sizes: dict[str, tuple[int, ...]] = {
        "none": (8, 24, 136, 520, 1032, 2048, 2560, 4096, 5120, 7168, 7176, 8192),
        "fp32": (128, 384, 640, 1152, 2048, 3072, 7168, 7296),
        "pow2": (128, 896, 6144, 7168),
        "ue8m0": (128, 512, 640, 1408, 2560, 4096, 7168, 7296),
    }
    for fp8, hiddens in sizes.items():
        for hidden in hiddens:
            check_case(LowLatencyCase(2, (5, 3), hidden=hidden, fp8=fp8, finish=finish, weights_at_dispatch=early))


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("early", [False, True])
def test_top_k(on_gpus, num_ranks, early):
    on_gpus(num_ranks)
    for num_topk in (1, 2, 3, 4, 5, 8, 9, 11, 16, 32):
        for sum_at_home in (False, True):
            tokens = tuple(4 + rank for rank in range(num_ranks))
            case = LowLatencyCase(num_ranks, tokens, num_topk=num_topk, num_experts=40, sum_at_home=sum_at_home)
            finish = "hook" if num_topk % 2 else "sync"
            check_case(dataclasses.replace(case, finish=finish, weights_at_dispatch=early))


@pytest.mark.gpu
@pytest.mark.parametrize("finish", ["sync", "hook"])
@pytest.mark.parametrize("early", [False, True])
def test_token_counts_up_to_the_maximum(on_gpus, finish, early):
    on_gpus(2)
    for max_tokens, tokens in (
        (1, (1, 0)),
        (1, (1, 1)),
        (7, (7, 6)),
        (128, (128, 77)),
        (300, (300, 300)),
        (64, (8, 1)),
    ):
        case = LowLatencyCase(2, tokens, max_tokens, hidden=256, num_topk=4, num_experts=12, finish=finish)
        check_case(dataclasses.replace(case, fp8="pow2", weights_at_dispatch=early))
    # Rows in slots, in one piece and in several.
    for fp8, hidden in (("fp32", 2560), ("none", 1160), ("ue8m0", 7168)):
        case = LowLatencyCase(2, (200, 131), 200, hidden=hidden, num_topk=4, num_experts=12, finish=finish, fp8=fp8)
        check_case(dataclasses.replace(case, weights_at_dispatch=early))
    # More rows than a block for each, at the size that decoding uses.
    case = LowLatencyCase(2, (128, 128), 128, hidden=7168, num_topk=8, num_experts=16, finish=finish)
    check_case(dataclasses.replace(case, weights_at_dispatch=early))


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [2, 3, 9, 64, 256])
def test_numbers_of_experts(on_gpus, num_experts):
    """Experts need not divide by the ranks; tokens may name fewer than K of them."""
    on_gpus(2)
    for early in (False, True):
        case = LowLatencyCase(2, (12, 9), 16, hidden=256, num_topk=8, num_experts=num_experts)
        check_case(dataclasses.replace(case, weights_at_dispatch=early))


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_random_cases(on_gpus, num_ranks):
    on_gpus(num_ranks)
    pick = random.Random(num_ranks)
    for case in draw_cases(num_ranks, 16, 70 + num_ranks):
        check_case(
            dataclasses.replace(
                case,
                finish=pick.choice(("sync", "async", "hook")),
                sum_at_home=pick.random() < 0.5,
                zero_copy=pick.random() < 0.5,
                out=pick.random() < 0.5,
                repeats=pick.choice((1, 3)),
            )
        )


def run_constant(ctx: RankContext, tokens: int) -> None:
    """Every token goes to every expert; rank r's rows hold r + 1, and expert e multiplies by e + 1: all exact."""
    buffer, num_experts = make_buffer(ctx), 2 * ctx.num_ranks
    x = torch.full((tokens, 256), ctx.rank + 1, dtype=torch.bfloat16, device=ctx.device)
    idx = torch.arange(num_experts, device=ctx.device).expand(tokens, -1).contiguous()
    weights = torch.full(idx.shape, 0.5, device=ctx.device)
    for way, early in itertools.product(("sync", "hook"), (False, True)):
        options = {"return_recv_hook": way == "hook"}
        recv, count, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, tokens, num_experts, use_fp8=False, topk_weights=weights if early else None, **options
        )
        if hook is not None:
            hook()
        assert count.tolist() == [tokens * ctx.num_ranks] * 2
        for source in range(ctx.num_ranks):
            assert bool((recv[:, source * tokens : (source + 1) * tokens] == source + 1).all()), f"rows of {source}"
        factors = torch.tensor([2 * ctx.rank + 1, 2 * ctx.rank + 2], device=ctx.device).bfloat16()
        combined, _, hook = buffer.low_latency_combine(recv * factors[:, None, None], idx, weights, handle, **options)
        if hook is not None:
            hook()
        total = 0.5 * (ctx.rank + 1) * num_experts * (num_experts + 1) / 2
        how = f"{way}, weights at dispatch={early}"
        assert bool((combined == total).all()), f"{how}: {combined[:, 0].tolist()}, expected {total}"
    finished(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("tokens", [1, 40])
def test_constant_rows(on_gpus, num_ranks, tokens):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_constant, tokens)


def run_hard_values(ctx: RankContext) -> None:
    """NaN of many patterns, infinities, zeros of both signs, subnormals, in tokens, experts' rows and weights."""
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    tokens, hidden, num_experts, num_topk = 30, 640, 8, 4
    idx = make_inputs(LowLatencyCase(ctx.num_ranks, (tokens,) * ctx.num_ranks, num_topk=num_topk), ctx.rank)[1]
    x = make_hard_rows(generator(301, ctx.rank), torch.bfloat16, tokens, hidden)
    weights = make_hard_rows(generator(302, ctx.rank), torch.float32, tokens, num_topk)
    slots = ctx.num_ranks * 32
    num_local = num_experts // ctx.num_ranks
    rows = make_hard_rows(generator(303, ctx.rank), torch.bfloat16, num_local * slots, hidden)
    rows = rows.view(num_local, slots, hidden)
    on_device = [t.to(ctx.device) for t in (x, idx, weights, rows)]
    for fp8, options in FP8_ARGS.items():
        got = buffer.low_latency_dispatch(*on_device[:2], 32, num_experts, **options)
        want = portable.low_latency_dispatch(x, idx, 32, num_experts, **options)
        used = used_rows(want[1], slots)
        for part, (mine, other) in enumerate(zip(as_parts(got[0]), as_parts(want[0]), strict=True)):
            flat = [t.cpu().reshape(-1, t.shape[2])[used] for t in (mine, other)]
            expect_bits(*flat, f"{fp8}: part {part}")
        weighted = buffer.low_latency_dispatch(*on_device[:2], 32, num_experts, topk_weights=on_device[2], **options)
        for sum_at_home in (False, True):
            other = portable.low_latency_combine(rows, idx, weights, want[2], sum_at_home=sum_at_home)[0]
            for hook, early in itertools.product((False, True), (False, True)):
                handle = weighted[2] if early else got[2]
                mine, _, finish = buffer.low_latency_combine(
                    on_device[3], *on_device[1:3], handle, sum_at_home=sum_at_home, return_recv_hook=hook
                )
                if finish is not None:
                    finish()
                how = f"sum_at_home={sum_at_home}, hook={hook}, weights at dispatch={early}"
                expect_bits(mine, other, f"{fp8}: combined, {how}")
    finished(buffer)


@pytest.mark.gpu
def test_hard_values(on_gpus):
    on_gpus(2)
    run_ranks(2, run_hard_values)


def run_repeats(ctx: RankContext, count: int, early: bool) -> None:
    """Rows beyond the counts may hold anything; all else has the same bits each time."""
    buffer, case = make_buffer(ctx), LowLatencyCase(ctx.num_ranks, (64,) * ctx.num_ranks, 64, 2048, 8, 32)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    rows = make_expert_rows(case, ctx.rank).to(ctx.device)
    mismatches, first, used = Mismatches(ctx.device), None, None
    for number in range(count):
        recv, recv_count, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, 64, 32, topk_weights=weights if early else None, **FP8_ARGS[case.fp8]
        )
        combined = buffer.low_latency_combine(rows, idx, weights, handle)[0]
        if used is None:
            used = used_rows(recv_count, rows.shape[1]).to(ctx.device)
        packed = [t.reshape(-1, *t.shape[2:])[used] for t in (*recv, handle[0])]
        now = (*packed, recv_count, handle[1], combined)
        first = first or now
        for i, (got, want) in enumerate(zip(now, first, strict=True)):
            mismatches.compare(got, want, f"repeat {number} [{i}]")
    finished(buffer)
    assert not mismatches.found()


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("early", [False, True])
def test_repeats_have_equal_bits(on_gpus, num_ranks, early):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_repeats, 200, early)


# ---------------------------------------------------------------------------------------------------------------
# Handles, sizes and modes on one buffer


def run_rebuilt_handles(ctx: RankContext) -> None:
    """A handle made of its values alone, entries left out since the dispatch, and rows of another dispatch's width.

    With the weights at dispatch entries cannot be left out, unless they are not used: by a copy, or for sums at home.
    """
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    for number, case in enumerate(draw_cases(ctx.num_ranks, 8, 80)):
        prepared = prepare(ctx, portable, case)
        early = case.weights_at_dispatch
        handle = buffer.low_latency_dispatch(
            prepared.x,
            prepared.idx,
            case.max_tokens,
            case.num_experts,
            topk_weights=prepared.weights if early else None,
            **FP8_ARGS[case.fp8],
        )[2]
        rebuilt = (handle[0].clone(), handle[1].clone(), *handle[2:])
        for its_handle in (handle, rebuilt, handle):
            for (sum_at_home, with_dropped), want in prepared.combined.items():
                if early and with_dropped and not sum_at_home and its_handle is handle:
                    continue
                for hook in (False, True):
                    got, _, finish = buffer.low_latency_combine(
                        prepared.rows,
                        prepared.topk(with_dropped),
                        prepared.weights,
                        its_handle,
                        sum_at_home=sum_at_home,
                        return_recv_hook=hook,
                    )
                    if finish is not None:
                        finish()
                    how = f"rebuilt={its_handle is rebuilt}, home={sum_at_home}, dropped={with_dropped}, hook={hook}"
                    how += f", weights at dispatch={early}"
                    expect_bits(got, want, f"case {number}, {how}")
    finished(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_rebuilt_handles_and_dropped_entries(on_gpus, num_ranks):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_rebuilt_handles)


def run_token_maxima(ctx: RankContext) -> None:
    """Other maxima, widths, top-k and experts from call to call; smaller ones after larger ones and back."""
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    shapes = [(8, 512, 2, 8), (128, 1024, 4, 16), (1, 128, 8, 32), (64, 2048, 3, 8), (8, 512, 2, 8), (200, 256, 8, 12)]
    prepared = []
    for number, (max_tokens, hidden, num_topk, num_experts) in enumerate(shapes):
        tokens = tuple(max(0, max_tokens - 3 * rank) for rank in range(ctx.num_ranks))
        case = LowLatencyCase(ctx.num_ranks, tokens, max_tokens, hidden, num_topk, num_experts, seed=number)
        prepared.append(prepare(ctx, portable, case))
    soak = Soak(ctx, buffer, prepared, 5)
    soak.run(120)
    finished(buffer)
    assert not soak.mismatches.found()


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_different_maxima_on_one_buffer(on_gpus, num_ranks):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_token_maxima)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("run", "args"),
    [(run_mode_switch, ()), (run_statistics, ()), (run_two_outstanding, (False,)), (run_two_outstanding, (True,))],
)
def test_modes_statistics_and_two_batches(on_gpus, run, args):
    """What the portable engine's tests do, on the kernels."""
    on_gpus(2)
    run_ranks(2, run, *args)


def run_alternating_modes(ctx: RankContext, count: int) -> None:
    """Normal and low-latency calls in any order, never synchronised."""
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    case = LowLatencyCase(ctx.num_ranks, (40,) * ctx.num_ranks, 48, 512, 3, 8, fp8="none")
    prepared = prepare(ctx, portable, case)

    def normal(which: Any, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layout = which.get_dispatch_layout(idx, case.num_experts)
        recv, _, its_weights, _, handle, _ = which.dispatch(
            x, None, layout[0], layout[1], layout[3], layout[2], idx, weights
        )
        return recv, *which.combine(recv * 2, handle, its_weights)[:2]

    cpu = tuple(t.cpu() for t in (prepared.x, prepared.idx, prepared.weights))
    wanted = tuple(t.to(ctx.device) for t in normal(portable, *cpu))
    soak, pick = Soak(ctx, buffer, [prepared], 6), random.Random(6)
    for number in range(count):
        if pick.random() < 0.5:
            got = normal(buffer, prepared.x, prepared.idx, prepared.weights)
            for i, (mine, want) in enumerate(zip(got, wanted, strict=True)):
                soak.mismatches.compare(mine, want, f"normal call {number} [{i}]")
        if pick.random() < 0.2:
            buffer.clean_low_latency_buffer(case.max_tokens, case.hidden, case.num_experts)
        soak.run(pick.randint(1, 3))
    finished(buffer)
    assert not soak.mismatches.found()


@pytest.mark.gpu
def test_normal_and_low_latency_calls_alternate(on_gpus):
    on_gpus(2)
    run_ranks(2, run_alternating_modes, 60)


def make_logfmt_rows(case: LowLatencyCase, rank: int) -> torch.Tensor:
    """Expert rows most of whose chunks are cast, and some that are not, with large, tiny or special values."""
    rows = make_expert_rows(case, rank).float() * 0.125  # below 1: otherwise chunks travel as bf16
    scale = torch.randint(-12, 1, rows.shape[:2], generator=generator(case.seed, rank, 62))
    rows *= torch.exp2(scale.float())[..., None]
    flat = rows.view(-1, case.hidden)
    flat[:, ::7] = 0.0
    flat[:, 3::11] *= 2.0**-30
    flat[::5, :128] = 0.0
    flat[1::5, -1] = 3.0
    flat[2::5, 0] = float("nan")
    flat[3::10] *= 2.0**-90
    return rows.bfloat16()


def run_logfmt(ctx: RankContext, hidden: int, max_tokens: int) -> None:
    """All ways to call it, eagerly and in a graph; the weights that came with a dispatch are not used."""
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    tokens = some_tokens(ctx.num_ranks, max_tokens)
    case = LowLatencyCase(ctx.num_ranks, tokens, max_tokens, hidden, 4, 8, mask="some", fp8="none")
    x, idx, weights = make_inputs(case, ctx.rank)
    rows = make_logfmt_rows(case, ctx.rank)
    handle = portable.low_latency_dispatch(x, idx, max_tokens, 8, use_fp8=False)[2]
    want = {
        at_home: portable.low_latency_combine(rows, idx, weights, handle, True, sum_at_home=at_home)[0]
        for at_home in (False, True)
    }
    x, idx, weights, rows = (t.to(ctx.device) for t in (x, idx, weights, rows))

    def combine(handle: Any, rows: torch.Tensor = rows, **how: Any) -> torch.Tensor:
        combined, event, hook = buffer.low_latency_combine(rows, idx, weights, handle, use_logfmt=True, **how)
        if hook is not None:
            rows.fill_(float("nan"))  # they have left
            hook()
        if how.get("async_finish"):
            event.current_stream_wait()
        return combined

    def pair() -> torch.Tensor:
        return combine(buffer.low_latency_dispatch(x, idx, max_tokens, 8, use_fp8=False)[2])

    for early in (None, weights):
        handle = buffer.low_latency_dispatch(x, idx, max_tokens, 8, use_fp8=False, topk_weights=early)[2]
        copied = (handle[0].clone(), *handle[1:])
        num_launches = launches(buffer, "low_latency_combine")
        for repeat in range(2):  # the second time without detailed checks
            for at_home in (False, True):
                how = {"sum_at_home": at_home}
                got = {
                    "whole": combine(handle, **how),
                    "out": combine(handle, out=torch.full_like(x, 7.0), **how),
                    "asynchronous": combine(handle, async_finish=True, **how),
                    "hook": combine(handle, rows.clone(), return_recv_hook=True, **how),
                    "copied handle": combine(copied, **how),
                    "copied handle, hook": combine(copied, rows.clone(), return_recv_hook=True, **how),
                }
                for name, combined in got.items():
                    expect_bits(combined, want[at_home], f"LogFMT, {name}, {at_home}, repeat {repeat}")
        assert launches(buffer, "low_latency_combine") == num_launches + 4 * 8
        buffer.low_latency_combine(rows, idx, weights, handle)  # as bf16 in between

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pair()
    finished(buffer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        combined = pair()
    ctx.barrier()
    for replay in range(5):
        combined.fill_(7.0)
        graph.replay()
        torch.cuda.synchronize()
        expect_bits(combined, want[False], f"LogFMT, replay {replay}")
    finished(buffer)
    ctx.barrier()


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize(("hidden", "max_tokens"), [(1024, 6), (512, 200), (1536, 24), (7168, 128), (136, 6)])
def test_logfmt(on_gpus, num_ranks, hidden, max_tokens):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_logfmt, hidden, max_tokens)


# ---------------------------------------------------------------------------------------------------------------
# Back to back


def run_soak(ctx: RankContext, engine: str, num_cases: int, count: int, seed: int, delays: int = 0) -> dict[str, int]:
    """`count` operations without a synchronisation, compared on the device with the portable engine's results."""
    portable = make_buffer(ctx, "portable")
    with environ(DEEP_EP_DEBUG_DELAYS=str(delays)):
        buffer = make_buffer(ctx, engine)
    prepared = [prepare(ctx, portable, case) for case in draw_cases(ctx.num_ranks, num_cases, seed)]
    ctx.barrier()
    soak = Soak(ctx, buffer, prepared, seed)
    soak.run(count)
    if ctx.device.type == "cuda":
        finished(buffer)
    found = soak.mismatches.found()
    assert not found, f"{len(found)} comparisons failed, the first: {found[:3]}"
    ctx.barrier()
    return dict(soak.counts)


def test_the_soak_itself():
    """The same operations on CPU tensors: what the soak expects is what the portable engine does."""
    for counts in run_ranks(2, run_soak, "portable", 12, 80, 5):
        assert len(counts) == 6
        assert sum(counts.values()) == 80


@pytest.mark.gpu
@pytest.mark.parametrize(("num_ranks", "count"), [(2, 20_000), (3, 1000), (4, 2000), (8, 800)])
def test_back_to_back(on_gpus, num_ranks, count):
    """10,000 pairs with token counts from 0 to the maximum, and never a wait of the host."""
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_soak, "cuda", 32, count, 40 + num_ranks, timeout=400)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_with_delays(on_gpus, seed):
    """Seeded delays at every signal and wait, in the order of operations and bits of which nothing may change."""
    on_gpus(2)
    run_ranks(2, run_soak, "cuda", 16, 250, 50 + seed, seed)


def run_unawaited(ctx: RankContext, planted: int) -> int:
    """How many results of some operations differ. They are of many shapes, so stale rows are not the right ones."""
    portable, buffer = make_buffer(ctx, "portable"), make_buffer(ctx)
    prepared = [prepare(ctx, portable, case) for case in draw_cases(ctx.num_ranks, 8, 70)]
    ctx.barrier()
    Soak(ctx, buffer, prepared, 70).run(20)
    finished(buffer)
    ctx.barrier()
    buffer.runtime.kernels.domain.set_debug(1, planted)
    soak = Soak(ctx, buffer, prepared, 71)
    soak.run(60)
    finished(buffer)
    ctx.barrier()
    return len(soak.mismatches.found())


@pytest.mark.gpu
def test_rows_that_are_not_awaited_show(on_gpus):
    """The comparisons of the soak can fail: they do when kernels take rows that have not come."""
    on_gpus(2)
    assert sum(run_ranks(2, run_unawaited, PLANTED_BUGS["announcement not awaited"])) > 0
    assert run_ranks(2, run_unawaited, 0) == [0, 0]


@pytest.mark.gpu(2)
def test_one_hardware_queue():
    env = {**CUDA_ENV, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    for counts in spawn_fresh(2, run_soak, "cuda", 12, 150, 60, timeout=120, env=env):
        assert sum(counts.values()) == 150
