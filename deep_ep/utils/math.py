"""Small numeric helpers that tests and benchmarks of this field use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..fp8 import dequantize_1x128, quantize_1x128


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def align(x: int, y: int) -> int:
    """The smallest multiple of ``y`` that is not below ``x``."""
    return ceil_div(x, y) * y


def safe_div(a: float, b: float) -> float:
    """a / b, or 0 where b is 0."""
    return 0.0 if b == 0 else a / b


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>) in float64 of both plus one: 0 for equal tensors."""
    x, y = x.double() + 1, y.double() + 1
    return float(1 - 2 * (x * y).sum() / (x * x + y * y).sum())


def per_token_cast_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [T, H] -> (E4M3 [T, H], float32 scales [T, ceil(H / 128)]): 1x128 tiles, see `deep_ep.fp8`."""
    q, scales = quantize_1x128(x)
    return q, scales


def per_token_cast_back(x_fp8: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16 values of 1x128 tiles; ``scales`` float32 or int32 (four packed UE8M0 exponents, the lowest byte first)."""
    if x_fp8.numel() == 0:
        return x_fp8.to(torch.bfloat16)
    return dequantize_1x128(x_fp8, scales)


def inplace_unique(x: torch.Tensor, num_slots: int) -> None:
    """Replace each row of ``x`` [n, m] by its distinct values in 0..num_slots-1, largest first, padded with -1."""
    present = torch.zeros((x.size(0), num_slots + 1), dtype=torch.bool, device=x.device)
    present.scatter_(1, torch.where(x < 0, num_slots, x).long(), True)
    slots = torch.arange(num_slots, device=x.device)
    values = torch.where(present[:, :num_slots], slots, -1).sort(dim=1, descending=True).values
    width = min(num_slots, x.size(1))
    x.fill_(-1)
    x[:, :width] = values[:, :width].to(x.dtype)


def create_grouped_scores(scores: torch.Tensor, group_idx: torch.Tensor, num_groups: int) -> torch.Tensor:
    """``scores`` [T, E] with 0 outside the groups of experts that ``group_idx`` [T, g] names."""
    num_tokens, num_experts = scores.shape
    mask = torch.zeros((num_tokens, num_groups), dtype=torch.bool, device=scores.device).scatter_(1, group_idx, True)
    grouped = scores.view(num_tokens, num_groups, num_experts // num_groups)
    return (grouped * mask.unsqueeze(-1)).view(num_tokens, num_experts)


def hash_tensor(t: torch.Tensor) -> int:
    """Sum of the tensor seen as int32 words; the order of the words does not matter."""
    return int(t.contiguous().reshape(-1).view(torch.int32).sum().item())


def hash_tensors(*ts: torch.Tensor | None) -> int:
    """Exclusive or of the tensors' hashes; None is skipped."""
    value = 0
    for t in ts:
        if t is not None:
            value ^= hash_tensor(t)
    return value


def count_bytes(*ts: torch.Tensor | Sequence[Any] | None) -> int:
    """Bytes of all tensors, also inside tuples and lists; None counts 0."""
    total = 0
    for t in ts:
        if isinstance(t, torch.Tensor):
            total += t.numel() * t.element_size()
        elif t is not None:
            total += count_bytes(*t)
    return total
