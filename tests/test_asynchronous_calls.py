"""Calls beside the current stream: what is enqueued on which stream, in which order, by the short cut and the long way.

With stand-ins for torch's streams and events, and those for kernels of `test_short_cuts`; at the end with real ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from cuda_cases import SHORT_SLEEP, dispatch, finished, make_buffer, make_routing
from harness import RankContext, expect_bits, run_ranks
from test_cuda_host_path import NUM_EXPERTS, NUM_SMS, kernels
from test_short_cuts import H, buffer, call_dispatch, make_call, same

from deep_ep import Buffer, Config, EventHandle, EventOverlap, event
from deep_ep.engines.aside import Aside
from deep_ep.engines.low_latency_call import LowLatencyCall
from deep_ep.errors import ConfigError

__all__ = ["buffer", "kernels"]
CURRENT, COMM, OTHER = 5, 7, 9
CONFIG = Config(NUM_SMS)


class FakeStreams:
    """Stands in for torch's functions. `log`: (what, stream), and for events their number, in the order of the calls.

    Attributes:
        failing: waits raise.
        made: how many objects of streams were made.
    """

    def __init__(self, monkeypatch) -> None:
        self.log: list[tuple] = []
        self.current, self.num_events, self.made, self.failing = CURRENT, 0, 0, False
        streams = self

        class Stream:
            def __init__(self, stream_id=COMM, device_index=0, device_type=1, device=None, priority=0) -> None:
                self.stream_id, self.device_index, self.device_type = stream_id, device_index, device_type
                streams.made += 1

        class EventBase:
            def __new__(cls):
                made = super().__new__(cls)
                made.number = streams.num_events
                streams.num_events += 1
                return made

            def record(self, stream) -> None:
                streams.log.append(("record", stream.stream_id, self.number))

            def wait(self, stream) -> None:
                if streams.failing:
                    raise RuntimeError("no wait")
                streams.log.append(("wait", stream.stream_id, self.number))

        class Event(EventBase):
            def record(self, stream=None) -> None:
                raise AssertionError("the way through torch's own layers")

            wait = record

        def set_stream(*, stream_id: int, device_index: int, device_type: int) -> None:
            assert (device_index, device_type) == (0, 1)
            streams.current = stream_id
            streams.log.append(("current", stream_id))

        def use(tensor: torch.Tensor, stream) -> None:
            streams.log.append(("use", stream.stream_id, id(tensor)))

        for owner, name, fake in (
            (torch._C, "_cuda_getCurrentStream", lambda index: (streams.current, 0, 1)),
            (torch._C, "_cuda_getCurrentRawStream", lambda index: streams.current),
            (torch._C, "_cuda_getDevice", lambda: None),
            (torch._C, "_cuda_setStream", set_stream),
            (torch._C, "_CudaEventBase", EventBase),
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "Event", Event),
            (torch.cuda, "is_initialized", lambda: True),
            (torch.Tensor, "record_stream", use),
        ):
            monkeypatch.setattr(owner, name, fake, raising=False)

    def take(self) -> list[tuple]:
        """The log so far, with events numbered as they come, and without what `keep` said; that goes to `uses`."""
        log, self.log[:] = list(self.log), []
        self.uses = [(stream, tensor) for what, stream, *tensor in log if what == "use"]
        numbers: dict[int, int] = {}
        return [
            (what, stream, *(numbers.setdefault(number, len(numbers)) for number in rest))
            for what, stream, *rest in log
            if what != "use"
        ]


@pytest.fixture
def streams(monkeypatch):
    event.stream_of.cache_clear()
    yield FakeStreams(monkeypatch)
    monkeypatch.undo()
    event.stream_of.cache_clear()


@pytest.fixture
def calls(buffer, kernels, streams):
    """Functions by name, that take `previous_event` and `async_finish`, and ``long``, which makes them take that way.

    Each returns the results without the event, the event, and the tensors that it was given; those that kernels read
    come first, as many as ``reads`` says.
    """
    log = streams.log

    def begin(stream: int) -> bool:
        log.append(("begin", stream))
        return False

    kernels._order = SimpleNamespace(begin=begin, end=lambda stream: log.append(("end", stream)), close=lambda: None)
    kernels._domain.refuse = lambda stream: log.append(("refuse", stream))
    count = kernels._count

    def launch(kernel: str) -> None:
        log.append(("launch", streams.current))
        count(kernel)

    kernels._count = launch
    x, idx, weights = make_call()
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, NUM_EXPERTS)
    layout = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    for _ in range(2):
        recv_weights, handle = call_dispatch(buffer, x, idx, weights)[2:5:2]
    rows = torch.rand(handle[3].shape[0], H).bfloat16()
    buffer.dispatch(x, handle=handle, config=CONFIG)

    def uncached(long=False, **when):
        per_node = torch.ones(1, dtype=torch.int32) if long else None
        *out, done = buffer.dispatch(
            x, **layout, topk_idx=idx, topk_weights=weights, config=CONFIG, num_tokens_per_rdma_rank=per_node, **when
        )
        return out, done, [*x, in_rank, per_expert, idx, weights, per_rank]

    def cached(long=False, **when):
        *out, done = buffer.dispatch(x, handle=list(handle) if long else handle, config=CONFIG, **when)
        return out, done, [*x, handle[5], *handle[:5]]

    def combine(long=False, **when):
        *out, done = buffer.combine(rows, list(handle) if long else handle, recv_weights, config=CONFIG, **when)
        return out, done, [rows, recv_weights, handle[0], handle[5], *handle[1:5]]

    log.clear()
    buffer.long.clear()
    return {"uncached": uncached, "cached": cached, "combine": combine}


READS = {"uncached": 6, "cached": 3, "combine": 4}
NAMES = list(READS)


def previous_of(kind: str, streams: FakeStreams):
    """An event, or nothing, on another stream."""
    before, streams.current = streams.current, OTHER
    made = {"none": lambda: None, "empty": EventOverlap, "handle": EventHandle, "overlap": Buffer.capture}[kind]()
    streams.current = before
    streams.take()
    return made


@pytest.mark.parametrize("kind", ["none", "empty", "handle", "overlap"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("async_finish", [False, True])
def test_the_order_of_streams(calls, buffer, streams, name, kind, async_finish):
    previous = previous_of(kind, streams)
    want, _, _ = calls[name]()
    num_launches = sum(what == "launch" for what, *_ in streams.take())
    out, done, given = calls[name](previous_event=previous, async_finish=async_finish)
    short = streams.take()
    uses = streams.uses
    assert buffer.long == [] and same(out, want)
    has_event = kind in ("handle", "overlap")
    where, numbers = CURRENT, iter(range(9))
    wanted: list[tuple] = []
    if async_finish or has_event:
        where = COMM
        if has_event:
            wanted = [("current", COMM), ("wait", COMM, next(numbers))]
        else:
            first = next(numbers)
            wanted = [("record", CURRENT, first), ("wait", COMM, first), ("current", COMM)]
    wanted += [("begin", where), *[("launch", where)] * num_launches]
    if async_finish:
        wanted.append(("record", COMM, next(numbers)))
    wanted.append(("end", where))
    if where == COMM:
        wanted.append(("current", CURRENT))
        if not async_finish:
            last = next(numbers)
            wanted += [("record", COMM, last), ("wait", CURRENT, last)]
    assert short == wanted
    assert streams.current == CURRENT and torch.is_grad_enabled()

    tensors = [tensor for value in out for tensor in (value if isinstance(value, tuple) else [value])]
    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if where == COMM:
        assert {tensor for stream, (tensor,) in uses if stream == COMM} == {id(t) for t in given[: READS[name]]}
        marked = [t for t in tensors if [id(t)] in [tensor for stream, tensor in uses if stream == CURRENT]]
        covered = {tensor.untyped_storage().data_ptr() for tensor in marked}
        assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == covered  # nothing is left out
    else:
        assert uses == []
    if async_finish:
        assert {id(tensor) for tensor in done.extra_tensors} == {id(tensor) for tensor in given}
        done.current_stream_wait()
        assert streams.take() == [("wait", CURRENT, 0)]
    else:
        assert done.event is None and done.extra_tensors is None

    slow, slow_done, _ = calls[name](long=True, previous_event=previous, async_finish=async_finish)
    assert len(buffer.long) == 1 and same(slow, want)
    assert streams.take() == wanted
    assert (slow_done.event is None) == (not async_finish)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("async_finish", [False, True])
def test_what_fails_leaves_the_streams_as_they_were(calls, buffer, kernels, streams, name, async_finish, long):
    def broken(num_sms: int) -> int:
        assert not torch.is_grad_enabled() and streams.current == COMM
        raise MemoryError("no blocks")

    kernels.blocks = broken
    previous = previous_of("overlap", streams)
    with pytest.raises(MemoryError, match="no blocks"):
        calls[name](long=long, previous_event=previous, async_finish=async_finish)
    wanted = [("current", COMM), ("wait", COMM, 0), ("begin", COMM), ("refuse", COMM), ("end", COMM)]
    wanted.insert(3, ("launch", COMM))  # of the refusal
    wanted.append(("current", CURRENT))
    if not async_finish:
        wanted += [("record", COMM, 1), ("wait", CURRENT, 1)]
    assert streams.take() == wanted
    assert streams.uses == [] and torch.is_grad_enabled()
    assert buffer.long == (["combine" if name == "combine" else "dispatch"] if long else [])
    assert buffer.runtime.lock.acquire(blocking=False)
    buffer.runtime.lock.release()


@pytest.mark.parametrize("name", NAMES)
def test_an_end_that_fails_restores_the_stream(calls, kernels, streams, name):
    def fail(stream: int) -> None:
        raise RuntimeError("no end")

    kernels._order.end = fail
    for long in (False, True):
        with pytest.raises(RuntimeError, match="no end"):
            calls[name](long=long, async_finish=True)
        assert streams.current == CURRENT and torch.is_grad_enabled()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("kind", ["none", "handle"])
def test_a_wait_that_fails(calls, buffer, streams, kind, long):
    previous = previous_of(kind, streams)
    streams.failing = True
    with pytest.raises(RuntimeError, match="no wait"):
        calls["cached"](long=long, previous_event=previous, async_finish=True)
    log = streams.take()
    assert streams.current == CURRENT and torch.is_grad_enabled()
    assert ("current", COMM) not in log or ("current", CURRENT) in log
    assert buffer.runtime.lock.acquire(blocking=False)
    buffer.runtime.lock.release()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("previous", [3, "event", torch.zeros(1)])
@pytest.mark.parametrize("async_finish", [False, True])
def test_wrong_previous_events_take_the_long_way(calls, buffer, streams, name, previous, async_finish):
    with pytest.raises(ConfigError, match="previous_event is a"):
        calls[name](previous_event=previous, async_finish=async_finish)
    assert buffer.long == ["combine" if name == "combine" else "dispatch"]
    assert [what for what, *_ in streams.take()] == ["begin", "launch", "refuse", "end"]
    assert streams.current == CURRENT and torch.is_grad_enabled()


def test_nothing_happens_before_the_long_way(calls, buffer, streams, monkeypatch):
    """An answer of None leaves no trace."""
    engine, given = buffer.runtime, calls["cached"]()[2]
    handle = (*given[3:], given[2])
    x, idx, _ = make_call()
    configs, when, nothing = (CONFIG, buffer._default_config), (EventHandle(), True), (None, None, None)
    streams.take()

    def dispatch(x, when, handle=handle):
        return engine.try_dispatch(x, handle, nothing, nothing[:2], None, *configs, when)

    assert dispatch(x, (None, True)) is not None
    streams.take()
    rows = torch.rand(handle[3].shape[0], H).bfloat16()
    for unusual in (
        lambda: dispatch(list(x), when),
        lambda: dispatch(x, when, handle=list(handle)),
        lambda: dispatch(x, when, handle=None),
        lambda: dispatch(x, ("an event", True)),
        lambda: engine.try_combine(rows, list(handle), None, *configs, when),
        lambda: engine.try_combine(rows[1:], handle, None, *configs, when),
        lambda: engine.try_combine(rows, handle, None, *configs, (3, False)),
        lambda: engine.try_layout(idx, NUM_EXPERTS, 3),
    ):
        assert unusual() is None
        assert streams.take() == [] and streams.uses == []
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    assert dispatch(x, when) is None and engine.try_combine(rows, handle, None, *configs, when) is None
    assert engine.try_layout(idx, NUM_EXPERTS, EventHandle()) is None
    assert [what for what, *_ in streams.take()] == ["record"]  # of that event


def test_a_failed_buffer_raises_before_anything_is_enqueued(calls, kernels, streams):
    kernels.check = lambda: (_ for _ in ()).throw(RuntimeError("it failed"))
    for name in NAMES:
        with pytest.raises(RuntimeError, match="it failed"):
            calls[name](async_finish=True)
        assert streams.take() == [] and streams.current == CURRENT


def test_calls_on_the_communication_stream_itself(calls, streams):
    streams.current = COMM
    calls["cached"](async_finish=True)
    log = streams.take()
    assert log[:4] == [("record", COMM, 0), ("wait", COMM, 0), ("current", COMM), ("begin", COMM)]
    assert log[-2:] == [("end", COMM), ("current", COMM)]


def test_streams_and_the_event_of_forks_are_made_once(calls, streams, kernels):
    for name in NAMES:
        calls[name](async_finish=True)
    events, made = streams.num_events, streams.made
    for name in NAMES:
        calls[name](async_finish=True)
        calls[name](previous_event=calls[name](async_finish=True)[1])
    assert streams.made == made
    assert streams.num_events == events + 2 * len(NAMES)  # those that calls returned
    assert kernels.comm_stream() is kernels.aside.stream is kernels.comm_stream()


# ---------------------------------------------------------------------------------------------------------------
# Layouts, events, low-latency calls


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("kind", ["none", "empty", "handle", "overlap"])
def test_layouts_stay_on_the_current_stream(calls, buffer, streams, kernels, kind, long):
    _, idx, _ = make_call()
    given = idx.t().contiguous().t() if long else idx
    want = buffer.get_dispatch_layout(idx, NUM_EXPERTS)[:4]
    previous = previous_of(kind, streams)
    kernels.check = lambda: None
    *out, done = buffer.get_dispatch_layout(given, NUM_EXPERTS, previous, async_finish=True)
    log = streams.take()
    waits = [("wait", CURRENT, 0)] * (kind in ("handle", "overlap"))
    if long:
        waits *= 2  # the short cut waits before it looks, which costs nothing and changes nothing
    assert log == [*waits, ("launch", CURRENT), ("record", CURRENT, len(waits[:1]))]
    assert same(out, list(want)) and done.extra_tensors is None
    assert buffer.get_dispatch_layout(given, NUM_EXPERTS, previous)[4].event is None
    with pytest.raises(ConfigError, match="previous_event is a"):
        buffer.get_dispatch_layout(given, NUM_EXPERTS, "event", async_finish=True)


def test_events_follow_the_current_stream(streams):
    streams.current = OTHER
    made = EventHandle()
    streams.current = CURRENT
    made.current_stream_wait()
    overlap = EventOverlap(made)
    overlap.current_stream_wait()
    with overlap:
        pass
    assert isinstance(made._event, torch.cuda.Event)
    assert streams.log == [("record", OTHER, 0), *[("wait", CURRENT, 0)] * 3]
    assert streams.made == 2
    assert event.event_of(overlap) is event.event_of(made) is made
    assert event.event_of(None) is None is event.event_of(EventOverlap())


def test_without_a_context_events_ask_for_nothing(streams, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    made = EventHandle()
    made.current_stream_wait()
    assert made.query() and streams.log == [] and streams.made == streams.num_events == 0


@pytest.mark.parametrize("fails", [False, True])
def test_an_asynchronous_low_latency_call(buffer, streams, fails):
    aside = Aside(torch.cuda.Stream())
    ll = SimpleNamespace(
        aside=aside, current_device=lambda: 0, index=0, refuse=lambda name: streams.log.append((name,))
    )
    given, made = (torch.zeros(1), torch.zeros(2)), torch.zeros(3)
    call = LowLatencyCall(buffer.runtime, "low_latency_dispatch", ll, given, True, lambda *_: None)
    entered = [("record", CURRENT, 0), ("wait", COMM, 0), ("current", COMM)]
    if fails:
        with pytest.raises(ValueError, match="wrong"), call:
            raise ValueError("wrong")
        assert streams.log == [*entered, ("low_latency_dispatch",), ("current", CURRENT)]
    else:
        with call:
            call.start()
            call.keep((made, 3))
        assert streams.log == [*entered, ("record", COMM, 1), ("current", CURRENT)]
        assert call.event.extra_tensors == (*given, made)
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------------------------------------------------------
# On GPUs


@contextmanager
def only_short_cuts(buffer) -> Iterator[None]:
    long_way, calls = buffer.runtime.call, []
    buffer.runtime.call = lambda operation, *rest: calls.append(operation) or long_way(operation, *rest)
    try:
        yield
    finally:
        del buffer.runtime.call
    assert calls == [], "calls that took the long way"


def run_short_cuts_aside(ctx: RankContext, with_event: bool, async_finish: bool) -> None:
    """What is late is waited for, what is dropped at once is read, and the current stream finds the results."""
    buffer, routing = make_buffer(ctx), make_routing(ctx, 125, 200, 256)
    recv, _, weights, _, handle, _ = dispatch(buffer, routing)
    rows = recv * 2
    want = (buffer.dispatch(routing.x, handle=handle)[0], *buffer.combine(rows, handle, topk_weights=weights)[:2])
    finished(buffer)
    producer = torch.cuda.Stream() if with_event else torch.cuda.current_stream()
    for step in range(6):
        late, before = producer if step % 2 else buffer.get_comm_stream(), None
        with torch.cuda.stream(late):
            torch.cuda._sleep(SHORT_SLEEP)
        with torch.cuda.stream(producer):
            x, y, w, made = routing.x.clone(), rows.clone(), weights.clone(), tuple(t.clone() for t in handle)
            if with_event:
                before = Buffer.capture()
        sizes = [t.nbytes for t in (x, y, w, *made)]
        with only_short_cuts(buffer):
            out = buffer.dispatch(x, handle=made, previous_event=before, async_finish=async_finish)
            back = buffer.combine(y, made, topk_weights=w, previous_event=before, async_finish=async_finish)
        got, events = (out[0], *back[:2]), (out[5].event, back[2].event)
        assert all((done is not None) == async_finish for done in events)
        del x, y, w, made, out, back
        with torch.cuda.stream(producer):  # zeros: read as heads they give wrong rows, and no wild addresses
            junk = [torch.zeros(size, dtype=torch.uint8, device=ctx.device) for size in sizes for _ in range(3)]
        for done in events if async_finish else ():
            done.current_stream_wait()
        expect_bits(tuple(t.clone() for t in got), want, f"step {step}")
        finished(buffer)
        del junk, got


@pytest.mark.gpu
@pytest.mark.parametrize(("with_event", "async_finish"), [(False, True), (True, True), (True, False)])
def test_short_cuts_beside_the_current_stream(on_gpus, with_event, async_finish):
    on_gpus(2)
    run_ranks(2, run_short_cuts_aside, with_event, async_finish)


def run_short_cuts_in_capture(ctx: RankContext) -> None:
    """Forks and joins by events of the capture itself, replayed between calls that are not captured."""
    buffer = make_buffer(ctx)
    inputs = [make_routing(ctx, 145, 32, 256).x + step for step in range(4)]
    handle = dispatch(buffer, make_routing(ctx, 145, 32, 256))[4]
    static = inputs[0].clone()

    def calls(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with only_short_cuts(buffer):
            recv, *_, first = buffer.dispatch(x, handle=handle, previous_event=Buffer.capture(), async_finish=True)
            first.current_stream_wait()
            doubled = recv * 2
            once, _, second = buffer.combine(doubled, handle, async_finish=True)
            twice = buffer.combine(doubled, handle, previous_event=second)[0]
        return recv, once, twice

    def want(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        recv = buffer.dispatch(x, handle=handle)[0]
        back = buffer.combine(recv * 2, handle)[0]
        return recv, back, back

    wanted = [want(x) for x in inputs]
    calls(static)
    finished(buffer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = calls(static)
    ctx.barrier()
    for step in range(12):
        which, other = step % len(inputs), (step + 1) % len(inputs)
        static.copy_(inputs[which])
        graph.replay()
        got = tuple(t.clone() for t in captured)
        eager = calls(inputs[other])
        expect_bits(got, wanted[which], f"replay {step}")
        expect_bits(eager, wanted[other], f"calls after replay {step}")
    finished(buffer)


@pytest.mark.gpu
def test_short_cuts_beside_a_captured_stream(on_gpus):
    on_gpus(2)
    run_ranks(2, run_short_cuts_in_capture)
