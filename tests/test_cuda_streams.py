"""The NVLink engine's order in time: host waits, capacities, streams, CUDA graphs, and ranks that fail or disagree."""

import os
import signal
import time

import pytest
import torch
from cuda_cases import (
    LONG_SLEEP,
    SHORT_SLEEP,
    Routing,
    dispatch,
    dispatch_everywhere,
    expect_everywhere,
    fill_everywhere,
    finished,
    make_buffer,
    make_routing,
    outcome,
    received,
    round_trip,
)
from harness import Died, RankContext, expect_bits, run_ranks, spawn_fresh

from deep_ep import Buffer
from deep_ep.errors import BufferOverflow, ConfigError

CUDA_ENV = {"DEEP_EP_TEST_DEVICE": "cuda"}


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setenv("DEEP_EP_TEST_DEVICE", "cuda")


# ---------------------------------------------------------------------------------------------------------------
# Host waits, capacities, streams


def run_without_host_waits(ctx: RankContext) -> None:
    buffer, routing = make_buffer(ctx), make_routing(ctx, 100)
    worst = 24 * ctx.num_ranks
    handle = dispatch(buffer, routing)[4]

    def calls(**options) -> list[torch.Tensor]:
        cached = buffer.dispatch(routing.x, handle=handle, **options)[0]
        mine = buffer.empty_combine_input(handle, 256)
        mine.copy_(cached)
        recv, _, weights, _, made, _ = dispatch(buffer, routing, num_worst_tokens=worst, **options)
        ordinary = recv * 2
        first = buffer.combine(ordinary, made, topk_weights=weights, bias=routing.x, **options)
        return [cached, *first[:2], buffer.combine(mine, handle, **options)[0]]

    want = [t.clone() for t in calls()]
    calls(async_finish=True)
    finished(buffer)
    for options in ({}, {"async_finish": True}):
        ctx.barrier()
        asleep = torch.cuda.Event()
        torch.cuda._sleep(LONG_SLEEP)
        asleep.record()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = [calls() for _ in range(5)][-1]
            if options:  # every one starts after the sleep, and leaves nothing to wait for on the host
                for _ in range(5):
                    calls(**options)
            still_asleep = not asleep.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert still_asleep, "a call waited for the device"
        finished(buffer)
        expect_bits(tuple(got), tuple(want), "calls that were queued behind a sleep")


@pytest.mark.gpu(2)
def test_no_host_wait_where_none_is_promised(on_cuda):
    run_ranks(2, run_without_host_waits)


def run_overflow(ctx: RankContext) -> None:
    buffer = make_buffer(ctx)
    total = 8 * ctx.num_ranks
    for step in range(2):
        recv = dispatch_everywhere(buffer, fill_everywhere(ctx, 8, 64, 4 * step), num_worst_tokens=total - 3)[0]
        torch.cuda.synchronize()
        ctx.barrier()  # nobody calls on before all have seen it
        with pytest.raises(BufferOverflow, match=f"{total} tokens but num_worst_tokens is {total - 3}"):
            buffer.check()
        buffer.check()
        assert bool((recv[:8] == 4 * step).all())  # what fits has arrived
        assert bool((recv[8:] == 4 * step + 1).all())
        exact = dispatch_everywhere(buffer, fill_everywhere(ctx, 8, 64, 4 * step), num_worst_tokens=total)[0]
        expect_everywhere(ctx, exact, 8, 4 * step, "after an overflow")
        finished(buffer)


@pytest.mark.gpu(2)
def test_overflow_is_raised_by_check(on_cuda):
    run_ranks(2, run_overflow)


def run_worst_then_counted(ctx: RankContext) -> None:
    """A worst-case dispatch that has not run yet must not answer the host's wait of the next dispatch."""
    buffer = make_buffer(ctx)
    few, many = fill_everywhere(ctx, 3, 64, 1), fill_everywhere(ctx, 50, 64, 9)
    dispatch_everywhere(buffer, many)
    torch.cuda.synchronize()
    for _ in range(3):
        torch.cuda._sleep(SHORT_SLEEP)
        first = dispatch_everywhere(buffer, few, num_worst_tokens=200)
        recv, _, _, counts, handle, _ = dispatch_everywhere(buffer, many)
        assert counts == [50 * ctx.num_ranks]
        expect_everywhere(ctx, recv, 50, 9, "counted dispatch")
        expect_everywhere(ctx, first[0][: 3 * ctx.num_ranks], 3, 1, "worst-case dispatch")
        assert received(handle, ctx.rank) == 50 * ctx.num_ranks
    finished(buffer)


