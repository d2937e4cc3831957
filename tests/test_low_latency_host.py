"""`Buffer` over low-latency kernels without a GPU: who serves a call, who refuses it, and what is outstanding."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from low_latency_fakes import FakeKernels, FakePlan, install_fakes

import deep_ep
from deep_ep import Buffer
from deep_ep.engines.cuda_ll import LowLatencyKernels
from deep_ep.errors import CommTimeout, ConfigError

M, E, H = 4, 4, 256
ODD_H = 12


@pytest.fixture
def world(monkeypatch):
    """A buffer of one rank whose kernels, for CPU tensors, are fakes; and what it is called with."""
    install_fakes(monkeypatch)
    buffer = Buffer(None, comm=deep_ep.SoloComm(), device="cpu", enable_shrink=True, mask_timeout_us=250_000)
    engine = buffer.runtime
    engine.low_latency = LowLatencyKernels(FakeKernels(0, 1), engine.lock, engine.traffic)
    monkeypatch.setattr(engine, "refuse", lambda *_: pytest.fail("the portable engine's peers were told"))
    x = torch.ones((3, H), dtype=torch.bfloat16)
    idx = torch.full((3, 2), -1)
    yield SimpleNamespace(buffer=buffer, ll=engine.low_latency, x=x, idx=idx, weights=torch.ones((3, 2)))
    buffer.destroy()


def dispatch(world: Any, **other: Any) -> Any:
    arguments = {"x": world.x, "topk_idx": world.idx, "num_max_dispatch_tokens_per_rank": M, "num_experts": E}
    return world.buffer.low_latency_dispatch(**{**arguments, **other})


def combine(world: Any, handle: Any, **other: Any) -> Any:
    arguments = {
        "x": torch.zeros((E, M, H), dtype=torch.bfloat16),
        "topk_idx": world.idx,
        "topk_weights": world.weights,
        "handle": handle,
    }
    return world.buffer.low_latency_combine(**{**arguments, **other})


def portable_combine(world: Any, **other: Any) -> Any:
    """Of rows that are no multiple of 16 bytes, which kernels do not take; none came."""
    handle = (torch.full((E, M), -1, dtype=torch.int32), torch.zeros((E, 1), dtype=torch.int64), M, ODD_H, E)
    return combine(world, handle, x=torch.zeros((E, M, ODD_H), dtype=torch.bfloat16), **other)


def empty_handle(world: Any, **other: Any) -> Any:
    """Of a dispatch that received nothing, as the kernels would have written it."""
    handle = dispatch(world, **other)[2]
    handle[0].fill_(-1)
    handle[1].zero_()
    return handle


def refusals(world: Any) -> list[int]:
    return [kind for kind, _ in world.ll.regions.current.peers.refusals]


def test_checked_and_repeated_calls_agree(world):
    for use_fp8 in (False, True):
        first, second = dispatch(world, use_fp8=use_fp8), dispatch(world, use_fp8=use_fp8)
        for one, other in zip(first[0] if use_fp8 else [first[0]], second[0] if use_fp8 else [second[0]], strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        assert first[2][2:] == second[2][2:] == (M, H, E)
        assert [call[3].event for call in (first, second)] == [None, None]
        assert [call[4] for call in (first, second)] == [None, None]
    out = torch.zeros((3, H), dtype=torch.bfloat16)
    results = [combine(world, second[2], out=given) for given in (None, None, out, out)]
    assert [result[0].shape for result in results] == [(3, H)] * 4
    assert results[2][0] is results[3][0] is out
    assert len(FakePlan.launches) == 8
    traffic = world.buffer.traffic
    assert (traffic.dispatch_calls, traffic.dispatch_rows, traffic.combine_calls) == (4, 12, 4)
    assert traffic.dispatch_dtypes == {"bfloat16": 2, "float8_e4m3fn": 2}
    assert traffic.dispatch_bytes == 6 * 2 * H + 6 * (H + 4 * H // 128)
    assert traffic.combine_bytes == 12 * 2 * H


@pytest.mark.parametrize("options", [{}, {"use_fp8": False}, {"round_scale": True, "use_ue8m0": True}])
@pytest.mark.parametrize("expert_major", [True, False])
def test_a_dispatch_writes_to_given_tensors(world, options, expert_major):
    """In the first call and in later ones, with a hook or without."""
    options = {**options, "expert_major": expert_major}
    count = 0
    for hooked in (False, True, False):
        received = dispatch(world, **options)[0]
        parts = received if isinstance(received, tuple) else (received,)
        given = [torch.empty_strided(part.shape, part.stride(), dtype=part.dtype) for part in parts]
        out = tuple(given) if len(given) == 2 else given[0]
        again, _, _, _, hook = dispatch(world, **options, out=out, return_recv_hook=hooked)
        assert again is out or all(one is other for one, other in zip(again, out, strict=True))
        addresses = [*(part.data_ptr() for part in given), 0][:2]
        assert list(FakePlan.launches[-1][5:7]) == addresses
        if hooked:
            del out, again, given
            hook()  # which keeps them until then
            assert list(FakePlan.launches[-1][5:7]) == addresses
        count += 3 if hooked else 2
        world.ll._plans.clear()  # so that the next call is checked in detail
    assert len(FakePlan.launches) == count


def kept(event: deep_ep.EventOverlap) -> set[int]:
    return {tensor.data_ptr() for tensor in event.extra_tensors}


@pytest.mark.parametrize("is_like_one_before", [False, True])
def test_asynchronous_calls(world, is_like_one_before):
    """Beside the current stream, checked or like one before; the event keeps what the kernels use, statistics too."""
    handle = empty_handle(world)
    stats = torch.zeros(E, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    recv_x = dispatch(world)[0]
    combine(world, handle)
    done, num_launches = world.ll._kernels.aside.done, len(FakePlan.launches)
    if not is_like_one_before:
        world.ll._plans.clear()
    named = {"cumulative_local_expert_recv_stats": stats[0], "dispatch_wait_recv_cost_stats": stats[1]}
    for out in (None, recv_x):
        received, count, handle, event, hook = dispatch(world, async_finish=True, out=out, **named)
        assert (hook, isinstance(event.event, deep_ep.EventHandle)) == (None, True)
        used = (world.x, world.idx, *received, count, handle[0], handle[1], *stats[:2])
        assert {tensor.data_ptr() for tensor in used} <= kept(event)
    assert out is None or received is out
    calls = [("enter", None), ("leave", "before", False)]
    # What is not like one before is found out beside the current stream.
    assert [call[:-1] for call in done] == calls * (2 if is_like_one_before else 3)
    assert [call[-1] - num_launches for call in done[-4:]] == [0, 1, 1, 2]
    done.clear()
    rows = world.buffer.get_next_low_latency_combine_buffer(handle)
    for options in ({}, {"zero_copy": True}, {"out": torch.zeros_like(world.x)}):
        given = {**options, "combine_wait_recv_cost_stats": stats[2]}
        combined, event, hook = combine(world, handle, async_finish=True, **given)
        assert (hook, isinstance(event.event, deep_ep.EventHandle)) == (None, True)
        used = [combined, world.idx, world.weights, *handle[:2], stats[2], *([rows] if "zero_copy" in options else [])]
        assert {tensor.data_ptr() for tensor in used} <= kept(event)
    assert [call[:-1] for call in done] == calls * (3 if is_like_one_before else 4)
    with pytest.raises(ConfigError, match="exclude each other"):
        dispatch(world, async_finish=True, return_recv_hook=True)
    with pytest.raises(ConfigError, match="exclude each other"):
        combine(world, handle, async_finish=True, return_recv_hook=True)


def test_zero_copy_calls_like_one_before(world, monkeypatch):
    """They take the rows of the combine buffer, once, and skip the checks as others do."""
    handle = empty_handle(world)
    combine(world, handle)
    x = torch.zeros((E, M, H), dtype=torch.bfloat16)
    monkeypatch.setattr(world.ll, "combine", lambda *_: pytest.fail("it was checked in detail"))
    for options in ({}, {"return_recv_hook": True}, {"async_finish": True}):
        rows = world.buffer.get_next_low_latency_combine_buffer(handle)
        hook = combine(world, handle, x=x, zero_copy=True, **options)[2]
        assert FakePlan.launches[-1][1] == rows.data_ptr() != x.data_ptr()
        if hook is not None:
            hook()
        with pytest.raises(ConfigError, match="get it anew"):
            combine(world, handle, x=x, zero_copy=True, **options)
    world.buffer.get_next_low_latency_combine_buffer(handle)
    num_launches = len(FakePlan.launches)
    for wrong in ({"use_logfmt": True}, {"x": x.float()}, {"x": x[:1]}, {"x": None}):
        with pytest.raises(ConfigError):
            combine(world, handle, **{"x": x, "zero_copy": True, **wrong})
    assert len(FakePlan.launches) == num_launches


def test_weights_may_go_with_the_dispatch(world):
    """In the first call and in later ones, contiguous or not; combine uses what came, unless home is to sum."""
    strided = torch.ones((2, 3)).t()
    for given in (world.weights, world.weights, strided):
        handle = dispatch(world, topk_weights=given)[2]
        assert FakePlan.launches[-1][3] not in (0, strided.data_ptr())
        for asked in ({}, {"sum_at_home": True}, {"use_logfmt": True}, {}):
            combine(world, handle, **asked)
            assert (FakePlan.launches[-1][6] == 0) == bool(asked)
    # Without tokens there may be no address.
    nothing = {"x": world.x[:0], "topk_idx": world.idx[:0], "topk_weights": world.weights[:0]}
    dispatch(world, **nothing)
    assert FakePlan.launches[-1][0].shape[-1] is True
    num_launches = len(FakePlan.launches)
    empty_handle(world, topk_weights=world.weights)
    portable_combine(world)
    assert len(FakePlan.launches) == num_launches + 1


def test_logfmt_is_of_the_kernels(world):
    """One launch a call, or two with a hook, whether checked or like one before, of plans of its own."""
    handle = empty_handle(world)
    out = torch.zeros((3, H), dtype=torch.bfloat16)
    for how in ({}, {"sum_at_home": True}, {"out": out}, {"return_recv_hook": True}) * 2:
        num_launches = len(FakePlan.launches)
        for use_logfmt in (True, False):
            combined, event, hook = combine(world, handle, use_logfmt=use_logfmt, **how)
            assert combined is out or "out" not in how
            assert (hook is not None) == ("return_recv_hook" in how)
            assert isinstance(event, deep_ep.EventOverlap)
            if hook is not None:
                hook()
            assert FakePlan.launches[-1][0].shape[-2] is use_logfmt
        assert len(FakePlan.launches) == num_launches + (4 if "return_recv_hook" in how else 2)
    assert not world.buffer._portable_waits


def test_a_third_outstanding_operation_takes_part_in_nothing(world):
    handle = empty_handle(world)
    combine(world, handle)
    hooks = [dispatch(world, return_recv_hook=True)[4], combine(world, handle, return_recv_hook=True)[2]]
    num_launches = len(FakePlan.launches)
    calls = [world.ll._operations.num_calls(kind) for kind in (0, 1)]
    for again in ({}, {"async_finish": True}, {"return_recv_hook": True}):
        with pytest.raises(ConfigError, match="2 low-latency operations are outstanding"):
            dispatch(world, **again)
        with pytest.raises(ConfigError, match="2 low-latency operations are outstanding"):
            combine(world, handle, **again)
    with pytest.raises(ConfigError, match="2 low-latency operations are outstanding"):
        portable_combine(world)
    assert len(FakePlan.launches) == num_launches
    assert [world.ll._operations.num_calls(kind) for kind in (0, 1)] == calls
    assert refusals(world) == []
    for hook in hooks:
        hook()
    dispatch(world)


def test_hooks_of_both_engines_count_together(world):
    handle = empty_handle(world)
    calls = world.ll._operations.num_calls(1)
    combined, _, portable = portable_combine(world, return_recv_hook=True)
    assert world.ll._operations.num_calls(1) == calls  # the kernels' epochs are their own
    received = dispatch(world, return_recv_hook=True)
    with pytest.raises(ConfigError, match="2 low-latency operations are outstanding"):
        dispatch(world)
    with pytest.raises(ConfigError, match="2 low-latency operations are outstanding"):
        portable_combine(world)
    assert refusals(world) == []
    portable()
    assert combined.tolist() == torch.zeros((3, ODD_H)).tolist()
    portable_combine(world)
    received[4]()
    num_launches = len(FakePlan.launches)
    dispatch(world)
    combine(world, handle)
    assert len(FakePlan.launches) == num_launches + 2
    del portable


def test_the_portable_engine_has_no_sets(world):
    """The set that the second combine after a hook would use is one of the kernels."""
    handle = empty_handle(world)
    hook = combine(world, handle, return_recv_hook=True)[2]
    combine(world, handle)
    portable_combine(world)
    with pytest.raises(ConfigError, match="from 2 calls ago"):
        combine(world, handle)
    hook()
    combine(world, handle)


def test_a_failure_raised_before_is_raised_again(world):
    handle = empty_handle(world)
    combine(world, handle)
    num_launches = len(FakePlan.launches)
    world.ll._kernels.failure = CommTimeout("gone", operation="dispatch", phase="counts", peer=0, waited_s=1.0)
    for call in (lambda: dispatch(world), lambda: combine(world, handle)):
        with pytest.raises(CommTimeout):
            call()
    assert len(FakePlan.launches) == num_launches


def test_dropped_hooks_of_the_portable_engine_hold_nothing(world):
    empty_handle(world)
    for _ in range(4):
        portable_combine(world, return_recv_hook=True)
    dispatch(world)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": None},
        {"x": torch.zeros((3, H))},
        {"x": torch.zeros(3, dtype=torch.bfloat16)},
        {"x": torch.zeros((9, H), dtype=torch.bfloat16)},
        {"topk_idx": None},
        {"topk_idx": torch.zeros(3, dtype=torch.int64)},
        {"topk_idx": torch.zeros((2, 2), dtype=torch.int64)},
        {"num_max_dispatch_tokens_per_rank": 0},
        {"num_max_dispatch_tokens_per_rank": 2.5},
        {"num_experts": -1},
        {"use_ue8m0": True},
        {"cumulative_local_expert_recv_stats": torch.zeros(2 * E, dtype=torch.int32)[::2]},
        {"dispatch_wait_recv_cost_stats": torch.zeros(1)},
        {"topk_weights": [[1.0, 1.0]] * 3},
        {"topk_weights": torch.ones((3, 1))},
        {"topk_weights": torch.ones((3, 2)).bfloat16()},
        {"out": torch.zeros((E, M, H), dtype=torch.bfloat16)},
        {"out": (torch.zeros((E, M, H), dtype=torch.float8_e4m3fn), None)},
        {"out": (torch.zeros((E, M, H), dtype=torch.float8_e4m3fn), torch.zeros((E, M, H // 128)))},
        {"out": torch.zeros((E, M, H), dtype=torch.float8_e4m3fn), "use_fp8": False},
        {"out": torch.zeros((E, M + 1, H), dtype=torch.bfloat16), "use_fp8": False},
        {"out": torch.zeros((E, M, H), dtype=torch.bfloat16, device="meta"), "use_fp8": False},
        {"out": torch.zeros(E * M * H + 1, dtype=torch.bfloat16)[1:].view(E, M, H), "use_fp8": False},
        {"out": (), "use_fp8": False},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_arguments_are_refused_where_the_peers_are(world, wrong):
    """In the kernels, even if nothing says that this call was meant for them."""
    dispatch(world)
    num_launches = len(FakePlan.launches)
    with pytest.raises(ConfigError):
        dispatch(world, **wrong)
    assert refusals(world) == [0]
    assert len(FakePlan.launches) == num_launches
    dispatch(world)


def test_wrong_combines_are_refused_where_the_peers_are(world):
    handle = empty_handle(world)
    for number, wrong in enumerate(
        (
            {"handle": None},
            {"handle": (handle[0][:1], *handle[1:])},
            {"handle": (*handle[:2], 0, *handle[3:])},
            {"handle": (*handle[:4], None)},
            {"topk_idx": torch.full((M + 1, 2), -1), "topk_weights": torch.ones((M + 1, 2))},
            {"x": torch.zeros((1, M, H), dtype=torch.bfloat16)},
            {"topk_weights": torch.ones((3, 2)).double()},
            {"out": torch.zeros((3, 1), dtype=torch.bfloat16)},
            {"zero_copy": True},
            {"zero_copy": True, "use_logfmt": True},
        )
    ):
        with pytest.raises(ConfigError):
            combine(world, **{"handle": handle, **wrong})
        assert refusals(world) == [1] * (number + 1)


def test_tensors_of_a_handle_may_be_strided(world):
    handle = empty_handle(world)
    strided = torch.stack([handle[0], handle[0]], dim=2)[..., 0]
    assert not strided.is_contiguous()
    combine(world, (strided, *handle[1:]))
    src_info = FakePlan.launches[-1][2]
    assert src_info not in (strided.data_ptr(), handle[0].data_ptr())


def test_rows_may_be_written_again_before_the_hook(world):
    handle = empty_handle(world)
    x = torch.zeros((E, M, H), dtype=torch.bfloat16)
    combine(world, handle, x=x, return_recv_hook=True)[2]()
    assert FakePlan.launches[-2][1] == x.data_ptr()  # the send part takes them
    copied = (handle[0].clone(), *handle[1:])
    combine(world, copied, x=x, return_recv_hook=True)[2]()
    assert FakePlan.launches[-2][1] == FakePlan.launches[-1][1] != x.data_ptr()


def test_waits_are_those_of_the_engine_that_ran_last(world):
    handle = empty_handle(world)
    names = ("low_latency_dispatch", "low_latency_combine")
    assert world.buffer.last_waits() == {name: [0] for name in names}
    world.ll._waits[0, 0], world.ll._waits[1, 0] = 5, 6
    assert world.buffer.last_waits() == {names[0]: [5], names[1]: [6]}
    portable_combine(world)
    assert world.buffer.last_waits() == {names[0]: [5], names[1]: [0]}
    dispatch(world)
    assert world.buffer.last_waits()[names[1]] == [0]
    for _ in range(2):
        combine(world, handle)
        assert world.buffer.last_waits() == {names[0]: [5], names[1]: [6]}
        portable_combine(world)
    combine(world, handle)
    assert world.buffer.last_waits() == {names[0]: [5], names[1]: [6]}


def test_masks_hold_on_both_engines(world, monkeypatch):
    """Ranks that kernels have masked are left out by the portable engine, and the other way round."""
    empty_handle(world)
    seen = []

    def lose_the_rank(engine: Any, request: Any, masked: set[int], mask_after_s: float) -> Any:
        seen.append((set(masked), mask_after_s))
        masked.add(0)
        return lambda: None

    monkeypatch.setattr("deep_ep.low_latency.portable_ll.combine", lose_the_rank)
    portable_combine(world)
    assert world.ll.masked.tolist() == [1]
    portable_combine(world)
    world.buffer.low_latency_clean_mask_buffer()
    portable_combine(world)
    assert seen == [(set(), 0.25), ({0}, 0.25), (set(), 0.25)]


@pytest.mark.parametrize(
    ("given", "variable", "seconds"),
    [(None, None, 10.0), (5e6, "7", 5.0), (None, "1500", 0.0015), (1, None, 1e-6)],
)
def test_the_mask_timeout(monkeypatch, given, variable, seconds):
    if variable is not None:
        monkeypatch.setenv("DEEP_EP_MASK_TIMEOUT_US", variable)
    for shrink in (False, True):
        buffer = Buffer(
            None, comm=deep_ep.SoloComm(), device="cpu", enable_shrink=shrink, mask_timeout_us=given, timeout_s=77
        )
        assert buffer._mask_timeout_s == pytest.approx(seconds if shrink else 0.0)
        buffer.destroy()


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), "soon"])
def test_bad_mask_timeouts(monkeypatch, wrong):
    with pytest.raises(ConfigError, match=r"mask_timeout_us=.+ microseconds"):
        Buffer(None, comm=deep_ep.SoloComm(), device="cpu", mask_timeout_us=wrong)
    monkeypatch.setenv("DEEP_EP_MASK_TIMEOUT_US", str(wrong))
    with pytest.raises(ConfigError, match="DEEP_EP_MASK_TIMEOUT_US"):
        Buffer(None, comm=deep_ep.SoloComm(), device="cpu")
