"""Low-latency dispatch and combine: pytest cases, and a script that checks and then times.

python tests/test_low_latency.py --num-processes 4 --num-tokens 128 --hidden 2048 --num-topk 8 --num-experts 64
torchrun --nproc-per-node 4 tests/test_low_latency.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases import generator, make_topk
from harness import RankContext
from launch import Report, add_common_arguments, launch
from low_latency_cases import FP8_ARGS, LowLatencyCase, check_case, run_case, verify
from test_intranode import SMALL, run_script

from deep_ep import Buffer
from deep_ep.utils.math import count_bytes


@pytest.mark.parametrize("finish", ["sync", "hook"])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_serving_shapes(num_ranks, finish):
    check_case(
        LowLatencyCase(
            num_ranks,
            tuple(24 - 2 * r for r in range(num_ranks)),
            max_tokens=32,
            hidden=1024,
            num_topk=8,
            num_experts=32,
            finish=finish,
            fp8="ue8m0",
        )
    )


@pytest.mark.parametrize("torchrun", [0, 2])
def test_script(torchrun):
    out = run_script("test_low_latency.py", "--num-processes", "2", *SMALL, "--use-logfmt", torchrun=torchrun)
    assert out.count("[check]") == 8
    assert "dispatch + combine" in out


def check(ctx: RankContext, args: argparse.Namespace, report: Report) -> None:
    most = args.num_check_tokens
    tokens = tuple(max(0, most - 3 * (rank % 4)) for rank in range(ctx.num_ranks))
    cases = {
        "bf16": {"fp8": "none"},
        "FP8": {"mask": "some", "repeats": 3},
        "FP8, power-of-two scales": {"fp8": "pow2", "finish": "async"},
        "FP8, packed UE8M0 scales, hook": {"fp8": "ue8m0", "finish": "hook"},
        "summed at home": {"sum_at_home": True, "out": True},
        "zero copy": {"zero_copy": True},
        "weights at dispatch, hook": {"weights_at_dispatch": True, "finish": "hook"},
        "rows by source": {"weights_at_dispatch": True, "expert_major": False},
    }
    for name, changes in cases.items():
        case = LowLatencyCase(ctx.num_ranks, tokens, most, args.hidden, args.num_topk, args.num_experts, **changes)
        report.checked(name, lambda case=case: verify(case, ctx.rank, run_case(ctx, case)))


def time_calls(ctx: RankContext, args: argparse.Namespace, report: Report) -> None:
    hint = Buffer.get_low_latency_rdma_size_hint(args.num_tokens, args.hidden, ctx.num_ranks, args.num_experts)
    buffer = ctx.buffer(
        num_rdma_bytes=hint,
        low_latency_mode=True,
        num_qps_per_rank=max(1, args.num_experts // ctx.num_ranks),
        allow_nvlink_for_low_latency_mode=not args.disable_nvlink,
        allow_mnnvl=args.allow_mnnvl,
    )
    idx, weights = (
        t.to(ctx.device) for t in make_topk(generator(110, ctx.rank), args.num_tokens, args.num_topk, args.num_experts)
    )
    x = torch.randn(args.num_tokens, args.hidden, generator=generator(111, ctx.rank)).bfloat16().to(ctx.device)

    def dispatch(**extra):
        return buffer.low_latency_dispatch(x, idx, args.num_tokens, args.num_experts, **extra)

    def combine(rows, handle, **extra):
        return buffer.low_latency_combine(rows, idx, weights, handle, **extra)

    recv, count, handle, _, _ = dispatch(use_fp8=False)
    received = int(count.sum())
    scale_bytes = {"fp32": 4, "pow2": 4, "ue8m0": 1}
    row_bytes = {name: args.hidden + scale_bytes[name] * -(-args.hidden // 128) for name in FP8_ARGS if name != "none"}
    report.print(
        f"\n{args.num_tokens} tokens a rank, hidden {args.hidden}, top-{args.num_topk} of {args.num_experts} experts, "
        f"engine {buffer.engine}; rank 0 receives {received} rows; output {count_bytes(recv) / 1e6:.0f} MB"
    )
    report.table_head()
    report.timed("dispatch bf16", args, lambda: dispatch(use_fp8=False), received * args.hidden * 2)
    for name, size in row_bytes.items():
        report.timed(
            f"dispatch FP8, {name} scales", args, lambda name=name: dispatch(**FP8_ARGS[name]), received * size
        )

    def hooked() -> None:
        call = dispatch(return_recv_hook=True)
        call[4]()

    report.timed("dispatch FP8, with hook", args, hooked, received * row_bytes["fp32"])
    combine_bytes = received * args.hidden * 2
    report.timed("combine bf16", args, lambda: combine(recv, handle), combine_bytes)
    if args.use_logfmt:
        report.timed("combine LogFMT", args, lambda: combine(recv, handle, use_logfmt=True), combine_bytes * 10 // 16)

    for name, early in (("", None), (", weights at dispatch", weights)):

        def both(early=early) -> None:
            combine(recv, dispatch(topk_weights=early)[2])

        report.timed(f"dispatch + combine{name}", args, both, received * row_bytes["fp32"] + combine_bytes)


def body(ctx: RankContext, args: argparse.Namespace) -> None:
    report = Report(ctx, "low latency")
    check(ctx, args, report)
    time_calls(ctx, args, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, num_processes=4, num_tokens=128, hidden=2048, num_topk=8, num_experts=64)
    parser.set_defaults(num_check_tokens=16)
    parser.add_argument("--disable-nvlink", action="store_true", help="no peer access inside a node")
    parser.add_argument("--use-logfmt", action="store_true", help="also time combine in LogFMT")
    launch(parser.parse_args(), body)


if __name__ == "__main__":
    main()
