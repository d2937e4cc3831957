"""Dispatch and combine between nodes: pytest cases, and a script that checks and then times.

On one host the ranks are split into `--num-nodes` nodes (as DEEP_EP_NVL_DOMAIN does); under torchrun on several hosts
the hosts are the nodes unless the option is given.

    python tests/test_internode.py --num-processes 4 --num-nodes 2
    torchrun --nproc-per-node 4 tests/test_internode.py --num-nodes 2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases import Case, check_case
from harness import RankContext
from launch import Report, add_common_arguments, launch
from normal_script import check, time_calls
from test_intranode import SMALL, run_script

from deep_ep.utils.envs import get_physical_domain_size


@pytest.mark.parametrize("payload", ["bf16", "fp8_scales_packed", "bf16_use_fp8_ue8m0"])
@pytest.mark.parametrize(("num_ranks", "domain"), [(4, 2), (8, 4), (8, 2)])
def test_nodes(num_ranks, domain, payload):
    check_case(
        Case(
            num_ranks,
            tuple(30 - 2 * r for r in range(num_ranks)),
            hidden=512,
            num_topk=8,
            num_experts=32,
            payload=payload,
            domain=domain,
            mask="some",
            num_bias=1,
            alignment=16,
        )
    )


@pytest.mark.parametrize("torchrun", [0, 4])
def test_script(torchrun):
    out = run_script(
        "test_internode.py",
        "--num-processes",
        "4",
        "--num-nodes",
        "2",
        "--num-topk-groups",
        "1",
        *SMALL,
        torchrun=torchrun,
    )
    assert out.count("[check]") == 6
    assert "2 node(s)" in out


def body(ctx: RankContext, args: argparse.Namespace) -> None:
    num_nodes = args.num_nodes or get_physical_domain_size(ctx.group)[0]
    if ctx.num_ranks % num_nodes != 0:
        raise SystemExit(f"{ctx.num_ranks} ranks do not split into --num-nodes {num_nodes}")
    domain = ctx.num_ranks // num_nodes
    report = Report(ctx, f"internode, {num_nodes} nodes of {domain} ranks")
    check(ctx, args, report, domain)
    time_calls(ctx, args, report, domain, args.num_topk_groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, num_processes=4, num_tokens=1024, hidden=2048, num_topk=4, num_experts=64)
    parser.add_argument(
        "--num-nodes", type=int, default=None, help="nodes to split the ranks into (default: 2 on one host)"
    )
    parser.add_argument("--num-topk-groups", type=int, default=None, help="nodes that a token may visit (default: all)")
    args = parser.parse_args()
    if args.num_nodes is None and args.num_processes % 2 == 0:
        args.num_nodes = 2
    launch(args, body)


if __name__ == "__main__":
    main()
