"""What native low-latency calls do with their inputs: outputs, launches, receive hooks, and the tensors of handles."""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from low_latency_calls import (
    BF16,
    CPU,
    RECEIVE,
    SCALES,
    SEND,
    STREAM,
    WHOLE,
    CombineCalls,
    DispatchCalls,
    H,
    K,
    L,
    M,
    R,
    T,
    combine_arguments,
    combine_tensors,
    dispatch_tensors,
    make_handles,
)

from deep_ep._native import _C
from deep_ep.engines.low_latency_call import ReceiveHook
from deep_ep.engines.low_latency_plans import PLACES, maker_of, view_maker
from deep_ep.errors import BufferDestroyed, CommTimeout
from deep_ep.traffic import TrafficStats


def test_a_dispatch_goes_from_inputs_to_outputs():
    """In both parts, with scales."""
    calls = DispatchCalls(scales=SCALES)
    inputs, stats = (16, 32, 0, T, 48, 64), torch.zeros(1)
    (rows, made), count, handle, event, hook = calls.calls.run((*inputs, 0, 0), None, True, stats, None)
    assert (count.shape, len(handle), event.event) == ((L,), 5, None)
    assert (rows.shape, rows.stride(), rows.dtype) == ((L, R * M, H), (R * M * H, H, 1), BF16)
    assert (made.shape, made.stride(), made.dtype) == SCALES
    world = calls.world
    assert (world.region.num_pending, world.operations.num_pending, world.operations.age(0)) == (1, 1, 1)
    world.kernels.max_blocks = 4
    hook()
    small = getattr(handle[0], PLACES)[1]
    arguments = (*inputs[:4], rows.data_ptr(), made.data_ptr(), small, *inputs[4:])
    assert calls.plan.launches == [(*arguments, SEND, 5, STREAM, False), (*arguments, RECEIVE, 4, STREAM, False)]
    assert calls.plan.begun == [STREAM] * 2
    assert (world.region.num_pending, world.operations.num_pending, world.region.leases) == (0, 0, 0)
    assert (world.kernels.launches, world.used, world.lock.held) == ({"low_latency_dispatch": 2}, [], 0)
    assert world.traffic == TrafficStats(1, 0, T, 0, T * 2 * H, 0, {"bfloat16": 1})


def test_a_combine_goes_from_inputs_to_outputs():
    calls = CombineCalls(weights_at=512)
    inputs = (*range(16, 16 + 8), T, 32, 33)
    out = torch.zeros(1)
    assert calls.calls.run(inputs, out, False, None)[0] is out
    assert calls.plan.launches.pop() == (*inputs, 0, WHOLE, 5, STREAM, False)
    same, event, hook = calls.calls.run(inputs, out, True, None)
    assert (same is out, event.event, calls.world.operations.age(1)) == (True, None, 1)
    hook()
    *arguments, ticket = calls.plan.launches[0][:-4]
    assert (tuple(arguments), ticket != 0) == (inputs, True)
    arguments = (*inputs, ticket)
    assert calls.plan.launches == [(*arguments, SEND, 5, STREAM, False), (*arguments, RECEIVE, 5, STREAM, False)]
    assert calls.world.traffic == TrafficStats(0, 2, 0, 2 * T, 0, 2 * T * 2 * H)
    calls.plan.launches.clear()
    calls = CombineCalls(weights_at=512)
    assert calls.read(*combine_tensors()) is not None


def begin(calls: DispatchCalls | CombineCalls, with_hook: bool = False) -> Any:
    """An operation of addresses."""
    if isinstance(calls, DispatchCalls):
        return calls.calls.run((16, 16, 0, T, 0, 0, 0, 0), None, with_hook, None, None)
    return calls.calls.run((16,) * 8 + (T, 16, 16), torch.zeros(1), with_hook, None)


