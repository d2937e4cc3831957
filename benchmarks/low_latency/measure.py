"""What is timed: the operations alone, in pairs, in a CUDA graph and with hooks; the host's own time; the floors."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from intranode.probes import Registers, Rig
from intranode.world import MAX_SLEEP_CYCLES, SLEEP_CYCLES, WARMUPS, World, summary

import deep_ep
from deep_ep.errors import TopologyError

from .case import Case

GRAPH_PAIRS = 10  # in one graph, as the layers of a model are
TORCH_NAME = "by torch: empty outputs of a dispatch and one small kernel"
#: Bytes before a flag: none, and an FP8 row of the usual size.
FLAG_PAYLOADS = (0, 7168)
LINK_ROWS = 2048
LINK_SMS = 64


@dataclasses.dataclass
class Row:
    """One figure.

    Attributes:
        bytes_over_link: that the busiest direction of a link has to carry.
        trips: times that something has to cross the link one after the other.
        per_call: operations or pairs in a call.
        in_graph: the call replays a graph.
    """

    key: str
    name: str
    call: Callable[[], Any]
    bytes_over_link: int
    trips: int
    per_call: int = 1
    in_graph: bool = False


class Workload:
    """The calls of one buffer on one case, in one format; checked once.

    ``early``: the weights go with the dispatch, and `early_handle` is the handle of such a one. `source_handle`: of a
    dispatch whose rows lie by source.
    """

    def __init__(self, buffer: deep_ep.Buffer, case: Case, use_fp8: bool) -> None:
        self.buffer, self.case, self.use_fp8 = buffer, case, use_fp8
        result = self.dispatch()
        case.check_dispatch(result, use_fp8)
        self.handle = result[2]
        case.check_combine(self.combine())
        case.check_dispatch(self.dispatch_hooked(), use_fp8)
        result = self.dispatch_hooked(early=True)
        case.check_dispatch(result, use_fp8)
        self.early_handle = result[2]
        case.check_combine(self.combine_hooked())
        case.check_combine(self.combine(self.early_handle))
        case.check_combine(self.combine_hooked(self.early_handle))
        result = self.dispatch(True, expert_major=False)
        case.check_dispatch_by_source(result, use_fp8)
        self.source_handle = result[2]
        case.check_combine(self.combine_by_source())
        case.check_combine(self.pair_by_source())
        # What calls write to that are given it.
        self.received, self.combined = self.dispatch()[0], self.combine()[0]
        case.check_dispatch(self.dispatch(out=self.received), use_fp8)
        case.check_combine(self.combine(out=self.combined))
        result = self.dispatch(async_finish=True)
        result[3].current_stream_wait()
        case.check_dispatch(result, use_fp8)
        combined, event, _ = self.combine(async_finish=True)
        event.current_stream_wait()
        case.check_combine((combined,))
        case.world.barrier()

    # Calls with as little around them as a caller has, since the host's time is measured as well.

    def dispatch_call(self, early: bool = False, **options: Any) -> Callable[[], Any]:
        case, use_fp8, dispatch = self.case, self.use_fp8, self.buffer.low_latency_dispatch
        x, idx, max_tokens, num_experts = case.x, case.idx, case.max_tokens, case.args.experts
        if early:
            options["topk_weights"] = case.weights
        if not options:
            return lambda: dispatch(x, idx, max_tokens, num_experts, use_fp8=use_fp8)
        return lambda: dispatch(x, idx, max_tokens, num_experts, use_fp8=use_fp8, **options)

    def combine_call(self, handle: Any = None, **options: Any) -> Callable[[], Any]:
        case, combine, handle = self.case, self.buffer.low_latency_combine, handle or self.handle
        rows, idx, weights = case.expert_rows, case.idx, case.weights
        if not options:
            return lambda: combine(rows, idx, weights, handle)
        return lambda: combine(rows, idx, weights, handle, **options)

    def dispatch(self, early: bool = False, **options: Any) -> Any:
        return self.dispatch_call(early, **options)()

    def combine(self, handle: Any = None, **options: Any) -> Any:
        return self.combine_call(handle, **options)()

    def pair(self, early: bool = False) -> Any:
        return self.combine(self.dispatch(early)[2])

    def dispatch_hooked(self, early: bool = False) -> Any:
        result = self.dispatch(early, return_recv_hook=True)
        result[4]()
        return result

    def combine_hooked(self, handle: Any = None) -> Any:
        result = self.combine(handle, return_recv_hook=True)
        result[2]()
        return result

    def pair_hooked(self, early: bool = False) -> Any:
        return self.combine_hooked(self.dispatch_hooked(early)[2])

    def dispatch_by_source(self) -> Any:
        return self.dispatch(True, expert_major=False)

    def combine_by_source(self, handle: Any = None) -> Any:
        case = self.case
        return self.buffer.low_latency_combine(case.partial_rows, case.idx, None, handle or self.source_handle)

    def pair_by_source(self) -> Any:
        return self.combine_by_source(self.dispatch_by_source()[2])

    def host_calls(self) -> list[tuple[str, str, Callable[[], Any]]]:
        """Key, name and call of what only the host's time is taken of: calls that make no outputs, and asynchronous
        ones."""
        dispatch, combine = self.dispatch_call(async_finish=True), self.combine_call(async_finish=True)

        def dispatch_aside() -> None:
            dispatch()[3].current_stream_wait()

        def combine_aside() -> None:
            combine()[1].current_stream_wait()

        return [
            ("dispatch_out", "dispatch, out given", self.dispatch_call(out=self.received)),
            ("combine_out", "combine, out given", self.combine_call(out=self.combined)),
            ("dispatch_async", "dispatch, asynchronous, with its events", dispatch_aside),
            ("combine_async", "combine, asynchronous, with its events", combine_aside),
        ]

    def graph(self, pair: Callable[[], Any]) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            pair()
        self.case.world.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(GRAPH_PAIRS):
                result = pair()
        graph.replay()
        self.case.check_combine(result)
        self.case.world.barrier()
        return graph.replay

    def rows(self) -> list[Row]:
        case = self.case
        sent = case.rows_over_link * case.row_bytes(self.use_fp8)
        back = case.rows_over_link * case.row_bytes(False)
        rows = [
            Row("dispatch", "dispatch", self.dispatch_call(), sent, 1),
            Row("combine", "combine", self.combine_call(), back, 1),
            Row("pair", "dispatch + combine", self.pair, sent + back, 2),
            Row("dispatch_source", "dispatch with weights, rows by source", self.dispatch_by_source, sent, 1),
            Row("combine_source", "combine, rows by source", self.combine_by_source, back, 1),
            Row("pair_source", "dispatch + combine, rows by source", self.pair_by_source, sent + back, 2),
        ]
        if self.buffer.engine == "cuda":
            for pair, key, name in (
                (self.pair, "pair_graph", "dispatch + combine in a CUDA graph"),
                (
                    lambda: self.pair(True),
                    "pair_graph_weights",
                    "dispatch + combine, weights at dispatch, in a CUDA graph",
                ),
                (self.pair_by_source, "pair_graph_source", "dispatch + combine, rows by source, in a CUDA graph"),
            ):
                rows.append(Row(key, name, self.graph(pair), sent + back, 2, GRAPH_PAIRS, True))
        rows += [
            Row("dispatch_hook", "dispatch, receive hook at once", self.dispatch_hooked, sent, 1),
            Row("combine_hook", "combine, receive hook at once", self.combine_hooked, back, 1),
            Row("pair_hook", "dispatch + combine, receive hooks at once", self.pair_hooked, sent + back, 2),
            Row(
                "dispatch_hook_weights",
                "dispatch with weights, receive hook at once",
                lambda: self.dispatch_hooked(True),
                sent,
                1,
            ),
            Row(
                "combine_hook_weights",
                "combine, weights at dispatch, receive hook at once",
                lambda: self.combine_hooked(self.early_handle),
                back,
                1,
            ),
            Row(
                "pair_hook_weights",
                "dispatch + combine, weights at dispatch, receive hooks at once",
                lambda: self.pair_hooked(True),
                sent + back,
                2,
            ),
        ]
        return rows


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed; values in ascending order."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def call_times(world: World, call: Callable[[], Any], iterations: int) -> list[float]:
    """Microseconds of each of `iterations` calls on this rank, all of them enqueued before the first one runs."""
    gc.freeze()
    if not world.num_devices:
        for _ in range(WARMUPS):
            call()
        times = []
        for _ in range(iterations):
            start_s = time.perf_counter()
            call()
            times.append((time.perf_counter() - start_s) * 1e6)
        return times
    cycles = SLEEP_CYCLES
    while True:
        for _ in range(WARMUPS):
            call()
        world.barrier()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
        torch.cuda._sleep(cycles)
        call()  # the ranks do not wake at the same moment, and wait for each other here
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        was_ahead = not events[0].query()
        events[-1].synchronize()
        # All ranks or none try again: they run the calls together.
        if all(world.gather(was_ahead)) or cycles >= MAX_SLEEP_CYCLES:
            return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]
        cycles *= 4


def measure(world: World, buffer: deep_ep.Buffer, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows over token counts and formats."""
    figures: list[dict[str, Any]] = []
    for tokens in args.tokens:
        case = Case(world, args, tokens)
        for form in args.formats:
            workload = Workload(buffer, case, form == "fp8")
            for row in workload.rows():
                world.barrier()
                # Events between calls cost time themselves: the mean is taken without, the percentiles with them.
                mean = [us / row.per_call for us in world.rounds(lambda row=row: _mean(world, buffer, row, args))]
                called = [us / row.per_call for us in world.slowest(row.call)]
                pooled = world.gather(call_times(world, row.call, args.samples))
                ordered = sorted(us / row.per_call for times in pooled for us in times)
                figure = {
                    "key": row.key,
                    "name": row.name,
                    "tokens": tokens,
                    "format": form,
                    **summary(mean),
                    "called_us": summary(called)["median_us"],
                    "p50_us": round(percentile(ordered, 0.50), 2),
                    "p99_us": round(percentile(ordered, 0.99), 2),
                    "bytes_over_link": row.bytes_over_link,
                    "trips": row.trips,
                }
                figures.append(figure)
                if world.rank == 0:
                    print(
                        f"{tokens:>4} tokens  {form}  {row.name:<62}{figure['median_us']:>9.1f} us  "
                        f"(p50 {figure['p50_us']:.1f}, p99 {figure['p99_us']:.1f}, called {figure['called_us']:.1f})",
                        flush=True,
                    )
            del workload
    buffer.check()
    return figures


