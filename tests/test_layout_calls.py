"""`_C.LayoutCalls`: which calls it takes, and the tensors that it makes; with functions of Python for the kernel."""

import itertools

import pytest
import torch
from test_cuda_host_path import CPU, NUM_EXPERTS, FakeLayoutQueue, KernelsOnCpu, kernels
from test_short_cuts import K, buffer, call_dispatch, make_call

from deep_ep._native import _C
from deep_ep.engines.low_latency_plans import maker_of, view_maker
from deep_ep.errors import CommTimeout
from deep_ep.layout import compute_dispatch_layout

__all__ = ["buffer", "kernels"]


class Calls:
    """Calls of a group of one rank; the slabs that they asked for, in bytes."""

    def __init__(self) -> None:
        self.queue, self.slabs = FakeLayoutQueue(KernelsOnCpu()), []
        self.native = _C.LayoutCalls(torch.Tensor, -1, self.queue, 1, 64, self.make_slab, view_maker())
        self.run, self.try_run, self.prepare = self.native.run, self.native.try_run, self.native.prepare

    def make_slab(self, num_bytes: int):
        self.slabs.append(num_bytes)
        slab = maker_of(CPU)((num_bytes // 4,), (1,), torch.int32)
        return slab.data_ptr(), slab, slab.view(torch.bool)


@pytest.fixture
def calls():
    return Calls()


def make_idx(num_tokens: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, NUM_EXPERTS, (num_tokens, K), generator=torch.Generator().manual_seed(seed))


def expect(made, idx: torch.Tensor) -> None:
    want = compute_dispatch_layout(idx, NUM_EXPERTS, 1, 1)
    wanted = (want.num_tokens_per_rank, want.num_tokens_per_expert, want.is_token_in_rank)
    for have, tensor in zip(made, wanted, strict=True):
        assert have.dtype == tensor.dtype
        assert have.shape == tensor.shape
        assert torch.equal(have, tensor)
        assert have.is_contiguous()
        assert not have._is_view()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_call_has_tensors_of_its_own(calls, dtype):
    made = []
    for seed, num_tokens in enumerate((12, 12, 12, 30, 30, 0, 1, 1, 1, 12)):
        idx = make_idx(num_tokens, seed).to(dtype)
        made.append((calls.try_run(idx, NUM_EXPERTS, 0), idx))
        calls.prepare(0)
        calls.prepare(0)
    assert calls.queue.launches == [(0, False)] * len(made)
    for tensors, idx in made:
        expect(tensors, idx)
    tensors = [tensor for each, _ in made for tensor in each]
    assert all(tensor._version == 0 for tensor in tensors)
    tensors[0].zero_()
    assert [tensor._version for tensor in tensors] == [1] + [0] * (len(tensors) - 1)
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert calls.slabs == [2 << 20]


def test_tensors_are_made_ahead_once_calls_are_alike(calls):
    idx = make_idx()
    places = []
    for _ in range(4):
        calls.prepare(3)  # not the stream of the calls
        places.append(calls.try_run(idx, NUM_EXPERTS, 0)[0].data_ptr())
        calls.prepare(0)
    other = calls.try_run(make_idx(13), NUM_EXPERTS, 0)[0].data_ptr()  # behind what was made ahead
    steps = {after - before for before, after in itertools.pairwise(places)}
    assert len(steps) == 1
    assert other == places[-1] + 2 * steps.pop()
    assert calls.try_run(idx, NUM_EXPERTS, 0)[0].data_ptr() == places[-1] + places[1] - places[0]
    elsewhere = calls.try_run(idx, NUM_EXPERTS, 3)[0]
    assert len(calls.slabs) == 2
    assert elsewhere.untyped_storage().data_ptr() == elsewhere.data_ptr()
    calls.native.clear()
    expect(calls.try_run(idx, NUM_EXPERTS, 3), idx)
    assert len(calls.slabs) == 3


def test_slabs_are_left_when_they_are_full(calls):
    idx = make_idx(100_000)
    made = [calls.try_run(idx, NUM_EXPERTS, 0) for _ in range(30)]
    assert calls.slabs == [2 << 20] * 2
    for each in made:
        expect(each, idx)
    idx = make_idx(600_000)
    expect(calls.try_run(idx, NUM_EXPERTS, 0), idx)
    assert calls.slabs[2] < 2 << 20
    assert calls.slabs[2] > 600_000


def test_captured_calls_have_memory_of_their_own(calls):
    idx = make_idx()
    for _ in range(3):
        calls.try_run(idx, NUM_EXPERTS, 5)
    calls.prepare(5)
    calls.queue.state = 1
    kept = [calls.try_run(idx, NUM_EXPERTS, 5) for _ in range(3)]
    assert len({each[0].untyped_storage().data_ptr() for each in kept}) == 3
    assert calls.queue.launches == [(5, False)] * 3 + [(5, True)] * 3
    assert len(calls.slabs) == 4


def test_what_it_does_not_take(calls):
    idx = make_idx()
    unusual = [
        (None, NUM_EXPERTS),
        (idx.tolist(), NUM_EXPERTS),
        (idx.short(), NUM_EXPERTS),
        (idx[0], NUM_EXPERTS),
        (idx[:, :0], NUM_EXPERTS),
        (idx.t().contiguous().t(), NUM_EXPERTS),
        (idx.to("meta"), NUM_EXPERTS),
        (torch.nn.Parameter(idx, requires_grad=False), NUM_EXPERTS),
        (idx, 0),
        (idx, -1),
        (idx, True),
        (idx, 65),
        (idx, 1 << 70),
        (idx, 6.0),
        (idx, None),
    ]
    for case in unusual:
        assert calls.try_run(*case, 0) is None, case
    calls.queue.state = -1  # a failure
    assert calls.try_run(idx, NUM_EXPERTS, 0) is None
    assert calls.run(idx.data_ptr(), True, 12, K, NUM_EXPERTS, 0) is None
    assert calls.queue.launches == []


def test_both_ways_of_a_buffer(buffer, kernels):
    idx = make_idx()
    for given in (idx, idx.int(), idx.t().contiguous().t(), torch.nn.Parameter(idx, requires_grad=False)):
        for inference in (False, True):
            with torch.inference_mode(inference):
                per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(given, NUM_EXPERTS)
            assert per_node is event.event is None
            assert not (per_rank.is_inference() or per_expert.is_inference() or in_rank.is_inference())
            expect((per_rank, per_expert, in_rank), idx)
    assert kernels.launches == {"dispatch_layout": 8}
    kernels._error = lambda: (1, 1, 1, 3, 7, 6)
    kernels.layout_queue.state = -1
    for _ in range(2):
        with pytest.raises(CommTimeout, match="rank 3"):
            buffer.get_dispatch_layout(idx, NUM_EXPERTS)


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_made_ahead_is_used_by_like_calls(buffer, kernels, inference):
    x, idx, weights = make_call()
    results = []
    for _ in range(4):
        with torch.inference_mode(inference):
            results.append(call_dispatch(buffer, x, idx, weights))
    made = kernels._next_handle
    assert made is not None
    handle = call_dispatch(buffer, x, idx, weights)[4]
    assert handle[0] is made.tensors[0]
    assert handle[5] is made.tensors[3]
    heads = [result[4][5] for result in results]
    assert len({head.data_ptr() for head in heads}) == 4
    for result in results:
        for tensor, same in zip(result[4], handle, strict=True):
            assert torch.equal(tensor, same)
            assert not tensor.is_inference()
    more = make_call(1, 20)
    assert call_dispatch(buffer, *more)[4][5].shape == (20, 1)


def test_no_memory_for_what_is_made_ahead(buffer, kernels, monkeypatch):
    x, idx, weights = make_call()
    for _ in range(3):
        call_dispatch(buffer, x, idx, weights)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kernels, "_make_handle", fail)
    call_dispatch(buffer, x, idx, weights)  # has its memory, and goes on
    with pytest.raises(RuntimeError, match="out of memory"):
        call_dispatch(buffer, x, idx, weights)
