"""What is timed: whole calls over SM budgets, the layout kernel, and the host's own time."""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import deep_ep

from .case import Case
from .world import World, summary

#: The limit that a row is held against, by the first word of its key or the whole of it; see probes.py.
PROBE_OF = {"fp8": "place_fp8_scales", "bf16": "place_bf16", "combine": "pull_bf16"}
HOST_TOKENS = 512
LAYOUT_CALLS = 50


@dataclasses.dataclass
class Row:
    """One figure: a call, what it must return, and the bytes that a row of it moves to another rank.

    Attributes:
        waits: the host waits in the call, so that several cannot be enqueued ahead of the device.
        kept: outputs of so many calls are alive.
    """

    key: str
    name: str
    call: Callable[[], Any]
    check: Callable[[Any], None]
    row_bytes: int
    waits: bool = False
    kept: int = 0

    @property
    def probe(self) -> str:
        return PROBE_OF[self.key.split("_", maxsplit=1)[0]]


class Workload:
    """The calls of one buffer on one case."""

    def __init__(self, buffer: deep_ep.Buffer, case: Case, args: argparse.Namespace) -> None:
        self.buffer, self.case, self.args = buffer, case, args
        _, self.recv_idx, self.recv_weights, _, self.handle, _ = self.uncached(case.x, None)
        self.ordinary = case.expert_output(case.recv_x, case.world.rank)
        self.symmetric = buffer.empty_combine_input(self.handle, args.hidden)
        self.symmetric.copy_(self.ordinary)
        self.skipped: list[str] = []

    def uncached(self, x: Any, config: deep_ep.Config | None) -> Any:
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(self.case.idx, self.args.experts)
        return self.buffer.dispatch(
            x, None, per_rank, per_node, in_rank, per_expert, self.case.idx, self.case.weights, config=config
        )

    def keeps(self, row: Row) -> bool:
        """Whether the outputs that are to be kept alive fit, on every rank."""
        wanted = (row.kept + 2) * (len(self.case.recv_x) * row.row_bytes * 17 // 16 + (4 << 20))
        memory = getattr(self.buffer.runtime, "memory", None)
        fits = True
        if memory is not None:
            usage = memory.usage()
            fits = usage["mapped_bytes"] - usage["control_bytes"] - memory.live_bytes() >= wanted
        elif self.case.world.num_devices:
            fits = torch.cuda.mem_get_info()[0] >= wanted
        return all(self.case.world.gather(fits))

    def rows(self, num_sms: int) -> list[Row]:
        buffer, case, handle, config = self.buffer, self.case, self.handle, deep_ep.Config(num_sms)
        wide = 2 * self.args.hidden
        narrow = self.args.hidden + case.x_fp8[1].element_size() * case.x_fp8[1].shape[1]
        # An uncached dispatch also brings indices, weights and the source of each row.
        routing = self.args.topk * (case.idx.element_size() + 4) + 4

        def cached(x: Any, **options: Any) -> Any:
            return buffer.dispatch(x, handle=handle, config=config, **options)

        def combine(x: torch.Tensor, weights: torch.Tensor | None = None) -> Any:
            return buffer.combine(x, handle, weights, config=config)

        rows = [
            Row("fp8_dispatch_cached", "FP8 dispatch, cached", lambda: cached(case.x_fp8), case.check_rows, narrow),
            Row(
                "fp8_dispatch_inside",
                "FP8 dispatch, cached, quantised inside from bf16",
                lambda: cached(case.x, use_fp8=True),
                case.check_rows,
                narrow,
            ),
            Row("bf16_dispatch_cached", "bf16 dispatch, cached", lambda: cached(case.x), case.check_rows, wide),
            Row(
                "fp8_dispatch_uncached",
                "FP8 dispatch, uncached, layout and host wait included",
                lambda: self.uncached(case.x_fp8, config),
                case.check_routed,
                narrow + routing,
                waits=True,
            ),
            Row(
                "bf16_dispatch_uncached",
                "bf16 dispatch, uncached, layout and host wait included",
                lambda: self.uncached(case.x, config),
                case.check_routed,
                wide + routing,
                waits=True,
            ),
            Row(
                "combine_symmetric",
                "bf16 combine, input in symmetric memory",
                lambda: combine(self.symmetric),
                case.check_combined,
                wide,
            ),
            Row(
                "combine_ordinary",
                "bf16 combine, ordinary tensor",
                lambda: combine(self.ordinary),
                case.check_combined,
                wide,
            ),
            Row(
                "combine_weights",
                "bf16 combine and top-k weights, input in symmetric memory",
                lambda: combine(self.symmetric, self.recv_weights),
                case.check_combined,
                wide + 4 * self.args.topk,
            ),
        ]
        if self.args.keep:
            kept = [
                self._keeping(row, f"{row.key.removesuffix('_cached')}_kept")
                for row in rows
                if row.key in ("fp8_dispatch_cached", "bf16_dispatch_cached", "fp8_dispatch_uncached")
            ]
            for row in kept:
                if self.keeps(row):
                    rows.append(row)
                else:
                    self.skipped.append(f"{row.key} at {num_sms} SMs: no memory for {row.kept} outputs")
        return rows

    def _keeping(self, row: Row, key: str) -> Row:
        """The same calls with their last outputs alive, as a training step keeps them for the backward pass."""
        kept: collections.deque[Any] = collections.deque(maxlen=self.args.keep)

        def call() -> Any:
            kept.append(row.call())
            return kept[-1]

        name = f"{row.name.split(', layout')[0]}, last {self.args.keep} outputs alive"
        return dataclasses.replace(row, key=key, name=name, call=call, kept=self.args.keep)


def measure(world: World, buffer: deep_ep.Buffer, case: Case, args: argparse.Namespace) -> tuple[list[Any], list[str]]:
    """The rows at all SM budgets: figures, and what was left out and why."""
    workload = Workload(buffer, case, args)
    figures: list[dict[str, Any]] = []
    for num_sms in args.sms:
        rows = workload.rows(num_sms)
        while rows:
            row = rows.pop(0)
            row.check(row.call())
            world.barrier()
            for _ in range(row.kept):  # fill what is kept: the first rounds would not reuse memory otherwise
                row.call()
            times = summary(world.slowest(row.call))
            num_bytes = case.rows_over_link * row.row_bytes
            figure = {
                "key": row.key,
                "name": row.name,
                "num_sms": num_sms,
                "kept": row.kept,
                **times,
                "bytes_over_link": num_bytes,
                "gb_s": round(num_bytes / times["median_us"] / 1e3, 2),
                "probe": row.probe,
                "queued_us": None,
            }
            if buffer.engine == "cuda" and not row.waits:
                queued = world.rounds(lambda row=row: world.queued_microseconds(row.call, args.iterations))
                figure["queued_us"] = summary(queued)["median_us"]
            figures.append(figure)
            if world.rank == 0:
                more = "" if figure["queued_us"] is None else f"  (enqueued ahead: {figure['queued_us']:.1f} us)"
                print(f"{num_sms:>4} SMs  {row.name:<58}{times['median_us']:>10.1f} us{more}", flush=True)
            del row  # it holds the outputs that were kept
    buffer.check()
    return figures, workload.skipped


def measure_layout(world: World, buffer: deep_ep.Buffer, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """`get_dispatch_layout` alone: the device's time for it, the launches enqueued ahead."""

    def call() -> None:
        buffer.get_dispatch_layout(case.idx, args.experts)

    if buffer.engine != "cuda":
        return {"tokens": args.tokens, "topk": args.topk, **summary(world.slowest(call))}
    times = world.rounds(lambda: world.queued_microseconds(call, LAYOUT_CALLS))
    return {"tokens": args.tokens, "topk": args.topk, **summary(times)}


def measure_host(world: World, buffer: deep_ep.Buffer, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of the host to enqueue one of many calls: no synchronisation, few tokens so that the device keeps up."""
    tokens = min(args.tokens, HOST_TOKENS)
    few = argparse.Namespace(**{**vars(args), "tokens": tokens, "keep": 0})
    case = Case(world, few)
    workload = Workload(buffer, case, few)
    rows = [row for row in workload.rows(args.sms[-1]) if not row.waits]
    calls = {"layout": ("get_dispatch_layout", lambda: buffer.get_dispatch_layout(case.idx, args.experts))}
    calls.update({row.key: (row.name, row.call) for row in rows})
    config = deep_ep.Config(args.sms[-1])

    def finish(call: Callable[..., Any], *inputs: Any, **options: Any) -> None:
        """As training loops call: after an event, beside the current stream, which then waits."""
        before = buffer.capture()
        options.update(config=config, previous_event=before, async_finish=True, allocate_on_comm_stream=True)
        call(*inputs, **options)[-1].current_stream_wait()

    if buffer.engine == "cuda":
        calls["fp8_dispatch_async"] = (
            "FP8 dispatch, cached, asynchronous, with its events",
            lambda: finish(buffer.dispatch, case.x_fp8, handle=workload.handle),
        )
        calls["combine_async"] = (
            "bf16 combine, asynchronous, with its events",
            lambda: finish(buffer.combine, workload.symmetric, workload.handle),
        )
    figures = []
    for key, (name, call) in calls.items():
        times = world.rounds(partial(world.host_microseconds, call))
        figures.append({"key": key, "name": name, "tokens": tokens, **summary(times)})
    return figures
