"""A rank of the benchmark: its device, its group, its clocks."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

WARMUPS = 3
#: Of the device's clock, about 2 GHz: 10 ms, enough to enqueue 100 calls; at most 640 ms.
SLEEP_CYCLES = 20_000_000
MAX_SLEEP_CYCLES = 64 * SLEEP_CYCLES
#: Calls of a round whose host time is taken, and those before: the first one after a pause costs several times more.
HOST_CALLS, HOST_WARMUPS = 100, 5


class World:
    """This rank: its device, a group for objects and barriers, and clocks."""

    def __init__(self, rank: int, args: argparse.Namespace) -> None:
        self.rank, self.size, self.args = rank, args.ranks, args
        self.num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.device = torch.device("cuda", rank % self.num_devices) if self.num_devices else torch.device("cpu")
        if self.num_devices:
            torch.cuda.set_device(self.device)
        self.group = dist.new_group(list(range(args.ranks)))

    def gather(self, value: Any) -> list[Any]:
        dist.all_gather_object(values := [None] * self.size, value, group=self.group)
        return values

    def gather_tensor(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks (equal shapes) on this rank's device, by way of the host, bytes untouched."""
        raw = value.contiguous().cpu().view(torch.uint8)
        dist.all_gather(parts := [torch.empty_like(raw) for _ in range(self.size)], raw, group=self.group)
        return [part.view(value.dtype).to(self.device) for part in parts]

    def synchronize(self) -> None:
        if self.num_devices:
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        self.synchronize()
        dist.barrier(self.group)

    def host_microseconds(self, call: Callable[[], Any]) -> float:
        """The host's time for one of many calls, with nothing waited for."""
        self.barrier()
        for _ in range(HOST_WARMUPS):
            call()
        start_s = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        return (time.perf_counter() - start_s) * 1e6 / HOST_CALLS

    def microseconds(self, call: Callable[[], Any], iterations: int) -> float:
        """Time of one of `iterations` back-to-back calls, on this rank."""
        gc.freeze()  # a walk of the collector over all imports takes tens of ms, at a moment of its own choosing
        for _ in range(WARMUPS):
            call()
        if not self.num_devices:
            start_s = time.perf_counter()
            for _ in range(iterations):
                call()
            return (time.perf_counter() - start_s) * 1e6 / iterations
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(iterations):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / iterations

    def queued_microseconds(self, call: Callable[[], Any], iterations: int) -> float:
        """The same with all calls enqueued before the first runs: the device's time, whatever the host needs.

        `call` may not wait for the device.
        """
        gc.freeze()
        cycles = SLEEP_CYCLES
        while True:
            for _ in range(WARMUPS):
                call()
            self.barrier()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(cycles)
            call()  # the ranks do not wake at the same moment, and wait for each other here
            start.record()
            for _ in range(iterations):
                call()
            end.record()
            was_ahead = not start.query()
            end.synchronize()
            # All ranks or none try again: they run the calls together.
            if all(self.gather(was_ahead)) or cycles >= MAX_SLEEP_CYCLES:
                return start.elapsed_time(end) * 1e3 / iterations
            cycles *= 4

    def slowest(self, call: Callable[[], Any]) -> list[float]:
        """Microseconds of a call by round, on the rank that was slowest in it."""
        return self.rounds(lambda: self.microseconds(call, self.args.iterations))

    def rounds(self, once: Callable[[], float]) -> list[float]:
        """What ``once`` measured in each round, on the rank where it was largest; all ranks begin a round together."""
        return self.rounds_in_turn([once])[0]

    def rounds_in_turn(self, each: Sequence[Callable[[], float]]) -> list[list[float]]:
        """The same of several that take turns in each round, so that one pace of the machine holds for all of them."""
        mine: list[list[float]] = [[] for _ in each]
        for _ in range(self.args.rounds):
            for times, once in zip(mine, each, strict=True):
                self.barrier()
                times.append(once())
        ranks = self.gather(mine)
        return [[max(times) for times in zip(*of_ranks, strict=True)] for of_ranks in zip(*ranks, strict=True)]


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, minimum and quartiles of microseconds."""
    ordered = sorted(times)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median_us": round(statistics.median(ordered), 2),
        "min_us": round(ordered[0], 2),
        "p25_us": round(quartiles[0], 2),
        "p75_us": round(quartiles[2], 2),
    }
