"""AdamW over replicated and expert-sharded FP32 weights, with one flat all-reduce and a global norm."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from deep_ep.train.launch import World

_BETAS = (0.9, 0.95)


def lr_at(step: int, *, peak: float, warmup: int, steps: int, floor: float = 0.1) -> float:
    """Learning rate of `step` (from 0): a linear warm-up over `warmup` steps, then a cosine from `peak` down
    to `floor * peak` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether the weight belongs to this rank's experts: its gradient is complete here."""
    return bool(getattr(parameter, "is_expert", False))


@dataclasses.dataclass(frozen=True)
class StepResult:
    """`loss` in nats a token over the global batch; `grad_norm` over all weights, before clipping."""

    loss: float
    grad_norm: float


class Optimizer:
    """AdamW with decoupled weight decay on matrices. Weights and both moments are FP32.

    Gradients arrive as sums over tokens; the mean and the clipping are one multiplication.
    """

    def __init__(self, model: nn.Module, world: World, *, weight_decay: float, clip: float) -> None:
        self.named = dict(model.named_parameters())
        self._world = world
        self._clip = clip
        self._replicated = [p for p in self.named.values() if not is_expert(p)]
        self._experts = [p for p in self.named.values() if is_expert(p)]
        # Norm gains and the embedding are left out of the decay: rare bytes get no gradient to hold them up.
        plain = [p for name, p in self.named.items() if p.dim() < 2 or name == "embedding"]
        chosen = {id(p) for p in plain}
        decayed = [p for p in self.named.values() if id(p) not in chosen]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=0.0, betas=_BETAS, eps=1e-8, foreach=True,
        )  # fmt: skip

    def step(self, loss_sum: torch.Tensor, num_tokens: int, lr: float) -> StepResult:
        """Reduce, clip and apply the gradients of `loss_sum`, this rank's summed token loss; a collective
        call.

        `num_tokens` counts the tokens of all ranks.
        """
        for parameter in self.named.values():
            # An expert without tokens still decays, on any rank count alike.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        device = loss_sum.device
        expert_square = torch.zeros((), device=device)
        for parameter in self._experts:
            expert_square = expert_square + _square(parameter)
        pieces = [_grad(p).reshape(-1) for p in self._replicated]
        flat = torch.cat([*pieces, loss_sum.detach().float().reshape(1), expert_square.reshape(1)])
        self._world.sum_(flat)
        offset = 0
        for parameter in self._replicated:
            count = parameter.numel()
            parameter.grad = flat[offset : offset + count].view_as(parameter)
            offset += count
        # Replicated gradients are now the same everywhere and count once; each expert counts on its owner.
        square = flat[:offset].square().sum() + flat[-1]
        loss, norm = (torch.stack((flat[-2], square.sqrt())).double() / num_tokens).tolist()
        scale = min(1.0, self._clip / (norm + 1e-6)) / num_tokens
        for parameter in self.named.values():
            _grad(parameter).mul_(scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return StepResult(loss, norm)


def _grad(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _square(parameter: nn.Parameter) -> torch.Tensor:
    return _grad(parameter).square().sum()