@pytest.mark.gpu(2)
def test_counts_belong_to_their_dispatch(on_cuda):
    run_ranks(2, run_worst_then_counted)


def run_other_streams(ctx: RankContext, worst: int) -> None:
    """Calls on the communication stream, ordered by events alone, while everything around them is slow."""
    buffer = make_buffer(ctx)
    routing = make_routing(ctx, 110, 40, 512)
    want = [t.clone() for t in round_trip(buffer, routing)]
    count = want[0].shape[0]
    torch.cuda.synchronize()
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    for allocate in (False, True):
        options = {"async_finish": True, "allocate_on_comm_stream": allocate}
        with torch.cuda.stream(producer):
            layout = buffer.get_dispatch_layout(routing.idx, 10)
            torch.cuda._sleep(SHORT_SLEEP)
            x = routing.x.clone()
            before = Buffer.capture()
        torch.cuda._sleep(SHORT_SLEEP)  # the current stream has nothing to do with it
        out = buffer.dispatch(
            x, None, layout[0], layout[1], layout[3], layout[2], routing.idx, routing.weights,
            num_worst_tokens=worst, previous_event=before, **options,
        )  # fmt: skip
        again = buffer.dispatch(x, handle=out[4], previous_event=out[5], **options)
        with torch.cuda.stream(consumer):
            out[5].current_stream_wait()
            doubled = out[0] * 2
            ready = Buffer.capture()
            back = buffer.combine(doubled, out[4], topk_weights=out[2], previous_event=ready, **options)
            with back[2]:
                pass
            again[5].current_stream_wait()
            got = [t.clone() for t in (out[0][:count], again[0][:count], out[1][:count], out[2][:count], *back[:2])]
        consumer.synchronize()
        expect_bits(tuple(got), tuple(want), f"on other streams, allocate_on_comm_stream={allocate}")
        torch.cuda.synchronize()
    with pytest.raises(ConfigError, match="previous_event"):
        buffer.dispatch(routing.x, handle=out[4], previous_event=3, async_finish=True)
    assert torch.is_grad_enabled()
    assert torch.cuda.current_stream() != buffer.get_comm_stream()
    finished(buffer)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("worst", [0, 90])
def test_events_on_other_streams(on_cuda, worst):
    run_ranks(2, run_other_streams, worst)


def run_dropped_arguments(ctx: RankContext) -> None:
    """Arguments may be dropped as soon as an asynchronous call has returned."""
    buffer = make_buffer(ctx)
    source = make_routing(ctx, 120, 200, 256)
    worst = 200 * ctx.num_ranks
    recv, _, _, _, handle, _ = dispatch(buffer, source)
    rows, bias, count = recv.clone(), source.x.clone(), recv.shape[0]
    want = (*round_trip(buffer, source)[:4:3], buffer.combine(rows, handle, bias=bias)[0])
    finished(buffer)
    for _ in range(3):
        arguments = Routing(source.x.clone(), source.idx.clone(), source.weights.clone())
        late = [t.clone() for t in handle], rows.clone(), bias.clone()
        torch.cuda.synchronize()
        sizes = [t.nbytes for t in (arguments.x, arguments.idx, arguments.weights, *late[0], *late[1:])]
        with torch.cuda.stream(buffer.get_comm_stream()):
            torch.cuda._sleep(SHORT_SLEEP)
        out = dispatch(buffer, arguments, num_worst_tokens=worst, async_finish=True)
        back = buffer.combine(late[1], late[0], bias=late[2], async_finish=True)
        got, events = (out[0], out[2], back[0]), (out[5].event, back[2].event)
        del arguments, late, out, back
        # Zeros: read as rows or indices they give wrong results, and no wild addresses.
        junk = [torch.zeros(size, dtype=torch.uint8, device=ctx.device) for size in sizes for _ in range(3)]
        for event in events:
            event.current_stream_wait()
        torch.cuda.synchronize()
        expect_bits((got[0][:count], got[1][:count], got[2]), want, "arguments that were dropped early")
        del junk
    finished(buffer)


@pytest.mark.gpu(2)
def test_arguments_of_asynchronous_calls_may_be_dropped(on_cuda):
    run_ranks(2, run_dropped_arguments)


# ---------------------------------------------------------------------------------------------------------------
# CUDA graphs


