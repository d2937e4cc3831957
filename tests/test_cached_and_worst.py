"""Handles used again, in any order and for other payloads; `num_worst_tokens`."""

import pytest
import reference as ref
import torch
from cases import PAYLOADS, USE_FP8, Case, check_case, generator, make_rows, make_topk, to_cpu, to_device
from harness import RankContext, expect_bits, run_ranks


@pytest.mark.parametrize("worst_extra", [0, 1, 30])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_worst_tokens(num_ranks, worst_extra):
    check_case(
        Case(
            num_ranks,
            tuple(5 + r for r in range(num_ranks)),
            num_topk=2,
            num_experts=8,
            worst_extra=worst_extra,
            mask="some",
            num_bias=1,
            repeats=2,
        )
    )


@pytest.mark.parametrize("payload", PAYLOADS)
def test_worst_tokens_payloads(payload):
    check_case(Case(2, (9, 4), hidden=256, payload=payload, worst_extra=3, alignment=8))


@pytest.mark.parametrize("mask", ["all", "rows"])
@pytest.mark.parametrize("domain", [None, 2])
def test_worst_tokens_with_nothing_to_receive(mask, domain):
    check_case(Case(4, (0, 3, 0, 1), mask=mask, worst_extra=2, domain=domain))


def test_worst_tokens_internode():
    check_case(Case(4, (9, 4, 0, 5), hidden=64, num_topk=3, num_experts=8, worst_extra=5, domain=2, num_bias=2))


INTERLEAVED = 5


def interleaved_inputs(rank: int, step: int):
    tokens = (step * 7 + rank * 3) % 11
    return make_topk(generator(20, rank, step), tokens, 3, 10, "some")


def run_interleaved(ctx: RankContext, domain):
    """Several handles alive at once, used in another order than made, each several times, in several dtypes."""
    buffer = ctx.buffer(domain)
    handles, inputs = [], []
    for step in range(INTERLEAVED):
        idx, weights = to_device(interleaved_inputs(ctx.rank, step), ctx.device)
        lay = buffer.get_dispatch_layout(idx, 10)
        x = make_rows(generator(21, ctx.rank, step), "bf16", idx.size(0), 64).to(ctx.device)
        out = buffer.dispatch(x, None, lay[0], lay[1], lay[3], lay[2], idx, weights)
        handles.append(out[4])
        inputs.append((x, out[0]))
    results = []
    for step in (3, 0, 4, 0, 2, 1, 3, 3):
        x, recv = inputs[step]
        again = buffer.dispatch(x, handle=handles[step])
        expect_bits(again[0], recv, f"cached dispatch of step {step}")
        wide = make_rows(generator(22, ctx.rank, step), "fp8_scales", x.size(0), 256)
        cached = buffer.dispatch(to_device(wide, ctx.device), handle=handles[step])
        combined = buffer.combine(recv, handles[step])[0]
        results.append(to_cpu((step, cached[0], combined)))
    return results


@pytest.mark.parametrize(("num_ranks", "domain"), [(2, None), (4, None), (4, 2)])
def test_interleaved_handles(num_ranks, domain):
    results = run_ranks(num_ranks, run_interleaved, domain)
    for step_index in range(len(results[0])):
        step = results[0][step_index][0]
        topk = [interleaved_inputs(r, step) for r in range(num_ranks)]
        route = ref.routes([ref.layout(idx, 10, num_ranks).is_token_in_rank for idx, _ in topk])
        xs = [make_rows(generator(21, r, step), "bf16", topk[r][0].size(0), 64) for r in range(num_ranks)]
        wides = [make_rows(generator(22, r, step), "fp8_scales", topk[r][0].size(0), 256) for r in range(num_ranks)]
        recvs = [ref.gather(xs, route, r) for r in range(num_ranks)]
        for rank in range(num_ranks):
            _, cached, combined = results[rank][step_index]
            for part in (0, 1):
                expect_bits(
                    cached[part],
                    ref.gather([w[part] for w in wides], route, rank),
                    f"cached FP8, rank {rank} step {step}",
                )
            expect_bits(combined, ref.combine(recvs, route, rank, domain=domain), f"combine, rank {rank} step {step}")


def run_cached_fp8(ctx: RankContext, payload):
    """`use_fp8=True` together with `handle=`: quantised inside, as in the backward of combine."""
    buffer = ctx.buffer()
    idx, weights = make_topk(generator(30, ctx.rank), 9, 2, 6)
    idx, weights = idx.to(ctx.device), weights.to(ctx.device)
    lay = buffer.get_dispatch_layout(idx, 6)
    x = make_rows(generator(31, ctx.rank), payload, 9, 272).to(ctx.device)
    first = buffer.dispatch(x, None, lay[0], lay[1], lay[3], lay[2], idx, weights, use_fp8=True, **USE_FP8[payload])
    cached = buffer.dispatch(x, handle=first[4], use_fp8=True, **USE_FP8[payload])
    assert isinstance(cached[0], tuple)
    assert len(cached[0]) == 2
    expect_bits(cached[0], first[0], "cached FP8 dispatch")
    plain = buffer.dispatch(x, handle=first[4])
    assert plain[0].dtype == torch.bfloat16


@pytest.mark.parametrize("payload", sorted(USE_FP8))
def test_cached_dispatch_quantises_inside(payload):
    run_ranks(2, run_cached_fp8, payload)


def run_handle_rebuilt(ctx: RankContext):
    """A handle is its tensors: clones of them in a new tuple or list are the same handle."""
    buffer = ctx.buffer()
    idx, weights = make_topk(generator(40, ctx.rank), 6, 2, 4)
    idx, weights = idx.to(ctx.device), weights.to(ctx.device)
    lay = buffer.get_dispatch_layout(idx, 4)
    x = make_rows(generator(41, ctx.rank), "bf16", 6, 32).to(ctx.device)
    recv, _, _, _, handle, _ = buffer.dispatch(x, None, lay[0], lay[1], lay[3], lay[2], idx, weights)
    want = buffer.combine(recv, handle)[0]
    for rebuilt in (tuple(t.clone() for t in handle), [t.clone() for t in handle]):
        expect_bits(buffer.dispatch(x, handle=rebuilt)[0], recv, "cached dispatch with a rebuilt handle")
        expect_bits(buffer.combine(recv, rebuilt)[0], want, "combine with a rebuilt handle")
    other = ctx.fresh_buffer()  # another buffer of the same group takes it too
    expect_bits(other.combine(recv, handle)[0], want, "combine through another buffer")
    other_sms = type(buffer).num_sms
    try:
        type(buffer).set_num_sms(other_sms + 4)  # and a buffer with another SM budget
        expect_bits(buffer.combine(recv, handle)[0], want, "combine with another SM count")
        expect_bits(buffer.dispatch(x, handle=handle)[0], recv, "cached dispatch with another SM count")
    finally:
        type(buffer).set_num_sms(other_sms)


def test_handle_is_its_tensors():
    run_ranks(2, run_handle_rebuilt)
