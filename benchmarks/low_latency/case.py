"""Random inputs of one token count, and what the operations must return on them, in plain torch."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from intranode.case import same_bits
from intranode.world import World

from deep_ep.fp8 import quantize_1x128

SCALE_BYTES = 4  # of a tile of 128 columns


class Case:
    """Inputs of this rank, and the results that follow from them and from those of the others."""

    def __init__(self, world: World, args: argparse.Namespace, tokens: int) -> None:
        self.world, self.args, self.tokens = world, args, tokens
        self.max_tokens = max(tokens, args.max_tokens or 0)
        generator = torch.Generator(device=world.device).manual_seed(args.seed * 1000 + world.rank)
        like = {"generator": generator, "device": world.device}
        self.x = torch.randn(tokens, args.hidden, **like).bfloat16()
        self.idx = torch.rand(tokens, args.experts, **like).topk(args.topk, dim=1).indices
        self.weights = torch.rand(tokens, args.topk, **like)
        # Contiguous ranges of experts, the first ranks own one more if they do not divide.
        self.sizes = [args.experts // args.ranks + (rank < args.experts % args.ranks) for rank in range(args.ranks)]
        ranks = torch.arange(args.ranks, device=world.device)
        self.owner = torch.repeat_interleave(ranks, torch.tensor(self.sizes, device=world.device))[self.idx]
        # What an expert makes of a row: different for each, and rounded, so that the order of sums shows.
        self.factors = 1.0 + 0.37 * (torch.arange(args.experts, device=world.device) % 7)
        self._expect_packed()
        self._expect_by_source()
        self._expect_combined()
        away = [int((self.owner == rank).any(1).sum()) for rank in range(args.ranks) if rank != world.rank]
        #: Token rows that the busiest direction of a link of any rank carries, one for each (token, rank).
        self.rows_over_link = max(world.gather(max(sum(away), self._arriving)))

    def _expect_packed(self) -> None:
        """The packed rows that hold tokens: which they are, and of which token of which rank."""
        rank, slots = self.world.rank, self.args.ranks * self.max_tokens
        idx = torch.cat(self.world.gather_tensor(self.idx))
        x = torch.cat(self.world.gather_tensor(self.x))
        first = sum(self.sizes[:rank])
        local = torch.arange(first, first + self.sizes[rank], device=idx.device)
        hits = (idx[:, None, :] == local[None, :, None]).any(2)
        expert, token = hits.t().nonzero().unbind(1)
        self.count = hits.sum(0, dtype=torch.int32)
        begin = self.count.cumsum(0) - self.count
        self.used = expert * slots + torch.arange(len(expert), device=idx.device) - begin[expert]
        self.src_info = (token % self.tokens).int()
        self.recv = x[token]
        visits = hits.any(1)
        own = visits[rank * self.tokens : (rank + 1) * self.tokens]
        self._arriving = int(visits.sum()) - int(own.sum())
        outputs = (self.recv.float() * self.factors[first + expert, None]).bfloat16()
        self.expert_rows = torch.zeros(
            (self.sizes[rank], slots, self.args.hidden), dtype=torch.bfloat16, device=self.world.device
        )
        self.expert_rows.view(-1, self.args.hidden)[self.used] = outputs

    def _expect_by_source(self) -> None:
        """What arrives where rows lie by source: index and rows, and the sums that go home."""
        rank, ranks, tokens = self.world.rank, self.args.ranks, self.tokens
        x, idx, weights = (torch.stack(self.world.gather_tensor(t)) for t in (self.x, self.idx, self.weights))
        first = sum(self.sizes[:rank])
        here = (idx >= first) & (idx < first + self.sizes[rank])
        shape = (ranks, self.max_tokens, self.args.topk)
        self.index = torch.full(shape, -1, dtype=torch.int32, device=idx.device)
        self.index[:, :tokens] = torch.where(here, idx - first, -1).int()
        self.wanted = (self.index >= 0).any(2)
        self.recv_by_source = x[self.wanted[:, :tokens]]
        shape = (ranks, self.max_tokens, self.args.hidden)
        self.partial_rows = torch.zeros(shape, dtype=torch.bfloat16, device=x.device)
        self.partial_rows[:, :tokens] = self._partials(x, idx, weights, here)

    def _partials(self, x: torch.Tensor, idx: torch.Tensor, weights: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
        """Weighted sums of what the selected experts make of tokens, where `here`."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for k in range(self.args.topk):
            output = (x.float() * self.factors[idx[..., k], None]).bfloat16().float()
            total = torch.where(here[..., k, None], total + output * weights[..., k, None], total)
        return total.bfloat16()

    def _expect_combined(self) -> None:
        total = torch.zeros(self.x.shape, dtype=torch.float32, device=self.x.device)
        for rank in range(self.args.ranks):
            total = total + self._partials(self.x, self.idx, self.weights, self.owner == rank).float()
        self.combined = total.bfloat16()

    def row_bytes(self, use_fp8: bool) -> int:
        """Of a row that dispatch sends."""
        hidden = self.args.hidden
        return hidden + -(-hidden // 128) * SCALE_BYTES if use_fp8 else 2 * hidden

    def check_dispatch(self, result: Any, use_fp8: bool) -> None:
        recv, count, handle = result[:3]
        same_bits("counts", count[:, None], self.count[:, None])
        parts = zip(recv, quantize_1x128(self.recv), strict=True) if use_fp8 else [(recv, self.recv)]
        for got, expected in parts:
            same_bits("packed rows", got.reshape(-1, got.shape[2])[self.used], expected)
        same_bits("src_info", handle[0].reshape(-1, 1)[self.used], self.src_info[:, None])

    def check_dispatch_by_source(self, result: Any, use_fp8: bool) -> None:
        recv, _, handle = result[:3]
        same_bits("recv_topk_idx", handle[0].flatten(1), self.index.flatten(1))
        expected = quantize_1x128(self.recv_by_source) if use_fp8 else (self.recv_by_source,)
        for got, want in zip(recv if use_fp8 else (recv,), expected, strict=True):
            same_bits("rows by source", got.contiguous()[self.wanted], want)

    def check_combine(self, result: Any) -> None:
        same_bits("combined rows", result[0], self.combined)