def test_tickets_lie_on_slabs():
    """One each, as long as the slab goes round; a captured one alone."""
    calls = CombineCalls()
    for _ in range(600):
        begin(calls, True)[-1]()
    tickets = [launch[11] for launch in calls.plan.launches]
    assert tickets[::2] == tickets[1::2]
    assert all(b - a == 128 for a, b in itertools.pairwise(tickets[:1024:2]))
    assert tickets[1024] - tickets[1022] != 128
    calls.plan.state = 1
    hooks = [begin(calls, True)[-1] for _ in range(2)]
    captured = [launch[11] for launch in calls.plan.launches[-2:]]
    assert abs(captured[1] - captured[0]) > 128
    del hooks


@pytest.mark.parametrize("make", [DispatchCalls, CombineCalls])
def test_nothing_is_made_after_a_failure(make):
    calls = make(state=-1)
    good = [*dispatch_tensors(), False] if make is DispatchCalls else combine_arguments()
    assert calls.calls.try_run(*good) is None
    assert begin(calls) is None
    assert calls.plan.begun == [STREAM] * 2
    assert (calls.plan.launches, calls.world.kernels.launches) == ([], {})
    assert calls.world.traffic == TrafficStats()


@pytest.mark.parametrize("make", [DispatchCalls, CombineCalls])
def test_hooks_that_cannot_receive(make):
    """After a failure, as often as one is known; of a buffer that was destroyed; and of one that has started anew."""
    kind = int(make is CombineCalls)
    name = ("low_latency_dispatch", "low_latency_combine")[kind]
    calls = make()
    for known in (True, False):
        hook = begin(calls, True)[-1]
        if known:
            calls.world.kernels.failure = CommTimeout("it was late")
        else:
            calls.plan.state = -1
        with pytest.raises(CommTimeout, match="it is late"):
            hook()
        hook()
        calls.world.kernels.failure, calls.plan.state = None, 0
    assert calls.world.operations.num_pending == calls.world.region.num_pending == 2
    hook = begin(calls, True)[-1]
    calls.world.operations.forget_pending()
    num_launches = len(calls.plan.launches)
    hook()
    assert (calls.world.operations.num_pending, len(calls.plan.launches)) == (0, num_launches)
    hook = begin(calls, True)[-1]
    calls.world.operations.close()
    with pytest.raises(BufferDestroyed, match=name):
        hook()
    assert calls.world.lock.held == 0


@pytest.mark.parametrize("make", [DispatchCalls, CombineCalls])
def test_hooks_are_called_by_any_thread(make):
    calls = make()
    hook = begin(calls, True)[-1]
    calls.world.device = 3
    hook()
    assert calls.world.used == ["begin", "end"]
    assert len(calls.plan.launches) == 2
    hook, calls.world.device = begin(calls, True)[-1], 3
    calls.plan.state = -1
    with pytest.raises(CommTimeout):
        hook()
    assert calls.world.used == ["begin", "end"] * 2


@pytest.mark.parametrize("make", [DispatchCalls, CombineCalls])
def test_hooks_keep_what_is_used(make):
    calls = make()
    if make is DispatchCalls:
        kept = torch.zeros(L, dtype=torch.int32)
        done = calls.calls.try_run(*dispatch_tensors(recv_stats=kept), True)
    else:
        kept = torch.zeros((L, R * M, H), dtype=BF16)
        done = calls.calls.try_run(*combine_arguments(x=kept, with_hook=True))
    life, owner, hook = weakref.ref(kept), weakref.ref(calls.world.region), done[-1]
    calls.world.kernels.launches.clear()
    del kept, done
    gc.collect()
    assert life() is not None and owner() is not None
    hook()
    assert life() is None
    hook()
    assert repr(hook).startswith("<built-in method receive_hook")


@pytest.mark.parametrize("make", [DispatchCalls, CombineCalls])
def test_what_is_captured_is_leased(make):
    calls = make(state=1)
    good = [*dispatch_tensors(), False] if make is DispatchCalls else combine_arguments()
    made = [calls.calls.try_run(*good) for _ in range(2)]
    assert calls.world.region.leases == 2
    begin(calls, True)[-1]()
    assert calls.world.region.leases == 4
    assert [launch[-1] for launch in calls.plan.launches] == [True] * 4
    if make is DispatchCalls:
        slabs = {handle[0].untyped_storage().data_ptr() for _, _, handle, _, _ in made}
        assert len(slabs) == 2


