"""Checking and timing of normal mode, shared by test_intranode.py and test_internode.py as scripts."""

from __future__ import annotations

import argparse

import torch
from cases import Case, Plan, generator, make_topk, run_case, verify
from harness import RankContext
from launch import Report

from deep_ep import Buffer
from deep_ep.utils.math import count_bytes, create_grouped_scores, per_token_cast_to_fp8


def grouped_topk(
    args: argparse.Namespace, rank: int, num_groups: int, num_topk_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random top-k whose experts lie in `num_topk_groups` of `num_groups` groups of experts."""
    if num_topk_groups >= num_groups or args.num_experts % num_groups != 0:
        return make_topk(generator(100, rank), args.num_tokens, args.num_topk, args.num_experts)
    scores = torch.rand(args.num_tokens, args.num_experts, generator=generator(100, rank)) + 1e-3
    best = scores.view(args.num_tokens, num_groups, -1).amax(dim=2).topk(num_topk_groups, dim=1).indices
    masked = create_grouped_scores(scores, best, num_groups)
    return masked.topk(args.num_topk, dim=1).indices, torch.rand(
        args.num_tokens, args.num_topk, generator=generator(101, rank)
    )


def check(ctx: RankContext, args: argparse.Namespace, report: Report, domain: int | None) -> None:
    tokens = tuple(max(0, args.num_check_tokens - 5 * (rank % 3)) for rank in range(ctx.num_ranks))
    cases = {
        "bf16": {"num_bias": 2, "repeats": 2},
        "bf16, masked entries, int32 indices": {"mask": "some", "idx_dtype": torch.int32, "alignment": 128},
        "FP8 and scales": {"payload": "fp8_scales", "mask": "rows", "num_bias": 1},
        "FP8 and column-major scales": {"payload": "fp8_scales_colmajor"},
        "bf16 quantised inside": {"payload": "bf16_use_fp8", "combine_dtype": torch.float32},
        "raw bytes, worst-case size": {"payload": "uint8", "worst_extra": 7},
    }
    for name, changes in cases.items():
        case = Case(ctx.num_ranks, tokens, args.hidden, args.num_topk, args.num_experts, domain=domain, **changes)
        plan = Plan.of(case)

        def run(plan: Plan = plan) -> None:
            verify(plan, ctx.rank, run_case(ctx, plan.case, plan.num_worst, plan.num_recv))

        report.checked(f"{name}", run)


def time_calls(
    ctx: RankContext, args: argparse.Namespace, report: Report, domain: int | None, num_topk_groups: int | None = None
) -> None:
    Buffer.set_num_sms(args.num_sms)
    buffer = ctx.buffer(domain, allow_mnnvl=args.allow_mnnvl)
    num_nodes = ctx.num_ranks // (domain or ctx.num_ranks)
    idx, weights = grouped_topk(args, ctx.rank, num_nodes, num_topk_groups or num_nodes)
    idx, weights = idx.to(ctx.device), weights.to(ctx.device)
    x = torch.randn(args.num_tokens, args.hidden, generator=generator(102, ctx.rank)).bfloat16().to(ctx.device)
    x_fp8 = per_token_cast_to_fp8(x)
    lay = buffer.get_dispatch_layout(idx, args.num_experts)

    def dispatch(x, **extra):
        return buffer.dispatch(x, None, lay[0], lay[1], lay[3], lay[2], idx, weights, **extra)

    recv, _, recv_weights, counts, handle, _ = dispatch(x)
    rows = recv.size(0)
    bf16_bytes, fp8_bytes = count_bytes(recv), count_bytes(dispatch(x_fp8)[0])
    report.print(
        f"\n{args.num_tokens} tokens a rank, hidden {args.hidden}, top-{args.num_topk} of {args.num_experts} experts, "
        f"{num_nodes} node(s), engine {buffer.engine}; rank 0 receives {rows} rows, {max(counts)} at the busiest expert"
    )
    report.table_head()
    report.timed("layout", args, lambda: buffer.get_dispatch_layout(idx, args.num_experts), 0)
    report.timed("dispatch bf16", args, lambda: dispatch(x), bf16_bytes)
    report.timed("dispatch bf16, cached", args, lambda: buffer.dispatch(x, handle=handle), bf16_bytes)
    report.timed("dispatch FP8 + scales", args, lambda: dispatch(x_fp8), fp8_bytes)
    report.timed("dispatch FP8 + scales, cached", args, lambda: buffer.dispatch(x_fp8, handle=handle), fp8_bytes)
    report.timed("dispatch bf16, FP8 made inside", args, lambda: dispatch(x, use_fp8=True), fp8_bytes)
    report.timed("combine bf16", args, lambda: buffer.combine(recv, handle), bf16_bytes)
    report.timed("combine bf16 and weights", args, lambda: buffer.combine(recv, handle, recv_weights), bf16_bytes)