def run_graphs(ctx: RankContext, eager_on_capture_stream: bool) -> None:
    """Replays between eager calls that free and reallocate: neither may touch the other's memory."""
    buffer = make_buffer(ctx, num_nvl_bytes=1 << 29)
    tokens, hidden = 32, 256
    worst = tokens * ctx.num_ranks
    inputs = [make_routing(ctx, 130 + i, tokens, hidden) for i in range(8)]
    static = Routing(*(torch.empty_like(t) for t in (inputs[0].x, inputs[0].idx, inputs[0].weights)))
    fixed = dispatch(buffer, inputs[0])[4]
    want = [(*round_trip(buffer, i, worst)[4:], buffer.dispatch(i.x, handle=fixed)[0]) for i in inputs]

    def load(routing: Routing) -> None:
        static.x.copy_(routing.x)
        static.idx.copy_(routing.idx)
        static.weights.copy_(routing.weights)

    load(inputs[0])
    capture_stream = torch.cuda.Stream()
    finished(buffer)
    with torch.cuda.stream(capture_stream):
        round_trip(buffer, static, worst)
    torch.cuda.synchronize()
    both, cached = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(both, stream=capture_stream):
        static_both = round_trip(buffer, static, worst)[4:]
    with torch.cuda.graph(cached, stream=capture_stream):
        static_cached = buffer.dispatch(static.x, handle=fixed)[0]
    ctx.barrier()
    kept, compared, unchanged = [], [], []

    def drop(count: int) -> None:
        for tensors, clones in kept[:count]:
            for tensor, clone in zip(tensors, clones, strict=True):
                unchanged.append((tensor.view(torch.uint8) == clone.view(torch.uint8)).all())
        del kept[:count]

    stream = capture_stream if eager_on_capture_stream else torch.cuda.current_stream()
    with torch.cuda.stream(stream):
        for step in range(50):
            which = step * 3 % len(inputs)
            load(inputs[which])
            both.replay()
            compared.append((tuple(t.clone() for t in static_both), want[which][:2], f"replay {step}"))
            if step % 3:
                cached.replay()
                compared.append((static_cached.clone(), want[which][2], f"replay {step}, cached dispatch"))
            other = (which + step) % len(inputs)
            eager = round_trip(buffer, inputs[other], worst if step % 2 else 0)
            compared.append((eager[4:], want[other][:2], f"eager call after replay {step}"))
            kept.append((eager, [t.clone() for t in eager]))
            if step % 4 == 3:
                drop(len(kept) - 2)
        drop(len(kept))
    torch.cuda.synchronize()
    for got, expected, what in compared:
        expect_bits(got, expected, what)
    assert all(bool(same) for same in unchanged), "a replay wrote to kept outputs of eager calls"
    finished(buffer)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("eager_on_capture_stream", [False, True])
def test_graph_replays_between_eager_calls(on_cuda, eager_on_capture_stream):
    run_ranks(2, run_graphs, eager_on_capture_stream)