def test_errors_on_the_way_are_raised():
    def fail(*_: object) -> Any:
        raise MemoryError("no room")

    layouts = [((1,), (1,), 0, 1)] * 3
    for make_slab, view in ((fail, None), (lambda _: (8, 1, 2, 3), fail)):
        handles = _C.LowLatencyHandles(make_slab, view, 2, 64, layouts, None, PLACES, (M, H, L))
        calls = DispatchCalls(handles=handles)
        with pytest.raises(MemoryError, match="no room"):
            calls.calls.try_run(*dispatch_tensors(), False)
        assert calls.plan.launches == []
    with pytest.raises(ValueError, match="three"):
        _C.LowLatencyHandles(fail, fail, 2, 64, layouts[:2], None, PLACES, (M, H, L))
    calls = CombineCalls(state=1)
    calls.world.region.lease = fail
    with pytest.raises(MemoryError, match="no room"):
        calls.calls.try_run(*combine_arguments())
    assert calls.plan.launches == []


# ---------------------------------------------------------------------------------------------------------------
# Native methods without pybind11's conversion of arguments


def test_wrong_arguments_of_native_methods_are_type_errors():
    calls = CombineCalls()
    run, good = calls.calls.try_run, combine_arguments()
    for wrong in ([], good[:-1], [*good, None]):
        with pytest.raises(TypeError, match=rf"try_run\(\) takes 9 arguments but {len(wrong)} were given"):
            run(*wrong)
    for value in (-1, 1 << 64, 1.0, "1", None, torch.zeros(1)):
        with pytest.raises(TypeError, match=r"try_run\(\) argument 9 is .*, of the wrong type"):
            run(*good[:8], value)
    with pytest.raises(TypeError, match="keyword"):
        run(x=good[0])
    with pytest.raises(TypeError, match=r"try_run\(\) argument 8 is 1, of the wrong type"):
        run(*good[:7], 1, good[8])
    assert run(*good[:8], (1 << 64) - 1) is None
    assert calls.plan.launches == []
    assert run(*good) is not None


def test_native_methods_keep_their_object():
    calls = DispatchCalls()
    run, world, life = calls.calls.try_run, calls.world, weakref.ref(calls.plan)
    del calls
    gc.collect()
    assert life() is not None
    assert run(*dispatch_tensors(), False) is not None
    del world.operations  # which know calls, and are not kept by them
    with pytest.raises(ValueError, match="operations are gone"):
        run(*dispatch_tensors(), False)
    del run
    gc.collect()
    assert life() is None


# ---------------------------------------------------------------------------------------------------------------
# What a call makes


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])  # with and without a function of its own
@pytest.mark.parametrize("dtype", [BF16, torch.float8_e4m3fn, torch.int64])
def test_new_tensors(device, dtype):
    made = maker_of(device)((2, 3, 5), (15, 1, 3), dtype)
    like = torch.empty_strided((2, 3, 5), (15, 1, 3), dtype=dtype, device=device)
    for have, want in ((made, like), (maker_of(device)((0, 5), (5, 1), dtype), like.new_empty((0, 5)))):
        assert (have.shape, have.stride(), have.dtype, have.device) == (
            want.shape,
            want.stride(),
            want.dtype,
            want.device,
        )
    assert made.is_leaf
    assert not made.requires_grad
    with torch.inference_mode():
        assert maker_of(device)((2,), (1,), dtype).is_inference()


@pytest.mark.parametrize("device", [CPU, torch.device("meta")])
def test_views_of_a_slab(device, monkeypatch):
    """With and without torch's own function for it."""
    slab = torch.empty(64, dtype=torch.int32, device=device)
    for _ in range(2):
        made = view_maker()(slab, (2, 3), (12, 1), 5)
        assert (made.shape, made.stride(), made.dtype, made.storage_offset()) == ((2, 3), (12, 1), torch.int32, 5)
        assert made.untyped_storage()._cdata == slab.untyped_storage()._cdata
        monkeypatch.delattr(torch._C._dynamo.guards, "_reinterpret_tensor", raising=False)


