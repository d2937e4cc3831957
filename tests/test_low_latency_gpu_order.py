"""Low-latency kernels in time: streams, hooks, host waits, CUDA graphs, statistics of waits, and lost ranks."""

import dataclasses
import os
import random
import signal
import time
from typing import Any

import pytest
import torch
from cuda_cases import LONG_SLEEP, SHORT_SLEEP, finished, make_buffer, outcome
from harness import Died, RankContext, expect_bits, run_ranks, spawn_fresh
from low_latency_cases import FP8_ARGS, LowLatencyCase, make_inputs
from low_latency_soak import prepare, used_rows
from soak_cases import Mismatches, as_parts

from deep_ep.errors import ConfigError

CUDA_ENV = {"DEEP_EP_TEST_DEVICE": "cuda"}


# ---------------------------------------------------------------------------------------------------------------
# Streams, hooks, host


def run_pair(buffer: Any, case: LowLatencyCase, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor) -> Any:
    """Dispatch in bf16 and combine what came, doubled: (received rows, counts, combined)."""
    early = weights if case.weights_at_dispatch else None
    recv, count, handle, _, _ = buffer.low_latency_dispatch(
        x, idx, case.max_tokens, case.num_experts, use_fp8=False, topk_weights=early
    )
    return recv, count, buffer.low_latency_combine(recv * 2, idx, weights, handle)[0]


