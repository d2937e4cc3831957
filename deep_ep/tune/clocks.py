"""Time on a device, work that keeps it busy, and medians of times over ranks."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from deep_ep.train.launch import World


class Clock:
    """Marks in the current stream of a CUDA device; wall-clock time on the CPU, where calls are done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """A point in time, on the device: when all that was enqueued before it is done."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def microseconds(self, start: Any, end: Any) -> float:
        """Time from one mark to a later one. Waits for the later one."""
        if not self._on_gpu:
            return float(end - start) * 1e6
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3

    def synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)


class Gemm:
    """A product of random bf16 matrices, [m, k] x [k, n], written to the same output each time."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device, seed: int) -> None:
        m, n, k = shape
        generator = torch.Generator(device=device).manual_seed(seed)
        # Random: a GPU computes with zeros at a lower power, and so at a higher clock.
        self._lhs = torch.randn((m, k), generator=generator, device=device).bfloat16()
        self._rhs = torch.randn((k, n), generator=generator, device=device).bfloat16()
        self._out = torch.empty((m, n), dtype=torch.bfloat16, device=device)

    def run(self, times: int) -> None:
        """Enqueue this many on the current stream."""
        for _ in range(times):
            torch.mm(self._lhs, self._rhs, out=self._out)


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """No garbage collection meanwhile: a walk over all objects takes tens of ms, at a moment of its own choosing."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def by_rank(world: World, values: Sequence[float]) -> list[list[float]]:
    """The values of every rank, on every rank: as many numbers from each. Collective."""
    table = torch.zeros((world.size, len(values)), dtype=torch.float64)
    table[world.rank] = torch.tensor(list(values), dtype=torch.float64)
    return [[float(value) for value in row] for row in world.sum_(table).tolist()]


def slowest(world: World, values: Sequence[float]) -> list[float]:
    """Each number on the rank where it is largest. Collective."""
    return [max(column) for column in zip(*by_rank(world, values), strict=True)]


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, minimum and quartiles of microseconds."""
    quartiles = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {
        "median_us": round(statistics.median(times), 2),
        "min_us": round(min(times), 2),
        "p25_us": round(quartiles[0], 2),
        "p75_us": round(quartiles[2], 2),
    }
