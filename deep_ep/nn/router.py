"""Which experts a token visits: FP32 gate, top-k, group-limited routing, load balancing without an auxiliary loss.

Follows the published routers of DeepSeek-V2 (arXiv 2405.04434: softmax scores, groups ranked by their best expert),
DeepSeek-V3 (arXiv 2412.19437: sigmoid scores with a selection bias, groups ranked by the sum of their best two) and
Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..errors import ConfigError

_SCORINGS = ("softmax", "sigmoid")
# Keeps the normalisation finite where all chosen sigmoid scores have underflowed to zero.
_TINY = 1e-20


class RouterOutput(NamedTuple):
    """What `Router` returns for T tokens.

    Attributes:
        topk_idx: int64 [T, K], global expert index, best first; what `Buffer.dispatch` takes.
        topk_weights: float32 [T, K], carries the gradient of the gate.
        scores: float32 [T, E], softmax or sigmoid scores before any bias or group mask; carries gradient too, for
            callers that add a loss term of their own.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    scores: torch.Tensor


class Router(nn.Module):
    """FP32 linear gate with top-k selection.

    Ties go to the lower expert index, so that every rank, device and run selects the same experts from equal scores.

    Args:
        hidden: width of a token.
        num_experts: E, over all ranks.
        num_topk: K, experts per token.
        scoring: "softmax" or "sigmoid".
        num_groups: experts are split into this many contiguous groups of equal size. With one group per node, a token
            visits at most ``topk_groups`` nodes.
        topk_groups: groups a token may choose from (None: all). Groups are ranked by their best expert (softmax) or by
            the sum of their best two (sigmoid), bias included.
        normalize_weights: divide a token's K weights by their sum.
        routed_scaling: factor on the weights after that.
        bias_update_rate: step of the selection bias in `update_bias`; 0 switches balancing off.
        seed: the gate is drawn from this alone: N(0, 1 / hidden).
        device: where the parameters live.

    Attributes:
        weight: float32 parameter [E, hidden].
        bias: float32 buffer [E], added to the scores for the selection only; weights come from the bare scores.

    Raises:
        ConfigError: a value is out of range, or the allowed groups hold fewer than K experts.
    """

    bias: torch.Tensor

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        num_topk: int,
        *,
        scoring: str = "softmax",
        num_groups: int = 1,
        topk_groups: int | None = None,
        normalize_weights: bool = True,
        routed_scaling: float = 1.0,
        bias_update_rate: float = 1e-3,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        topk_groups = num_groups if topk_groups is None else topk_groups
        _check_arguments(hidden, num_experts, num_topk, scoring, num_groups, topk_groups, bias_update_rate)
        self.hidden = hidden
        self.num_experts = num_experts
        self.num_topk = num_topk
        self.scoring = scoring
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.normalize_weights = normalize_weights
        self.routed_scaling = routed_scaling
        self.bias_update_rate = bias_update_rate
        generator = torch.Generator("cpu").manual_seed(seed)
        weight = torch.randn((num_experts, hidden), generator=generator, dtype=torch.float32, device="cpu")
        weight *= hidden**-0.5
        device = torch.get_default_device() if device is None else device
        self.weight = nn.Parameter(weight.to(device))
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32, device=device))

    def forward(self, x: torch.Tensor) -> RouterOutput:
        """Route tokens ``x`` [T, hidden] of any float dtype; all arithmetic is FP32, inside autocast too."""
        if x.dim() != 2 or x.shape[1] != self.hidden or not x.is_floating_point():
            raise ConfigError(
                f"router input is {tuple(x.shape)} {x.dtype}, expected float [tokens, {self.hidden}]; flatten leading "
                "dimensions first"
            )
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.float(), self.weight.float())
            scores = logits.softmax(dim=-1) if self.scoring == "softmax" else logits.sigmoid()
            topk_idx = self._select(scores.detach())
            weights = scores.gather(1, topk_idx)
            if self.normalize_weights:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + _TINY)
            if self.routed_scaling != 1.0:
                weights = weights * self.routed_scaling
        return RouterOutput(topk_idx, weights, scores)

    def _select(self, scores: torch.Tensor) -> torch.Tensor:
        """Expert indices int64 [T, K] from scores [T, E]."""
        choice = scores + self.bias
        if self.topk_groups < self.num_groups:
            grouped = choice.view(-1, self.num_groups, self.num_experts // self.num_groups)
            best = 1 if self.scoring == "softmax" else min(2, grouped.shape[2])
            group_score = grouped.amax(-1) if best == 1 else grouped.topk(best, dim=-1).values.sum(-1)
            groups = stable_topk(group_score, self.topk_groups)
            allowed = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, groups, True)
            choice = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        return stable_topk(choice, self.num_topk)

    @torch.no_grad()
    def update_bias(self, load: torch.Tensor) -> None:
        """Nudge the bias of every expert by one step towards equal load.

        Overloaded experts lose ``bias_update_rate``, underloaded ones gain it (Wang et al. 2024, the sign update).

        Args:
            load: [E] tokens per expert over all ranks since the last update.
        """
        if tuple(load.shape) != (self.num_experts,):
            raise ConfigError(
                f"load has shape {tuple(load.shape)}, expected ({self.num_experts},): one count per expert"
            )
        load = load.to(device=self.bias.device, dtype=torch.float32)
        self.bias += self.bias_update_rate * torch.sign(load.mean() - load)

    def extra_repr(self) -> str:
        return (
            f"hidden={self.hidden}, experts={self.num_experts}, topk={self.num_topk}, scoring={self.scoring}, "
            f"groups={self.topk_groups}/{self.num_groups}"
        )