@pytest.mark.parametrize("expert_major", [True, False])
@pytest.mark.parametrize("with_weights", [True, False])
def test_small_tensors_of_handles(expert_major, with_weights):
    """Ordinary tensors that share nothing but their slab, which lives as long as one of them."""
    handles = make_handles(with_weights, expert_major)
    taken = [handles.take(0, False) for _ in range(300)]
    spans, groups = [], L if expert_major else R
    for count, (info, ranges, *numbers), block in taken:
        shape, same_block = getattr(info, PLACES)
        assert (numbers, same_block) == ([M, H, L * R], block)
        assert (count.shape, count.dtype, info.dtype) == ((groups,), torch.int32, torch.int32)
        assert info.shape == ((L, R * M) if expert_major else (R, M, K))
        assert info.data_ptr() == block + shape.src_info_at
        if expert_major:
            assert (ranges.shape, ranges.dtype, ranges.data_ptr()) == ((L, R), torch.int64, block)
        else:
            assert (ranges.shape, ranges.dtype) == ((R, M, K) if with_weights else (0,), torch.float32)
            assert not with_weights or ranges.data_ptr() == block + shape.weights_at
        for tensor in (count, info, ranges):
            assert tensor.is_contiguous()
            assert not tensor._is_view()
            assert tensor._version == 0
            tensor.fill_(1)
            assert tensor._version == 1
            spans.append((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes))
    spans = sorted(span for span in spans if span[0] < span[1])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    kept = taken[0][0]
    kept.fill_(7)
    del taken, count, info, ranges, tensor
    for _ in range(300):
        handles.take(0, False)[1][0].fill_(9)
    assert kept.tolist() == [7] * len(kept)


def test_slabs_belong_to_streams():
    """A few of them are kept; what is captured has its own."""
    handles = make_handles()

    def slab_of(stream: int, captured: bool = False) -> torch.Tensor:
        return handles.take(stream, captured)[0]

    kept = [slab_of(stream) for stream in range(4)]
    places = [each.untyped_storage().data_ptr() for each in kept]
    assert len(set(places)) == 4
    assert [slab_of(stream).untyped_storage().data_ptr() for stream in (3, 2, 1, 0)] == places[::-1]
    captured = [slab_of(1, True) for _ in range(2)]
    assert len({*places, *(each.untyped_storage().data_ptr() for each in captured)}) == 6
    another = slab_of(9)  # in place of the oldest
    assert slab_of(3).untyped_storage().data_ptr() == places[3]
    assert slab_of(9).untyped_storage().data_ptr() == another.untyped_storage().data_ptr()
    assert slab_of(0).untyped_storage().data_ptr() not in places


@pytest.mark.parametrize("first", [True, False])
def test_a_slab_serves_in_inference_mode_and_outside(first):
    """Tensors made outside can be changed there, whatever mode the slab was made in."""
    handles = make_handles()
    for inference in (first, not first):
        with torch.inference_mode(inference):
            count, (info, ranges, *_), _ = handles.take(0, False)
            assert count.is_inference() is info.is_inference() is ranges.is_inference() is inference
            for tensor in (count, info, ranges):
                tensor.zero_()


def test_a_hook_lets_go_of_what_it_kept():
    calls = []

    def fail() -> None:
        raise ValueError("once")

    for finish, arguments in ((lambda *given: calls.append(given), (1, 2)), (fail, ())):
        kept = torch.zeros(1)
        life = weakref.ref(kept)
        hook = ReceiveHook(finish, *arguments, kept=kept)
        del kept
        assert hook.pending
        assert life() is not None
        if finish is fail:
            with pytest.raises(ValueError, match="once"):
                hook()
        else:
            hook()
        assert not hook.pending
        assert life() is None
        hook()
    assert calls == [(1, 2)]
