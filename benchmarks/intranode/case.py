"""Random inputs, and what the operations must return on them, in plain torch."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from deep_ep.fp8 import quantize_1x128

from .world import World


class Case:
    """Random inputs of this rank, those of the others gathered, and the results that follow from them."""

    def __init__(self, world: World, args: argparse.Namespace) -> None:
        self.world, self.args = world, args
        generator = torch.Generator(device=world.device).manual_seed(args.seed * 1000 + world.rank)
        like = {"generator": generator, "device": world.device}
        self.x = torch.randn(args.tokens, args.hidden, **like).bfloat16()
        self.idx = torch.rand(args.tokens, args.experts, **like).topk(args.topk, dim=1).indices
        self.weights = torch.rand(args.tokens, args.topk, **like)
        self.x_fp8 = quantize_1x128(self.x)
        # Contiguous ranges of experts, the first ranks own one more if they do not divide.
        self.sizes = [args.experts // args.ranks + (rank < args.experts % args.ranks) for rank in range(args.ranks)]
        owner = torch.repeat_interleave(torch.arange(args.ranks), torch.tensor(self.sizes)).to(world.device)
        self.owner = owner[self.idx]
        self.in_rank = torch.stack([(self.owner == rank).any(1) for rank in range(args.ranks)], dim=1)
        self._expect_dispatch(owner)
        self._expect_combine()
        leaving = [int(self.in_rank[:, rank].sum()) for rank in range(args.ranks) if rank != world.rank]
        arriving = len(self.recv_x) - int(self.in_rank[:, world.rank].sum())
        #: Rows that the busiest direction of a link of any rank carries.
        self.rows_over_link = max(world.gather(max(sum(leaving), arriving)))

    def _expect_dispatch(self, owner: torch.Tensor) -> None:
        rank, args = self.world.rank, self.args
        idx_of, weights_of = self.world.gather_tensor(self.idx), self.world.gather_tensor(self.weights)
        visits = [(owner[idx] == rank).any(1) for idx in idx_of]
        self.recv_x = torch.cat([x[v] for x, v in zip(self.world.gather_tensor(self.x), visits, strict=True)])
        # Quantisation works row by row, so the received rows quantise to the rows that were sent.
        self.recv_fp8 = quantize_1x128(self.recv_x)
        idx = torch.cat([part[v] for part, v in zip(idx_of, visits, strict=True)])
        weights = torch.cat([part[v] for part, v in zip(weights_of, visits, strict=True)])
        first = sum(self.sizes[:rank])
        mine = (idx >= first) & (idx < first + self.sizes[rank])
        self.recv_idx = torch.where(mine, idx - first, -1)
        self.recv_weights = torch.where(mine, weights, 0.0)
        self.counts = [int((self.recv_idx == expert).sum()) for expert in range(self.sizes[rank])]
        if not args.tokens or not bool(self.recv_x.any()):
            raise SystemExit(f"rank {rank} receives no rows; give more tokens or fewer ranks")

    def expert_output(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """What the experts of a rank make of rows: different on each, and rounded, so that the order of sums shows."""
        return (x.float() * (1.0 + 0.37 * rank)).bfloat16()

    def _expect_combine(self) -> None:
        total = torch.zeros(self.x.shape, dtype=torch.float32, device=self.x.device)
        weights = torch.zeros_like(self.weights)
        for rank in range(self.args.ranks):
            there = self.in_rank[:, rank : rank + 1]
            total = torch.where(there, total + self.expert_output(self.x, rank).float(), total)
            weights = weights + torch.where(self.owner == rank, self.weights, 0.0)
        self.combined, self.combined_weights = total.bfloat16(), weights

    def check_rows(self, result: Any) -> None:
        received = result[0]
        pairs = zip(received, self.recv_fp8, strict=True) if isinstance(received, tuple) else [(received, self.recv_x)]
        for got, expected in pairs:
            same_bits("received rows", got, expected)

    def check_routed(self, result: Any) -> None:
        self.check_rows(result)
        same_bits("received indices", result[1], self.recv_idx)
        same_bits("received weights", result[2], self.recv_weights)
        if result[3] != self.counts:
            raise SystemExit("dispatch: wrong numbers of tokens by expert")

    def check_combined(self, result: Any) -> None:
        same_bits("combined rows", result[0], self.combined)
        if result[1] is not None:
            same_bits("combined weights", result[1], self.combined_weights)


def same_bits(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise SystemExit(f"{what}: got {list(got.shape)} {got.dtype}, expected {list(expected.shape)} {expected.dtype}")
    raw, wanted = got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    if not torch.equal(raw, wanted):
        raise SystemExit(f"{what}: {int((raw != wanted).any(1).sum())} of {len(raw)} rows differ from the reference")
