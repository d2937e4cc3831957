"""Dispatch and combine of normal mode against the reference, bit for bit: chosen cases of every kind."""

import pytest
import reference as ref
import torch
from cases import PAYLOADS, Case, check_case, generator, make_topk, to_cpu
from harness import RankContext, expect_bits, run_ranks

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_rank_counts(num_ranks):
    tokens = tuple(11 + 3 * r for r in range(num_ranks))
    check_case(Case(num_ranks, tokens, hidden=128, num_topk=4, num_experts=16, mask="some", num_bias=1, repeats=2))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_payloads(payload, num_ranks):
    check_case(
        Case(
            num_ranks,
            tuple(range(4, 4 + num_ranks)),
            hidden=272,
            num_topk=3,
            num_experts=8,
            payload=payload,
            cached_payload=payload.replace("bf16_use_fp8_ue8m0", "bf16_bits")
            .replace("bf16_use_fp8_pow2", "uint8")
            .replace("bf16_use_fp8", "bf16"),
        )
    )


@pytest.mark.parametrize("combine_dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("num_bias", [0, 1, 2])
def test_combine_dtypes_and_bias(combine_dtype, num_bias):
    check_case(
        Case(
            3,
            (9, 0, 4),
            hidden=48,
            num_topk=5,
            num_experts=7,
            combine_dtype=combine_dtype,
            num_bias=num_bias,
            mask="rows",
        )
    )


@pytest.mark.parametrize("tokens", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 2, 65), (64, 64, 64, 64)], ids=str)
@pytest.mark.parametrize("mask", ["none", "rows", "all", "skew"])
def test_token_counts_and_masks(tokens, mask):
    check_case(Case(4, tokens, hidden=32, num_topk=3, num_experts=12, mask=mask, num_bias=1, combine_dtype=FP32))


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(1, 1), (1, 3), (2, 4), (5, 3), (9, 8), (13, 4), (64, 8)])
def test_expert_counts_that_do_not_divide(num_experts, num_ranks):
    check_case(Case(num_ranks, (6,) * num_ranks, num_topk=min(4, num_experts), num_experts=num_experts))


@pytest.mark.parametrize("num_topk", [1, 2, 7, 9, 16, 32])
def test_top_k(num_topk):
    check_case(Case(2, (7, 8), num_topk=num_topk, num_experts=33, mask="some", idx_dtype=torch.int32))


@pytest.mark.parametrize("hidden", [16, 24, 136, 512, 2048, 7168])
def test_hidden_sizes(hidden):
    check_case(Case(2, (3, 5), hidden=hidden, num_bias=2, cached_payload="bf16"))


@pytest.mark.parametrize("alignment", [1, 2, 16, 128])
def test_expert_alignment(alignment):
    check_case(Case(2, (40, 3), num_topk=3, num_experts=9, alignment=alignment, mask="some"))


def test_without_topk():
    check_case(Case(3, (5, 1, 8), with_topk=False, mask="some"))


def run_same_in_every_dtype(ctx: RankContext):
    """Dispatch must not care what the bytes mean; combine of equal rows by one rank must give them back."""
    buffer = ctx.buffer()
    idx, weights = make_topk(generator(7, ctx.rank), 12, 1, 6)
    idx, weights = idx.to(ctx.device), weights.to(ctx.device)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 6)
    raw = torch.randint(0, 256, (12, 64), dtype=torch.uint8, generator=generator(8, ctx.rank)).to(ctx.device)
    got = {}
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.int64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ):
        recv, *_ = buffer.dispatch(raw.view(dtype), None, per_rank, per_node, in_rank, per_expert, idx, weights)
        assert recv.dtype == dtype
        got[dtype] = recv.contiguous().view(torch.uint8)
    first = got[torch.uint8]
    for dtype, value in got.items():
        expect_bits(value, first, str(dtype))
    x = torch.randn(12, 64, generator=generator(9, ctx.rank)).bfloat16().to(ctx.device)
    recv, _recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
        x, None, per_rank, per_node, in_rank, per_expert, idx, weights
    )
    back, back_weights, _ = buffer.combine(recv, handle, recv_weights)
    expect_bits(back, x, "combine of dispatched rows, top-1")
    expect_bits(back_weights, weights, "weights of top-1")


def test_payload_bytes_are_never_interpreted():
    run_ranks(3, run_same_in_every_dtype)


