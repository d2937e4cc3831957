"""Low-latency dispatch and combine between the GPUs of one host, over token counts, beside what a link can do at least.

    python benchmarks/bench_low_latency.py --ranks 2 --tokens 1,8,32,64,128,256,512 --hidden 7168 --topk 8 --experts 256

Every operation is compared bit for bit with a reference in plain torch before it is timed. Times are those of whole
calls by CUDA events. Median, quartiles and minimum are of rounds of back-to-back calls, all of them enqueued before the
first one ran; of each round the slowest rank counts. p50 and p99 are of the single calls of all ranks, with an event
between any two. "called" is a median from Python with nothing enqueued ahead. The floor of a figure is the way of one
flag for each time that something must cross the link, plus the bytes at the rate of the link, both measured in the run.

In rows "weights at dispatch" the weights of the tokens travel with the dispatch (`topk_weights=`), so that combine need
not wait for them; four bytes a selection, which the floors leave out. In rows "by source" (`expert_major=False`) they
travel too, a token comes once instead of once for each expert, and combine takes sums, whose time is not in the figure.

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

from intranode.mps import shared_gpus
from intranode.world import World
from low_latency.measure import measure, measure_floors, measure_host
from low_latency.report import build_result, print_result

import deep_ep


def rank_main(rank: int, args: argparse.Namespace, store: str, mps: str) -> None:
    backend = "cpu:gloo,cuda:gloo" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    world = World(rank, args)
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        max([*args.tokens, args.max_tokens or 0]), args.hidden, args.ranks, args.experts
    )
    buffer = deep_ep.Buffer(world.group, 0, hint, low_latency_mode=True, device=world.device)
    if rank == 0 and buffer.engine != "cuda":
        print("The cuda engine cannot serve here (`python -m deep_ep doctor` says why): the portable engine runs.")
    elif rank == 0 and args.ranks > world.num_devices:
        print(
            f"{args.ranks} ranks share {world.num_devices} GPU(s), MPS: {mps}: the timings will not be meaningful.",
            flush=True,
        )
    figures = measure(world, buffer, args)
    host = measure_host(world, buffer, args)
    world.barrier()
    engine = buffer.engine
    usage = buffer.runtime.memory_usage() if engine == "cuda" else {}
    memory = {"hint_bytes": hint, **usage}
    buffer.destroy()
    floors = measure_floors(world, args)
    if rank == 0:
        result = build_result(args, engine, figures, host, floors, memory, mps)
        print_result(result)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
            print(f"written to {args.json}")
    dist.barrier(world.group)
    dist.destroy_process_group()


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer from 1")
    return int(text)


def token_counts(text: str) -> list[int]:
    """Integers from 1, separated by commas."""
    return [positive(part.strip()) for part in text.split(",")]


def formats(text: str) -> list[str]:
    """fp8, bf16 or both, separated by commas."""
    names = [part.strip() for part in text.split(",")]
    if any(name not in ("fp8", "bf16") for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected fp8, bf16, or both like fp8,bf16")
    return names


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument(
        "--tokens", type=token_counts, default=[1, 8, 32, 64, 128, 256, 512], help="tokens a rank, like 1,8,128"
    )
    parser.add_argument("--max-tokens", type=positive, help="num_max_dispatch_tokens_per_rank; default the tokens")
    parser.add_argument("--formats", type=formats, default=["fp8", "bf16"], help="of dispatched rows: fp8,bf16")
    parser.add_argument("--hidden", type=positive, default=7168)
    parser.add_argument("--topk", type=positive, default=8)
    parser.add_argument("--experts", type=positive, default=256)
    parser.add_argument("--iterations", type=positive, default=50, help="back-to-back calls a round")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--samples", type=positive, default=200, help="calls of a rank that p50 and p99 are taken of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="the commit that is measured, where git cannot tell")
    parser.add_argument("--json", help="write the result there")
    args = parser.parse_args(argv)
    if args.topk > args.experts or args.ranks > args.experts:
        parser.error(f"--experts {args.experts}: expected at least --topk {args.topk} and --ranks {args.ranks}")
    if "fp8" in args.formats and args.hidden % 128 != 0:
        parser.error(f"--hidden {args.hidden}: expected a multiple of 128 for FP8; or pass --formats bf16")
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
