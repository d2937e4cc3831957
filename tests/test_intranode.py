"""Dispatch and combine inside one node: pytest cases, and a script that checks and then times.

python tests/test_intranode.py --num-processes 4 --num-tokens 1024 --hidden 2048 --num-topk 4 --num-experts 64
torchrun --nproc-per-node 4 tests/test_intranode.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases import Case, check_case
from harness import REPO_ROOT, TESTS_DIR, RankContext, environ
from launch import Report, add_common_arguments, launch
from normal_script import check, time_calls


@pytest.mark.parametrize("payload", ["bf16", "fp8_scales_colmajor", "bf16_use_fp8"])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_whole_node(num_ranks, payload):
    check_case(
        Case(
            num_ranks,
            tuple(40 - 3 * r for r in range(num_ranks)),
            hidden=1024,
            num_topk=6,
            num_experts=32,
            payload=payload,
            mask="some",
            num_bias=1,
            alignment=32,
            repeats=2,
        )
    )


@pytest.mark.gpu(2)
def test_cuda_script():
    run_script("test_intranode.py", "--num-processes", "2", "--num-tokens", "256")


SMALL = [
    "--num-tokens",
    "64",
    "--hidden",
    "256",
    "--num-topk",
    "2",
    "--num-experts",
    "8",
    "--num-check-tokens",
    "9",
    "--num-tests",
    "2",
    "--num-warmups",
    "1",
    "--cpu",
]


def run_script(name: str, *arguments: str, torchrun: int = 0) -> str:
    """Run one of the scripts as a user does, return what it prints."""
    starter = [sys.executable]
    if torchrun:
        starter += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    with environ(OMP_NUM_THREADS="1"):
        done = subprocess.run(
            [*starter, str(TESTS_DIR / name), *arguments],
            cwd=REPO_ROOT,
            env={**env, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("torchrun", [0, 2])
def test_script(torchrun):
    out = run_script("test_intranode.py", "--num-processes", "2", *SMALL, torchrun=torchrun)
    assert out.count("[check]") == 6, "once, from rank 0"
    assert "combine bf16" in out
    assert "GB/s" in out


def body(ctx: RankContext, args: argparse.Namespace) -> None:
    torch.manual_seed(ctx.rank)
    report = Report(ctx, "intranode")
    check(ctx, args, report, None)
    time_calls(ctx, args, report, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, num_processes=4, num_tokens=1024, hidden=2048, num_topk=4, num_experts=64)
    launch(parser.parse_args(), body)


if __name__ == "__main__":
    main()