def stable_topk(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices int64 [T, k] of the k largest per row, largest first, ties to the lower index.

    `torch.topk` leaves the order of ties to the kernel, which differs between devices.
    """
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


def mask_padding(topk_idx: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Copy of ``topk_idx`` [T, K] with -1 in the rows where ``valid`` (bool [T]) is False: padding goes nowhere."""
    if valid.dtype != torch.bool or tuple(valid.shape) != tuple(topk_idx.shape[:1]):
        raise ConfigError(
            f"valid is {tuple(valid.shape)} {valid.dtype}, expected bool [{topk_idx.shape[0]}]: one flag per token"
        )
    return topk_idx.masked_fill(~valid.unsqueeze(1), -1)


def capacity_cap(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor, num_experts: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep at most ``capacity`` of the selections of every expert, those of largest weight, and drop the others.

    Ties go to the earlier token. Counts are those of this call, that is of this rank's tokens.

    Args:
        topk_idx: int [T, K], -1 for no selection.
        topk_weights: float32 [T, K].
        num_experts: E.
        capacity: selections an expert accepts, 0 or more.

    Returns:
        (topk_idx with -1 at dropped selections, topk_weights with 0 there; gradient flows through the kept ones).

    Raises:
        ConfigError: shapes differ, or the capacity is negative.
    """
    if topk_idx.shape != topk_weights.shape or topk_idx.dim() != 2:
        raise ConfigError(
            f"topk_idx is {tuple(topk_idx.shape)} and topk_weights {tuple(topk_weights.shape)}; both have to be [T, K]"
        )
    if capacity < 0:
        raise ConfigError(f"capacity is {capacity}; give the selections an expert accepts, 0 or more")
    expert = topk_idx.reshape(-1).long()
    by_weight = topk_weights.detach().reshape(-1).sort(descending=True, stable=True).indices
    # Sorting by weight and then stably by expert leaves each expert's selections in falling weight.
    order = by_weight[expert[by_weight].sort(stable=True).indices]
    counts = torch.bincount(expert + 1, minlength=num_experts + 1)
    starts = counts.cumsum(0) - counts
    position = torch.empty_like(expert)
    position[order] = torch.arange(expert.numel(), device=expert.device) - starts[expert[order] + 1]
    drop = (position >= capacity).view_as(topk_idx) | (topk_idx < 0)
    return topk_idx.masked_fill(drop, -1), topk_weights.masked_fill(drop, 0.0)


def _check_arguments(
    hidden: int, num_experts: int, num_topk: int, scoring: str, num_groups: int, topk_groups: int, rate: float
) -> None:
    if hidden < 1 or num_experts < 1:
        raise ConfigError(f"hidden={hidden}, num_experts={num_experts}: both have to be at least 1")
    if not 1 <= num_topk <= num_experts:
        raise ConfigError(f"num_topk={num_topk} is outside [1, num_experts={num_experts}]")
    if scoring not in _SCORINGS:
        raise ConfigError(f"scoring={scoring!r} is not known; choose one of {', '.join(_SCORINGS)}")
    if num_groups < 1 or num_experts % num_groups != 0:
        raise ConfigError(f"num_groups={num_groups} does not divide num_experts={num_experts} into equal groups")
    if not 1 <= topk_groups <= num_groups:
        raise ConfigError(f"topk_groups={topk_groups} is outside [1, num_groups={num_groups}]")
    if num_topk > topk_groups * (num_experts // num_groups):
        raise ConfigError(
            f"num_topk={num_topk} experts cannot come from topk_groups={topk_groups} groups of "
            f"{num_experts // num_groups}; allow more groups or fewer experts a token"
        )
    if rate < 0:
        raise ConfigError(f"bias_update_rate={rate} is negative; use 0 to switch balancing off")