def run_no_host_wait(ctx: RankContext, early: bool) -> None:
    """Calls behind a sleeping stream return at once; the peers, which do not sleep, may be operations ahead."""
    buffer = make_buffer(ctx)
    case = LowLatencyCase(ctx.num_ranks, (20,) * ctx.num_ranks, 32, 1024, 4, 8, fp8="none", weights_at_dispatch=early)
    inputs = tuple(t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    want = run_pair(buffer, case, *inputs)[2].clone()

    def hooked() -> torch.Tensor:
        recv, _, handle, _, hook = buffer.low_latency_dispatch(
            inputs[0],
            inputs[1],
            case.max_tokens,
            case.num_experts,
            use_fp8=False,
            return_recv_hook=True,
            topk_weights=inputs[2] if early else None,
        )
        hook()
        combined, _, hook = buffer.low_latency_combine(recv * 2, *inputs[1:], handle, return_recv_hook=True)
        hook()
        return combined

    hooked()
    finished(buffer)
    for sleeper in range(ctx.num_ranks):
        ctx.barrier()
        asleep = torch.cuda.Event()
        if ctx.rank == sleeper:
            torch.cuda._sleep(LONG_SLEEP)
        asleep.record()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = [run_pair(buffer, case, *inputs)[2] for _ in range(10)] + [hooked() for _ in range(10)]
            still_asleep = not asleep.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert still_asleep or ctx.rank != sleeper, "a call waited for the device"
        finished(buffer)
        for number, combined in enumerate(got):
            expect_bits(combined, want, f"rank {sleeper} asleep, call {number}")


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
def test_no_host_wait(on_gpus, early):
    on_gpus(2)
    run_ranks(2, run_no_host_wait, early)


def run_streams(ctx: RankContext, early: bool) -> None:
    """Asynchronous calls ordered by their events; inputs that a slow stream makes; hooks called on another stream."""
    buffer = make_buffer(ctx)
    case = LowLatencyCase(ctx.num_ranks, (20,) * ctx.num_ranks, 32, 1024, 4, 8, fp8="none", weights_at_dispatch=early)
    inputs = tuple(t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    recv, _, want = (t.clone() for t in run_pair(buffer, case, *inputs))
    torch.cuda.synchronize()
    slow = torch.cuda.Stream()
    with torch.cuda.stream(slow):
        torch.cuda._sleep(SHORT_SLEEP)
        late = tuple(t.clone() for t in inputs)
        packed, _, handle, event, _ = buffer.low_latency_dispatch(
            late[0], late[1], 32, 8, use_fp8=False, async_finish=True, topk_weights=late[2] if early else None
        )
        del late
        event.current_stream_wait()
        doubled = packed * 2
        combined, event, _ = buffer.low_latency_combine(doubled, *inputs[1:], handle, async_finish=True)
        del doubled, packed
    event.current_stream_wait()
    expect_bits(combined, want, "asynchronous calls")
    # The receive phase belongs to the stream of the call, wherever its hook is called. The send phase has taken what it
    # was given: the caller may write that again before the hook.
    with torch.cuda.stream(slow):
        taken = tuple(t.clone() for t in inputs)
        packed, count, handle, _, hook = buffer.low_latency_dispatch(
            taken[0], taken[1], 32, 8, use_fp8=False, return_recv_hook=True, topk_weights=taken[2] if early else None
        )
        for tensor in taken:
            tensor.zero_()
    hook()
    slow.synchronize()
    used = used_rows(count, packed.shape[1])
    expect_bits(
        packed.cpu().view(-1, case.hidden)[used], recv.cpu().view(-1, case.hidden)[used], "a hook on another stream"
    )
    # So it is with the rows of a combine.
    torch.cuda.current_stream().wait_stream(slow)
    rows = packed * 2
    combined, _, hook = buffer.low_latency_combine(rows, *inputs[1:], handle, return_recv_hook=True)
    rows.fill_(float("nan"))
    hook()
    expect_bits(combined, want, "rows written again before the hook")
    finished(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
def test_streams(on_gpus, early):
    on_gpus(2)
    run_ranks(2, run_streams, early)


def run_outstanding(ctx: RankContext, early: bool) -> None:
    buffer = make_buffer(ctx)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(LowLatencyCase(), ctx.rank))
    want = buffer.low_latency_combine(*_dispatched(buffer, x, idx, weights))[0]
    hooked = {"use_fp8": False, "return_recv_hook": True, "topk_weights": weights if early else None}
    hooks = []
    for _ in range(2):
        hooks.append(buffer.low_latency_dispatch(x, idx, 8, 8, use_fp8=False, return_recv_hook=True)[4])
    with pytest.raises(ConfigError, match="2 low-latency operations are outstanding"):
        buffer.low_latency_dispatch(x, idx, 8, 8, use_fp8=False)
    # Nobody else learns of it, and one rank alone may try once too often.
    if ctx.rank == 0:
        with pytest.raises(ConfigError, match="2 low-latency operations are outstanding"):
            buffer.low_latency_dispatch(x, idx, 8, 8, use_fp8=False, return_recv_hook=True)
    hooks[0]()
    hooks[1]()
    with pytest.raises(ConfigError, match="exclude each other"):
        buffer.low_latency_dispatch(x, idx, 8, 8, use_fp8=False, async_finish=True, return_recv_hook=True)
    expect_bits(buffer.low_latency_combine(*_dispatched(buffer, x, idx, weights))[0], want, "after a refusal")
    # Two micro-batches in turn, each with a dispatch or a combine under way while the other's begins.
    first = buffer.low_latency_dispatch(x, idx, 8, 8, **hooked)
    for _ in range(5):
        second = buffer.low_latency_dispatch(x, idx, 8, 8, **hooked)
        first[4]()
        back = buffer.low_latency_combine(first[0], idx, weights, first[2], return_recv_hook=True)
        second[4]()
        first = buffer.low_latency_dispatch(x, idx, 8, 8, **hooked)
        back[2]()
        expect_bits(back[0], want, "the first micro-batch")
        back = buffer.low_latency_combine(second[0], idx, weights, second[2], return_recv_hook=True)
        back[2]()
        expect_bits(back[0], want, "the second micro-batch")
    first[4]()
    finished(buffer)


def _dispatched(
    buffer: Any, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, early: bool = False
) -> tuple[Any, ...]:
    recv, _, handle, _, _ = buffer.low_latency_dispatch(
        x, idx, 8, 8, use_fp8=False, topk_weights=weights if early else None
    )
    return recv, idx, weights, handle


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
def test_outstanding_operations(on_gpus, early):
    on_gpus(2)
    run_ranks(2, run_outstanding, early)


# ---------------------------------------------------------------------------------------------------------------
# CUDA graphs


def run_graphs(ctx: RankContext, count: int, hooked: bool, early: bool) -> None:
    """Three graphs of different maxima alive at once, replayed in any order between eager calls."""
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    pick, mismatches = random.Random(11), Mismatches(ctx.device)  # equal on all ranks
    options = {"return_recv_hook": hooked}
    graphs = []

    def pair(case: LowLatencyCase, static: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        recv, recv_count, handle, _, hook = buffer.low_latency_dispatch(
            static[0],
            static[1],
            case.max_tokens,
            case.num_experts,
            topk_weights=static[2] if early else None,
            **FP8_ARGS[case.fp8],
            **options,
        )
        if hook is not None:
            hook()
        combined, _, hook = buffer.low_latency_combine(static[3], static[1], static[2], handle, **options)
        if hook is not None:
            hook()
        return (*as_parts(recv), handle[0], recv_count, combined)

    def compare(case: Any, got: tuple[torch.Tensor, ...], what: str) -> None:
        for i, (mine, want) in enumerate(zip(got[:-2], (*case.recv, case.src_info), strict=True)):
            mismatches.compare(case.significant(mine), want, f"{what}: part {i}")
        mismatches.compare(got[-2], case.count, f"{what}: counts")
        mismatches.compare(got[-1], case.combined[False, False], f"{what}: combined")

    stream = torch.cuda.Stream()
    for max_tokens, fp8 in ((96, "fp32"), (32, "none"), (8, "ue8m0")):
        shape = LowLatencyCase(ctx.num_ranks, (max_tokens,) * ctx.num_ranks, max_tokens, 1024, 4, 8, fp8=fp8)
        cases = [prepare(ctx, portable, dataclasses.replace(shape, seed=900 + i, mask="some")) for i in range(4)]
        static = [t.clone() for t in (cases[0].x, cases[0].idx, cases[0].weights, cases[0].rows)]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # memory is agreed upon and everything is loaded before the capture
            pair(shape, static)
        finished(buffer)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = pair(shape, static)
        graphs.append((graph, shape, cases, static, outputs))
    ctx.barrier()
    for step in range(count):
        graph, shape, cases, static, outputs = pick.choice(graphs)
        case = pick.choice(cases)
        if pick.random() < 0.3:
            compare(case, pair(shape, [case.x, case.idx, case.weights, case.rows]), f"eager call {step}")
            continue
        for into, source in zip(static, (case.x, case.idx, case.weights, case.rows), strict=True):
            into.copy_(source)
        graph.replay()
        compare(case, outputs, f"replay {step} of the graph of {shape.max_tokens} tokens")
    # The same graph many times in a row, on inputs that stay.
    graph, shape, cases, static, outputs = graphs[0]
    for into, source in zip(static, (cases[1].x, cases[1].idx, cases[1].weights, cases[1].rows), strict=True):
        into.copy_(source)
    for _ in range(count):
        graph.replay()
    compare(cases[1], outputs, "replays in a row")
    finished(buffer)
    assert not mismatches.found()
    ctx.barrier()


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_graphs(on_gpus, num_ranks, hooked, early):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_graphs, 150, hooked, early)


# ---------------------------------------------------------------------------------------------------------------
# Statistics of waits


def run_rows_written_before_the_hook(ctx: RankContext, early: bool) -> None:
    """Also with a handle whose src_info is a copy, of which combine has to look rows up."""
    buffer = make_buffer(ctx)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(LowLatencyCase(), ctx.rank))
    rows, _, _, handle = _dispatched(buffer, x, idx, weights, early)
    want = buffer.low_latency_combine(rows, idx, weights, handle)[0]
    for its_handle in (handle, (handle[0].clone(), *handle[1:])):
        given = rows.clone()
        combined, _, hook = buffer.low_latency_combine(given, idx, weights, its_handle, return_recv_hook=True)
        given.fill_(float("nan"))
        hook()
        expect_bits(combined, want, f"rows written before the hook, copied={its_handle is not handle}")
    finished(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
def test_rows_may_be_written_before_the_hook(on_gpus, early):
    on_gpus(2)
    run_ranks(2, run_rows_written_before_the_hook, early)


def run_repeated_calls(ctx: RankContext, early: bool) -> None:
    """Calls that skip the detailed checks: outputs stay as they were while later ones come, on any stream."""
    buffer = make_buffer(ctx)
    case = LowLatencyCase(ctx.num_ranks, (20,) * ctx.num_ranks, 32, 1024, 4, 8)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    stats = torch.zeros(8 // ctx.num_ranks, dtype=torch.int32, device=ctx.device)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    first, kept = None, []
    for number in range(60):
        with torch.cuda.stream(streams[number % 3 if number >= 30 else 0]):
            recv, count, handle, _, _ = buffer.low_latency_dispatch(
                x, idx, 32, 8, cumulative_local_expert_recv_stats=stats, topk_weights=weights if early else None
            )
            rows = torch.ones(recv[0].shape, dtype=torch.bfloat16, device=ctx.device)
            combined = buffer.low_latency_combine(rows, idx, weights, handle)[0]
        first = first or (*recv, count, handle, combined)
        kept.append((*recv, count, handle, combined))
    finished(buffer)
    used = used_rows(first[2], first[0].shape[1])
    for number, (q, scales, count, handle, combined) in enumerate(kept):
        expect_bits(count, first[2], f"counts of call {number}")
        expect_bits(combined, first[4], f"call {number}")
        expect_bits(handle[1], first[3][1], f"ranges of call {number}")
        for got, want in ((q, first[0]), (scales, first[1]), (handle[0][..., None], first[3][0][..., None])):
            some = [t.contiguous().view(torch.uint8).cpu().flatten(0, 1)[used] for t in (got, want)]
            expect_bits(some[0], some[1], f"outputs of call {number}")
    assert stats.tolist() == (60 * first[2]).tolist()
    assert buffer.memory_usage()["low_latency_bytes"] > 0
    assert buffer.traffic.dispatch_calls >= 60
    ctx.barrier()


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("early", [False, True])
def test_repeated_calls(on_gpus, num_ranks, early):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_repeated_calls, early)


def run_waits(ctx: RankContext, early: bool) -> dict[str, list[float]]:
    """Milliseconds that each rank waited for each, when rank 1 was late by a second in both operations."""
    buffer = make_buffer(ctx)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(LowLatencyCase(ctx.num_ranks, (6,) * 8), ctx.rank))
    given = {"use_fp8": False, "topk_weights": weights if early else None}
    recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, 8, **given)
    buffer.low_latency_combine(recv, idx, weights, handle)
    seen: dict[str, list[float]] = {}
    for name in ("dispatch", "combine"):
        stats = torch.zeros(ctx.num_ranks, dtype=torch.int64, device=ctx.device)
        finished(buffer)
        ctx.barrier()
        if ctx.rank == 1:
            time.sleep(1.0)
        if name == "dispatch":
            recv, _, handle, _, _ = buffer.low_latency_dispatch(
                x, idx, 8, 8, dispatch_wait_recv_cost_stats=stats, **given
            )
        else:
            buffer.low_latency_combine(recv, idx, weights, handle, combine_wait_recv_cost_stats=stats)
        finished(buffer)
        once = stats.clone()
        assert buffer.last_waits()[f"low_latency_{name}"] == once.tolist()
        if name == "dispatch":  # they add up
            buffer.low_latency_dispatch(x, idx, 8, 8, dispatch_wait_recv_cost_stats=stats, **given)
            finished(buffer)
            assert bool((stats >= once).all())
        seen[name] = (once.double() / 1e6).tolist()
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("early", [False, True])
def test_wait_times(on_gpus, num_ranks, early):
    on_gpus(num_ranks)
    results = run_ranks(num_ranks, run_waits, early)
    for rank, seen in enumerate(results):
        for name, waited_ms in seen.items():
            what = f"{name}: rank {rank} waited {waited_ms} ms"
            assert waited_ms[rank] < 100, what
            if rank != 1:
                assert 500 < waited_ms[1] < 5000, what
            else:
                assert max(waited_ms) < 500, what


