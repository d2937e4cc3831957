"""Runs the kernels under compute-sanitizer: memcheck, racecheck and synccheck, on a few small random operations.

    python tests/sanitize.py                                # two ranks, all three tools
    python tests/sanitize.py --tools racecheck --count 8

The ranks' kernels wait for each other, so the ranks run at the same time: on a GPU each, or in time slices of one. One
line per tool; the exit code is 0 only if every tool ran to the end and found nothing. Kernels of torch are left out.
The sanitizers see shared memory and the bounds of allocations, not the order between ranks: see test_cuda_order.py.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "synccheck")
# Everything is slow there: no deadline of the library may end a run that only crawls.
LIBRARY_TIMEOUT_S = 900
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?")


def sanitizer_command(sanitizer: str, tool: str) -> list[str]:
    """Without the program. Children are checked too; a program that does not touch CUDA itself is no error."""
    return [
        sanitizer, "--tool", tool, "--target-processes", "all", "--kernel-name", "kns=deep_ep",
        "--require-cuda-init", "no", "--report-api-errors", "no", "--launch-timeout", "180", "--error-exitcode", "9",
    ]  # fmt: skip


def problems(output: str, code: int, ranks: int) -> list[str]:
    """Why a run does not count as clean; empty if it does."""
    found = [int(errors or hazards) for errors, hazards in SUMMARY.findall(output)]
    texts = []
    if sum(found):
        texts.append(f"{sum(found)} errors")
    if not found:  # one for all processes, or one for each
        texts.append("no summary")
    finished = len(re.findall(r"^rank \d+ finished", output, re.MULTILINE))
    if finished != ranks:
        texts.append(f"{finished} of {ranks} ranks finished")
    if code != 0:
        texts.append(f"exit code {code}")
    return texts


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def run_tool(sanitizer: str, tool: str, args: argparse.Namespace) -> list[str]:
    """One tool over one launch of all ranks; why it is not clean."""
    inner = [sys.executable, __file__, "--launch", "--ranks", str(args.ranks), "--count", str(args.count)]
    # The tools may wait for every kernel; said so, the library enqueues nothing behind a kernel that waits for it.
    env = {**os.environ, "DEEP_EP_TIMEOUT_S": str(LIBRARY_TIMEOUT_S), "OMP_NUM_THREADS": "1"}
    env["CUDA_LAUNCH_BLOCKING"] = "1"
    process = subprocess.Popen(
        [*sanitizer_command(sanitizer, tool), *inner],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    start = time.monotonic()
    try:
        output, _ = process.communicate(timeout=args.limit)
        found = problems(output, process.returncode, args.ranks)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        found = [f"no end within {args.limit} s", *problems(output, 0, args.ranks)]
    seconds = time.monotonic() - start
    if found:
        lines = output.splitlines()
        print("\n".join(lines[:60] + (["..."] if len(lines) > 120 else []) + lines[60:][-60:]))
    verdict = "; ".join(found) or "no errors"
    print(f"{tool}: {verdict} ({args.ranks} ranks, {args.count} operations, {seconds:.0f} s)", flush=True)
    return found


def launch(args: argparse.Namespace) -> int:
    """All ranks as processes of their own."""
    with tempfile.TemporaryDirectory(prefix="deep_ep_sanitize_") as folder, contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(args.ranks):
            command = [sys.executable, __file__, "--rank", str(rank), "--store", str(Path(folder) / "store")]
            command += ["--ranks", str(args.ranks), "--count", str(args.count)]
            ranks.append(subprocess.Popen(command))
            stack.callback(ranks[-1].kill)
        return max(abs(process.wait()) for process in ranks)


def run_rank(args: argparse.Namespace) -> int:
    """Random operations on small tensors, compared with the reference: normal ones, then low-latency ones."""
    tests = Path(__file__).resolve().parent
    sys.path[:0] = [str(tests), str(tests.parent)]
    import low_latency_soak
    import torch
    import torch.distributed as dist
    from cuda_cases import make_buffer
    from harness import RankContext
    from soak_cases import Soak, draw_cases, prepare

    device = torch.device("cuda", args.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    store = dist.FileStore(args.store, args.ranks)
    dist.init_process_group("gloo", store=store, rank=args.rank, world_size=args.ranks)
    ctx = RankContext(args.rank, args.ranks, dist.group.WORLD, store, device)
    prepared = [prepare(ctx, case) for case in draw_cases(args.ranks, 4, 21)]
    buffer = make_buffer(ctx)
    soak = Soak(ctx, buffer, prepared, 21)
    soak.run(args.count)
    torch.cuda.synchronize()
    buffer.check()
    found = soak.mismatches.found()
    ctx.barrier()
    del soak, prepared
    portable = make_buffer(ctx, "portable")
    cases = [low_latency_soak.prepare(ctx, portable, c) for c in low_latency_soak.draw_cases(args.ranks, 4, 22)]
    ctx.barrier()
    quick = low_latency_soak.Soak(ctx, buffer, cases, 22)
    quick.run(args.count)
    torch.cuda.synchronize()
    buffer.check()
    found += quick.mismatches.found()
    ctx.barrier()
    del quick, cases
    portable.destroy()
    buffer.destroy()
    dist.destroy_process_group()
    print(f"rank {args.rank} finished: {found[:3] if found else 'all results are right'}", flush=True)
    return 1 if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--count", type=int, default=24, help="operations of either kind in each run")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds for each tool")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        return run_rank(args)
    if args.launch:
        return launch(args)
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
        return 2
    failed = [tool for tool in args.tools if run_tool(sanitizer, tool, args)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
