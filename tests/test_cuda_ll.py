"""The host's side of low-latency kernels without a GPU: the region, outputs, hooks and what is launched."""

import copy
import gc
import weakref

import pytest
import torch
from low_latency_fakes import (
    STREAM,
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

from deep_ep import fp8
from deep_ep.engines.cuda_ll import LowLatencyKernels
from deep_ep.engines.low_latency_plans import PLACES
from deep_ep.engines.low_latency_regions import RegionShape
from deep_ep.engines.portable_ll import LowLatencyDispatch
from deep_ep.errors import BufferDestroyed, ConfigError, PeerError, PoolExhausted
from deep_ep.traffic import TrafficStats

WHOLE, SEND, RECEIVE = 0, 1, 2


@pytest.fixture
def lock():
    lock = FakeLock()
    yield lock
    assert lock.held == 0


@pytest.fixture
def ll(monkeypatch, lock):
    install_fakes(monkeypatch)
    return LowLatencyKernels(FakeKernels(), lock, TrafficStats(), 0.5)


@pytest.mark.parametrize("scale_format", [None, "fp32", "pow2", "ue8m0"])
def test_outputs_of_a_dispatch(ll, scale_format):
    recv, wait = torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    request = dispatch_request(hidden=640, scale_format=scale_format, recv=recv, wait=wait)
    output, hook = dispatch(ll, request, False)
    assert hook is None
    num_local, capacity = 2, 12  # rank 1 of 3 has 2 of 7 experts
    assert output.rows.shape == (num_local, capacity, 640)
    assert output.rows.is_contiguous()
    assert output.rows.dtype == (torch.bfloat16 if scale_format is None else torch.float8_e4m3fn)
    if scale_format is None:
        assert output.scales is None
    else:
        dtype, columns = fp8.scale_columns(640, scale_format)
        assert (output.scales.dtype, output.scales.shape) == (dtype, (num_local, capacity, columns))
        assert output.scales.stride() == (columns * capacity, 1, capacity)
    assert (output.count.shape, output.count.dtype) == ((num_local,), torch.int32)
    assert (output.src_info.shape, output.src_info.dtype) == ((num_local, capacity), torch.int32)
    assert (output.layout_range.shape, output.layout_range.dtype) == ((num_local, 3), torch.int64)
    assert output.src_info.is_contiguous()
    assert output.layout_range.is_contiguous()
    [(plan, *arguments)] = FakePlan.launches
    x, idx, weights, num_tokens, rows, scales, small, recv_at, wait_at, part, num_sms, stream = arguments
    assert (x, idx, weights, num_tokens) == (request.x.data_ptr(), request.topk_idx.data_ptr(), 0, 3)
    assert (recv_at, wait_at, part, num_sms, stream) == (recv.data_ptr(), wait.data_ptr(), WHOLE, 66, STREAM)
    assert rows == output.rows.data_ptr()
    assert scales == (0 if scale_format is None else output.scales.data_ptr())
    assert output.layout_range.data_ptr() == small
    assert output.count.data_ptr() == small + plan.outputs.recv_count_at
    assert output.src_info.data_ptr() == small + plan.outputs.src_info_at
    format_ = -1 if scale_format is None else ["fp32", "pow2", "ue8m0"].index(scale_format)
    assert plan.shape == (7, 4, 640, format_, False, True)
    assert getattr(output.src_info, PLACES)[1] == small


def test_outputs_are_fresh_memory(ll):
    outputs = [dispatch(ll, dispatch_request(), False)[0] for _ in range(40)]
    for name in ("rows", "count", "src_info", "layout_range"):
        assert len({getattr(output, name).data_ptr() for output in outputs}) == 40


def test_the_region_is_reserved_once_and_serves_smaller_calls(ll):
    memory = ll._kernels.memory
    ll.dispatch(dispatch_request(num_max=8, num_topk=4), False)
    ll.dispatch(dispatch_request(num_max=4, num_topk=2, num_experts=3, hidden=128), False)
    output, _ = dispatch(ll, dispatch_request(num_tokens=0, num_max=1, idx_dtype=torch.int32), False)
    ll.combine(combine_request(output, 0), False)
    shape = RegionShape(8, 4, 7, 256)
    assert memory.blocks == [shape.num_bytes(3)]
    peers = ll.regions.current.peers
    assert peers.clears == 1
    assert peers.regions == [base + 512 for base in memory.bases]
    assert peers.rest == (*shape, True, ll.masked.data_ptr(), ll._waits.data_ptr(), 0.5)
    assert ll.regions.usage() == {"low_latency_bytes": shape.num_bytes(3)}
    # All ranks have cleared theirs before anyone uses it.
    assert [name for name, _ in memory.asked] == ["low-latency region", "low-latency region is ready"]


def test_a_larger_call_replaces_the_region(ll):
    memory = ll._kernels.memory
    ll.dispatch(dispatch_request(num_max=8, hidden=128), False)
    first = FakePlan.launches[-1][0]
    ll.dispatch(dispatch_request(num_max=4, hidden=512), False)
    assert ll.regions.current.shape == RegionShape(8, 2, 7, 512)
    assert memory.returned == [512]
    ll.dispatch(dispatch_request(num_max=8, hidden=128), False)
    again = FakePlan.launches[-1][0]
    assert again.peers is ll.regions.current.peers is not first.peers
    assert again.signature == first.signature


def test_a_region_stays_while_a_hook_needs_it(ll):
    memory = ll._kernels.memory
    _, hook = dispatch(ll, dispatch_request(num_max=4), True)
    ll.dispatch(dispatch_request(num_max=8), False)
    assert memory.returned == []
    both = RegionShape(4, 2, 7, 256).num_bytes(3) + RegionShape(8, 2, 7, 256).num_bytes(3)
    assert ll.regions.usage() == {"low_latency_bytes": both}
    hook()
    assert FakePlan.launches[-1][0] is FakePlan.launches[0][0]
    ll.dispatch(dispatch_request(num_max=16), False)
    assert memory.returned == [512, 1024]
    assert ll.regions.usage() == {"low_latency_bytes": RegionShape(16, 2, 7, 256).num_bytes(3)}


def test_a_region_stays_while_a_graph_or_another_rank_needs_it(ll, monkeypatch):
    memory = ll._kernels.memory
    ll.dispatch(dispatch_request(num_max=4), False)
    capture(ll, monkeypatch)
    ll.dispatch(dispatch_request(num_max=4), False)
    assert FakePlan.captured == [False, True]
    capture(ll, monkeypatch, False)
    ll.dispatch(dispatch_request(num_max=8), False)
    ll.dispatch(dispatch_request(num_max=16), False)
    assert memory.returned == [1024]
    memory.answers = {0: (RegionShape(32, 2, 7, 256), [True, True])}
    ll.dispatch(dispatch_request(num_max=32), False)
    assert memory.returned == [1024]


def test_no_region_is_reserved_under_capture(ll, monkeypatch):
    capture(ll, monkeypatch)
    with pytest.raises(ConfigError, match="before the capture"):
        ll.dispatch(dispatch_request(), False)
    assert FakePlan.launches == []


def test_ranks_that_disagree(ll):
    memory = ll._kernels.memory
    memory.answers = {2: (RegionShape(5, 2, 7, 256), [])}
    with pytest.raises(ConfigError, match="num_max_tokens=5"):
        ll.dispatch(dispatch_request(num_max=4), False)
    memory.answers = {2: None}
    with pytest.raises(PeerError, match="rank 2 gave the operation up"):
        ll.dispatch(dispatch_request(num_max=4), False)
    assert memory.blocks == []


def test_room_is_made_or_missed(ll):
    memory = ll._kernels.memory
    memory.room, memory.growth = 0, 0
    with pytest.raises(PoolExhausted, match="max_pool_bytes"):
        ll.dispatch(dispatch_request(), False)
    memory.growth = 1 << 30
    ll.dispatch(dispatch_request(), False)
    assert len(memory.blocks) == 1


def test_a_hook_is_a_second_launch(ll):
    kernels = ll._kernels
    output, hook = dispatch(ll, dispatch_request(), True)
    assert [launch[-3] for launch in FakePlan.launches] == [SEND]
    hook()
    hook()
    send, receive = FakePlan.launches
    assert receive[-3] == RECEIVE
    assert receive[-1] == STREAM
    assert send[:-3] == receive[:-3]
    assert kernels.launches == {"low_latency_dispatch": 2}
    hook = ll.combine(combine_request(output), True)
    hook()
    assert [launch[-3] for launch in FakePlan.launches[2:]] == [SEND, RECEIVE]
    ticket = FakePlan.launches[2][-4]
    assert ticket not in (0, output.layout_range.data_ptr())
    assert kernels.launches == {"low_latency_dispatch": 2, "low_latency_combine": 2}


def test_a_third_outstanding_operation_is_refused(ll):
    dispatched, combined = "low_latency_dispatch", "low_latency_combine"
    output, first = dispatch(ll, dispatch_request(), True)
    ll.check_outstanding(dispatched)
    with pytest.raises(ConfigError, match="2 low-latency operations are outstanding"):
        ll.check_outstanding(dispatched, num_others=1)
    second = ll.combine(combine_request(output), True)
    for name in (dispatched, combined):
        with pytest.raises(ConfigError, match="2 low-latency operations are outstanding"):
            ll.check_outstanding(name)
    assert len(FakePlan.launches) == ll.num_pending == 2
    second()
    ll.check_outstanding(dispatched)
    first()
    assert ll.num_pending == 0


def test_an_operation_may_not_use_the_set_of_an_outstanding_one(ll):
    output, hook = dispatch(ll, dispatch_request(), True)
    ll.dispatch(dispatch_request(), False)
    with pytest.raises(ConfigError, match="from 2 calls ago"):
        ll.check_outstanding("low_latency_dispatch")
    ll.check_outstanding("low_latency_combine")  # its sets are others
    ll.combine(combine_request(output), False)
    hook()
    ll.check_outstanding("low_latency_dispatch")


def test_hooks_forgotten_by_recover_do_nothing(ll):
    _, hook = dispatch(ll, dispatch_request(), True)
    ll.recover()
    assert ll.regions.current.num_pending == 0
    assert ll.regions.current.peers.clears == 2
    ll.dispatch(dispatch_request(), True)
    num_launches = len(FakePlan.launches)
    hook()
    assert len(FakePlan.launches) == num_launches


def test_failures_of_kernels_are_raised_before_anything(ll):
    _, hook = dispatch(ll, dispatch_request(), True)
    ll._queue.state = -1
    ll._kernels.failure = PeerError("gone", operation="low_latency_dispatch", peer=2)
    with pytest.raises(PeerError):
        ll.dispatch(dispatch_request(), False)
    with pytest.raises(PeerError):
        hook()
    assert len(FakePlan.launches) == 1


def test_combine_uses_positions_only_of_its_own_dispatch(ll):
    output, _ = dispatch(ll, dispatch_request(), False)
    ll.combine(combine_request(output), False)
    block = output.layout_range.data_ptr()
    outputs = FakePlan.launches[0][0].outputs
    assert FakePlan.launches[-1][4:7] == (block + outputs.source_tokens_at, block + outputs.positions_at, 0)
    for other in (output.src_info.clone(), copy.deepcopy(output.src_info)):
        request = combine_request(output, src_info=other)
        ll.combine(request, False)
        assert FakePlan.launches[-1][1] == request.x.data_ptr()
        assert FakePlan.launches[-1][4:7] == (0, 0, 0)
        # The rows leave in the receive part then, so they are kept as they were.
        hook = ll.combine(request, True)
        assert FakePlan.launches[-1][1] != request.x.data_ptr()
        hook()
    ll.combine(combine_request(output, num_topk=1), False)
    assert FakePlan.launches[-1][4:7] == (0, 0, 0)


def test_weights_come_with_a_dispatch_and_are_used_by_its_combine(ll):
    request = dispatch_request(with_weights=True)
    output, hook = dispatch(ll, request, True)
    hook()
    plan, _, _, weights = FakePlan.launches[0][:4]
    assert weights == FakePlan.launches[1][3] == request.topk_weights.data_ptr()
    assert plan.shape[-1] is True
    outputs, block = plan.outputs, output.layout_range.data_ptr()
    tables = (block + outputs.source_tokens_at, block + outputs.positions_at, block + outputs.weights_at)
    end = output.src_info.untyped_storage().data_ptr() + output.src_info.untyped_storage().nbytes()
    assert tables[2] + 4 * 12 * 2 <= end  # float32 [R, M, K]
    for with_hook in (False, True):
        hook = ll.combine(combine_request(output), with_hook)
        assert FakePlan.launches[-1][4:7] == tables
    hook()
    assert FakePlan.launches[-1][4:7] == tables
    quick_combine(ll, output, combine_request(output))
    assert FakePlan.launches[-1][4:7] == tables
    # Rows that home sums travel as they are; a copy of the handle has no weights.
    request = combine_request(output, sum_at_home=True)
    ll.combine(request, False)
    quick_combine(ll, output, request)
    assert [launch[4:7] for launch in FakePlan.launches[-2:]] == [(*tables[:2], 0)] * 2
    ll.combine(combine_request(output, src_info=output.src_info.clone()), False)
    assert FakePlan.launches[-1][4:7] == (0, 0, 0)


def test_handles_with_and_without_weights_alternate(ll):
    outputs = [dispatch(ll, dispatch_request(with_weights=given), False)[0] for given in (False, True)]
    for output in outputs:
        ll.combine(combine_request(output), False)
    for _ in range(3):
        for given in (False, True):
            output = outputs[given]
            quick_combine(ll, output, combine_request(output))
            offset = getattr(output.src_info, PLACES)[0].weights_at
            want = output.layout_range.data_ptr() + offset if given else 0
            assert FakePlan.launches[-1][6] == want
            request = dispatch_request(with_weights=given)
            handle = quick_dispatch(ll, request)[2]
            assert FakePlan.launches[-1][3] == (request.topk_weights.data_ptr() if given else 0)
            assert getattr(handle[0], PLACES)[0].with_weights is given
    assert len(FakePlan.launches) == 4 + 12


def test_unaligned_tensors_are_copied(ll):
    request = dispatch_request()
    odd = torch.zeros(3 * 256 + 4, dtype=torch.bfloat16)[4:].view(3, 256)
    if odd.data_ptr() % 16 == 0:
        odd = torch.zeros(3 * 256 + 5, dtype=torch.bfloat16)[5:].view(3, 256)
    ll.dispatch(LowLatencyDispatch(odd, request.topk_idx, None, 4, 7, None, None, None), False)
    assert FakePlan.launches[-1][1] % 16 == 0


def test_signatures_differ_by_what_must_agree(ll):
    kinds = [
        {},
        {"hidden": 512},
        {"num_max": 8},
        {"num_experts": 8},
        {"num_topk": 3},
        {"scale_format": "fp32"},
        {"scale_format": "pow2"},
        {"with_weights": True},
    ]
    for given in kinds:
        ll.dispatch(dispatch_request(**given), False)
    signatures = [launch[0].signature for launch in FakePlan.launches]
    assert len(set(signatures)) == len(kinds)
    ll.dispatch(dispatch_request(idx_dtype=torch.int32), False)
    assert FakePlan.launches[-1][0].signature == signatures[0]
    assert not FakePlan.launches[-1][0].is_int64


def test_combines_that_use_weights_and_others_do_not_match(ll):
    def signature(output, **given):
        ll.combine(combine_request(output, **given), False)
        return FakePlan.launches[-1][0].signature

    plain, weighted = (dispatch(ll, dispatch_request(with_weights=given), False)[0] for given in (False, True))
    without = signature(plain)
    assert signature(weighted) != without
    assert signature(weighted, src_info=weighted.src_info.clone()) == without
    assert signature(weighted, sum_at_home=True) == signature(plain, sum_at_home=True) == without


def test_combines_with_and_without_logfmt_do_not_match(ll):
    """They go to plans of their own, and the weights that came with the dispatch are not used."""
    coded = []
    for given in (False, True):
        output, _ = dispatch(ll, dispatch_request(with_weights=given), False)
        plain, request = combine_request(output), combine_request(output, use_logfmt=True)
        ll.combine(plain, False)
        assert quick_combine(ll, output, request) is None
        without = FakePlan.launches[-1]
        ll.combine(request, False)
        assert quick_combine(ll, output, request) is not None
        checked, again = FakePlan.launches[-2:]
        assert checked == again
        assert (without[0].shape[-2], checked[0].shape[-2]) == (False, True)
        assert without[0].signature != checked[0].signature
        assert checked[4] != 0
        assert checked[5:7] == (without[5], 0)
        coded.append(checked[0].signature)
        quick_combine(ll, output, plain)
        assert FakePlan.launches[-1] == without
    assert coded[0] == coded[1]


def test_what_is_served(ll):
    assert ll.serves(136, 8, 128, 256)
    assert ll.serves(128, 32, 128, 256, use_fp8=True)
    assert not ll.serves(136, 8, 128, 256, use_fp8=True)
    assert not ll.serves(132, 8, 128, 256)
    assert not ll.serves(128, 33, 128, 256)
    assert not ll.serves(128, 8, 1 << 19, 256)
    assert not ll.serves(128, 8, 128, 5000)


def test_refusals(ll):
    ll.refuse("low_latency_dispatch")
    assert ll._kernels.memory.asked == [("low-latency region", None)]
    ll.dispatch(dispatch_request(), False)
    ll.refuse("low_latency_combine")
    assert ll.regions.current.peers.refusals == [(1, STREAM)]
    assert ll._queue.ended == [STREAM]
    ll._queue.state = -1  # what has failed is not refused as well
    ll.refuse("low_latency_combine")
    assert ll.regions.current.peers.refusals == [(1, STREAM)]


def test_masks_and_waits(ll):
    ll.set_mask(2, True)
    assert ll.masked.tolist() == [0, 0, 1]
    ll.set_mask(2, False)
    assert ll.masked.tolist() == [0, 0, 0]
    ll._waits[1, 2] = 5
    assert ll.last_waits() == {"low_latency_dispatch": [0, 0, 0], "low_latency_combine": [0, 0, 5]}


def test_hooks_of_a_destroyed_buffer_raise(ll):
    hook = ll.dispatch(dispatch_request(), True)[4]
    ll.close()
    with pytest.raises(BufferDestroyed, match="low_latency_dispatch"):
        hook()


def test_nothing_outlives_a_buffer_that_was_dropped(monkeypatch):
    """Not even where nobody closed it; but what a hook needs."""
    install_fakes(monkeypatch)
    kernels = FakeKernels()
    ll, life = LowLatencyKernels(kernels, FakeLock(), TrafficStats(), 0.5), weakref.ref(kernels)
    output, hook = dispatch(ll, dispatch_request(), True)
    ll.combine(combine_request(output), False)
    monkeypatch.setattr(FakePlan, "launches", [])
    del kernels, ll, output
    gc.collect()
    assert life() is not None
    hook()
    monkeypatch.setattr(FakePlan, "launches", [])
    del hook
    gc.collect()
    assert life() is None
