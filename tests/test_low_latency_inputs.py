"""What the native side sees of a low-latency call's tensors, and what it leaves to the detailed checks."""

import contextlib
import ctypes
import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import torch
from low_latency_fakes import BEGIN, LAUNCH, Entry, FakeKernels, FakeLock

from deep_ep._native import _C
from deep_ep.engines.low_latency_call import ReceiveHook
from deep_ep.engines.low_latency_plans import PLACES, HandleShape, handles_of, maker_of, view_maker
from deep_ep.errors import BufferDestroyed, CommTimeout
from deep_ep.event import EventOverlap
from deep_ep.traffic import TrafficStats

T, H, K, M, L, R = 3, 64, 2, 4, 5, 3
CPU = torch.device("cpu")
BF16 = torch.bfloat16
WHOLE, SEND, RECEIVE = 0, 1, 2
STREAM = 7
ROWS = ((L, R * M, H), (R * M * H, H, 1), BF16)


class Derived(torch.Tensor):
    pass


class Lookalike:
    """Answers as a tensor does."""

    dtype, shape = BF16, (T, H)

    def data_ptr(self) -> int:
        return 1 << 20

    def get_device(self) -> int:
        return -1

    def is_contiguous(self) -> bool:
        return True


def odd(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Contiguous, but not at a multiple of 16 bytes."""
    size = torch.Size(shape).numel()
    result = torch.zeros(size + 16, dtype=dtype)
    start = 1 if result.data_ptr() % 16 == 0 else 0
    return result[start : start + size].view(shape)


class Recorder:
    """A plan whose launches are kept: how many numbers it takes, and what it says when it begins."""

    def __init__(self, num_arguments: int, state: int = 0) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.begun: list[int] = []

        self.state = state

        def begin(_: None, stream: int) -> int:
            self.begun.append(stream)
            return self.state

        def launch(_: None, arguments: int, *rest: int) -> None:
            self.launches.append((*(ctypes.c_int64 * num_arguments).from_address(arguments), *rest))

        self.functions = Entry(None, BEGIN(begin), LAUNCH(launch))

    @property
    def entry(self) -> int:
        return ctypes.addressof(self.functions)


class Place:
    """A region, whose leases are counted."""

    num_pending = leases = 0

    def lease(self) -> None:
        self.leases += 1


class World:
    """What a buffer's operations have in common, on the CPU."""

    def __init__(self) -> None:
        self.kernels, self.lock, self.traffic, self.region = FakeKernels(), FakeLock(), TrafficStats(), Place()
        self.kernels.max_blocks, self.device, self.used = 5, -1, []
        self.operations = _C.LowLatencyOperations(
            *(self.lock, self.kernels, -1, lambda: self.device, lambda: STREAM, self.traffic, EventOverlap),
            *(self.use_device, self.raise_failure, self.raise_closed, PLACES),
        )

    @contextlib.contextmanager
    def use_device(self) -> Iterator[None]:
        self.used.append("begin")
        yield
        self.used.append("end")

    def raise_failure(self, kernels: Any) -> NoReturn:
        assert kernels is self.kernels
        raise CommTimeout("it is late")

    def raise_closed(self, operation: str) -> NoReturn:
        raise BufferDestroyed(operation)


def make_handles(with_weights: bool = False, expert_major: bool = True) -> _C.LowLatencyHandles:
    outputs = _C.LowLatencyOutputs(L, R, M, K, with_weights, expert_major)
    return handles_of(CPU, outputs, HandleShape.of(K, M, H, L * R, with_weights, expert_major, R, 0), R)


class DispatchCalls:
    def __init__(
        self, is_int64: bool = True, with_weights: bool = False, tensor_type: type = torch.Tensor, **other: Any
    ) -> None:
        made = {"handles": make_handles(), "rows": ROWS, "scales": None}
        given: dict[str, Any] = {"state": 0, **made, **other}
        self.plan, self.world = Recorder(9, given["state"]), World()
        self.calls = _C.LowLatencyDispatchCalls(
            *(self.world.operations, tensor_type, -1, M, H, K, is_int64, with_weights, L, R, self.plan),
            *(self.world.region, 2 * H, "bfloat16", maker_of(CPU)),
            *(given["handles"], given["rows"], given["scales"]),
        )

    def read(self, *tensors: object) -> tuple[int, ...] | None:
        """What is launched with of the tensors that a call passes."""
        done = self.calls.try_run(*tensors, False)
        if done is None:
            assert not self.plan.launches and not self.plan.begun and not self.world.kernels.launches
            return None
        x, idx, weights, num_tokens, rows, scales, small, recv, wait, *rest = self.plan.launches.pop()
        recv_x, _, handle, event, hook = done
        assert (type(event), vars(event), event.event, hook) == (EventOverlap, {}, None, None)
        assert tensors[5] is None or recv_x is tensors[5]
        pair = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
        assert (rows, scales) == tuple(0 if part is None else part.data_ptr() for part in pair)
        assert small == getattr(handle[0], PLACES)[1]
        assert rest == [WHOLE, 5, STREAM, False]
        assert self.plan.begun.pop() == STREAM
        assert self.world.kernels.launches == {"low_latency_dispatch": self.world.traffic.dispatch_calls}
        return x, idx, weights, num_tokens, recv, wait


def dispatch_inputs(is_int64: bool = True, with_weights: bool = False, tensor_type: type = torch.Tensor):
    return DispatchCalls(is_int64, with_weights, tensor_type)


def dispatch_tensors(num_tokens: int = T, **other: object) -> list[object]:
    given = {
        "x": torch.zeros((num_tokens, H), dtype=BF16),
        "topk_idx": torch.zeros((num_tokens, K), dtype=torch.int64),
        "topk_weights": None,
        "recv_stats": torch.zeros(L, dtype=torch.int32),
        "wait_stats": torch.zeros(R, dtype=torch.int64),
        "out": None,
    }
    return list({**given, **other}.values())


@pytest.mark.parametrize("num_tokens", [0, 1, T, M])
def test_addresses_of_a_dispatch(num_tokens):
    x, idx, _, recv, wait, _ = tensors = dispatch_tensors(num_tokens)
    have = dispatch_inputs().read(*tensors)
    assert have == (x.data_ptr(), idx.data_ptr(), 0, num_tokens, recv.data_ptr(), wait.data_ptr())
    none = dispatch_tensors(num_tokens, recv_stats=None, wait_stats=None)
    assert dispatch_inputs().read(*none)[4:] == (0, 0)
    weights = torch.ones((num_tokens, K))
    have = dispatch_inputs(with_weights=True).read(*dispatch_tensors(num_tokens, topk_weights=weights))
    assert have[2] == weights.data_ptr()
    small = dispatch_tensors(num_tokens, topk_idx=idx.int())
    assert dispatch_inputs().read(*small) is None
    assert dispatch_inputs(is_int64=False).read(*small)[1] == small[1].data_ptr()


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": None},
        {"x": [[0.0] * H] * T},
        {"x": Lookalike()},
        {"x": torch.zeros((T, H), dtype=BF16).as_subclass(Derived)},
        {"x": torch.zeros((T, H), dtype=BF16, device="meta")},
        {"x": torch.zeros((T, H), dtype=BF16).to_sparse()},
        {"x": torch.zeros((T, H), dtype=torch.float16)},
        {"x": torch.zeros((T, H), dtype=torch.int16)},
        {"x": torch.zeros((T, H // 2), dtype=torch.float32)},
        {"x": torch.zeros((T + 1, H), dtype=BF16)},
        {"x": torch.zeros((T, 2 * H), dtype=BF16)},
        {"x": torch.zeros((T, 2 * H), dtype=BF16)[:, :H]},
        {"x": torch.zeros((H, T), dtype=BF16).t()},
        {"x": torch.zeros((1, H), dtype=BF16).expand(T, H)},
        {"x": torch.zeros((1, T, H), dtype=BF16)},
        {"x": torch.zeros(T * H, dtype=BF16)},
        {"x": torch.zeros((), dtype=BF16)},
        {"x": odd((T, H), BF16)},
        {"topk_idx": torch.zeros((T, K))},
        {"topk_idx": torch.zeros((T, K), dtype=torch.uint64)},
        {"topk_idx": torch.zeros((T, K + 1), dtype=torch.int64)},
        {"topk_idx": torch.zeros((K, T), dtype=torch.int64).t()},
        {"topk_idx": torch.zeros(T, dtype=torch.int64)},
        {"topk_weights": torch.ones((T, K))},
        {"recv_stats": torch.zeros(L, dtype=torch.int64)},
        {"recv_stats": torch.zeros(L + 1, dtype=torch.int32)},
        {"recv_stats": torch.zeros(2 * L, dtype=torch.int32)[::2]},
        {"recv_stats": odd((L,), torch.int32)},
        {"wait_stats": torch.zeros((R, 1), dtype=torch.int64)},
        {"wait_stats": 0},
        {"wait_stats": False},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_a_dispatch_kernel_cannot_take(wrong):
    assert dispatch_inputs().read(*dispatch_tensors(**wrong)) is None
    assert dispatch_inputs().read(*dispatch_tensors()) is not None


def rows_like(**other: Any) -> torch.Tensor:
    sizes, strides, dtype = {**dict(zip(("sizes", "strides", "dtype"), ROWS, strict=True)), **other}.values()
    return torch.empty_strided(sizes, strides, dtype=dtype)


SCALES = ((L, R * M, 3), (3 * R * M, 1, R * M), torch.float32)
FP8_ROWS = (*ROWS[:2], torch.float8_e4m3fn)


def test_a_dispatch_writes_to_given_tensors():
    rows, scales = (torch.empty_strided(sizes, by, dtype=dtype) for sizes, by, dtype in (FP8_ROWS, SCALES))
    assert dispatch_inputs().read(*dispatch_tensors(out=rows_like())) is not None
    calls = DispatchCalls(rows=FP8_ROWS, scales=SCALES)
    assert calls.read(*dispatch_tensors(out=(rows, scales))) is not None
    assert calls.read(*dispatch_tensors()) is not None
    # What has one column of scales, or one row, has strides that say nothing.
    single = ((L, R * M, 1), (R * M, 1, R * M), torch.float32)
    other = torch.empty_strided((L, R * M, 1), (R * M, 1, 99), dtype=torch.float32)
    assert DispatchCalls(rows=FP8_ROWS, scales=single).read(*dispatch_tensors(out=(rows, other))) is not None
    # Checked before.
    recv_x = calls.calls.run((16, 32, 0, T, 0, 0, 48, 64), (rows, scales), False, None, None)[0]
    assert (recv_x[0] is rows, recv_x[1] is scales) == (True, True)
    assert calls.plan.launches[-1][4:6] == (48, 64)


@pytest.mark.parametrize(
    "out",
    [
        rows_like(dtype=torch.float16),
        rows_like(sizes=(L, R * M + 1, H)),
        rows_like(sizes=(L, R * M - 1, H)),
        rows_like(strides=(R * M * H, 1, R * M)),
        rows_like().flatten(),
        odd((L, R * M, H), BF16),
        rows_like().as_subclass(Derived),
        (rows_like(),),
        (rows_like(), None),
        0,
    ],
    ids=lambda out: f"{type(out).__name__}{list(getattr(out, 'shape', ()))}",
)
def test_outputs_that_a_dispatch_kernel_cannot_take(out):
    assert dispatch_inputs().read(*dispatch_tensors(out=out)) is None


def test_fp8_outputs_that_a_dispatch_kernel_cannot_take():
    rows, scales = (torch.empty_strided(sizes, by, dtype=dtype) for sizes, by, dtype in (FP8_ROWS, SCALES))
    calls = DispatchCalls(rows=FP8_ROWS, scales=SCALES)
    for out in (
        rows,
        (rows,),
        [rows, scales],
        (scales, rows),
        (rows, scales, scales),
        (rows, None),
        (rows.view(torch.uint8), scales),
        (rows, scales.contiguous()),
        (rows, scales.view(torch.int32)),
        (rows, scales[..., :2]),
    ):
        assert calls.read(*dispatch_tensors(out=out)) is None
    assert calls.read(*dispatch_tensors(out=(rows, scales))) is not None


@pytest.mark.parametrize(
    "weights",
    [
        None,
        1.0,
        torch.ones((T, K)).double(),
        torch.ones((T, K + 1)),
        torch.ones((T - 1, K)),
        torch.ones((K, T)).t(),
        odd((T, K), torch.float32),
    ],
    ids=lambda weights: type(weights).__name__,
)
def test_weights_that_a_dispatch_kernel_cannot_take(weights):
    assert dispatch_inputs(with_weights=True).read(*dispatch_tensors(topk_weights=weights)) is None


def test_more_tokens_than_agreed():
    assert dispatch_inputs().read(*dispatch_tensors(M + 1)) is None


def test_strides_of_single_rows_and_of_nothing_do_not_matter():
    single = torch.zeros((1, 2 * H), dtype=BF16)[:, :H]
    assert single.is_contiguous()
    assert dispatch_inputs().read(*dispatch_tensors(1, x=single))[0] == single.data_ptr()
    nothing = torch.zeros((2 * H, 0), dtype=BF16).t()[:, ::2]
    assert nothing.is_contiguous()
    assert dispatch_inputs().read(*dispatch_tensors(0, x=nothing)) is not None


def test_a_gradient_is_no_obstacle():
    x = torch.zeros((T, H), dtype=BF16, requires_grad=True)
    assert dispatch_inputs().read(*dispatch_tensors(x=x))[0] == x.data_ptr()
    with torch.inference_mode():
        assert dispatch_inputs().read(*dispatch_tensors()) is not None


def test_tensors_that_have_no_native_side_are_not_read():
    """As all are where torch does not carry the functions."""

    class Plain:
        pass

    class Odd:
        __dlpack_c_exchange_api__ = "no capsule"

    for tensor_type in (Plain, Odd):
        inputs = dispatch_inputs(tensor_type=tensor_type)
        assert inputs.read(*dispatch_tensors()) is None
        assert inputs.read(*dispatch_tensors(x=tensor_type())) is None


# ---------------------------------------------------------------------------------------------------------------
# Combine


class CombineCalls:
    def __init__(self, expert_major: bool = True, is_int64: bool = True, weights_at: int = -1, **other: Any) -> None:
        groups, capacity = (L, R * M) if expert_major else (R, M)
        self.plan, self.places = Recorder(12, other.get("state", 0)), (256, 2048, 3072, weights_at)
        self.world = World()
        self.calls = _C.LowLatencyCombineCalls(
            *(self.world.operations, torch.Tensor, -1, groups, capacity, H, M, K, is_int64, expert_major, R),
            *(self.places, self.plan, self.world.region, 2 * H, maker_of(CPU)),
            *(((H, 1), BF16), torch.int64),
        )

    def read(self, *tensors: Any) -> tuple[int, ...] | None:
        done = self.calls.try_run(*tensors[:7], False, tensors[7])
        if done is None:
            assert not self.plan.launches and not self.plan.begun and not self.world.kernels.launches
            return None
        out, event, hook = done
        assert (type(event), event.event, hook) == (EventOverlap, None, None)
        num_tokens = tensors[3].shape[0]
        x, info, ranges, *places, idx, weights, tokens, out_at, wait, no_ticket, part, sms, stream, captured = (
            self.plan.launches.pop()
        )
        assert self.plan.begun.pop() == STREAM
        block = tensors[7]
        assert places == [block + 2048, block + 3072, 0 if self.places[3] < 0 else block + self.places[3]]
        assert (tokens, no_ticket, part, sms, stream, captured) == (num_tokens, 0, WHOLE, 5, STREAM, False)
        assert out_at == out.data_ptr()
        assert (out.shape, out.stride(), out.dtype) == ((num_tokens, H), (H, 1), BF16)
        assert tensors[5] is None or out is tensors[5]
        return x, info, ranges, idx, weights, num_tokens, out_at if tensors[5] is not None else 0, wait


def combine_inputs(expert_major: bool = True, is_int64: bool = True):
    return CombineCalls(expert_major, is_int64)


def combine_tensors(expert_major: bool = True, **other: object) -> list[object]:
    block = torch.zeros(4096, dtype=torch.int32)
    given = {
        "x": torch.zeros((L, R * M, H) if expert_major else (R, M, H), dtype=BF16),
        "src_info": block[64 : 64 + L * R * M].view(L, R * M),
        "layout_range": block.view(torch.int64)[: L * R].view(L, R) if expert_major else torch.zeros(0),
        "topk_idx": torch.zeros((T, K), dtype=torch.int64),
        "topk_weights": torch.ones((T, K)) if expert_major else None,
        "out": torch.zeros((T, H), dtype=BF16),
        "wait_stats": torch.zeros(R, dtype=torch.int64),
        "block": block.data_ptr(),
    }
    return list({**given, **other}.values())


def combine_arguments(with_hook: bool = False, **other: object) -> list[object]:
    *tensors, block = combine_tensors(**other)
    return [*tensors, with_hook, block]


@pytest.mark.parametrize("expert_major", [True, False])
def test_addresses_of_a_combine(expert_major):
    tensors = combine_tensors(expert_major)
    x, info, ranges, idx, weights, out, wait, _ = tensors
    want = [t.data_ptr() for t in (x, info, ranges, idx)]
    weights_at = weights.data_ptr() if expert_major else 0
    inputs = combine_inputs(expert_major)
    assert inputs.read(*tensors) == (*want, weights_at, T, out.data_ptr(), wait.data_ptr())
    tensors[5] = tensors[6] = None
    assert inputs.read(*tensors) == (*want, weights_at, T, 0, 0)
    if expert_major:
        # Weights are read element by element.
        assert inputs.read(*tensors[:4], odd((T, K), torch.float32), *tensors[5:]) is not None
    else:
        assert inputs.read(*tensors[:4], "unused", *tensors[5:]) == (*want, 0, T, 0, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros((L, R * M, H))},
        {"x": torch.zeros((L, R * M + 1, H), dtype=BF16)},
        {"x": torch.zeros((R * M, L, H), dtype=BF16).transpose(0, 1)},
        {"x": torch.zeros((L * R * M, H), dtype=BF16)},
        {"x": odd((L, R * M, H), BF16)},
        {"src_info": torch.zeros((L, R * M), dtype=torch.int32)},
        {"src_info": None},
        {"layout_range": torch.zeros((L, R), dtype=torch.int64)},
        {"layout_range": None},
        {"topk_idx": torch.zeros((T, K), dtype=torch.int32)},
        {"topk_idx": torch.zeros((M + 1, K), dtype=torch.int64)},
        {"topk_idx": torch.zeros((T, K - 1), dtype=torch.int64)},
        {"topk_weights": None},
        {"topk_weights": torch.ones((T + 1, K))},
        {"topk_weights": torch.ones((K, T)).t()},
        {"topk_weights": torch.ones((T, K)).double()},
        {"out": torch.zeros((T, H))},
        {"out": torch.zeros((T + 1, H), dtype=BF16)},
        {"out": torch.zeros((H, T), dtype=BF16).t()},
        {"out": odd((T, H), BF16)},
        {"out": torch.zeros((T, H), dtype=BF16).as_subclass(Derived)},
        {"wait_stats": torch.zeros(R)},
        {"block": 0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_a_combine_kernel_cannot_take(wrong):
    assert combine_inputs().read(*combine_tensors(**wrong)) is None
    assert combine_inputs().read(*combine_tensors()) is not None


# ---------------------------------------------------------------------------------------------------------------
# From inputs to outputs


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
    calls = dispatch_inputs()
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
