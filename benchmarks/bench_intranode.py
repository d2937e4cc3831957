"""Dispatch and combine between the GPUs of one host, over SM budgets, beside what the link itself can do.

    python benchmarks/bench_intranode.py --ranks 2 --tokens 4096 --hidden 7168 --topk 8 --experts 256 --sms 8,16,24

A figure is the time of a whole call by CUDA events over back-to-back calls; of each round the slowest rank counts, and
the table gives median, quartiles and minimum over the rounds. Before it is timed, every operation is compared bit for
bit with a reference in plain torch. The limits are taken in the same run, both directions at once: bare kernels that
move the same rows on the same number of SMs, and copies of the same number of bytes by the copy engines of two GPUs.
The ratios are time over those.

With more ranks than GPUs the ranks share them, under a CUDA MPS daemon where there is one: a check that everything
works, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from intranode.case import Case
from intranode.limits import measure_limits
from intranode.mps import shared_gpus
from intranode.report import build_result, print_result
from intranode.workload import measure, measure_host, measure_layout
from intranode.world import World

import deep_ep

POOL_BYTES = 10 << 30
SHARED_POOL_BYTES = 1 << 30


def rank_main(rank: int, args: argparse.Namespace, store: str, mps: str) -> None:
    backend = "cpu:gloo,cuda:gloo" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    world = World(rank, args)
    if args.pool_bytes is None:
        args.pool_bytes = POOL_BYTES if args.ranks <= world.num_devices else SHARED_POOL_BYTES
    buffer = deep_ep.Buffer(world.group, num_nvl_bytes=args.pool_bytes, device=world.device)
    if buffer.engine != "cuda":
        # SM budgets mean nothing to it: one of them is enough.
        args.sms = args.sms[:1]
        if rank == 0:
            print("The cuda engine cannot serve here (`python -m deep_ep doctor` says why): the portable engine runs.")
    elif rank == 0 and args.ranks > world.num_devices:
        print(
            f"{args.ranks} ranks share {world.num_devices} GPU(s), MPS: {mps}: the timings will not be meaningful.",
            flush=True,
        )
    case = Case(world, args)
    figures, skipped = measure(world, buffer, case, args)
    layout = measure_layout(world, buffer, case, args)
    host = measure_host(world, buffer, args)
    world.barrier()
    engine = buffer.engine
    buffer.destroy()
    sizes = sorted({figure["bytes_over_link"] for figure in figures})
    limits = measure_limits(world, sizes, case.rows_over_link, args)
    if rank == 0:
        result = build_result(args, engine, figures, skipped, limits, layout, host, mps)
        print_result(result)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
            print(f"written to {args.json}")
    dist.barrier(world.group)
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
    parser.add_argument("--keep", type=int, default=32, help="outputs kept alive in the last rows; 0 leaves them out")
    parser.add_argument(
        "--pool-bytes", type=positive, help="symmetric memory of a rank; 10 GiB, or 1 GiB where ranks share a GPU"
    )
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
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with (
        shared_gpus(-(-args.ranks // num_devices) if num_devices else 0) as no_mps,
        tempfile.TemporaryDirectory(prefix="deep_ep_bench_") as folder,
    ):
        store = f"{folder}/store"
        torch.multiprocessing.spawn(rank_main, args=(args, store, no_mps or "on"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
