"""The sweep: every operation at every SM budget, alone and beside GEMMs, on all ranks together.

Alone, a figure is the time of one of many back-to-back calls. Beside GEMMs it is that of a step: a fixed number of
GEMMs on one stream and of calls on the communication stream, until both are done. There are as many GEMMs as last a
quarter longer than the calls do alone at their fastest budget: communication then fits behind them, but a budget that
is too small shows as much as one that takes SMs away.

Rounds go over all budgets in turn, so that a drift of the clocks meets all of them; of each round the slowest rank
counts. Calls before the first mark align the ranks: a kernel waits for its peers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deep_ep.buffer import Buffer
from deep_ep.config import Config
from deep_ep.errors import ConfigError, DeepEPError
from deep_ep.fp8 import quantize_1x128
from deep_ep.train.launch import World
from deep_ep.train.report import Progress
from deep_ep.tune.clocks import Clock, Gemm, slowest, summary, without_collector
from deep_ep.tune.settings import TuneConfig

#: GEMMs of a step, alone, over the calls of a step, alone at their fastest budget.
GEMM_SHARE = 1.25
_WARMUPS = 2
_POOL_ROWS = 14  # blocks of the largest output that both streams, the handle and the inputs of combine may hold


class WrongResult(DeepEPError, RuntimeError):
    """An operation gave other bits at one SM budget than at another."""


@dataclass(frozen=True)
class Variant:
    """One way to call an operation: `call(config)` enqueues it on the current stream.

    Calls are synchronous ones on the communication stream, which cost the host less than asynchronous ones: what the
    sweep compares is the device's time.

    Attributes:
        operation: "dispatch" or "combine".
        dtype: of the rows, "fp8" or "bf16".
        row_bytes: what one row moves over the link.
    """

    key: str
    name: str
    operation: str
    dtype: str
    row_bytes: int
    call: Callable[[Config], list[torch.Tensor]]


class Workload:
    """A buffer, random inputs of this rank, and the calls to time. Collective."""

    def __init__(self, config: TuneConfig, world: World) -> None:
        self.config = config
        group = world.group or dist.group.WORLD
        pool = _POOL_ROWS * config.tokens * config.ranks * 2 * config.hidden if world.device.type == "cuda" else 0
        self.buffer = Buffer(group, num_nvl_bytes=pool, device=world.device)
        generator = torch.Generator(device=world.device).manual_seed(config.seed * 1000 + world.rank)
        like: dict[str, Any] = {"generator": generator, "device": world.device}
        x = torch.randn((config.tokens, config.hidden), **like).bfloat16()
        self.idx = torch.rand((config.tokens, config.experts), **like).topk(config.topk, dim=1).indices
        self.weights = torch.rand((config.tokens, config.topk), **like)
        self.rows: dict[str, Any] = {"bf16": x}
        if "fp8" in config.dtypes:
            self.rows["fp8"] = quantize_1x128(x)
        received, _, _, _, handle, _ = self._routed(x, Config(config.reference_sms))
        if handle is None or not isinstance(received, torch.Tensor):
            raise WrongResult("an uncached dispatch of bf16 rows returned no handle, or no tensor")
        self.handle = handle
        # Different on each rank, and rounded, so that the order of sums shows in the bits.
        self.expert_rows = (received.float() * (1.0 + 0.37 * world.rank)).bfloat16()
        self.symmetric_rows = self.buffer.empty_combine_input(handle, config.hidden)
        self.symmetric_rows.copy_(self.expert_rows)
        self.rows_over_link = self._rows_over_link(world, received.shape[0])

    def _rows_over_link(self, world: World, num_received: int) -> int:
        """Rows in the busier direction of the busiest rank's link; all rows of a rank that has no peers."""
        in_rank = self.buffer.get_dispatch_layout(self.idx, self.config.experts)[3]
        stay = int(in_rank[:, world.rank].sum())
        moved = max(int(in_rank.sum()), num_received) - (stay if world.size > 1 else 0)
        return int(slowest(world, [moved])[0])

    def _routed(self, rows: Any, config: Config) -> Any:
        """Layout and uncached dispatch, both on the current stream."""
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(self.idx, self.config.experts)
        return self.buffer.dispatch(
            rows, None, per_rank, per_node, in_rank, per_expert, self.idx, self.weights, config=config
        )

    def variants(self) -> list[Variant]:
        """What is timed: dispatch cached and uncached in each dtype, combine of both kinds of input."""
        hidden, result = self.config.hidden, []
        # An uncached dispatch also brings indices, weights and the source of each row.
        routing = self.config.topk * (self.idx.element_size() + 4) + 4
        for dtype in self.config.dtypes:
            row_bytes = 2 * hidden if dtype == "bf16" else hidden + 4 * self.rows[dtype][1].shape[1]
            label = "FP8" if dtype == "fp8" else dtype
            result += [
                Variant(
                    f"{dtype}_dispatch_cached", f"{label} dispatch, cached", "dispatch", dtype, row_bytes,
                    self._cached(self.rows[dtype]),
                ),
                Variant(
                    f"{dtype}_dispatch_uncached", f"{label} dispatch, uncached", "dispatch", dtype,
                    row_bytes + routing, self._uncached(self.rows[dtype]),
                ),
            ]  # fmt: skip
        for kind, rows in (("symmetric", self.symmetric_rows), ("ordinary", self.expert_rows)):
            where = "symmetric memory" if kind == "symmetric" else "ordinary tensor"
            name = f"bf16 combine, {where}"
            result.append(Variant(f"combine_{kind}", name, "combine", "bf16", 2 * hidden, self._combined(rows)))
        return result

    def _cached(self, rows: Any) -> Callable[[Config], list[torch.Tensor]]:
        def call(config: Config) -> list[torch.Tensor]:
            return _tensors(self.buffer.dispatch(rows, handle=self.handle, config=config)[0])

        return call

    def _uncached(self, rows: Any) -> Callable[[Config], list[torch.Tensor]]:
        def call(config: Config) -> list[torch.Tensor]:
            received, idx, weights, _, _, _ = self._routed(rows, config)
            return [*_tensors(received), idx, weights]

        return call

    def _combined(self, rows: torch.Tensor) -> Callable[[Config], list[torch.Tensor]]:
        def call(config: Config) -> list[torch.Tensor]:
            return [self.buffer.combine(rows, self.handle, config=config)[0]]

        return call