# ---------------------------------------------------------------------------------------------------------------
# Ranks that disagree, and lost ones


def run_weights_of_some(ctx: RankContext, how: str) -> Any:
    """The last rank has weights from the dispatch, or uses them, where the others do not: what each of them is told."""
    buffer = make_buffer(ctx, timeout_s=20)
    case = LowLatencyCase(ctx.num_ranks, (6,) * ctx.num_ranks)
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    want = buffer.low_latency_combine(*_dispatched(buffer, x, idx, weights, True))[0].clone()
    rows, _, _, handle = _dispatched(buffer, x, idx, weights, True)
    copied = (handle[0].clone(), *handle[1:])
    finished(buffer)
    ctx.barrier()
    odd, start = ctx.rank == ctx.num_ranks - 1, time.monotonic()

    def act() -> None:
        if how == "dispatch":
            _dispatched(buffer, x, idx, weights, odd)
        elif how == "copied handle":
            buffer.low_latency_combine(rows, idx, weights, handle if odd else copied)
        else:
            buffer.low_latency_combine(rows, idx, weights, handle, sum_at_home=not odd)
        finished(buffer)

    error, seconds = outcome(act), time.monotonic() - start
    ctx.barrier()
    buffer.recover()
    again = buffer.low_latency_combine(*_dispatched(buffer, x, idx, weights, True))[0]
    expect_bits(again, want, "after a recovery")
    finished(buffer)
    return error, seconds


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("how", ["dispatch", "copied handle", "sum at home"])
def test_weights_of_some_ranks_only(on_gpus, num_ranks, how):
    on_gpus(num_ranks)
    for rank, (error, seconds) in enumerate(run_ranks(num_ranks, run_weights_of_some, how)):
        assert error is not None, rank
        assert error[0] == "PeerError", error
        assert error[1] != rank
        assert seconds < 15, "a mismatch is known at once"


