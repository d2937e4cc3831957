"""Buffers that work again after a rank was late: the portable engine's connections and shared memory."""

import time

import pytest
import torch
from harness import RankContext

from deep_ep.engines.mesh import members_of
from deep_ep.errors import BufferDestroyed, CommTimeout, DeepEPError, PeerError

TOKENS, HIDDEN, TOPK, EXPERTS = 24, 256, 3, 12


def round_trip(ctx: RankContext, buffer, seed: int) -> None:
    """Dispatch and combine everything; the sums and the tokens' sources have to be right."""
    generator = torch.Generator().manual_seed(100 * seed + ctx.rank)
    topk_idx = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOPK] for _ in range(TOKENS)])
    x = torch.full((TOKENS, HIDDEN), 1.0 + ctx.rank + seed, dtype=torch.bfloat16)
    weights = torch.rand(TOKENS, TOPK, generator=generator)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, EXPERTS)
    recv, _, _, _, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=weights,
    )
    starts = [0, *handle[0][:, ctx.rank].tolist()]
    for source in range(ctx.num_ranks):
        assert recv[starts[source] : starts[source + 1]].eq(1.0 + source + seed).all()
    combined, _, _ = buffer.combine(recv, handle)
    want = in_rank.sum(1, keepdim=True).float() * (1.0 + ctx.rank + seed)
    assert combined.float().eq(want).all()


def failure_of(call) -> DeepEPError | None:
    try:
        call()
    except (CommTimeout, PeerError, BufferDestroyed) as error:
        return error
    return None


def run_late(ctx: RankContext, rounds: int, join: bool) -> list[str]:
    """Rank `late` comes after the deadline, to the operation or (without `join`) straight to the recovery."""
    buffer, members = ctx.fresh_buffer(timeout_s=0.8), members_of(ctx.group, None)
    round_trip(ctx, buffer, 0)
    seen = []
    for number in range(rounds):
        late = number % ctx.num_ranks
        ctx.barrier()
        if ctx.rank == late:
            time.sleep(1.5)
        failure = None
        if ctx.rank != late or join:
            failure = failure_of(lambda: round_trip(ctx, buffer, 1))
            assert failure is not None and failure_of(lambda: round_trip(ctx, buffer, 1)) is not None
        buffer.runtime.recover(members)
        for seed in range(2, 5):
            round_trip(ctx, buffer, seed)
        seen.append(f"{type(failure).__name__} {getattr(failure, 'peer', None)} {late}")
    buffer.runtime.recover(members)  # where nothing is broken it changes nothing
    round_trip(ctx, buffer, 9)
    buffer.destroy()
    return seen


@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_late_rank(spawn_fresh, num_ranks, join):
    results = spawn_fresh(num_ranks, run_late, 2, join)
    for number in range(2):
        names = [seen[number] for seen in results]
        assert any(name == f"CommTimeout {number} {number}" for name in names), results


@pytest.mark.parametrize("shared", ["0", "1"])
def test_with_and_without_shared_memory(spawn_fresh, shared):
    spawn_fresh(2, run_late, 1, True, env={"DEEP_EP_SHARED_MEMORY": shared})


def run_destroyed(ctx: RankContext) -> str:
    buffer, members = ctx.fresh_buffer(timeout_s=5), members_of(ctx.group, None)
    round_trip(ctx, buffer, 0)
    ctx.barrier()
    if ctx.rank == 1:
        buffer.runtime.destroy()
    try:
        buffer.runtime.recover(members)
    except BufferDestroyed as error:
        return str(error)
    return ""


def test_a_destroyed_buffer_does_not_come_back(spawn_fresh):
    first, second = spawn_fresh(2, run_destroyed)
    assert first == second and "ranks [1] was destroyed" in first
