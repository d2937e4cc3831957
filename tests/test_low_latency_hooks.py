"""Hooked combines whose weights did not go with the dispatch: a home gets sums if it is known in time what it wants."""

import pytest
import torch
from cuda_cases import finished, make_buffer
from harness import RankContext, expect_bits, run_ranks
from low_latency_cases import LowLatencyCase, make_inputs


def run_one_after_the_other(ctx: RankContext, tokens: int, leaves_out: bool) -> None:
    """Ranks send in turn, so each knows what the homes before it and itself want, and of the others nothing.

    What travels as a sum has its weights already. So weights that are changed after the sends, which callers must not
    do, tell which rows do. They are doubled, which changes no other bit.
    """
    buffer = make_buffer(ctx)
    num_ranks, num_experts = ctx.num_ranks, 8 * ctx.num_ranks
    case = LowLatencyCase(num_ranks, (tokens,) * num_ranks, tokens, 1024, 4, num_experts, fp8="none", mask="some")
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, tokens, num_experts, use_fp8=False)
    if leaves_out:  # some of what was dispatched is no longer wanted
        idx = torch.where(torch.arange(idx.numel(), device=ctx.device).view(idx.shape) % 5 == 1, -1, idx)
    owner = torch.where(idx < 0, -1, idx // 8)
    for last in range(num_ranks):
        turns = [(turn + last + 1) % num_ranks for turn in range(num_ranks)]
        place = torch.tensor([turns.index(rank) for rank in range(num_ranks)], device=ctx.device)
        unknown = (owner >= 0) & (place[owner.clamp(min=0)] < place[ctx.rank])
        assert bool(unknown.any()) == (turns[0] != ctx.rank), "the case tells nothing"
        want = buffer.low_latency_combine(recv, idx, torch.where(unknown, 2 * weights, weights), handle)[0]
        given, its_weights, hook = recv.clone(), weights.clone(), None
        finished(buffer)
        for turn in turns:
            ctx.barrier()
            if turn == ctx.rank:
                combined, _, hook = buffer.low_latency_combine(given, idx, its_weights, handle, return_recv_hook=True)
                torch.cuda.synchronize()
        ctx.barrier()
        given.fill_(float("nan"))
        its_weights *= 2
        assert hook is not None
        hook()
        expect_bits(combined, want, f"sent in the order {turns}")
    finished(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("tokens", [5, 150])
@pytest.mark.parametrize("leaves_out", [False, True])
def test_sums_of_what_is_known(on_gpus, num_ranks, tokens, leaves_out):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_one_after_the_other, tokens, leaves_out)


def run_all_at_once(ctx: RankContext, tokens: int) -> None:
    """Whatever is known when, the bits are those of a combine without a hook."""
    buffer = make_buffer(ctx)
    num_ranks, num_experts = ctx.num_ranks, 8 * ctx.num_ranks
    case = LowLatencyCase(num_ranks, (tokens,) * num_ranks, tokens, 1024, 4, num_experts, fp8="none", mask="some")
    x, idx, weights = (t.to(ctx.device) for t in make_inputs(case, ctx.rank))
    recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, tokens, num_experts, use_fp8=False)
    want = buffer.low_latency_combine(recv, idx, weights, handle)[0].clone()
    for number in range(300):
        combined, _, hook = buffer.low_latency_combine(recv, idx, weights, handle, return_recv_hook=True)
        hook()
        if number % 20 == 19:
            expect_bits(combined, want, f"call {number}")
        if number % 7 == ctx.rank:
            torch.cuda._sleep(20_000)
    finished(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("tokens", [8, 200])
def test_bits_do_not_tell(on_gpus, num_ranks, tokens):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_all_at_once, tokens)
