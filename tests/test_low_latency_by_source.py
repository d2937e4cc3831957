"""`low_latency_dispatch(expert_major=False)`: each token once, by source, and combines of what the caller summed."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import reference as ref
import torch
from cases import generator
from cuda_cases import finished, make_buffer, make_hard_rows
from harness import RankContext, expect_bits, run_ranks, spawn_fresh
from low_latency_cases import (
    FP8_ARGS,
    LowLatencyCase,
    check_case,
    finish_call,
    ll_buffer,
    make_expert_rows,
    make_inputs,
    sum_by_source,
)
from low_latency_fakes import (
    FakeKernels,
    FakeLock,
    FakePlan,
    combine_request,
    dispatch,
    dispatch_request,
    install_fakes,
    quick_combine,
    quick_dispatch,
)

import deep_ep
from deep_ep import Buffer
from deep_ep.engines.cuda_ll import LowLatencyKernels
from deep_ep.engines.low_latency_plans import PLACES
from deep_ep.errors import ConfigError
from deep_ep.traffic import TrafficStats

BY_SOURCE = LowLatencyCase(expert_major=False)


def by_source(*args: Any, **fields: Any) -> LowLatencyCase:
    return LowLatencyCase(*args, **fields, expert_major=False)


# ---------------------------------------------------------------------------------------------------------------
# The portable engine


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("fp8", sorted(FP8_ARGS))
def test_formats(num_ranks, fp8):
    tokens = tuple((3 * r + 5) % 8 for r in range(num_ranks))
    for early in (False, True):
        check_case(by_source(num_ranks, tokens, fp8=fp8, num_experts=16, mask="some", weights_at_dispatch=early))


@pytest.mark.parametrize("finish", ["sync", "async", "hook"])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("zero_copy", "out"), [(False, True), (True, False)])
def test_ways_to_call(finish, early, zero_copy, out):
    case = by_source(4, (8, 0, 3, 1), num_topk=6, finish=finish, out=out, zero_copy=zero_copy, repeats=3)
    check_case(dataclasses.replace(case, weights_at_dispatch=early))


@pytest.mark.parametrize("finish", ["sync", "hook"])
@pytest.mark.parametrize("hidden", [512, 1024, 7168])
def test_logfmt(finish, hidden):
    check_case(by_source(3, (8, 2, 5), hidden=hidden, num_topk=4, mask="some", finish=finish, use_logfmt=True))


@pytest.mark.parametrize("mask", ["none", "some", "rows", "all", "skew"])
@pytest.mark.parametrize("tokens", [(0, 0, 0), (8, 8, 8), (1, 0, 7)])
def test_tokens_and_masks(mask, tokens):
    check_case(by_source(3, tokens, mask=mask, num_topk=4, num_experts=7, idx_dtype=torch.int32))


def run_experts(ctx: RankContext, case: LowLatencyCase) -> torch.Tensor:
    """Experts that multiply, by the index and the weights that came."""
    buffer = ll_buffer(ctx)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    options = {"use_fp8": False, "topk_weights": weights, "expert_major": case.expert_major}
    recv, count, handle, _, _ = buffer.low_latency_dispatch(x, idx, case.max_tokens, case.num_experts, **options)
    first = ref.experts_of_rank(case.num_experts, case.num_ranks)[ctx.rank].start
    if case.expert_major:
        factors = 1.0 + 0.37 * torch.arange(first, first + len(count), device=ctx.device)
        return buffer.low_latency_combine((recv * factors[:, None, None]).bfloat16(), idx, weights, handle)[0].cpu()
    index, early = handle[:2]
    total = torch.zeros(recv.shape, device=ctx.device)
    for k in range(case.num_topk):
        output = (recv * (1.0 + 0.37 * (index[:, :, k, None] + first))).bfloat16().float()
        total = torch.where(index[:, :, k, None] >= 0, total + output * early[:, :, k, None], total)
    return buffer.low_latency_combine(total.bfloat16(), idx, None, handle)[0].cpu()


def test_both_layouts_give_the_same_bits():
    case = LowLatencyCase(3, (6, 3, 8), num_topk=4, num_experts=7, mask="some")
    packed = run_ranks(3, run_experts, case)
    for rank, got in enumerate(run_ranks(3, run_experts, dataclasses.replace(case, expert_major=False))):
        expect_bits(got, packed[rank], f"rank {rank}")


def run_copied_handles(ctx: RankContext) -> None:
    """A handle is its values: copies are as good, on one rank or on all. LogFMT is for rows of this layout as well."""
    buffer = ll_buffer(ctx)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(BY_SOURCE, ctx.rank))
    rows = [make_expert_rows(BY_SOURCE, rank) for rank in range(2)]
    mine = rows[ctx.rank].to(ctx.device)
    handle = buffer.low_latency_dispatch(x, idx, 8, 8, topk_weights=weights, expert_major=False)[2]
    want = sum_by_source(BY_SOURCE, rows, idx.cpu(), ctx.rank)
    copied = (handle[0].clone(), handle[1].clone(), *handle[2:])
    for number, use_hook in itertools.product(range(3), (False, True)):
        given = copied if number + ctx.rank > 1 else handle
        combined, event, hook = buffer.low_latency_combine(mine.clone(), idx, None, given, return_recv_hook=use_hook)
        finish_call(dataclasses.replace(BY_SOURCE, finish="hook" if use_hook else "sync"), event, hook)
        expect_bits(combined.cpu(), want, f"combine {number}, hook={use_hook}")
    coded = dataclasses.replace(BY_SOURCE, use_logfmt=True)
    want = sum_by_source(coded, [0.125 * r for r in rows], idx.cpu(), ctx.rank)
    got = buffer.low_latency_combine(0.125 * mine, idx, None, copied, use_logfmt=True)[0]
    expect_bits(got.cpu(), want, "combine with LogFMT")


def test_copied_handles():
    run_ranks(2, run_copied_handles)


def run_masked(ctx: RankContext) -> None:
    case = by_source(3, (6, 3, 5), num_experts=6)
    buffer = ll_buffer(ctx, enable_shrink=True)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    ctx.barrier()
    if ctx.rank != 2:
        buffer.low_latency_update_mask_buffer(2, True)
        recv, count, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, 8, 6, use_fp8=False, topk_weights=weights, expert_major=False
        )
        assert count.tolist() == [6, 3, 0]
        assert bool((handle[0][2] == -1).all())
        assert bool((handle[1][2] == 0).all())
        combined = buffer.low_latency_combine(recv, idx, None, handle)[0].cpu()
        others = ((idx >= 0) & (idx < 4)).cpu()
        num_ranks = (others & (idx.cpu() < 2)).any(1).int() + (others & (idx.cpu() >= 2)).any(1).int()
        expect_bits(combined, (x.cpu().float() * num_ranks[:, None]).bfloat16(), "combined")
    ctx.barrier()


def test_masked_ranks_have_no_tokens(spawn_fresh):
    spawn_fresh(3, run_masked)


@pytest.fixture
def solo():
    buffer = Buffer(None, 0, 1 << 20, low_latency_mode=True, comm=deep_ep.SoloComm())
    x = torch.randn(6, 512).bfloat16()
    idx = torch.randint(0, 4, (6, 3))
    recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, 4, use_fp8=False, expert_major=False)
    good = {"x": recv, "topk_idx": idx, "topk_weights": None, "handle": handle}
    yield SimpleNamespace(buffer=buffer, good=good, handle=handle)
    buffer.destroy()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda g: {"sum_at_home": True}, "sum_at_home=True.*expert_major=False"),
        (lambda g: {"topk_idx": g["topk_idx"][:, :2]}, "2 selections a token.*had 3"),
        (lambda g: {"topk_idx": g["topk_idx"][:4]}, "topk_idx has 4 tokens"),
        (lambda g: {"x": g["x"][:, :4]}, "shape"),
        (lambda g: {"handle": (g["handle"][0].long(), *g["handle"][1:])}, r"handle\[0\]"),
        (lambda g: {"handle": (g["handle"][0][:, :4], *g["handle"][1:])}, r"handle\[0\]"),
        (lambda g: {"handle": (g["handle"][0], torch.zeros(2), *g["handle"][2:])}, r"handle\[1\]"),
        (lambda g: {"handle": (g["handle"][0], None, *g["handle"][2:])}, r"handle\[1\]"),
    ],
)
def test_wrong_combines(solo, wrong, words):
    with pytest.raises(ConfigError, match=words):
        solo.buffer.low_latency_combine(**{**solo.good, **wrong(solo.good)})
    assert solo.buffer.low_latency_combine(**solo.good)[0].shape == (6, 512)


def test_the_other_layout_wants_weights(solo):
    recv, _, handle, _, _ = solo.buffer.low_latency_dispatch(
        torch.ones(6, 512).bfloat16(), solo.good["topk_idx"], 8, 4, use_fp8=False
    )
    with pytest.raises(ConfigError, match="topk_weights"):
        solo.buffer.low_latency_combine(recv, solo.good["topk_idx"], None, handle)


def run_disagreement(ctx: RankContext) -> str:
    buffer = ll_buffer(ctx)
    x, idx, _ = (t.to(ctx.device) for t in make_inputs(BY_SOURCE, ctx.rank))
    with pytest.raises(ConfigError) as caught:
        buffer.low_latency_dispatch(x, idx, 8, 8, expert_major=ctx.rank == 0)
    return str(caught.value)


def test_ranks_agree_on_the_layout(spawn_fresh):
    for message in spawn_fresh(2, run_disagreement):
        assert "options" in message


# ---------------------------------------------------------------------------------------------------------------
# The host's side of the kernels


@pytest.fixture
def ll(monkeypatch):
    install_fakes(monkeypatch)
    return LowLatencyKernels(FakeKernels(), FakeLock(), TrafficStats(), 0.5)


@pytest.mark.parametrize("scale_format", [None, "fp32"])
@pytest.mark.parametrize("with_weights", [False, True])
def test_outputs_of_a_dispatch(ll, scale_format, with_weights):
    stats = torch.zeros(2, dtype=torch.int32)
    options = {"scale_format": scale_format, "with_weights": with_weights, "recv": stats}
    request = dispatch_request(hidden=640, expert_major=False, **options)
    output, _ = dispatch(ll, request, False)
    again = quick_dispatch(ll, request)[:3]
    assert len(FakePlan.launches) == 2
    assert quick_dispatch(ll, request, expert_major=True) is None
    for recv_x, count, handle in ((output.rows, output.count, output.handle), again):
        rows = recv_x[0] if isinstance(recv_x, tuple) else recv_x
        assert rows.shape == (3, 4, 640)
        assert (count.shape, count.dtype) == ((3,), torch.int32)
        assert (handle[0].shape, handle[0].dtype) == ((3, 4, 2), torch.int32)
        assert (handle[1].shape, handle[1].dtype) == ((3, 4, 2) if with_weights else (0,), torch.float32)
        assert handle[0].is_contiguous()
    if scale_format is not None:
        assert output.scales.shape == (3, 4, 5)
        assert output.scales.stride() == (20, 1, 4)
    plan, *arguments = FakePlan.launches[0]
    small = arguments[6]
    assert plan.shape[-2:] == (with_weights, False)
    assert output.count.data_ptr() == small + plan.outputs.recv_count_at
    assert output.src_info.data_ptr() == small + plan.outputs.positions_at
    if with_weights:
        assert output.layout_range.data_ptr() == small + plan.outputs.weights_at
    assert ll.dispatch(dispatch_request(hidden=640, **options), False) is not None
    assert FakePlan.launches[-1][0].signature != plan.signature


def test_combines_go_by_the_index(ll):
    """The first call, calls like it, and those with a copy of the handle: which rows, and no weights."""
    for with_weights in (False, True):
        output, _ = dispatch(ll, dispatch_request(expert_major=False, with_weights=with_weights), False)
        block = FakePlan.launches[-1][7]
        outputs = getattr(output.src_info, PLACES)[0]
        request = combine_request(output)
        ll.combine(request, False)
        quick_combine(ll, output, request)
        quick_combine(ll, output, request, topk_weights=None)
        signatures = set()
        for plan, *arguments in FakePlan.launches[-3:]:
            x, _, _, source_tokens, positions, weights, idx, topk_weights, num_tokens = arguments[:9]
            assert (x, idx, num_tokens) == (request.x.data_ptr(), request.topk_idx.data_ptr(), 3)
            assert (weights, topk_weights) == (0, 0)
            assert positions == output.src_info.data_ptr() == block + outputs.positions_at
            assert source_tokens == block + outputs.source_tokens_at
            assert plan.shape[-1] is False
            signatures.add(plan.signature)
        copied = output.src_info.clone()
        hook = ll.combine(combine_request(output, src_info=copied), True)
        plan, x, _, _, source_tokens, positions = FakePlan.launches[-1][:6]
        assert (source_tokens, positions) == (0, copied.data_ptr())
        assert signatures == {plan.signature}
        hook()
        assert FakePlan.launches[-1][1] == x


def test_rows_are_not_copied_for_a_hook(ll):
    output, _ = dispatch(ll, dispatch_request(expert_major=False), False)
    for src_info in (output.src_info, output.src_info.clone()):
        request = combine_request(output, src_info=src_info)
        ll.combine(request, True)()
        assert [launch[1] for launch in FakePlan.launches[-2:]] == [request.x.data_ptr()] * 2


# ---------------------------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_kernels_formats(on_gpus, num_ranks):
    on_gpus(num_ranks)
    tokens = tuple((3 * rank + 5) % 9 for rank in range(num_ranks))
    for fp8, mask, early in itertools.product(sorted(FP8_ARGS), ("none", "some", "skew"), (False, True)):
        case = by_source(num_ranks, tokens, fp8=fp8, num_experts=16, mask=mask, repeats=2)
        check_case(dataclasses.replace(case, weights_at_dispatch=early))


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("finish", ["sync", "async", "hook"])
def test_kernels_ways_to_call(on_gpus, num_ranks, finish):
    on_gpus(num_ranks)
    tokens = (8, 0, 4, 1)[:num_ranks]
    for early, zero_copy, out in itertools.product((False, True), repeat=3):
        case = by_source(num_ranks, tokens, num_topk=6, finish=finish, repeats=3, zero_copy=zero_copy, out=out)
        check_case(dataclasses.replace(case, weights_at_dispatch=early))


@pytest.mark.gpu
@pytest.mark.parametrize("finish", ["sync", "hook"])
def test_kernels_sizes(on_gpus, finish):
    """Token counts up to the maximum, rows in lines and in pieces, hidden sizes, and top-k up to 32."""
    on_gpus(2)
    for max_tokens, tokens, hidden, num_topk, fp8 in (
        (1, (1, 0), 256, 4, "pow2"),
        (7, (7, 6), 1160, 1, "none"),
        (128, (128, 77), 7168, 8, "fp32"),
        (300, (300, 300), 256, 11, "ue8m0"),
        (200, (200, 131), 7168, 8, "none"),
        (64, (8, 1), 2560, 32, "fp32"),
        (16, (0, 0), 136, 3, "none"),
    ):
        case = by_source(2, tokens, max_tokens, hidden, num_topk, 40, fp8=fp8, finish=finish)
        for early in (False, True):
            check_case(dataclasses.replace(case, weights_at_dispatch=early))


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("finish", ["sync", "async", "hook"])
def test_kernels_logfmt(on_gpus, num_ranks, finish):
    on_gpus(num_ranks)
    for max_tokens, hidden in ((8, 512), (40, 1024), (200, 1536), (32, 7168), (8, 136)):
        tokens = (max_tokens, max_tokens // 3, 0, 1)[:num_ranks]
        fp8 = "none" if hidden % 128 else "fp32"
        case = by_source(num_ranks, tokens, max_tokens, hidden, 5, mask="some", fp8=fp8, finish=finish, repeats=3)
        for early in (False, True):
            check_case(dataclasses.replace(case, weights_at_dispatch=early, use_logfmt=True))


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_kernels_both_layouts_give_the_same_bits(on_gpus, num_ranks):
    on_gpus(num_ranks)
    case = LowLatencyCase(num_ranks, (6, 3, 8, 0)[:num_ranks], num_topk=4, num_experts=9, mask="some")
    packed = run_ranks(num_ranks, run_experts, case)
    for rank, got in enumerate(run_ranks(num_ranks, run_experts, dataclasses.replace(case, expert_major=False))):
        expect_bits(got, packed[rank], f"rank {rank}")


@pytest.mark.gpu
def test_kernels_copied_handles(on_gpus):
    on_gpus(2)
    run_ranks(2, run_copied_handles)


def run_hard_values(ctx: RankContext) -> None:
    """NaN of many patterns, infinities, zeros of both signs and subnormals, against the portable engine."""
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    tokens, hidden = 30, 640
    idx = make_inputs(LowLatencyCase(ctx.num_ranks, (tokens,) * ctx.num_ranks, num_topk=4), ctx.rank)[1]
    x = make_hard_rows(generator(401, ctx.rank), torch.bfloat16, tokens, hidden)
    weights = make_hard_rows(generator(402, ctx.rank), torch.float32, tokens, 4)
    rows = make_hard_rows(generator(403, ctx.rank), torch.bfloat16, ctx.num_ranks * 32, hidden)
    rows = rows.view(ctx.num_ranks, 32, hidden)
    on_device = [t.to(ctx.device) for t in (x, idx, weights, rows)]
    for fp8, options in FP8_ARGS.items():
        given = {**options, "expert_major": False}
        got = buffer.low_latency_dispatch(*on_device[:2], 32, 8, topk_weights=on_device[2], **given)
        want = portable.low_latency_dispatch(x, idx, 32, 8, topk_weights=weights, **given)
        for i in (0, 1):
            expect_bits(got[2][i].cpu(), want[2][i], f"{fp8}: handle[{i}]")
        wanted = (want[2][0] >= 0).any(2)
        parts = ((got[0], want[0]),) if fp8 == "none" else zip(got[0], want[0], strict=True)
        for part, (mine, other) in enumerate(parts):
            expect_bits(mine.cpu()[wanted], other[wanted], f"{fp8}: part {part}")
        combined = buffer.low_latency_combine(on_device[3], on_device[1], None, got[2])[0]
        expect_bits(combined.cpu(), portable.low_latency_combine(rows, idx, None, want[2])[0], f"{fp8}: combined")
    finished(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_kernels_hard_values(on_gpus, num_ranks):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_hard_values)


def run_graph(ctx: RankContext, hooked: bool) -> None:
    """Pairs of both layouts in one graph, replayed many times on inputs that change in between."""
    buffer = make_buffer(ctx)
    cases = [by_source(ctx.num_ranks, (20,) * ctx.num_ranks, 32, 1024, 4, 8, mask="some", seed=s) for s in range(3)]
    inputs = [[t.to(ctx.device) for t in make_inputs(case, ctx.rank)] for case in cases]
    rows = [[make_expert_rows(case, rank) for rank in range(ctx.num_ranks)] for case in cases]
    wants = [sum_by_source(c, r, i[1].cpu(), ctx.rank) for c, r, i in zip(cases, rows, inputs, strict=True)]
    x, idx, weights = (t.clone() for t in inputs[0])
    given = rows[0][ctx.rank].to(ctx.device)

    def pair(expert_major: bool) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"return_recv_hook": hooked}
        recv, _, handle, _, hook = buffer.low_latency_dispatch(
            x, idx, 32, 8, use_fp8=False, topk_weights=weights, expert_major=expert_major, **options
        )
        if hook is not None:
            hook()
        sums = recv if expert_major else given
        combined, _, hook = buffer.low_latency_combine(sums, idx, weights, handle, **options)
        if hook is not None:
            hook()
        return handle[0], combined

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for expert_major in (False, True):
            pair(expert_major)
    finished(buffer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        pair(True)
        index, combined = pair(False)
        pair(True)
    for number in range(60):
        case = number % 3
        for into, source in zip((x, idx, weights, given), (*inputs[case], rows[case][ctx.rank]), strict=True):
            into.copy_(source)
        graph.replay()
        expect_bits(combined.cpu(), wants[case], f"replay {number}")
        assert bool((index[:, 20:] == -1).all())
        expect_bits(pair(False)[1].cpu(), wants[case], f"eager call {number}")
    finished(buffer)
    ctx.barrier()


@pytest.mark.gpu
@pytest.mark.parametrize("hooked", [False, True])
def test_kernels_in_graphs(on_gpus, hooked):
    on_gpus(2)
    run_ranks(2, run_graph, hooked)


def run_back_to_back(ctx: RankContext, count: int) -> None:
    """Both layouts in turn without a wait of the host, two operations outstanding, unused memory left as it was."""
    buffer = make_buffer(ctx)
    cases = [
        by_source(ctx.num_ranks, tuple((7 * r + 3 * s) % 33 for r in range(ctx.num_ranks)), 32, 640, 4, 9, seed=s)
        for s in range(4)
    ]
    inputs = [[t.to(ctx.device) for t in make_inputs(case, ctx.rank)] for case in cases]
    rows = [[make_expert_rows(case, rank) for rank in range(ctx.num_ranks)] for case in cases]
    mine = [r[ctx.rank].to(ctx.device) for r in rows]
    wants = [
        sum_by_source(c, r, i[1].cpu(), ctx.rank).to(ctx.device) for c, r, i in zip(cases, rows, inputs, strict=True)
    ]
    bad = torch.zeros((), dtype=torch.int64, device=ctx.device)
    for number in range(count):
        at, hooked = number % 4, number % 3 == 1
        x, idx, weights = inputs[at]
        first = buffer.low_latency_dispatch(x, idx, 32, 9, expert_major=False, return_recv_hook=hooked)
        if hooked:  # another one between the halves
            other = buffer.low_latency_dispatch(x, idx, 32, 9, topk_weights=weights, return_recv_hook=True)
            first[4]()
            other[4]()
        given = mine[at].clone()
        combined, _, hook = buffer.low_latency_combine(given, idx, None, first[2], return_recv_hook=hooked)
        if hook is not None:
            given.fill_(float("nan"))
            hook()
        bad += (combined.view(torch.int16) != wants[at].view(torch.int16)).sum()
    finished(buffer)
    assert int(bad) == 0
    ctx.barrier()


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_kernels_back_to_back(on_gpus, num_ranks):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_back_to_back, 600)


@pytest.mark.gpu(3)
def test_kernels_masked_ranks_have_no_tokens():
    spawn_fresh(3, run_masked, env={"DEEP_EP_TEST_DEVICE": "cuda"})
