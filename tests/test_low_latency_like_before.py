"""Low-latency calls like one before on fake kernels: what they launch, and what is left to the detailed checks."""

import copy

import pytest
import torch
from low_latency_fakes import (
    FakeDispatchPlan,
    FakeKernels,
    FakeLock,
    FakePlan,
    capture,
    combine_request,
    dispatch,
    dispatch_request,
    install_fakes,
    quick_combine,
    quick_dispatch,
)

from deep_ep.engines.cuda_ll import LowLatencyKernels
from deep_ep.traffic import TrafficStats

WHOLE, RECEIVE = 0, 2


@pytest.fixture
def lock():
    lock = FakeLock()
    yield lock
    assert lock.held == 0


@pytest.fixture
def traffic():
    return TrafficStats()


@pytest.fixture
def ll(monkeypatch, lock, traffic):
    install_fakes(monkeypatch)
    return LowLatencyKernels(FakeKernels(), lock, traffic, 0.5)


@pytest.mark.parametrize("scale_format", [None, "fp32", "pow2"])
def test_a_call_like_one_before_launches_the_same(ll, traffic, scale_format):
    given = {"recv": torch.zeros(2, dtype=torch.int32), "wait": torch.zeros(3, dtype=torch.int64)}
    request = dispatch_request(scale_format=scale_format, **given)
    assert quick_dispatch(ll, request) is None
    output, _ = dispatch(ll, request, False)
    assert quick_dispatch(ll, dispatch_request(num_experts=6, scale_format=scale_format)) is None
    # The number of tokens may vary.
    other = dispatch_request(num_tokens=4, scale_format=scale_format, **given)
    recv_x, count, handle, event, hook = quick_dispatch(ll, other)
    assert (event.event, hook) == (None, None)
    assert handle[2:] == output.handle[2:]
    first, second = FakePlan.launches
    assert second[0].__class__ is FakeDispatchPlan
    assert second[1:5] == (other.x.data_ptr(), other.topk_idx.data_ptr(), 0, 4)
    assert second[8:] == first[8:]
    rows = recv_x[0] if scale_format else recv_x
    for new, old in ((rows, output.rows), (count, output.count), (handle[0], output.src_info)):
        assert (new.shape, new.stride(), new.dtype) == (old.shape, old.stride(), old.dtype)
        assert new.data_ptr() != old.data_ptr()
    assert (traffic.dispatch_calls, traffic.dispatch_rows) == (2, 7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": None},
        {"x": torch.zeros(256, dtype=torch.bfloat16)},
        {"x": torch.zeros((3, 256))},
        {"x": torch.zeros((2, 256), dtype=torch.bfloat16)},
        {"x": torch.zeros((256, 3), dtype=torch.bfloat16).t()},
        {"x": torch.zeros(3 * 256 + 1, dtype=torch.bfloat16)[1:].view(3, 256)},
        {"topk_idx": [[0, 0]] * 3},
        {"topk_idx": torch.zeros((3, 2), dtype=torch.int32)},
        {"topk_idx": torch.zeros((2, 3), dtype=torch.int64).t()},
        {"topk_weights": torch.ones((3, 2))},
        {"num_max_tokens": 2},
        {"num_max_tokens": None},
        {"num_experts": torch.ones(2)},
        {"use_fp8": True},
        {"round_scale": True},
        {"use_ue8m0": None},
        {"expert_major": False},
        {"num_max_tokens": 4.0},
        {"num_experts": 7 + (1 << 64)},
        {"with_hook": 1},
        {"out": 1},
        {"recv_stats": torch.zeros(3, dtype=torch.int32)},
        {"recv_stats": torch.zeros(2, dtype=torch.int64)},
        {"wait_stats": torch.zeros((3, 2), dtype=torch.int64)[:, 0]},
        {"wait_stats": 1},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_new_or_wrong_is_left_to_the_checks(ll, wrong):
    request = dispatch_request()
    ll.dispatch(request, False)
    assert quick_dispatch(ll, request, **wrong) is None
    assert len(FakePlan.launches) == 1
    assert quick_dispatch(ll, request) is not None


@pytest.mark.parametrize(
    "wrong", [None, [[1.0, 1.0]] * 3, torch.ones((3, 2)).double(), torch.ones((2, 2)), torch.ones((2, 3)).t()]
)
def test_weights_that_are_new_or_wrong_are_left_to_the_checks(ll, wrong):
    request = dispatch_request(with_weights=True)
    ll.dispatch(request, False)
    assert quick_dispatch(ll, request, topk_weights=wrong) is None
    assert len(FakePlan.launches) == 1
    assert quick_dispatch(ll, request) is not None


def test_more_tokens_than_agreed_are_left_to_the_checks(ll):
    ll.dispatch(dispatch_request(), False)
    assert quick_dispatch(ll, dispatch_request(num_tokens=5)) is None


def test_a_combine_like_one_before_launches_the_same(ll, traffic):
    output, _ = dispatch(ll, dispatch_request(), False)
    request = combine_request(output)
    assert quick_combine(ll, output, request) is None
    ll.combine(request, False)
    out, event, hook = quick_combine(ll, output, request)
    assert out is request.out
    assert (event.event, hook) == (None, None)
    out, _, _ = quick_combine(ll, output, request, out=None)
    assert (out.shape, out.dtype) == (request.out.shape, torch.bfloat16)
    assert FakePlan.launches[2] == FakePlan.launches[1]
    assert FakePlan.launches[3][10] == out.data_ptr()
    assert FakePlan.launches[3][:10] == FakePlan.launches[1][:10]
    assert traffic.combine_calls == 3


@pytest.mark.parametrize(
    "name", ["x", "topk_idx", "topk_weights", "handle", "out", "wait_stats", "sum_at_home", "use_logfmt"]
)
def test_combines_with_something_new_are_left_to_the_checks(ll, name):
    output, _ = dispatch(ll, dispatch_request(), False)
    request = combine_request(output)
    ll.combine(request, False)
    src_info, ranges, *numbers = output.handle
    wrong = {
        "x": [request.x.float(), request.x[:1], request.x.transpose(0, 1), None],
        "topk_idx": [request.topk_idx.int(), request.topk_idx[:, :1], torch.zeros((5, 2), dtype=torch.int64), 3],
        "topk_weights": [request.topk_weights.double(), request.topk_weights[:2], request.topk_weights.t(), None],
        "handle": [
            None,
            output.handle[:4],
            (src_info.clone(), ranges, *numbers),
            (copy.deepcopy(src_info), ranges, *numbers),
            (src_info, ranges.clone(), *numbers),
            (src_info, ranges, numbers[0] + 1, *numbers[1:]),
        ],
        "out": [request.out.float(), request.out[:2], torch.zeros((256, 3), dtype=torch.bfloat16).t(), 1],
        "wait_stats": [torch.zeros(3), torch.zeros(2, dtype=torch.int64)],
        "sum_at_home": [True],
        "use_logfmt": [True, None],
    }
    for value in wrong[name]:
        assert quick_combine(ll, output, request, **{name: value}) is None
    assert len(FakePlan.launches) == 2


def test_calls_like_before_use_the_new_region(ll):
    output, _ = dispatch(ll, dispatch_request(), False)
    request = combine_request(output)
    ll.combine(request, False)
    ll.dispatch(dispatch_request(num_max=8), False)
    assert quick_dispatch(ll, dispatch_request()) is None
    assert quick_combine(ll, output, request) is None
    ll.dispatch(dispatch_request(), False)
    quick_dispatch(ll, dispatch_request())
    assert FakePlan.launches[-1][0].peers is ll.regions.current.peers


def test_a_region_that_another_thread_replaced_is_not_used(ll, lock):
    output, _ = dispatch(ll, dispatch_request(), False)
    request = combine_request(output)
    ll.combine(request, False)

    def replace() -> None:
        ll.dispatch(dispatch_request(num_max=2 * ll.regions.current.shape.num_max_tokens), False)

    num_launches = len(FakePlan.launches)
    lock.before = replace
    assert quick_dispatch(ll, dispatch_request()) is None
    assert len(FakePlan.launches) == num_launches + 1
    lock.before = None
    ll.dispatch(dispatch_request(), False)
    ll.combine(request, False)
    lock.before = replace
    assert quick_combine(ll, output, request) is None
    assert [launch[-3] for launch in FakePlan.launches] == [WHOLE] * (num_launches + 4)


def test_calls_like_before_count_as_outstanding(ll):
    output, _ = dispatch(ll, dispatch_request(), False)
    ll.combine(combine_request(output), False)
    first = quick_dispatch(ll, dispatch_request(), with_hook=True)[4]
    _, _, second = quick_combine(ll, output, combine_request(output), with_hook=True)
    assert ll.num_pending == 2
    num_launches = len(FakePlan.launches)
    assert quick_dispatch(ll, dispatch_request()) is None
    assert quick_combine(ll, output, combine_request(output)) is None
    assert len(FakePlan.launches) == num_launches
    first()
    second()
    assert ll.num_pending == 0
    assert [launch[-3] for launch in FakePlan.launches[-2:]] == [RECEIVE, RECEIVE]


def test_captured_outputs_have_blocks_of_their_own(ll, monkeypatch):
    ll.dispatch(dispatch_request(), False)
    capture(ll, monkeypatch)
    ranges = [quick_dispatch(ll, dispatch_request())[2][1] for _ in range(3)]
    assert len({each.untyped_storage().data_ptr() for each in ranges}) == 3
    assert FakePlan.captured == [False, True, True, True]
    assert ll.regions.current.is_leased


def test_outputs_made_in_inference_mode_can_be_changed_outside(ll):
    with torch.inference_mode():
        ll.dispatch(dispatch_request(), False)
    _, count, handle, _, _ = quick_dispatch(ll, dispatch_request())
    count.zero_()
    handle[0].zero_()
    handle[1].zero_()


@pytest.mark.parametrize("num_max", [1, 4])
def test_scales_are_stored_with_tokens_innermost(ll, num_max):
    output, _ = dispatch(ll, dispatch_request(1, 128, num_max, scale_format="fp32"), False)
    assert output.scales.stride() == (3 * num_max, 1, 3 * num_max)