def run_without(ctx: RankContext, lost: int, how: str, shrink: bool, early: bool = False) -> Any:
    """Rank `lost` takes no part any more: it dies, or stays silent. What the others return, and their times."""
    num_experts = 2 * ctx.num_ranks
    case = LowLatencyCase(
        ctx.num_ranks, (6,) * ctx.num_ranks, num_experts=num_experts, seed=31, weights_at_dispatch=early
    )
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    # Of the two deadlines the other one is far off.
    deadlines = {"mask_timeout_us": 2_000_000} if shrink else {"timeout_s": 2.0, "mask_timeout_us": 1}
    buffer = make_buffer(ctx, enable_shrink=shrink, low_latency_mode=True, **deadlines)
    full = run_pair(buffer, case, x, idx, weights)
    finished(buffer)
    ctx.barrier()
    if ctx.rank == lost:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        ctx.store.wait(["the others are done"])
        return None
    time.sleep(0.5)
    start = time.monotonic()
    if not shrink:
        error = outcome(lambda: (run_pair(buffer, case, x, idx, weights), finished(buffer)))
        ctx.store.set("the others are done", "")
        return error
    mask = torch.full((ctx.num_ranks,), 7, dtype=torch.int32, device=ctx.device)
    results = []
    for _ in range(3):
        recv, count, handle, _, _ = buffer.low_latency_dispatch(
            x, idx, 8, num_experts, use_fp8=False, topk_weights=weights if early else None
        )
        combined = buffer.low_latency_combine(recv * 2, idx, weights, handle)[0]
        finished(buffer)
        results.append((count.cpu(), handle[1].cpu(), combined.cpu()))
    seconds = time.monotonic() - start
    start = time.monotonic()
    for _ in range(50):
        run_pair(buffer, case, x, idx, weights)
    finished(buffer)
    later_seconds = time.monotonic() - start
    buffer.low_latency_query_mask_buffer(mask)
    # What is left, by the rule of the portable engine with the same mask: terms of the lost rank are missing.
    owned = torch.arange(num_experts, device=ctx.device) // 2
    kept = (idx >= 0) & (owned[idx.clamp(min=0)] != lost)
    again = run_pair(buffer, case, x, torch.where(kept, idx, -1), weights)[2]
    finished(buffer)
    expect_bits(results[-1][2], again, "without the lost rank's terms")
    ctx.store.add("done", 1)
    while int(ctx.store.add("done", 0)) < ctx.num_ranks - 1:
        time.sleep(0.05)
    ctx.store.set("the others are done", "")
    return results, mask.tolist(), seconds, later_seconds, full[1].tolist()


