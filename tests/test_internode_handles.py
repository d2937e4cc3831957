"""Two-level groups (nodes made from one host by DEEP_EP_NVL_DOMAIN): sums, handles, the internode entry points."""

import pytest
import torch
from cases import PAYLOADS, Case, check_case, generator, make_rows, make_topk
from harness import RankContext, expect_bits, run_ranks

DOMAINS = [(2, 1), (4, 1), (4, 2), (6, 3), (6, 2), (8, 4), (8, 2)]


@pytest.mark.parametrize(("num_ranks", "domain"), DOMAINS)
@pytest.mark.parametrize("combine_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_domains(num_ranks, domain, combine_dtype):
    check_case(
        Case(
            num_ranks,
            tuple(3 + 2 * r for r in range(num_ranks)),
            num_topk=6,
            num_experts=2 * num_ranks + 1,
            domain=domain,
            mask="some",
            num_bias=1,
            combine_dtype=combine_dtype,
            repeats=2,
        )
    )


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payloads(payload):
    check_case(Case(4, (5, 0, 9, 2), hidden=256, num_topk=3, num_experts=8, payload=payload, domain=2))


@pytest.mark.parametrize("mask", ["rows", "all", "skew"])
def test_masks(mask):
    check_case(Case(4, (8, 1, 0, 3), num_topk=4, num_experts=10, domain=2, mask=mask, num_bias=2))


def test_domain_of_the_whole_group_is_one_node():
    check_case(Case(4, (2, 3, 4, 5), domain=4))


def run_shapes(ctx: RankContext):
    buffer = ctx.buffer(2)
    assert buffer.runtime.get_num_rdma_ranks() == 2
    assert buffer.runtime.get_rdma_rank() == ctx.rank // 2
    idx, weights = make_topk(generator(50, ctx.rank), 7, 3, 8)
    idx, weights = idx.to(ctx.device), weights.to(ctx.device)
    lay = buffer.get_dispatch_layout(idx, 8)
    assert lay[1].dtype == torch.int32
    assert lay[1].shape == (2,)
    x = make_rows(generator(51, ctx.rank), "bf16", 7, 64).to(ctx.device)
    recv, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        x, None, lay[0], lay[1], lay[3], lay[2], idx, weights
    )
    (
        in_rank,
        rdma_channel,
        gbl_channel,
        recv_rdma_channel,
        recv_rdma_sum,
        recv_gbl_channel,
        recv_gbl_sum,
        meta,
        rdma_head,
        nvl_head,
    ) = handle
    num_recv = recv.size(0)
    assert in_rank.shape == (7, 4)
    assert rdma_channel.size(0) == recv_rdma_channel.size(0) == recv_rdma_sum.size(0) == 2
    assert gbl_channel.size(0) == recv_gbl_channel.size(0) == recv_gbl_sum.size(0) == 4
    assert meta.shape == (num_recv, 8)
    assert meta.dtype == torch.uint8
    assert rdma_head.shape == (7, 2)
    assert nvl_head.dim() == 2
    assert int(recv_gbl_sum[-1]) == num_recv
    assert recv_gbl_sum.diff().ge(0).all()
    # A row's metadata: the node it came from, and which GPUs of this node the token visits (this one among them).
    words = meta.cpu().contiguous().view(torch.int32)
    source_rank = torch.searchsorted(recv_gbl_sum.cpu().long(), torch.arange(num_recv), right=True)
    assert words[:, 0].tolist() == (source_rank // 2).tolist()
    assert bool(((words[:, 1] >> (ctx.rank % 2)) & 1).all())
    config = type(buffer).get_dispatch_config(ctx.num_ranks)
    again = buffer.internode_dispatch(x, None, lay[0], lay[1], lay[3], lay[2], idx, weights, config=config)
    expect_bits(again[0], recv, "internode_dispatch")
    expect_bits((again[1], again[2]), (recv_idx, recv_weights), "internode_dispatch top-k")
    assert again[3] == counts
    expect_bits(buffer.internode_dispatch(x, handle, config=config)[0], recv, "cached internode_dispatch")
    want = buffer.combine(recv, handle, recv_weights)
    got = buffer.internode_combine(recv, handle, recv_weights, config=type(buffer).get_combine_config(ctx.num_ranks))
    expect_bits(got[:2], want[:2], "internode_combine")


def test_handle_shapes_and_internode_entry_points():
    run_ranks(4, run_shapes)


def run_node_rounding(ctx: RankContext):
    buffer = ctx.buffer(2)
    values = [1.0, 2.0**-9, 2.0**-9, 2.0**-9]
    idx = torch.arange(4)[None].to(ctx.device)
    lay = buffer.get_dispatch_layout(idx, 4)
    x = torch.zeros(1, 16, dtype=torch.bfloat16, device=ctx.device)
    out = buffer.dispatch(x, None, lay[0], lay[1], lay[3], lay[2], idx, torch.ones(1, 4, device=ctx.device))
    rows = torch.full((4, 16), values[ctx.rank], dtype=torch.bfloat16, device=ctx.device)
    return buffer.combine(rows, out[4])[0].cpu()


def test_node_sums_are_rounded():
    # Node 0: 1 + 2^-9 rounds to 1; node 1: 2^-8. The sum 1 + 2^-8 is a tie and rounds to 1. One FP32 sum of all four
    # would be 1 + 3 * 2^-9 and round to 1 + 2^-7.
    for got in run_ranks(4, run_node_rounding):
        assert got.unique().tolist() == [1.0]