def run_uncached_in_capture(ctx: RankContext) -> None:
    buffer, routing = make_buffer(ctx), make_routing(ctx, 140)
    want = [t.clone() for t in round_trip(buffer, routing)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(ConfigError, match="num_worst_tokens, or a handle"):
        dispatch(buffer, routing)
    expect_bits(round_trip(buffer, routing), tuple(want), "after a refused capture")
    finished(buffer)


@pytest.mark.gpu(2)
def test_capture_needs_a_known_size(on_cuda):
    run_ranks(2, run_uncached_in_capture)


def run_overflow_in_replay(ctx: RankContext) -> None:
    buffer, static = make_buffer(ctx), fill_everywhere(ctx, 8, 64, 1)
    dispatch_everywhere(buffer, static, num_worst_tokens=16)
    finished(buffer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dispatch_everywhere(buffer, static, num_worst_tokens=8)
    ctx.barrier()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        ctx.barrier()
        with pytest.raises(BufferOverflow, match="16 tokens but num_worst_tokens is 8"):
            buffer.check()


@pytest.mark.gpu(2)
def test_overflow_of_a_replay_is_raised_by_check(on_cuda):
    run_ranks(2, run_overflow_in_replay)


# ---------------------------------------------------------------------------------------------------------------
# Failures


def expect_recovery(ctx: RankContext, buffer) -> None:
    """All ranks recover, and the buffer does what it did before: also rows that copy engines bring."""
    ctx.barrier()
    buffer.recover()
    portable = make_buffer(ctx, "portable")
    for step in range(4):
        routing = make_routing(ctx, 210 + step, 30 + 50 * step, 512)
        want = round_trip(portable, routing)
        expect_bits(round_trip(buffer, routing), want, f"call {step} after a recovery")
        fixed = round_trip(buffer, routing, (30 + 50 * step) * ctx.num_ranks)
        expect_bits(fixed[4:], want[4:], f"worst-case call {step} after a recovery")
    finished(buffer)


def run_mismatch(ctx: RankContext, how: str):
    buffer = make_buffer(ctx, timeout_s=20)
    routing = make_routing(ctx, 150, hidden=128)
    recv, _, _, _, handle, _ = dispatch(buffer, routing)
    odd = ctx.rank == ctx.num_ranks - 1

    def act() -> None:
        if how == "hidden":
            dispatch(buffer, make_routing(ctx, 151, hidden=256 if odd else 128))
        elif how == "dtype":
            buffer.dispatch(routing.x.float() if odd else routing.x, handle=handle)
        elif odd:
            buffer.combine(recv, handle)
        else:
            buffer.dispatch(routing.x, handle=handle)
        finished(buffer)

    start = time.monotonic()
    first, later = outcome(act), outcome(lambda: buffer.combine(recv, handle))
    seconds = time.monotonic() - start
    expect_recovery(ctx, buffer)
    return first, later, seconds


@pytest.mark.gpu(2)
@pytest.mark.parametrize(("num_ranks", "how"), [(2, "hidden"), (2, "dtype"), (2, "operation"), (3, "operation")])
def test_ranks_that_disagree(on_cuda, num_ranks, how):
    for rank, (first, later, seconds) in enumerate(run_ranks(num_ranks, run_mismatch, how)):
        assert first is not None, rank
        assert first[0] == "PeerError", first
        assert first[1] != rank
        assert later is not None, "a failed buffer must refuse further calls"
        assert later[0] == "PeerError", later
        assert seconds < 15, "a mismatch is known at once"


def run_late(ctx: RankContext):
    round_trip(make_buffer(ctx), make_routing(ctx, 160))  # loads the kernels
    buffer = make_buffer(ctx, timeout_s=2.0)
    routing = make_routing(ctx, 161)
    round_trip(buffer, routing)
    finished(buffer)
    ctx.barrier()
    if ctx.rank == 1:
        time.sleep(3.5)
    start = time.monotonic()
    first = outcome(lambda: (dispatch(buffer, routing), finished(buffer)))
    seconds = time.monotonic() - start
    later = outcome(lambda: dispatch(buffer, routing))
    expect_recovery(ctx, buffer)
    return first, later, seconds


@pytest.mark.gpu(2)
def test_a_late_rank_is_named(on_cuda):
    (first, later, seconds), late = run_ranks(2, run_late)
    assert first[:2] == ("CommTimeout", 1), first
    assert "rank 1" in first[2]
    assert "2 s" in first[2]
    assert later[0] == "CommTimeout"
    assert 1.5 < seconds < 15
    assert late[0] is not None, "the late rank must not take the operation for done"
    assert late[0][0] in ("CommTimeout", "PeerError"), late


def run_killed(ctx: RankContext):
    round_trip(make_buffer(ctx), make_routing(ctx, 170))
    buffer, routing = make_buffer(ctx, timeout_s=4.0), make_routing(ctx, 171)
    round_trip(buffer, routing)
    finished(buffer)
    ctx.barrier()
    if ctx.rank == ctx.num_ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    return outcome(lambda: (dispatch(buffer, routing), finished(buffer)))


@pytest.mark.gpu(2)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_killed_rank_is_named(num_ranks):
    results = spawn_fresh(num_ranks, run_killed, timeout=90, env=CUDA_ENV)
    assert isinstance(results[-1], Died)
    for result in results[:-1]:
        assert result is not None
        assert result[:2] == ("CommTimeout", num_ranks - 1), result


def run_refused_dispatch(ctx: RankContext, how: str):
    """Each rank in turn passes a wrong argument; what all of them saw, and the buffer goes on."""
    buffer, routing = make_buffer(ctx, timeout_s=20), make_routing(ctx, 190, 50, 256)
    want = [t.clone() for t in round_trip(buffer, routing)]
    handle = dispatch(buffer, routing)[4]
    finished(buffer)
    seen = []
    for attempt in range(2 * ctx.num_ranks):
        ctx.barrier()
        x = routing.x[1:] if ctx.rank == attempt % ctx.num_ranks else routing.x
        start = time.monotonic()
        if how == "cached":
            first = outcome(lambda x=x: buffer.dispatch(x, handle=handle))
        else:
            worst = 50 * ctx.num_ranks if how == "worst case" else 0
            first = outcome(lambda x=x, worst=worst: dispatch(buffer, routing, x, num_worst_tokens=worst))
        torch.cuda.synchronize()
        seen.append((first, outcome(buffer.check), outcome(buffer.check), time.monotonic() - start))
        expect_bits(round_trip(buffer, routing), tuple(want), f"after refusal {attempt}")
        finished(buffer)
    assert buffer.runtime.kernels.launches["dispatch_refuse"] == 2
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize(("num_ranks", "how"), [(2, "counted"), (2, "worst case"), (2, "cached"), (3, "counted")])
def test_a_refused_dispatch_leaves_the_buffer_working(on_gpus, num_ranks, how):
    on_gpus(num_ranks)
    for rank, seen in enumerate(run_ranks(num_ranks, run_refused_dispatch, how)):
        for attempt, (first, told, again, seconds) in enumerate(seen):
            refuser = attempt % num_ranks
            if rank == refuser:
                assert first is not None and first[0] == "ConfigError" and told is None, (first, told)
            else:
                # Those whose host waits for counts know it at once, the others with the next check.
                error, nothing = (first, told) if how == "counted" else (told, first)
                assert error is not None and nothing is None, (first, told)
                assert error[:2] == ("PeerError", refuser) and "gave the operation up" in error[2], error
            assert again is None and seconds < 10


def run_refused_combine(ctx: RankContext, in_place: bool):
    buffer, routing = make_buffer(ctx, timeout_s=2.0), make_routing(ctx, 200, 50, 256, "none")
    recv, _, _, _, handle, _ = dispatch(buffer, routing)
    rows = recv if in_place else recv * 2
    buffer.combine(rows, handle)
    finished(buffer)
    ctx.barrier()
    first = outcome(lambda: buffer.combine(rows[1:] if ctx.rank == 0 else rows, handle))
    torch.cuda.synchronize()  # ends, also where copies wait for the inbox of a rank that never opens it
    told = outcome(buffer.check)
    later = [
        outcome(lambda: dispatch(buffer, routing)),
        outcome(lambda: buffer.dispatch(routing.x, handle=handle)),
        outcome(lambda: buffer.combine(rows, handle)),
        outcome(lambda: buffer.empty_combine_input(handle, 256)),
    ]
    assert buffer.memory_usage()["mapped_bytes"] > 0
    expect_recovery(ctx, buffer)
    return first, told, later


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [False, True])
def test_a_refused_combine(on_gpus, in_place):
    on_gpus(2)
    refuser, other = run_ranks(2, run_refused_combine, in_place, timeout=40)
    first, told, later = refuser
    assert first is not None and first[0] == "ConfigError", first
    assert told is not None and told[0] in ("CommTimeout", "PeerError") and told[1] == 1, told
    assert [error and error[:2] for error in later] == [told[:2]] * 4
    first, told, later = other
    assert first is None and told is not None, (first, told)
    assert told[:2] == ("PeerError", 0) and "combine: rank 0 gave the operation up" in told[2], told
    assert later == [told] * 4


def run_absent(ctx: RankContext):
    """Rank 1 never comes to a combine, and goes straight to the recovery; once more without a failure."""
    buffer, routing = make_buffer(ctx, timeout_s=1.5), make_routing(ctx, 205, 50, 256, "none")
    recv, _, _, _, handle, _ = dispatch(buffer, routing)
    rows = recv * 2
    want = buffer.combine(rows, handle)[0].clone()
    finished(buffer)
    ctx.barrier()
    seen = outcome(lambda: (buffer.combine(rows, handle), finished(buffer))) if ctx.rank == 0 else None
    expect_recovery(ctx, buffer)
    expect_bits(buffer.combine(rows, handle)[0], want, "a handle from before the failure")
    expect_recovery(ctx, buffer)
    return seen


@pytest.mark.gpu
def test_recovery_where_a_rank_never_came(on_gpus):
    on_gpus(2)
    seen, nothing = run_ranks(2, run_absent, timeout=40)
    assert nothing is None and seen is not None
    assert seen[:2] == ("CommTimeout", 1) and "combine: rank 0 waited 1.5 s" in seen[2], seen


def run_expert_out_of_range(ctx: RankContext, value: int):
    buffer, routing = make_buffer(ctx), make_routing(ctx, 180)
    dispatch(buffer, routing)
    bad = routing.idx.clone()
    bad[5, 1] = value
    buffer.get_dispatch_layout(bad, 10)
    torch.cuda.synchronize()
    results = [outcome(lambda: buffer.get_dispatch_layout(routing.idx, 10)), outcome(lambda: dispatch(buffer, routing))]
    ctx.barrier()
    return results


@pytest.mark.gpu(2)
@pytest.mark.parametrize("value", [10, -2, 1 << 40])
def test_an_expert_out_of_range_is_told_at_the_next_call(on_cuda, value):
    for results in run_ranks(2, run_expert_out_of_range, value):
        for result in results:
            assert result is not None
            assert result[0] == "ConfigError"
            assert f"topk_idx[5, 1] is {value}" in result[2]