def run_strides(ctx: RankContext):
    """Inputs that only need a copy to be contiguous are copied silently."""
    buffer = ctx.buffer()
    idx, weights = make_topk(generator(11, ctx.rank), 10, 3, 6)
    idx, weights = idx.to(ctx.device), weights.to(ctx.device)
    layout = buffer.get_dispatch_layout(idx, 6)
    x = torch.randn(10, 96, generator=generator(12, ctx.rank)).bfloat16().to(ctx.device)
    scales = torch.randn(10, 5, generator=generator(13, ctx.rank)).to(ctx.device)

    def go(x, x8, scales, idx, weights, bias, rows=None):
        plain = buffer.dispatch(x, None, layout[0], layout[1], layout[3], layout[2], idx, weights)
        out = buffer.dispatch((x8, scales), None, layout[0], layout[1], layout[3], layout[2], idx, weights)
        y = plain[0] if rows is None else rows
        return (plain[0], *out[0], out[1], out[2], *buffer.combine(y, out[4], out[2], bias=bias)[:2])

    def strided(t):
        wide = torch.zeros(*t.shape[:-1], t.shape[-1] * 2, dtype=t.dtype, device=t.device)[..., ::2]
        return wide.copy_(t)

    bias = torch.randn(10, 96, generator=generator(14, ctx.rank)).bfloat16().to(ctx.device)
    x8 = x.to(torch.float8_e4m3fn)
    want = go(x, x8, scales, idx, weights, bias)
    got = go(
        strided(x),
        strided(x8),
        scales.t().contiguous().t(),
        strided(idx),
        strided(weights),
        strided(bias),
        strided(want[0]),
    )
    expect_bits(got, want, "strided inputs")
    expanded = buffer.dispatch(x[:1].expand(10, 96), None, layout[0], layout[1], layout[3], layout[2], idx, weights)[0]
    expect_bits(
        expanded, x[:1].expand(expanded.size(0), 96).contiguous() if ctx.num_ranks == 1 else expanded, "expanded rows"
    )


def test_strided_inputs():
    run_ranks(1, run_strides)
    run_ranks(2, run_strides)


def run_chosen_ranks(ctx: RankContext):
    """`is_token_in_rank` decides where rows go, also where no expert was chosen (its top-k is then all -1 there)."""
    buffer = ctx.buffer()
    in_rank = torch.zeros(4, ctx.num_ranks, dtype=torch.bool)
    in_rank[:, (ctx.rank + 1) % ctx.num_ranks] = True
    per_rank = in_rank.sum(0).int()
    x = (torch.arange(4)[:, None] + 10 * ctx.rank).float().expand(4, 16).contiguous()
    per_expert = torch.zeros(ctx.num_ranks, dtype=torch.int32)
    args = [t.to(ctx.device) for t in (x, per_rank, in_rank, per_expert)]
    recv, _, _, counts, handle, _ = buffer.dispatch(args[0], None, args[1], None, args[2], args[3])
    return to_cpu((recv, counts, buffer.combine(recv, handle)[0]))


def test_rows_follow_is_token_in_rank():
    for rank, (recv, counts, back) in enumerate(run_ranks(3, run_chosen_ranks)):
        source = (rank - 1) % 3
        assert recv[:, 0].tolist() == [10.0 * source + t for t in range(4)]
        assert counts == [0]
        assert back[:, 0].tolist() == [10.0 * rank + t for t in range(4)]


def run_rounding(ctx: RankContext):
    """Each rank contributes one row to one token: the sum is FP32 in rank order, rounded once."""
    values = [1.0, 2.0**-9, 2.0**-9, -(2.0**-8)]
    buffer = ctx.buffer()
    idx = torch.arange(4)[None].to(ctx.device)
    layout = buffer.get_dispatch_layout(idx, 4)
    x = torch.zeros(1, 16, dtype=torch.bfloat16, device=ctx.device)
    out = buffer.dispatch(x, None, layout[0], layout[1], layout[3], layout[2], idx, torch.ones(1, 4, device=ctx.device))
    rows = torch.full((4, 16), values[ctx.rank], dtype=torch.bfloat16, device=ctx.device)
    return to_cpu(buffer.combine(rows, out[4])[0])


def test_sum_is_rounded_once():
    # With a rounding after every addition 1 + 2^-9 would stay 1 twice, and the result would be 1 - 2^-8.
    for got in run_ranks(4, run_rounding):
        assert got.unique().tolist() == [1.0]


def test_reference_combine_order():
    """The reference itself: FP32 addition is not associative, so the order shows."""
    rows = [torch.full((1, 1), v) for v in (1e8, 1.0, -1e8)]
    route = ref.routes(
        [torch.ones(1, 3, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.bool)]
    )
    assert ref.combine(rows, route, 0).item() == 0.0
    assert ref.combine([rows[0], rows[2], rows[1]], route, 0).item() == 1.0


@pytest.mark.gpu(2)
@pytest.mark.parametrize("payload", ["bf16", "fp8_scales_colmajor", "bf16_use_fp8"])
def test_cuda_tensors(payload, monkeypatch):
    monkeypatch.setenv("DEEP_EP_TEST_DEVICE", "cuda")
    check_case(Case(2, (33, 7), hidden=512, num_topk=4, num_experts=16, payload=payload, mask="some", num_bias=1))