@pytest.mark.gpu(2)
@pytest.mark.parametrize("how", ["killed", "silent"])
@pytest.mark.parametrize("early", [False, True])
def test_the_others_go_on_without_a_lost_rank(how, early):
    rest, gone = spawn_fresh(2, run_without, 1, how, True, early, timeout=90, env=CUDA_ENV)
    assert isinstance(gone, Died) == (how == "killed")
    check_rest(rest, 0, 1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
def test_two_go_on_without_a_third(on_gpus, early):
    on_gpus(3)
    results = spawn_fresh(3, run_without, 1, "silent", True, early, timeout=120, env=CUDA_ENV)
    for rank in (0, 2):
        check_rest(results[rank], rank, 1, 3)


def check_rest(result: Any, rank: int, lost: int, num_ranks: int) -> None:
    results, mask, seconds, later_seconds, full = result
    assert mask == [int(other == lost) for other in range(num_ranks)]
    for count, layout_range, combined in results:
        received = layout_range & 0xFFFFFFFF
        assert received[:, lost].tolist() == [0, 0]
        assert count.tolist() == received.sum(1).tolist()
        assert bool((count <= torch.tensor(full)).all())
        expect_bits(combined, results[-1][2], f"rank {rank}: combined")
    # One deadline of 2 s for the lost rank, then none. Ranks that take turns on a GPU are slow.
    assert 1.5 < seconds < 12, seconds
    assert later_seconds < (1.5 if num_ranks == 2 else 20), later_seconds


@pytest.mark.gpu(2)
@pytest.mark.parametrize("how", ["killed", "silent"])
@pytest.mark.parametrize("early", [False, True])
def test_a_lost_rank_is_named(how, early):
    rest = spawn_fresh(2, run_without, 1, how, False, early, timeout=90, env=CUDA_ENV)[0]
    assert rest is not None
    assert rest[:2] == ("CommTimeout", 1), rest
    assert "rank 1" in rest[2] and "low_latency_dispatch" in rest[2], rest


def run_masked_by_hand(ctx: RankContext, early: bool) -> None:
    """Masks set before a call, taken back, and the rank that takes part again."""
    buffer = make_buffer(ctx, enable_shrink=True, timeout_s=20)
    tokens, num_experts = (6,) * ctx.num_ranks, 2 * ctx.num_ranks
    case = LowLatencyCase(ctx.num_ranks, tokens, num_experts=num_experts, weights_at_dispatch=early)
    inputs = tuple(t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    want = run_pair(buffer, case, *inputs)[2].clone()
    last, status = ctx.num_ranks - 1, torch.full((ctx.num_ranks,), 9, dtype=torch.int32, device=ctx.device)
    finished(buffer)
    for _ in range(2):
        ctx.barrier()
        if ctx.rank == last:  # it masks everybody, so that its epochs go on as theirs do
            for other in range(last):
                buffer.low_latency_update_mask_buffer(other, True)
        else:
            buffer.low_latency_update_mask_buffer(last, True)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int((rank == last) != (ctx.rank == last)) for rank in range(ctx.num_ranks)]
        _, count, combined = run_pair(buffer, case, *inputs)
        owned = torch.arange(case.num_experts, device=ctx.device) // 2
        apart = (owned == last) != (ctx.rank == last)
        alone = torch.where(apart[inputs[1].clamp(min=0)], -1, inputs[1])
        expect_bits(combined, run_pair(buffer, case, inputs[0], alone, inputs[2])[2], "with masks")
        assert int(count.sum()) <= 6 * ctx.num_ranks * case.num_topk
        finished(buffer)
        ctx.barrier()
        buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * ctx.num_ranks
        ctx.barrier()
        expect_bits(run_pair(buffer, case, *inputs)[2], want, "after the masks were taken back")
        finished(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("early", [False, True])
def test_masks_by_hand(on_gpus, num_ranks, early):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_masked_by_hand, early)
