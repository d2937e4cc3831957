"""Dispatch + combine of the portable engine against a bare all-to-all of the same bytes, as a ratio.

    python benchmarks/bench_portable.py --ranks 4 --tokens 1024 --hidden 2048 --topk 4 --experts 64

Each repetition times, one after the other and each behind a barrier, what `deep_ep` does (pack the rows, exchange
counts, indices and weights with them, sum at home) and what nobody can avoid: `all_to_all_single` of the same payload
bytes between the same pairs of ranks, there and back, out of buffers that are already packed. All on one process
group, in one run, so that the ratio does not depend on what else the machine did. A call's time is that of its
slowest rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deep_ep
from deep_ep.utils.math import count_bytes, per_token_cast_to_fp8

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Row:
    """One line of the result: `ours` and the payload widths (bytes a row) of the all-to-all, there and back."""

    name: str
    ours: Callable[[], Any]
    there_bytes: int
    back_bytes: int


class AllToAll:
    """Payload of dispatch (there) and combine (back) between the same pairs of ranks, buffers packed beforehand."""

    def __init__(
        self, group: dist.ProcessGroup, send_rows: list[int], recv_rows: list[int], there_bytes: int, back_bytes: int
    ):
        self.group = group
        self.there = self._prepare(send_rows, recv_rows, there_bytes)
        self.back = self._prepare(recv_rows, send_rows, back_bytes)

    @staticmethod
    def _prepare(send_rows: list[int], recv_rows: list[int], width: int) -> tuple[Any, ...]:
        source = torch.randint(1, 256, (sum(send_rows) * width,), dtype=torch.uint8)
        target = torch.ones(sum(recv_rows) * width, dtype=torch.uint8)
        return target, source, [n * width for n in recv_rows], [n * width for n in send_rows]

    def __call__(self) -> None:
        for target, source, recv_bytes, send_bytes in (self.there, self.back):
            dist.all_to_all_single(target, source, recv_bytes, send_bytes, group=self.group)


def build_rows(args: argparse.Namespace, rank: int, group: dist.ProcessGroup) -> tuple[list[Row], list[int], list[int]]:
    torch.manual_seed(args.seed * 1000 + rank)
    buffer = deep_ep.Buffer(group)
    idx = torch.rand(args.tokens, args.experts).topk(args.topk, dim=1).indices
    weights = torch.rand(args.tokens, args.topk)
    x = torch.randn(args.tokens, args.hidden).bfloat16()
    x_fp8 = per_token_cast_to_fp8(x)
    lay = buffer.get_dispatch_layout(idx, args.experts)

    def dispatch(payload: Any, **extra: Any) -> Any:
        return buffer.dispatch(payload, None, lay[0], lay[1], lay[3], lay[2], idx, weights, **extra)

    recv, _, _, _, handle, _ = dispatch(x)
    expert_out = torch.randn_like(recv)
    ends = handle[0][:, rank].tolist()
    recv_rows = [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    send_rows = lay[0].tolist()
    visits = lay[3].sum(1, keepdim=True)
    assert torch.equal(buffer.combine(torch.ones_like(recv), handle)[0], visits.expand(-1, args.hidden).bfloat16())
    assert bool(recv.any())
    wide, narrow = args.hidden * 2, count_bytes(x_fp8) // max(1, args.tokens)

    def with_layout() -> None:
        again = buffer.get_dispatch_layout(idx, args.experts)
        out = buffer.dispatch(x, None, again[0], again[1], again[3], again[2], idx, weights)
        buffer.combine(expert_out, out[4])

    rows = [
        Row("bf16 dispatch + combine", lambda: (dispatch(x), buffer.combine(expert_out, handle)), wide, wide),
        Row("the same, layout included", with_layout, wide, wide),
        Row(
            "bf16 cached dispatch + combine",
            lambda: (buffer.dispatch(x, handle=handle), buffer.combine(expert_out, handle)),
            wide,
            wide,
        ),
        Row("FP8 dispatch + bf16 combine", lambda: (dispatch(x_fp8), buffer.combine(expert_out, handle)), narrow, wide),
        Row(
            "FP8 made inside + bf16 combine",
            lambda: (dispatch(x, use_fp8=True), buffer.combine(expert_out, handle)),
            narrow,
            wide,
        ),
    ]
    return rows, send_rows, recv_rows


def measure(group: dist.ProcessGroup, fn: Callable[[], Any]) -> float:
    dist.barrier(group)
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "median_ms": statistics.median(ordered) * 1e3,
        "min_ms": ordered[0] * 1e3,
        "max_ms": ordered[-1] * 1e3,
        "p25_ms": ordered[len(ordered) // 4] * 1e3,
        "p75_ms": ordered[(3 * len(ordered)) // 4] * 1e3,
    }


def rank_main(rank: int, args: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    group = dist.new_group(list(range(args.ranks)))
    rows, send_rows, recv_rows = build_rows(args, rank, group)
    bare = [AllToAll(group, send_rows, recv_rows, row.there_bytes, row.back_bytes) for row in rows]
    samples = torch.zeros(args.repetitions, len(rows), 2, dtype=torch.float64)
    for repetition in range(-args.warmups, args.repetitions):
        for i, row in enumerate(rows):
            # Which of the two goes first alternates: the second finds warmer caches.
            order = (0, 1) if (repetition + i) % 2 == 0 else (1, 0)
            for which in order:
                elapsed = measure(group, row.ours if which == 0 else bare[i])
                if repetition >= 0:
                    samples[repetition, i, which] = elapsed
    dist.all_reduce(samples, dist.ReduceOp.MAX, group=group)
    num_bytes = torch.tensor([sum(send_rows) * (row.there_bytes + row.back_bytes) for row in rows], dtype=torch.float64)
    dist.all_reduce(num_bytes, group=group)
    if rank == 0:
        report(args, rows, samples, num_bytes)
    dist.barrier(group)
    dist.destroy_process_group()


def report(args: argparse.Namespace, rows: list[Row], samples: torch.Tensor, num_bytes: torch.Tensor) -> None:
    result: dict[str, Any] = {"benchmark": "bench_portable", **environment(), "arguments": vars(args), "rows": []}
    print(
        f"{args.ranks} ranks, {args.tokens} tokens a rank, hidden {args.hidden}, top-{args.topk} of {args.experts} "
        f"experts; {args.repetitions} repetitions; {result['cpu']}, {result['cores']} cores, "
        f"{args.threads} thread(s) a rank"
    )
    print(f"{'':<34}{'deep_ep ms':>12}{'(p25-p75)':>15}{'all-to-all ms':>15}{'(p25-p75)':>15}{'ratio':>8}")
    for i, row in enumerate(rows):
        ours, bare = samples[:, i, 0].tolist(), samples[:, i, 1].tolist()
        mine, theirs = summary(ours), summary(bare)
        ratios = sorted(a / b for a, b in zip(ours, bare, strict=True))
        entry = {
            "name": row.name,
            "deep_ep": mine,
            "all_to_all": theirs,
            "ratio_of_medians": mine["median_ms"] / theirs["median_ms"],
            "median_of_ratios": statistics.median(ratios),
            "ratio_p25": ratios[len(ratios) // 4],
            "ratio_p75": ratios[(3 * len(ratios)) // 4],
            "bytes_all_ranks_both_directions": int(num_bytes[i]),
        }
        result["rows"].append(entry)
        spreads = [f"({s['p25_ms']:.1f}-{s['p75_ms']:.1f})" for s in (mine, theirs)]
        print(
            f"{row.name:<34}{mine['median_ms']:>12.2f}{spreads[0]:>15}{theirs['median_ms']:>15.2f}{spreads[1]:>15}"
            f"{entry['ratio_of_medians']:>8.2f}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {args.json}")


def environment() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "device": "cpu",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "none",
        "versions": {"deep_ep": deep_ep.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens a rank")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads a rank")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the result there")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    import tempfile

    with tempfile.TemporaryDirectory(prefix="deep_ep_bench_") as folder:
        torch.multiprocessing.spawn(rank_main, args=(args, f"{folder}/store"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
