"""What the test files share when they run as scripts: ranks, checks against the reference, tables of timings.

    python tests/test_intranode.py --num-processes 4
    torchrun --nproc-per-node 4 tests/test_intranode.py

Ranks use CUDA devices where there is one for each of them, else the CPU and gloo.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from harness import RankContext, environ

from deep_ep.utils.envs import init_dist
from deep_ep.utils.testing import bench


def add_common_arguments(
    parser: argparse.ArgumentParser, num_processes: int, num_tokens: int, hidden: int, num_topk: int, num_experts: int
) -> None:
    add = parser.add_argument
    add("--num-processes", type=int, default=num_processes, help="ranks to start (not under torchrun)")
    add("--num-tokens", type=int, default=num_tokens, help="tokens a rank in the timing part")
    add("--hidden", type=int, default=hidden)
    add("--num-topk", type=int, default=num_topk)
    add("--num-experts", type=int, default=num_experts)
    add("--num-check-tokens", type=int, default=48, help="tokens a rank in the checking part (the reference is slow)")
    add("--num-warmups", type=int, default=3)
    add("--num-tests", type=int, default=10)
    add("--num-sms", type=int, default=20, help="SM budget of the calls (CUDA)")
    add("--allow-mnnvl", action="store_true", help="passed to Buffer")
    add("--cpu", action="store_true", help="use the CPU even where CUDA devices are present")


def _rank_main(local_rank: int, num_local_ranks: int, args: argparse.Namespace, body: Callable[..., None]) -> None:
    if args.cpu or torch.cuda.device_count() < num_local_ranks:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local_ranks))
    rank, num_ranks, group = init_dist(local_rank, num_local_ranks)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.set_default_dtype(torch.float32)  # the reference names dtypes and devices where they matter
    torch.set_default_device(None)
    ctx = RankContext(rank, num_ranks, group, dist.distributed_c10d._get_default_store(), device)
    try:
        body(ctx, args)
        ctx.barrier()
    finally:
        ctx.close()
        dist.destroy_process_group()


def launch(args: argparse.Namespace, body: Callable[..., None]) -> None:
    """Run `body(ctx, args)` on every rank: this process's rank under torchrun, else `--num-processes` of its own."""
    if "LOCAL_RANK" in os.environ:
        _rank_main(int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1")), args, body)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // args.num_processes))
    with environ(
        MASTER_PORT=os.environ.get("MASTER_PORT", str(port)), OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", threads)
    ):
        torch.multiprocessing.spawn(_rank_main, args=(args.num_processes, args, body), nprocs=args.num_processes)


class Report:
    """Prints from rank 0; a check that fails raises on the rank that sees it and ends the run."""

    def __init__(self, ctx: RankContext, title: str):
        self.ctx = ctx
        self.print(f"{title}: {ctx.num_ranks} ranks on {self.device_name()}, torch {torch.__version__}")

    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.ctx.device.type == "cuda" else f"CPU ({os.cpu_count()} cores)"

    def print(self, text: str = "") -> None:
        if self.ctx.rank == 0:
            print(text, flush=True)

    def checked(self, what: str, check: Callable[[], Any]) -> None:
        start = time.perf_counter()
        check()
        self.ctx.barrier()
        self.print(f"[check] {what}: bit-equal to the reference ({time.perf_counter() - start:.2f} s)")

    def table_head(self) -> None:
        self.print(f"\n{'call':<34}{'average ms':>11}{'best ms':>10}{'MB a rank':>11}{'GB/s':>8}")

    def timed(self, what: str, args: argparse.Namespace, fn: Callable[[], Any], num_bytes: int) -> None:
        """Average over calls on the slowest rank; bytes: payload rows and scales received a rank, own ones too."""
        self.ctx.barrier()
        average, best, _ = bench(fn, args.num_warmups, args.num_tests)
        worst = torch.tensor([average, best, num_bytes], dtype=torch.float64, device=self.ctx.device)
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.ctx.group)
        average, best, size = worst.tolist()
        self.print(
            f"{what:<34}{average * 1e3:>11.3f}{best * 1e3:>10.3f}{size / 1e6:>11.2f}{size / average / 1e9:>8.2f}"
        )
