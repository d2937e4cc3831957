"""Timing: whole calls (`bench`) and single kernels (`bench_kineto`). CUDA where it is present, wall clock elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError

_FLUSH_BYTES = 256 << 20


def flush_l2_cache(enabled: bool = True) -> None:
    """Write 256 MiB on the current CUDA device, more than its L2 holds. Does nothing without CUDA."""
    if enabled and torch.cuda.is_available():
        torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda").zero_()


def bench(
    fn: Callable[[], Any],
    num_warmups: int = 50,
    num_tests: int = 50,
    post_fn: Callable[[], Any] | None = None,
    flush_l2: bool = True,
) -> tuple[float, float, float]:
    """Time ``fn``; returns ``(average, minimum, maximum)`` in seconds.

    Args:
        post_fn: run after each call, outside the time.
        flush_l2: empty the L2 cache once before the timed calls (CUDA).
    """
    if num_tests < 1:
        raise ConfigError(f"num_tests is {num_tests}, expected at least 1")
    for _ in range(num_warmups):
        fn()
    flush_l2_cache(flush_l2)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(num_tests)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(num_tests)]
        for start, end in zip(starts, ends, strict=True):
            start.record()
            fn()
            end.record()
            if post_fn is not None:
                post_fn()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]
    else:
        times = []
        for _ in range(num_tests):
            begin = time.perf_counter()
            fn()
            times.append(time.perf_counter() - begin)
            if post_fn is not None:
                post_fn()
    return sum(times) / len(times), min(times), max(times)


class empty_suppress:
    """A context that changes nothing."""

    def __enter__(self) -> empty_suppress:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


@contextlib.contextmanager
def suppress_stdout_stderr() -> Iterator[None]:
    """Send this process's output to nowhere, that of C code included."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with open(os.devnull, "w") as sink:
        try:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, source in zip((1, 2), saved, strict=True):
                os.dup2(source, target)
                os.close(source)


def _align_ranks(barrier: Callable[[], Any] | None) -> None:
    """Let all ranks start a call together on their GPUs, with the host well ahead of the device."""
    if barrier is not None:
        barrier()
        return
    lhs = torch.randn((8192, 8192), dtype=torch.float, device="cuda")
    torch.mm(lhs, lhs)
    if dist.is_initialized():
        dist.all_reduce(torch.ones(1, dtype=torch.float, device="cuda"))


def _kernel_times(profiler: Any, name: str) -> list[float]:
    """Durations in seconds of the kernels whose name contains ``name``, in the order they ran."""
    kernels = [e for e in profiler.events() if e.device_type.name == "CUDA" and name in e.name]
    kernels.sort(key=lambda e: e.time_range.start)
    return [e.time_range.elapsed_us() / 1e6 for e in kernels]


def bench_kineto(
    fn: Callable[[], Any],
    kernel_names: str | tuple[str, ...],
    num_tests: int = 30,
    suppress_kineto_output: bool = False,
    trace_path: str | None = None,
    flush_l2: bool = True,
    barrier_comm_profiling: bool = False,
    num_kernels_per_period: int = 1,
    barrier: Callable[[], Any] | None = None,
) -> Any:
    """Average time in seconds of the kernels named, one value a name (a single value for a single name).

    With ``num_kernels_per_period`` p > 1 each value is a list: the averages of the 1st, 2nd, .. p-th launch of a call.
    Without CUDA there are no kernels: the wall-clock time of the call is returned for each name.

    Args:
        kernel_names: parts of kernel names.
        trace_path: where to write a Chrome trace.
        barrier_comm_profiling: align the ranks before each call (by ``barrier`` when given).

    Raises:
        ConfigError: a name matches no kernel, or not a whole number of launches a call.
    """
    names = (kernel_names,) if isinstance(kernel_names, str) else tuple(kernel_names)
    if not torch.cuda.is_available():
        average = bench(fn, num_warmups=1, num_tests=num_tests, post_fn=barrier)[0]
        values: list[Any] = [
            average if num_kernels_per_period == 1 else [average / num_kernels_per_period] * num_kernels_per_period
            for _ in names
        ]
        return values[0] if isinstance(kernel_names, str) else tuple(values)
    fn()
    quiet = suppress_stdout_stderr() if suppress_kineto_output else empty_suppress()
    with quiet, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_tests):
            flush_l2_cache(flush_l2)
            if barrier_comm_profiling:
                _align_ranks(barrier)
            fn()
        torch.cuda.synchronize()
    if trace_path is not None:
        profiler.export_chrome_trace(trace_path)
    values = []
    for name in names:
        times = _kernel_times(profiler, name)
        if not times or len(times) % num_kernels_per_period != 0:
            raise ConfigError(
                f"{len(times)} launches match the kernel name {name!r}; expected a positive multiple of "
                f"{num_kernels_per_period}"
            )
        means = [
            sum(times[i::num_kernels_per_period]) / len(times[i::num_kernels_per_period])
            for i in range(num_kernels_per_period)
        ]
        values.append(means[0] if num_kernels_per_period == 1 else means)
    return values[0] if isinstance(kernel_names, str) else tuple(values)
