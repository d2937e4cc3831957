"""Inputs and expected results that the tests of framework call shapes share."""

import reference as ref
import torch
from cases import generator, make_topk
from harness import RankContext

E, K, H, T = 8, 3, 128, 9


def inputs(ctx: RankContext, tokens: int = T, hidden: int = H):
    gen = generator(70, ctx.rank)
    idx, weights = make_topk(gen, tokens, K, E, "some")
    x = torch.randn(tokens, hidden, generator=gen).bfloat16()
    return x.to(ctx.device), idx.to(ctx.device), weights.to(ctx.device)


def expected(ctx: RankContext, tokens: int = T):
    """Receive rows, top-k and the combine of the received rows, from the reference, for this rank."""
    made = []
    for rank in range(ctx.num_ranks):
        gen = generator(70, rank)
        idx, weights = make_topk(gen, tokens, K, E, "some")
        made.append((torch.randn(tokens, H, generator=gen).bfloat16(), idx, weights))
    route = ref.routes([ref.layout(m[1], E, ctx.num_ranks).is_token_in_rank for m in made])
    recv = [ref.gather([m[0] for m in made], route, r) for r in range(ctx.num_ranks)]
    idx, weights = ref.recv_topk([m[1] for m in made], [m[2] for m in made], route, E, ctx.rank)
    return recv[ctx.rank], idx, weights, ref.combine(recv, route, ctx.rank)
