"""`get_dispatch_layout` against the reference, and what it promises about events and dtypes."""

import pytest
import reference as ref
import torch
from cases import generator, make_topk, to_cpu
from harness import RankContext, expect_bits, run_ranks


def run_layouts(ctx: RankContext, specs, domain):
    buffer = ctx.buffer(domain)
    out = []
    for spec in specs:
        tokens, num_topk, num_experts, mask, dtype = spec
        idx, _ = make_topk(generator(1, ctx.rank), tokens + ctx.rank, num_topk, num_experts, mask, dtype)
        out.append(to_cpu(buffer.get_dispatch_layout(idx.to(ctx.device), num_experts)[:4]))
    return out


SPECS = [
    (tokens, num_topk, num_experts, mask, dtype)
    for tokens in (0, 1, 37)
    for num_topk, num_experts in ((1, 3), (2, 8), (8, 11), (16, 64))
    for mask, dtype in (("none", torch.int64), ("some", torch.int32), ("rows", torch.int64), ("all", torch.int64))
]


@pytest.mark.parametrize(
    ("num_ranks", "domain"), [(1, None), (2, None), (3, None), (4, None), (8, None), (4, 2), (8, 2), (8, 4), (6, 3)]
)
def test_layout_equals_reference(num_ranks, domain):
    results = run_ranks(num_ranks, run_layouts, SPECS, domain)
    for rank, result in enumerate(results):
        for (tokens, num_topk, num_experts, mask, dtype), got in zip(SPECS, result, strict=True):
            idx, _ = make_topk(generator(1, rank), tokens + rank, num_topk, num_experts, mask, dtype)
            want = ref.layout(idx, num_experts, num_ranks, domain)
            expect_bits(
                got,
                (
                    want.num_tokens_per_rank,
                    want.num_tokens_per_rdma_rank,
                    want.num_tokens_per_expert,
                    want.is_token_in_rank,
                ),
                f"rank {rank} of {num_ranks}, {tokens=} {num_topk=} {num_experts=} {mask=}",
            )


def run_details(ctx: RankContext):
    import deep_ep

    buffer = ctx.buffer()
    idx = torch.tensor([[0, 0], [1, -1], [-1, 2]], device=ctx.device)
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, 4)
    assert isinstance(event, deep_ep.EventOverlap)
    assert event.event is None
    assert per_node is None
    assert per_rank.dtype == per_expert.dtype == torch.int32
    assert in_rank.dtype == torch.bool
    assert in_rank.is_contiguous()
    assert in_rank.tolist() == [[True, False], [True, False], [False, True]]
    assert per_expert.tolist() == [2, 1, 1, 0], "every (token, k) pair counts"
    assert per_rank.tolist() == [2, 1], "a token counts once per rank"
    strided = torch.full((6, 4), 3, device=ctx.device)[::2, ::2]
    assert buffer.get_dispatch_layout(strided, 4)[2].tolist() == [0, 0, 0, 6]
    event = buffer.get_dispatch_layout(idx, 4, async_finish=True)[4]
    assert event.event is not None
    event.current_stream_wait()
    event.current_stream_wait()


def test_layout_details():
    run_ranks(2, run_details)
