"""Who owns which expert, and how many tokens go where: pure functions of `topk_idx`, no communication.

Experts are placed in contiguous ranges. Where E experts do not divide by R ranks, the first E % R ranks own one
more: 10 experts on 4 ranks are 3, 3, 2, 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import ConfigError


def num_local_experts(num_experts: int, num_ranks: int, rank: int) -> int:
    """Number of experts that ``rank`` owns."""
    base, extra = divmod(num_experts, num_ranks)
    return base + (1 if rank < extra else 0)


def first_local_expert(num_experts: int, num_ranks: int, rank: int) -> int:
    """Global index of the first expert of ``rank`` (equals ``num_experts`` where the rank owns none at the end)."""
    base, extra = divmod(num_experts, num_ranks)
    return rank * base + min(rank, extra)


def expert_to_rank(num_experts: int, num_ranks: int, device: str | torch.device | None = None) -> torch.Tensor:
    """Owner of every expert, int64 [E]."""
    counts = torch.tensor([num_local_experts(num_experts, num_ranks, r) for r in range(num_ranks)], dtype=torch.int64)
    return torch.repeat_interleave(torch.arange(num_ranks, dtype=torch.int64), counts).to(device)


@dataclass(slots=True)
class DispatchLayout:
    """What `Buffer.get_dispatch_layout` returns, without the event.

    Attributes:
        num_tokens_per_rank: int32 [R], tokens sent to each rank, a token counted once per rank.
        num_tokens_per_rdma_rank: int32 [N], likewise per node; None with one node.
        num_tokens_per_expert: int32 [E], every (token, k) pair counted.
        is_token_in_rank: bool [T, R].
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


def check_topk_range(topk_idx: torch.Tensor, num_experts: int) -> None:
    """Raise `ConfigError` naming the first entry outside [-1, num_experts)."""
    bad = (topk_idx < -1) | (topk_idx >= num_experts)
    if bool(bad.any()):
        token, k = (int(i) for i in bad.nonzero()[0])
        raise ConfigError(
            f"topk_idx[{token}, {k}] is {int(topk_idx[token, k])}, outside [0, {num_experts}) for num_experts="
            f"{num_experts}; mark a skipped selection with -1"
        )


def token_in_rank(topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> torch.Tensor:
    """bool [T, R]: does token t select an expert of rank r? Entries of -1 select nothing."""
    num_tokens = topk_idx.shape[0]
    owner = expert_to_rank(num_experts, num_ranks, topk_idx.device)
    # One column more than ranks takes the skipped entries, so that no masking is needed.
    hit = torch.zeros((num_tokens, num_ranks + 1), dtype=torch.bool, device=topk_idx.device)
    if topk_idx.numel() > 0 and num_experts > 0:
        selected = topk_idx.long()
        ranks = torch.where(selected >= 0, owner[selected.clamp(min=0)], num_ranks)
        hit.scatter_(1, ranks, True)
    return hit[:, :num_ranks].contiguous()


def compute_dispatch_layout(topk_idx: torch.Tensor, num_experts: int, num_ranks: int, num_nodes: int) -> DispatchLayout:
    """Count tokens per rank, node and expert.

    Args:
        topk_idx: int32 or int64 [T, K], -1 for no selection.
        num_experts: E.
        num_ranks: R.
        num_nodes: N, which divides R; ranks of one node are contiguous.

    Raises:
        ConfigError: an entry lies outside [-1, E).
    """
    check_topk_range(topk_idx, num_experts)
    in_rank = token_in_rank(topk_idx, num_experts, num_ranks)
    per_rank = in_rank.sum(0, dtype=torch.int32)
    per_node = None
    if num_nodes > 1:
        in_node = in_rank.view(in_rank.shape[0], num_nodes, num_ranks // num_nodes).any(2)
        per_node = in_node.sum(0, dtype=torch.int32)
    # Bin 0 collects the -1 entries.
    flat = topk_idx.reshape(-1).long() + 1
    per_expert = torch.bincount(flat, minlength=num_experts + 1)[1:].to(torch.int32)
    return DispatchLayout(per_rank, per_node, per_expert, in_rank)
