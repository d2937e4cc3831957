"""The host's side of low-latency kernels without a GPU: the region, outputs, hooks and what is launched."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from deep_ep import fp8
from deep_ep._native import _C
from deep_ep.engines import cuda_ll
from deep_ep.engines.cuda_ll import LowLatencyKernels, RegionShape
from deep_ep.engines.portable_ll import LowLatencyCombine, LowLatencyDispatch
from deep_ep.errors import ConfigError, PeerError, PoolExhausted
from deep_ep.layout import num_local_experts

WHOLE, SEND, RECEIVE = 0, 1, 2
STREAM = 7


class FakePeers:
    def __init__(self, domain: Any, regions: list[int], *rest: Any) -> None:
        self.regions, self.rest, self.clears, self.refusals = regions, rest, 0, []

    def clear(self) -> None:
        self.clears += 1

    def refuse(self, kind: int, stream: int) -> None:
        self.refusals.append((kind, stream))


class FakePlan:
    """A plan of either kind. Launches are kept on the class, in order."""

    launches: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, peers: FakePeers, signature: int, num_topk: int, is_int64: bool, *shape: Any) -> None:
        self.peers, self.signature, self.is_int64, self.shape = peers, signature, is_int64, shape
        num_experts, num_max, hidden, form = shape[:4]
        num_ranks, rank = len(peers.regions), 1
        name = {0: "fp32", 1: "pow2", 2: "ue8m0"}.get(form)
        self.outputs = _C.LowLatencyOutputs(
            num_local_experts(num_experts, num_ranks, rank),
            num_ranks,
            num_max,
            num_topk,
            2 * hidden if name is None else hidden,
            0 if name is None else fp8.scale_columns(hidden, name)[1],
        )

    def launch(self, *arguments: Any) -> None:
        FakePlan.launches.append((self, *arguments))


class FakeMemory:
    """Symmetric memory of three ranks that agree, unless a test says what the others answer."""

    def __init__(self) -> None:
        self.bases, self.room, self.growth = [1 << 20, 2 << 20, 3 << 20], 1 << 30, 0
        self.blocks: list[int] = []
        self.returned: list[int] = []
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[int, Any] = {}
        self.heap = SimpleNamespace(return_block=self.returned.append)

    def rendezvous(self, name: str, value: Any) -> list[Any]:
        self.asked.append((name, value))
        return [self.answers.get(rank, value) for rank in range(3)]

    def reserve_block(self, num_bytes: int) -> list[int]:
        if num_bytes > self.room:
            return []
        self.blocks.append(num_bytes)
        return [512 * len(self.blocks)] * 3

    def grow(self, num_bytes: int) -> int:
        self.room += self.growth
        return self.growth

    def usage(self) -> dict[str, int]:
        return {"free_bytes": self.room}


class FakeKernels:
    def __init__(self) -> None:
        self.memory, self.device, self.domain = FakeMemory(), torch.device("cpu"), object()
        self.rank, self.num_ranks = 1, 3
        self.launches: dict[str, int] = {}
        self.capturing, self.depth, self.failure = False, 0, None

    def enter(self, stream: int | None = None) -> tuple[int, bool]:
        self.depth += 1
        return STREAM if stream is None else stream, self.capturing

    def leave(self, stream: int, capturing: bool) -> None:
        self.depth -= 1

    def blocks(self, num_sms: int) -> int:
        return min(num_sms, 66)

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure


class FakeLock:
    held = 0

    def __enter__(self) -> None:
        self.held += 1

    def __exit__(self, *args: object) -> None:
        self.held -= 1


@pytest.fixture
def ll(monkeypatch):
    monkeypatch.setattr(cuda_ll._C, "LowLatencyPeers", FakePeers, raising=False)
    monkeypatch.setattr(cuda_ll._C, "LowLatencyDispatchPlan", FakePlan, raising=False)
    monkeypatch.setattr(cuda_ll._C, "LowLatencyCombinePlan", FakePlan, raising=False)
    monkeypatch.setattr(FakePlan, "launches", [])
    kernels = LowLatencyKernels(FakeKernels(), FakeLock(), 0.5)
    yield kernels
    assert kernels._kernels.depth == 0


def dispatch_request(
    num_tokens: int = 3, hidden: int = 256, num_max: int = 4, num_experts: int = 7, **given: Any
) -> LowLatencyDispatch:
    x = torch.zeros((num_tokens, hidden), dtype=torch.bfloat16)
    idx = torch.zeros((num_tokens, given.pop("num_topk", 2)), dtype=given.pop("idx_dtype", torch.int64))
    scale_format = given.pop("scale_format", None)
    return LowLatencyDispatch(x, idx, num_max, num_experts, scale_format, given.get("recv"), given.get("wait"))


def combine_request(output: Any, num_tokens: int = 3, num_topk: int = 2, **given: Any) -> LowLatencyCombine:
    hidden, num_max = output.rows.shape[2], output.rows.shape[1] // 3
    return LowLatencyCombine(
        torch.zeros(output.rows.shape, dtype=torch.bfloat16),
        torch.zeros((num_tokens, num_topk), dtype=torch.int64),
        torch.ones((num_tokens, num_topk)),
        given.get("src_info", output.src_info),
        output.layout_range,
        num_max,
        7,
        False,
        False,
        torch.empty((num_tokens, hidden), dtype=torch.bfloat16),
        None,
    )


@pytest.mark.parametrize("scale_format", [None, "fp32", "pow2", "ue8m0"])
def test_outputs_of_a_dispatch(ll, scale_format):
    recv, wait = torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    request = dispatch_request(hidden=640, scale_format=scale_format, recv=recv, wait=wait)
    output, hook = ll.dispatch(request, False)
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
    x, idx, num_tokens, rows, small, recv_at, wait_at, part, num_sms, stream = arguments
    assert (x, idx, num_tokens) == (request.x.data_ptr(), request.topk_idx.data_ptr(), 3)
    assert (recv_at, wait_at, part, num_sms, stream) == (recv.data_ptr(), wait.data_ptr(), WHOLE, 66, STREAM)
    assert rows == output.rows.data_ptr()
    if scale_format is not None:
        assert output.scales.data_ptr() == rows + plan.outputs.scales_at
    assert output.layout_range.data_ptr() == small
    assert output.count.data_ptr() == small + plan.outputs.recv_count_at
    assert output.src_info.data_ptr() == small + plan.outputs.src_info_at
    assert plan.shape == (7, 4, 640, -1 if scale_format is None else ["fp32", "pow2", "ue8m0"].index(scale_format))
    assert getattr(output.src_info, cuda_ll.PLACES) == (
        2,
        small + plan.outputs.source_tokens_at,
        small + plan.outputs.positions_at,
    )


def test_outputs_are_fresh_memory(ll):
    outputs = [ll.dispatch(dispatch_request(), False)[0] for _ in range(20)]
    for name in ("rows", "count", "src_info", "layout_range"):
        assert len({getattr(output, name).data_ptr() for output in outputs}) == 20


def test_the_region_is_reserved_once_and_serves_smaller_calls(ll):
    memory = ll._kernels.memory
    ll.dispatch(dispatch_request(num_max=8, num_topk=4), False)
    ll.dispatch(dispatch_request(num_max=4, num_topk=2, num_experts=3, hidden=128), False)
    output, _ = ll.dispatch(dispatch_request(num_tokens=0, num_max=1, idx_dtype=torch.int32), False)
    ll.combine(combine_request(output, 0), False)
    shape = RegionShape(8, 4, 7, 256)
    assert memory.blocks == [shape.num_bytes(3)]
    peers = ll._region.peers
    assert peers.clears == 1
    assert peers.regions == [base + 512 for base in memory.bases]
    assert peers.rest == (*shape, ll.masked.data_ptr(), ll._waits.data_ptr(), 0.5)
    assert ll.usage() == {"region_bytes": shape.num_bytes(3), "retired_bytes": 0}
    # All ranks have cleared theirs before anyone uses it.
    assert [name for name, _ in memory.asked] == ["low-latency region", "low-latency region is ready"]


def test_a_larger_call_replaces_the_region(ll):
    memory = ll._kernels.memory
    ll.dispatch(dispatch_request(num_max=8, hidden=128), False)
    first = FakePlan.launches[-1][0]
    ll.dispatch(dispatch_request(num_max=4, hidden=512), False)
    assert ll._region.shape == RegionShape(8, 2, 7, 512)
    assert memory.returned == [512]
    ll.dispatch(dispatch_request(num_max=8, hidden=128), False)
    again = FakePlan.launches[-1][0]
    assert again.peers is ll._region.peers is not first.peers
    assert again.signature == first.signature


def test_a_region_stays_while_a_hook_needs_it(ll):
    memory = ll._kernels.memory
    _, hook = ll.dispatch(dispatch_request(num_max=4), True)
    ll.dispatch(dispatch_request(num_max=8), False)
    assert memory.returned == []
    assert ll.usage()["retired_bytes"] == RegionShape(4, 2, 7, 256).num_bytes(3)
    hook()
    assert FakePlan.launches[-1][0] is FakePlan.launches[0][0]
    ll.dispatch(dispatch_request(num_max=16), False)
    assert memory.returned == [512, 1024]
    assert ll.usage()["retired_bytes"] == 0


def test_a_region_stays_while_a_graph_or_another_rank_needs_it(ll):
    memory = ll._kernels.memory
    ll.dispatch(dispatch_request(num_max=4), False)
    ll._kernels.capturing = True
    ll.dispatch(dispatch_request(num_max=4), False)
    ll._kernels.capturing = False
    ll.dispatch(dispatch_request(num_max=8), False)
    ll.dispatch(dispatch_request(num_max=16), False)
    assert memory.returned == [1024]
    memory.answers = {0: (RegionShape(32, 2, 7, 256), [True, True])}
    ll.dispatch(dispatch_request(num_max=32), False)
    assert memory.returned == [1024]


def test_no_region_is_reserved_under_capture(ll):
    ll._kernels.capturing = True
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
    kernels, lock = ll._kernels, ll._lock
    output, hook = ll.dispatch(dispatch_request(), True)
    assert [launch[-3] for launch in FakePlan.launches] == [SEND]
    hook()
    hook()
    send, receive = FakePlan.launches
    assert receive[-3] == RECEIVE
    assert receive[-1] == STREAM
    assert send[:-3] == receive[:-3]
    assert lock.held == 0
    assert kernels.launches == {"low_latency_dispatch": 2}
    hook = ll.combine(combine_request(output), True)
    hook()
    assert [launch[-3] for launch in FakePlan.launches[2:]] == [SEND, RECEIVE]
    ticket = FakePlan.launches[2][-4]
    assert ticket not in (0, output.layout_range.data_ptr())
    assert kernels.launches == {"low_latency_dispatch": 2, "low_latency_combine": 2}


def test_a_third_outstanding_operation_is_refused(ll):
    output, first = ll.dispatch(dispatch_request(), True)
    second = ll.combine(combine_request(output), True)
    for with_hook in (False, True):
        with pytest.raises(ConfigError, match="2 low-latency operations are outstanding"):
            ll.dispatch(dispatch_request(), with_hook)
        with pytest.raises(ConfigError, match="outstanding"):
            ll.combine(combine_request(output), with_hook)
    assert len(FakePlan.launches) == 2
    second()
    ll.dispatch(dispatch_request(), False)
    first()
    ll.dispatch(dispatch_request(), False)


def test_an_operation_may_not_use_the_set_of_an_outstanding_one(ll):
    output, hook = ll.dispatch(dispatch_request(), True)
    ll.dispatch(dispatch_request(), False)
    with pytest.raises(ConfigError, match="from 2 calls ago"):
        ll.dispatch(dispatch_request(), False)
    ll.combine(combine_request(output), False)  # its sets are others
    hook()
    ll.dispatch(dispatch_request(), False)


def test_hooks_forgotten_by_recover_do_nothing(ll):
    _, hook = ll.dispatch(dispatch_request(), True)
    ll.recover()
    assert ll._region.num_pending == 0
    assert ll._region.peers.clears == 2
    ll.dispatch(dispatch_request(), True)
    num_launches = len(FakePlan.launches)
    hook()
    assert len(FakePlan.launches) == num_launches


def test_failures_of_kernels_are_raised_before_anything(ll):
    _, hook = ll.dispatch(dispatch_request(), True)
    ll._kernels.failure = PeerError("gone", operation="low_latency_dispatch", peer=2)
    with pytest.raises(PeerError):
        ll.dispatch(dispatch_request(), False)
    with pytest.raises(PeerError):
        hook()
    assert len(FakePlan.launches) == 1


def test_combine_uses_positions_only_of_its_own_dispatch(ll):
    output, _ = ll.dispatch(dispatch_request(), False)
    places = getattr(output.src_info, cuda_ll.PLACES)
    ll.combine(combine_request(output), False)
    assert FakePlan.launches[-1][4:6] == places[1:]
    ll.combine(combine_request(output, src_info=output.src_info.clone()), False)
    assert FakePlan.launches[-1][4:6] == (0, 0)
    ll.combine(combine_request(output, num_topk=1), False)
    assert FakePlan.launches[-1][4:6] == (0, 0)


def test_unaligned_tensors_are_copied(ll):
    request = dispatch_request()
    odd = torch.zeros(3 * 256 + 4, dtype=torch.bfloat16)[4:].view(3, 256)
    if odd.data_ptr() % 16 == 0:
        odd = torch.zeros(3 * 256 + 5, dtype=torch.bfloat16)[5:].view(3, 256)
    ll.dispatch(LowLatencyDispatch(odd, request.topk_idx, 4, 7, None, None, None), False)
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
    ]
    for given in kinds:
        ll.dispatch(dispatch_request(**given), False)
    signatures = [launch[0].signature for launch in FakePlan.launches]
    assert len(set(signatures)) == len(kinds)
    ll.dispatch(dispatch_request(idx_dtype=torch.int32), False)
    assert FakePlan.launches[-1][0].signature == signatures[0]
    assert not FakePlan.launches[-1][0].is_int64


def test_what_is_served(ll):
    def row(hidden, dtype=torch.bfloat16):
        return torch.empty((1, hidden), dtype=dtype)

    assert ll.serves(row(136), 8, 128, 256)
    assert ll.serves(row(128), 32, 128, 256, use_fp8=True)
    assert not ll.serves(row(136), 8, 128, 256, use_fp8=True)
    assert not ll.serves(row(132), 8, 128, 256)
    assert not ll.serves(row(128, torch.float16), 8, 128, 256)
    assert not ll.serves(row(128), 33, 128, 256)
    assert not ll.serves(row(128), 8, 1 << 19, 256)
    assert not ll.serves(row(128), 8, 128, 5000)
    assert not ll.serves(torch.empty((1, 128), dtype=torch.bfloat16, device="meta"), 8, 128, 256)


def test_refusals(ll):
    ll.refuse(0)
    assert ll._kernels.memory.asked == [("low-latency region", None)]
    ll.dispatch(dispatch_request(), False)
    ll.refuse(1)
    assert ll._region.peers.refusals == [(1, STREAM)]


def test_masks_and_waits(ll):
    ll.set_mask(2, True)
    assert ll.masked.tolist() == [0, 0, 1]
    ll.set_mask(2, False)
    assert ll.masked.tolist() == [0, 0, 0]
    ll._waits[1, 2] = 5
    assert ll.last_waits() == {"low_latency_dispatch": [0, 0, 0], "low_latency_combine": [0, 0, 5]}
