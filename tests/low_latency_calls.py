"""Native low-latency calls on the CPU, whose launches are kept, and tensors to call them with."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from low_latency_fakes import BEGIN, LAUNCH, Entry, FakeKernels, FakeLock

from deep_ep._native import _C
from deep_ep.engines.low_latency_plans import PLACES, HandleShape, handles_of, maker_of
from deep_ep.errors import BufferDestroyed, CommTimeout
from deep_ep.event import EventOverlap
from deep_ep.traffic import TrafficStats

T, H, K, M, L, R = 3, 64, 2, 4, 5, 3
CPU = torch.device("cpu")
BF16 = torch.bfloat16
WHOLE, SEND, RECEIVE = 0, 1, 2
STREAM = 7
ROWS = ((L, R * M, H), (R * M * H, H, 1), BF16)
SCALES = ((L, R * M, 3), (3 * R * M, 1, R * M), torch.float32)
FP8_ROWS = (*ROWS[:2], torch.float8_e4m3fn)


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
