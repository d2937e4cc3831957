"""Dispatch and combine between the GPUs of one host, over SM budgets, beside what the link itself can do.

    python benchmarks/bench_intranode.py --ranks 2 --tokens 4096 --hidden 7168 --topk 8 --experts 256 --sms 8,16,24

A figure is the time of a whole call by CUDA events over back-to-back calls; of each round the slowest rank counts, and
the table gives median, quartiles and minimum over the rounds. Before it is timed, every operation is compared bit for
bit with a reference in plain torch. The limits are taken in the same run: copies of the same number of bytes by the
copy engines of two GPUs, both directions at once, and copies within one GPU. The ratio is time over that limit.

With more ranks than GPUs the ranks share them: a check that everything works, not a measurement.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deep_ep
from deep_ep.fp8 import quantize_1x128

ROOT = Path(__file__).resolve().parent.parent
LOCAL_COPY_BYTES = 256 << 20
WARMUPS = 3
POOL_BYTES = 3 << 30


@dataclasses.dataclass
class Row:
    """One figure: a call, what it must return, and the bytes that a row of it moves to another rank."""

    key: str
    name: str
    call: Callable[[], Any]
    check: Callable[[Any], None]
    row_bytes: int
    kept: int = 0


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

    def slowest(self, call: Callable[[], Any]) -> list[float]:
        """Microseconds of a call by round, on the rank that was slowest in it."""
        mine = []
        for _ in range(self.args.rounds):
            self.barrier()
            mine.append(self.microseconds(call, self.args.iterations))
        return [max(times) for times in zip(*self.gather(mine), strict=True)]


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


# Inputs, and what the operations must return.


class Case:
    """Random inputs of this rank, those of the others gathered, and the results that follow from them."""

    def __init__(self, world: World, args: argparse.Namespace) -> None:
        self.world, self.args = world, args
        generator = torch.Generator(device=world.device).manual_seed(args.seed * 1000 + world.rank)
        like = {"generator": generator, "device": world.device}
        self.x = torch.randn(args.tokens, args.hidden, **like).bfloat16()
        self.idx = torch.rand(args.tokens, args.experts, **like).topk(args.topk, dim=1).indices
        self.weights = torch.rand(args.tokens, args.topk, **like)
        self.x_fp8 = quantize_1x128(self.x)
        # Contiguous ranges of experts, the first ranks own one more if they do not divide.
        self.sizes = [args.experts // args.ranks + (rank < args.experts % args.ranks) for rank in range(args.ranks)]
        owner = torch.repeat_interleave(torch.arange(args.ranks), torch.tensor(self.sizes)).to(world.device)
        self.owner = owner[self.idx]
        self.in_rank = torch.stack([(self.owner == rank).any(1) for rank in range(args.ranks)], dim=1)
        self._expect_dispatch(owner)
        self._expect_combine()
        leaving = [int(self.in_rank[:, rank].sum()) for rank in range(args.ranks) if rank != world.rank]
        arriving = len(self.recv_x) - int(self.in_rank[:, world.rank].sum())
        #: Rows that the busiest direction of a link of any rank carries.
        self.rows_over_link = max(world.gather(max(sum(leaving), arriving)))

    def _expect_dispatch(self, owner: torch.Tensor) -> None:
        rank, args = self.world.rank, self.args
        idx_of, weights_of = self.world.gather_tensor(self.idx), self.world.gather_tensor(self.weights)
        visits = [(owner[idx] == rank).any(1) for idx in idx_of]
        self.recv_x = torch.cat([x[v] for x, v in zip(self.world.gather_tensor(self.x), visits, strict=True)])
        # Quantisation works row by row, so the received rows quantise to the rows that were sent.
        self.recv_fp8 = quantize_1x128(self.recv_x)
        idx = torch.cat([part[v] for part, v in zip(idx_of, visits, strict=True)])
        weights = torch.cat([part[v] for part, v in zip(weights_of, visits, strict=True)])
        first = sum(self.sizes[:rank])
        mine = (idx >= first) & (idx < first + self.sizes[rank])
        self.recv_idx = torch.where(mine, idx - first, -1)
        self.recv_weights = torch.where(mine, weights, 0.0)
        self.counts = [int((self.recv_idx == expert).sum()) for expert in range(self.sizes[rank])]
        if not args.tokens or not bool(self.recv_x.any()):
            raise SystemExit(f"rank {rank} receives no rows; give more tokens or fewer ranks")

    def expert_output(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """What the experts of a rank make of rows: different on each, and rounded, so that the order of sums shows."""
        return (x.float() * (1.0 + 0.37 * rank)).bfloat16()

    def _expect_combine(self) -> None:
        total = torch.zeros(self.x.shape, dtype=torch.float32, device=self.x.device)
        weights = torch.zeros_like(self.weights)
        for rank in range(self.args.ranks):
            there = self.in_rank[:, rank : rank + 1]
            total = torch.where(there, total + self.expert_output(self.x, rank).float(), total)
            weights = weights + torch.where(self.owner == rank, self.weights, 0.0)
        self.combined, self.combined_weights = total.bfloat16(), weights

    def check_rows(self, result: Any) -> None:
        received = result[0]
        pairs = zip(received, self.recv_fp8, strict=True) if isinstance(received, tuple) else [(received, self.recv_x)]
        for got, expected in pairs:
            _same_bits("received rows", got, expected)

    def check_routed(self, result: Any) -> None:
        self.check_rows(result)
        _same_bits("received indices", result[1], self.recv_idx)
        _same_bits("received weights", result[2], self.recv_weights)
        if result[3] != self.counts:
            raise SystemExit("dispatch: wrong numbers of tokens by expert")

    def check_combined(self, result: Any) -> None:
        _same_bits("combined rows", result[0], self.combined)
        if result[1] is not None:
            _same_bits("combined weights", result[1], self.combined_weights)


def _same_bits(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise SystemExit(f"{what}: got {list(got.shape)} {got.dtype}, expected {list(expected.shape)} {expected.dtype}")
    raw, wanted = got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    if not torch.equal(raw, wanted):
        raise SystemExit(f"{what}: {int((raw != wanted).any(1).sum())} of {len(raw)} rows differ from the reference")


# What is timed.


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

    def keeps(self) -> bool:
        """Whether the outputs that are to be kept alive fit, on every rank."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.case.recv_fp8)
        wanted = (self.args.keep + 2) * (size + (4 << 20))
        memory = getattr(self.buffer.runtime, "memory", None)
        fits = True
        if memory is not None:
            usage = memory.usage()
            fits = usage["mapped_bytes"] - usage["control_bytes"] - usage["live_bytes"] >= wanted
        elif self.case.world.num_devices:
            fits = torch.cuda.mem_get_info()[0] >= wanted
        return self.args.keep > 0 and all(self.case.world.gather(fits))

    def rows(self, num_sms: int) -> list[Row]:
        buffer, case, handle, config = self.buffer, self.case, self.handle, deep_ep.Config(num_sms)
        wide = 2 * self.args.hidden
        narrow = self.args.hidden + case.x_fp8[1].element_size() * case.x_fp8[1].shape[1]
        # An uncached dispatch also brings indices, weights and the source of each row.
        routing = self.args.topk * (case.idx.element_size() + 4) + 4
        kept: collections.deque[Any] = collections.deque(maxlen=self.args.keep)

        def cached(x: Any) -> Any:
            return buffer.dispatch(x, handle=handle, config=config)

        def combine(x: torch.Tensor, weights: torch.Tensor | None = None) -> Any:
            return buffer.combine(x, handle, weights, config=config)

        def cached_kept() -> Any:
            kept.append(cached(case.x_fp8))
            return kept[-1]

        rows = [
            Row("fp8_dispatch_cached", "FP8 dispatch, cached", lambda: cached(case.x_fp8), case.check_rows, narrow),
            Row("bf16_dispatch_cached", "bf16 dispatch, cached", lambda: cached(case.x), case.check_rows, wide),
            Row(
                "fp8_dispatch_uncached",
                "FP8 dispatch, uncached, layout and host wait included",
                lambda: self.uncached(case.x_fp8, config),
                case.check_routed,
                narrow + routing,
            ),
            Row(
                "bf16_dispatch_uncached",
                "bf16 dispatch, uncached, layout and host wait included",
                lambda: self.uncached(case.x, config),
                case.check_routed,
                wide + routing,
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
        if self.keeps():
            name = f"FP8 dispatch, cached, last {self.args.keep} outputs alive"
            rows.append(Row("fp8_dispatch_kept", name, cached_kept, case.check_rows, narrow, self.args.keep))
        elif self.args.keep:
            self.skipped.append(f"fp8_dispatch_kept at {num_sms} SMs: no memory for {self.args.keep} outputs")
        return rows


def measure(world: World, buffer: deep_ep.Buffer, case: Case, args: argparse.Namespace) -> tuple[list[Any], list[str]]:
    workload = Workload(buffer, case, args)
    figures: list[dict[str, Any]] = []
    for num_sms in args.sms:
        for row in workload.rows(num_sms):
            row.check(row.call())
            world.barrier()
            for _ in range(row.kept):  # fill what is kept: the first rounds would not reuse memory otherwise
                row.call()
            times = summary(world.slowest(row.call))
            num_bytes = case.rows_over_link * row.row_bytes
            figures.append(
                {
                    "key": row.key,
                    "name": row.name,
                    "num_sms": num_sms,
                    "kept": row.kept,
                    **times,
                    "bytes_over_link": num_bytes,
                    "gb_s": round(num_bytes / times["median_us"] / 1e3, 2),
                }
            )
            if world.rank == 0:
                print(f"{num_sms:>4} SMs  {row.name:<58}{times['median_us']:>10.1f} us", flush=True)
        del row  # it holds the outputs that were kept
    buffer.check()
    return figures, workload.skipped


# What the hardware can do.


def copy_engines(num_bytes: int, args: argparse.Namespace) -> list[float]:
    """Microseconds by round of copies GPU 0 -> 1 and 1 -> 0 at once, of the slower direction.

    Straight from the driver: torch's copy between devices adds two waits between streams to each copy.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    lanes = []
    for source, target in ((0, 1), (1, 0)):
        src = torch.randint(1, 256, (num_bytes,), dtype=torch.uint8, device=f"cuda:{source}")
        dst = torch.ones(num_bytes, dtype=torch.uint8, device=f"cuda:{target}")
        dst.copy_(src)  # torch opens the access to the peer on its first copy
        lanes.append((source, src, dst.fill_(0), torch.cuda.Stream(device=source)))
    for device in (0, 1):
        torch.cuda.synchronize(device)

    def enqueue(src: torch.Tensor, dst: torch.Tensor, stream: torch.cuda.Stream) -> None:
        status = driver.cuMemcpyDtoDAsync_v2(
            ctypes.c_uint64(dst.data_ptr()),
            ctypes.c_uint64(src.data_ptr()),
            ctypes.c_size_t(num_bytes),
            ctypes.c_void_p(stream.cuda_stream),
        )
        if status:
            raise RuntimeError(f"the driver's copy between GPUs failed with status {status}")

    rounds = []
    for _ in range(args.rounds):
        events = []
        # Both GPUs sleep first, so that all copies are enqueued when the first one starts.
        for device, _, _, stream in lanes:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
        for device, src, dst, stream in lanes:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    enqueue(src, dst, stream)
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record(stream)
                for _ in range(args.iterations):
                    enqueue(src, dst, stream)
                end.record(stream)
                events.append((start, end))
        for device in (0, 1):
            torch.cuda.synchronize(device)
        rounds.append(max(start.elapsed_time(end) for start, end in events) * 1e3 / args.iterations)
    for _, src, dst, _ in lanes:
        if not torch.equal(dst.to(src.device), src):
            raise RuntimeError("the copy engine's limit: the copied bytes differ")
    return rounds


def measure_limits(world: World, sizes: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    """Copies by rank 0 alone while the others wait; the keys of `copy_engine` are bytes in one direction."""
    limits: dict[str, Any] = {"copy_engine": {}, "local_copy": None, "note": ""}

    def figure(num_bytes: int, times: list[float]) -> dict[str, float]:
        result = summary(times)
        return {**result, "gb_s": round(num_bytes / result["median_us"] / 1e3, 2)}

    world.barrier()
    if world.rank == 0 and world.num_devices:
        src = torch.randint(1, 256, (LOCAL_COPY_BYTES,), dtype=torch.uint8, device=world.device)
        dst = torch.ones_like(src)
        times = [world.microseconds(lambda: dst.copy_(src), args.iterations) for _ in range(args.rounds)]
        limits["local_copy"] = {"bytes": LOCAL_COPY_BYTES, **figure(LOCAL_COPY_BYTES, times)}
        if world.num_devices < 2 or not torch.cuda.can_device_access_peer(0, 1):
            limits["note"] = "no two GPUs that reach each other: the link's limit was not measured"
        elif world.size > 1:
            for num_bytes in sizes:
                limits["copy_engine"][str(num_bytes)] = figure(num_bytes, copy_engines(num_bytes, args))
        torch.cuda.empty_cache()
    dist.barrier(world.group)
    return limits


# The report.


def environment(args: argparse.Namespace) -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    driver = ""
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "num_devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "driver": driver or "none",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": args.commit or git.stdout.strip() or "none",
        "command": "python benchmarks/bench_intranode.py " + shlex.join(args.command),
        "versions": {
            "deep_ep": deep_ep.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "none",
            "python": platform.python_version(),
        },
    }


def build_result(
    args: argparse.Namespace, engine: str, figures: list[dict[str, Any]], skipped: list[str], limits: dict[str, Any]
) -> dict[str, Any]:
    """The JSON: figures with their limits and ratios. `timings_meaningful`: every rank had kernels and its own GPU."""
    facts = environment(args)
    for figure in figures:
        limit = limits["copy_engine"].get(str(figure["bytes_over_link"]))
        figure["limit_us"] = limit["median_us"] if limit else None
        figure["ratio_to_limit"] = round(figure["median_us"] / limit["median_us"], 3) if limit else None
    arguments = {key: value for key, value in vars(args).items() if key not in ("json", "command", "commit")}
    return {
        "benchmark": "bench_intranode",
        "engine": engine,
        **facts,
        "timings_meaningful": engine == "cuda" and args.ranks <= facts["num_devices"],
        "arguments": arguments,
        "limits": limits,
        "rows": figures,
        "skipped": skipped,
    }


def print_result(result: dict[str, Any]) -> None:
    arguments = result["arguments"]
    title = (
        f"{arguments['ranks']} ranks on {result['num_devices']} x {result['device']}, engine {result['engine']}, "
        f"{arguments['tokens']} tokens a rank, hidden {arguments['hidden']}, top-{arguments['topk']} of "
        f"{arguments['experts']} experts; {arguments['rounds']} rounds of {arguments['iterations']} calls"
    )
    head = ["call", "SMs", "median us", "p25-p75", "min us", "MB", "GB/s", "limit us", "ratio"]
    keys = [figure["key"] for figure in result["rows"]]
    lines = [
        [
            figure["name"],
            str(figure["num_sms"]),
            f"{figure['median_us']:.1f}",
            f"{figure['p25_us']:.1f}-{figure['p75_us']:.1f}",
            f"{figure['min_us']:.1f}",
            f"{figure['bytes_over_link'] / 1e6:.1f}",
            f"{figure['gb_s']:.1f}",
            "-" if figure["limit_us"] is None else f"{figure['limit_us']:.1f}",
            "-" if figure["ratio_to_limit"] is None else f"{figure['ratio_to_limit']:.2f}",
        ]
        for figure in sorted(result["rows"], key=lambda figure: keys.index(figure["key"]))
    ]
    if importlib.util.find_spec("rich") and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title)
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 else "right")
        for line in lines:
            table.add_row(*line)
        Console().print(table)
    else:
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        print(f"\n{title}")
        for line in [head, *lines]:
            cells = [
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ]
            print("  ".join(cells))
    for num_bytes, limit in result["limits"]["copy_engine"].items():
        print(
            f"limit: copy engines, both directions, {int(num_bytes) / 1e6:.1f} MB: {limit['median_us']:.1f} us "
            f"({limit['p25_us']:.1f}-{limit['p75_us']:.1f}), {limit['gb_s']:.0f} GB/s each"
        )
    local = result["limits"]["local_copy"]
    if local:
        print(f"limit: copy within one GPU, {local['bytes'] >> 20} MiB: {local['gb_s']:.0f} GB/s")
    for remark in [result["limits"]["note"], *result["skipped"]]:
        if remark:
            print(remark)
    if not result["timings_meaningful"]:
        print("These timings are not meaningful: they want the cuda engine and a GPU for every rank.")


def rank_main(rank: int, args: argparse.Namespace, store: str) -> None:
    backend = "cpu:gloo,cuda:gloo" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    world = World(rank, args)
    buffer = deep_ep.Buffer(world.group, num_nvl_bytes=args.pool_bytes, device=world.device)
    if buffer.engine != "cuda":
        # SM budgets mean nothing to it: one of them is enough.
        args.sms = args.sms[:1]
        if rank == 0:
            print("The cuda engine cannot serve here (`python -m deep_ep doctor` says why): the portable engine runs.")
    elif rank == 0 and args.ranks > world.num_devices:
        print(f"{args.ranks} ranks share {world.num_devices} GPU(s): the timings will not be meaningful.")
    case = Case(world, args)
    figures, skipped = measure(world, buffer, case, args)
    limits = measure_limits(world, sorted({figure["bytes_over_link"] for figure in figures}), args)
    if rank == 0:
        result = build_result(args, buffer.engine, figures, skipped, limits)
        print_result(result)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
            print(f"written to {args.json}")
    world.barrier()
    buffer.destroy()
    dist.destroy_process_group()


def sm_counts(text: str) -> list[int]:
    """Even numbers from 2, separated by commas."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or any(count < 2 or count % 2 for count in counts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected even numbers from 2, separated by commas, like 8,16,24")
    return counts


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from 1")
    return int(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--tokens", type=positive, default=4096, help="tokens a rank")
    parser.add_argument("--hidden", type=positive, default=7168)
    parser.add_argument("--topk", type=positive, default=8)
    parser.add_argument("--experts", type=positive, default=256)
    parser.add_argument("--sms", type=sm_counts, default=[8, 16, 24], help="SM budgets, like 8,16,24")
    parser.add_argument("--iterations", type=positive, default=30, help="back-to-back calls a round")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--keep", type=int, default=32, help="outputs kept alive in the last row; 0 leaves it out")
    parser.add_argument("--pool-bytes", type=positive, default=POOL_BYTES, help="symmetric memory of a rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="the commit that is measured, where git cannot tell")
    parser.add_argument("--json", help="write the result there")
    args = parser.parse_args(argv)
    if args.topk > args.experts or args.ranks > args.experts:
        parser.error(f"--experts {args.experts}: expected at least --topk {args.topk} and --ranks {args.ranks}")
    if args.keep < 0:
        parser.error(f"--keep {args.keep}: expected 0 or more")
    args.command = list(sys.argv[1:] if argv is None else argv)
    if args.json:  # the file's name alone: a folder of one machine tells others nothing
        args.command = [item.replace(args.json, Path(args.json).name) for item in args.command]
    return args


def main() -> None:
    args = parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.ranks)))
    with tempfile.TemporaryDirectory(prefix="deep_ep_bench_") as folder:
        torch.multiprocessing.spawn(rank_main, args=(args, f"{folder}/store"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
