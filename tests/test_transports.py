"""Rows travel through shared memory or sockets: whichever a pair of ranks uses, the results have the same bits."""

import errno
import os
from unittest import mock

import pytest
import torch
from cases import generator
from harness import RankContext, environ, run_ranks, same_bits, spawn_fresh

ROUNDS = (3, 0, 1, 400, 17)  # tokens; the large round makes the memory grow


def _rounds(ctx: RankContext, buffer) -> list[torch.Tensor]:
    """Dispatch, cached dispatch and combine, back to back without any synchronisation of the test's own."""
    results = []
    for number, num_tokens in enumerate(ROUNDS):
        gen = generator(number, ctx.rank)
        tokens = num_tokens + ctx.rank if num_tokens else 0
        x = torch.randn(tokens, 96, generator=gen).to(torch.bfloat16)
        topk_idx = torch.randint(-1, 10, (tokens, 3), generator=gen)
        weights = torch.rand(tokens, 3, generator=gen)
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 10)
        recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=weights,
        )
        again = buffer.dispatch(x.float(), handle=handle)[0]
        combined, combined_weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
        results += [recv_x, recv_idx, recv_weights, again, combined, combined_weights]
    return results


def compare(ctx: RankContext, left_out: tuple[int, ...], full: tuple[int, ...]) -> tuple[list[int], bool]:
    """Run with ranks ``left_out`` of shared memory, and with the memory of ranks ``full`` exhausted."""
    want = _rounds(ctx, ctx.buffer())
    with environ(DEEP_EP_SHARED_MEMORY="0" if ctx.rank in left_out else None):
        buffer = ctx.fresh_buffer()
    peers = sorted(buffer.runtime._shared.peers)
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    effect = no_space if ctx.rank in full else None
    with mock.patch("os.posix_fallocate", side_effect=effect, wraps=None if effect else os.posix_fallocate):
        got = _rounds(ctx, buffer)
    buffer.destroy()
    return peers, all(same_bits(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("left_out", [(), (0,), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("full", [(), (1,), (0, 1, 2, 3)], ids=str)
def test_same_bits_whatever_carries_the_rows(left_out, full):
    for rank, (peers, same) in enumerate(run_ranks(4, compare, left_out, full)):
        others = [r for r in range(4) if r != rank and r not in left_out]
        assert peers == ([] if rank in left_out else others)
        assert same


def _names(_ctx: RankContext) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith("deep_ep-")]


def _leave_without_goodbye(ctx: RankContext) -> list[str]:
    _rounds(ctx, ctx.fresh_buffer())
    names = _names(ctx)
    if ctx.rank == 1:
        os._exit(1)
    return names


def test_no_file_is_left_behind_even_by_a_rank_that_dies():
    results = spawn_fresh(2, _leave_without_goodbye)
    assert results[0] == []