def _tensors(received: Any) -> list[torch.Tensor]:
    return list(received) if isinstance(received, tuple) else [received]


class Sweep:
    """Times one workload; all ranks call the same methods in the same order."""

    def __init__(self, workload: Workload, world: World) -> None:
        self.workload, self.world = workload, world
        self.config, self.buffer = workload.config, workload.buffer
        self.clock = Clock(world.device)
        self.gemm = Gemm(self.config.gemm, world.device, self.config.seed)
        self.comm = self.buffer.get_comm_stream()
        self.gemm_us = self._gemms_alone(1, repeats=3)

    def check(self, variant: Variant) -> None:
        """Compare the bits of every budget's results with those of a budget outside the sweep.

        Raises:
            WrongResult: they differ.
        """
        self._ready()
        with torch.cuda.stream(self.comm):
            wanted = [tensor.clone() for tensor in variant.call(Config(self.config.reference_sms))]
            for sms in self.config.sms:
                got = variant.call(Config(sms))
                if len(got) != len(wanted) or not all(map(_same_bits, got, wanted)):
                    raise WrongResult(
                        f"{variant.name}: the result on {sms} SMs differs from that on {self.config.reference_sms} "
                        f"(rank {self.world.rank})"
                    )

    def measure(self, variant: Variant, advance: Callable[[], None]) -> list[dict[str, Any]]:
        """A figure for each budget; calls `advance` after each round."""
        calls = self._calls(variant)
        alone: dict[int, list[float]] = {sms: [] for sms in self.config.sms}
        for _ in range(self.config.rounds):
            for sms, times in alone.items():
                times.append(self._alone(variant, Config(sms), calls))
            advance()
        alone = self._slowest(alone)
        fastest_us = min(summary(times)["median_us"] for times in alone.values())
        gemms = max(1, math.ceil(GEMM_SHARE * fastest_us * calls / self.gemm_us))
        steps: dict[int, list[float]] = {sms: [] for sms in self.config.sms}
        beside: dict[int, list[float]] = {sms: [] for sms in self.config.sms}
        gemms_alone = []
        for _ in range(self.config.rounds):
            gemms_alone.append(self._gemms_alone(gemms))
            for sms in self.config.sms:
                gemm_us, step_us = self._beside(variant, Config(sms), calls, gemms)
                beside[sms].append(gemm_us)
                steps[sms].append(step_us)
            advance()
        beside, steps = self._slowest(beside), self._slowest(steps)
        without = summary(gemms_alone)
        num_bytes = self.workload.rows_over_link * variant.row_bytes
        figures = []
        for sms in self.config.sms:
            call, gemm = summary(alone[sms]), summary(beside[sms])
            figures.append(
                {
                    "key": variant.key,
                    "name": variant.name,
                    "operation": variant.operation,
                    "dtype": variant.dtype,
                    "num_sms": sms,
                    "calls": calls,
                    "bytes_over_link": num_bytes,
                    "gb_s": round(num_bytes / call["median_us"] / 1e3, 2),
                    "alone": call,
                    "step": summary(steps[sms]),
                    "gemms": gemms,
                    "gemms_alone": without,
                    "gemms_beside": gemm,
                    "gemm_slowdown": round(gemm["median_us"] / without["median_us"] - 1, 4),
                }
            )
        return figures

    def _slowest(self, times: dict[int, list[float]]) -> dict[int, list[float]]:
        flat = slowest(self.world, [value for values in times.values() for value in values])
        rounds = self.config.rounds
        return {sms: flat[number * rounds : (number + 1) * rounds] for number, sms in enumerate(times)}

    def _calls(self, variant: Variant) -> int:
        """Calls in one measurement: as many as asked for, or fewer to keep to the time."""
        once_us = slowest(self.world, [self._alone(variant, Config(self.config.sms[0]), 2)])[0]
        measurements = len(self.workload.variants()) * self.config.rounds * len(self.config.sms)
        # A measurement alone and one beside GEMMs, which may well slow each other down: four times the calls' own time.
        share_us = self.config.seconds * 1e6 / measurements / 4
        return max(1, min(self.config.iterations, int(share_us / once_us) - _WARMUPS))

    def _ready(self) -> None:
        self.clock.synchronize()
        self.world.barrier()

    def _gemms_alone(self, count: int, repeats: int = 1) -> float:
        """Microseconds of this many GEMMs, shortest of the repeats, on the slowest rank. Collective."""
        times = []
        for _ in range(repeats):
            self._ready()
            self.gemm.run(_WARMUPS)
            start = self.clock.mark()
            self.gemm.run(count)
            times.append(self.clock.microseconds(start, self.clock.mark()))
        return slowest(self.world, [min(times)])[0]

    def _alone(self, variant: Variant, config: Config, calls: int) -> float:
        """Microseconds of one of back-to-back calls on this rank, on a stream that does nothing else."""
        self._ready()
        with torch.cuda.stream(self.comm):
            for _ in range(_WARMUPS):
                variant.call(config)
            start = self.clock.mark()
            for _ in range(calls):
                variant.call(config)
            return self.clock.microseconds(start, self.clock.mark()) / calls

    def _beside(self, variant: Variant, config: Config, calls: int, gemms: int) -> tuple[float, float]:
        """Microseconds until the GEMMs are done, and until the calls are done as well, on this rank."""
        self._ready()
        self.gemm.run(1)
        with torch.cuda.stream(self.comm):
            for _ in range(_WARMUPS):
                variant.call(config)
            warm = Buffer.capture()
        warm.current_stream_wait()
        start = self.clock.mark()
        begin = Buffer.capture()
        with torch.cuda.stream(self.comm):
            begin.current_stream_wait()
        enqueued = 0
        for number in range(calls):
            # GEMMs first: an uncached dispatch holds the host back, and the other stream must not run dry meanwhile.
            share = -(-gemms * (number + 1) // calls)
            self.gemm.run(share - enqueued)
            enqueued = share
            with torch.cuda.stream(self.comm):
                variant.call(config)
        with torch.cuda.stream(self.comm):
            calls_done = Buffer.capture()
        gemms_done = self.clock.mark()
        calls_done.current_stream_wait()
        end = self.clock.mark()
        return self.clock.microseconds(start, gemms_done), self.clock.microseconds(start, end)


def _same_bits(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    # Row-major copies: scales may come with other strides, and only contiguous tensors can be viewed as bytes.
    flat = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (got, wanted)]
    return torch.equal(*flat)


def measure(config: TuneConfig, world: World, progress: Progress) -> dict[str, Any]:
    """Run the sweep; figures and facts that all ranks know alike. Collective.

    Raises:
        ConfigError: this group has no kernels, so that an SM budget changes nothing.
        WrongResult: an operation's result depends on the budget.
    """
    workload = Workload(config, world)
    try:
        if config.device == "cuda" and workload.buffer.engine != "cuda":
            raise ConfigError(
                "the portable engine serves this group, and SM budgets mean nothing to it: nothing to tune. "
                "`python -m deep_ep doctor` says why the kernels are not used"
            )
        sweep = Sweep(workload, world)
        variants, figures, done = workload.variants(), [], 0

        for variant in variants:

            def advance(name: str = variant.name) -> None:
                nonlocal done
                done += 1
                progress.update(done, {"measuring": name})

            sweep.check(variant)
            with without_collector():
                figures += sweep.measure(variant, advance)
        workload.buffer.check()
        return {
            "engine": workload.buffer.engine,
            "gemm": {"shape": list(config.gemm), "alone_us": round(sweep.gemm_us, 2), "share": GEMM_SHARE},
            "figures": figures,
        }
    finally:
        workload.buffer.destroy()


def total_rounds(config: TuneConfig) -> int:
    """How often `measure` reports progress: two passes of rounds for each variant."""
    return 2 * config.rounds * (2 * len(config.dtypes) + 2)