def _mean(world: World, buffer: deep_ep.Buffer, row: Row, args: argparse.Namespace) -> float:
    if buffer.engine != "cuda":
        return world.microseconds(row.call, args.iterations)
    return world.queued_microseconds(row.call, args.iterations)


def measure_host(world: World, buffer: deep_ep.Buffer, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time of the host to enqueue one of many calls: no synchronisation, few tokens so that the device keeps up.

    Hosts differ by a factor of two, and one host from moment to moment, so torch's own time for what a dispatch cannot
    do without stands beside the calls, and all take turns.
    """
    case = Case(world, args, min(args.tokens))
    figures = []
    for form in args.formats:
        workload = Workload(buffer, case, form == "fp8")
        calls = [(row.key, row.name, row.call) for row in workload.rows()]
        calls += workload.host_calls()
        calls.append(("torch", TORCH_NAME, torchs_part(workload.received)))
        times = world.rounds_in_turn([partial(world.host_microseconds, call) for _, _, call in calls])
        for (key, name, _), of_call in zip(calls, times, strict=True):
            figures.append({"key": key, "name": name, "format": form, "tokens": case.tokens, **summary(of_call)})
    return figures


def torchs_part(recv_x: torch.Tensor | tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    """Memory for what a dispatch receives, by ``torch.empty``, and one small kernel of torch."""
    tensors = (recv_x,) if isinstance(recv_x, torch.Tensor) else recv_x
    layouts = [(tensor.numel(), tensor.dtype) for tensor in tensors]
    device = tensors[0].device
    counter = torch.zeros(1, device=device)

    def call() -> Any:
        made = [torch.empty(size, dtype=dtype, device=device) for size, dtype in layouts]
        counter.add_(1)
        return made

    return call


def measure_floors(world: World, args: argparse.Namespace) -> dict[str, Any]:
    """What nothing can undercut: a flag's way by bytes that travel before it, and the rate of a link's direction.

    Returns:
        ``flags``: microseconds one way by bytes; ``link``: stores of 16 bytes to the peer, both directions at once,
        bytes and GB/s; ``note``: what is missing and why.
    """
    floors: dict[str, Any] = {"flags": {}, "link": None, "note": ""}
    if not 1 < world.size <= world.num_devices:
        floors["note"] = "no two ranks with GPUs of their own: the floors were not measured"
        return floors
    try:
        rig = Rig(world, LINK_ROWS, 2 * args.hidden, 16, args.seed)
    except TopologyError as error:  # on all ranks alike
        floors["note"] = f"the floors were not measured: {error}"
        return floors
    for num_bytes in FLAG_PAYLOADS:
        floors["flags"][str(num_bytes)] = summary(world.rounds(lambda size=num_bytes: rig.flags(size)))
    num_bytes = LINK_ROWS * rig.row_bytes
    times = summary(world.slowest(lambda: rig.copy(Registers(32), LINK_SMS, True)))
    floors["link"] = {"bytes": num_bytes, **times, "gb_s": round(num_bytes / times["median_us"] / 1e3, 2)}
    rig.close()
    return floors
