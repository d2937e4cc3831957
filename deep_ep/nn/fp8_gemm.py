"""GEMM operands in bf16 or FP8, and the one product that the expert MLP uses: ``a @ b.T`` with FP32 accumulation.

FP8 follows DeepSeek-V3 (arXiv 2412.19437, section 3.3): E4M3 with one FP32 scale per 1x128 tile of an activation or
gradient, along the contracted dimension, and one per 128x128 block of a weight. Where torch has scaled GEMMs for this
(`torch.nn.functional.scaled_mm` on Hopper with CUDA 12.9 or later) and they agree with the definition in a self-check,
they are used; everywhere else both operands are dequantised to FP32 and multiplied in FP32, which rounds at the same
points.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import fp8

BF16 = "bf16"
TILE = "1x128"
BLOCK = "128x128"
# Rows of an expert are padded to this for scaled GEMMs: the weight gradient contracts over them in tiles of 128.
NATIVE_ALIGNMENT = 128


@dataclass
class GemmCounters:
    """What was really multiplied since the last reset, in this process.

    Attributes:
        fp8_gemms: products with two FP8 operands.
        bf16_gemms: products with two bf16 operands.
        native: FP8 products done by torch's scaled GEMM.
        dequantised: FP8 products done on dequantised operands.
        weight_quantisations: weight tensors quantised (each holds all experts of a rank).
        operands: products by kind, e.g. ``"float8_e4m3fn 1x128 @ float8_e4m3fn 128x128"``.
    """

    fp8_gemms: int = 0
    bf16_gemms: int = 0
    native: int = 0
    dequantised: int = 0
    weight_quantisations: int = 0
    operands: Counter[str] = field(default_factory=Counter)


_counters = GemmCounters()


def counters() -> GemmCounters:
    """The live counters of this process."""
    return _counters


def reset_counters() -> None:
    """Set all counters to zero."""
    fresh = GemmCounters()
    for name, value in vars(fresh).items():
        setattr(_counters, name, value)


class Operand:
    """A matrix [R, C] as a GEMM takes it: bf16, or E4M3 with scales in tiles along C or in blocks.

    Attributes:
        values: bf16 or float8_e4m3fn [R, C].
        scales: float32, [R, ceil(C / 128)] for "1x128", [ceil(R / 128), ceil(C / 128)] for "128x128"; None for "bf16".
        kind: "bf16", "1x128" or "128x128".
    """

    __slots__ = ("_dense", "_flipped", "kind", "scales", "values")

    def __init__(self, values: torch.Tensor, scales: torch.Tensor | None, kind: str) -> None:
        self.values = values
        self.scales = scales
        self.kind = kind
        self._dense: torch.Tensor | None = None
        self._flipped: Operand | None = None

    def rows(self, start: int, stop: int) -> Operand:
        """Rows [start, stop) of a bf16 or tiled operand, without a copy."""
        return Operand(self.values[start:stop], None if self.scales is None else self.scales[start:stop], self.kind)

    def transposed(self) -> Operand:
        """The transpose of a bf16 or block-scaled operand; kept, since a weight's is used in every backward."""
        if self._flipped is None:
            values = self.values.t()
            if self.kind != BF16 and device_has_scaled_mm(values.device):
                values = values.contiguous()  # scaled GEMMs read both operands along the contracted dimension
            self._flipped = Operand(values, None if self.scales is None else self.scales.t(), self.kind)
            if self._dense is not None:
                self._flipped._dense = self._dense.t()
        return self._flipped

    def dense(self) -> torch.Tensor:
        """float32 [R, C], value times scale; kept, since a weight's is used by every product of a step."""
        if self._dense is None:
            if self.scales is None:
                self._dense = self.values.float()
            else:
                dequantise = fp8.dequantize_128x128 if self.kind == BLOCK else fp8.dequantize_1x128
                self._dense = dequantise(self.values, self.scales, dtype=torch.float32)
        return self._dense


def along_columns(x: torch.Tensor, use_fp8: bool) -> Operand:
    """Activations or gradients [R, C] of a product that contracts over C."""
    if not use_fp8:
        return Operand(x.to(torch.bfloat16), None, BF16)
    return Operand(*fp8.quantize_1x128(x), TILE)


def along_rows(x: torch.Tensor, use_fp8: bool) -> Operand:
    """The transpose [C, R] of x [R, C], for a product that contracts over x's rows (weight gradients)."""
    if not use_fp8:
        return Operand(x.to(torch.bfloat16).t(), None, BF16)
    return Operand(*fp8.quantize_transposed(x), TILE)


def weights(w: torch.Tensor, use_fp8: bool) -> list[Operand]:
    """One operand [N, K] for each expert of w [L, N, K]."""
    if not use_fp8:
        return [Operand(part, None, BF16) for part in w.to(torch.bfloat16, copy=True).unbind()]
    _counters.weight_quantisations += 1
    values, scales = fp8.quantize_128x128(w)
    return [Operand(v, s, BLOCK) for v, s in zip(values.unbind(), scales.unbind(), strict=True)]


def matmul(a: Operand, b: Operand, dtype: torch.dtype) -> torch.Tensor:
    """a [M, K] times the transpose of b [N, K]: FP32 accumulation, one rounding to ``dtype``.

    Both operands are bf16, or both are FP8. bf16 products are rounded to bf16 also where ``dtype`` is float32.
    """
    name = f"{_describe(a)} @ {_describe(b)}"
    _counters.operands[name] += 1
    if a.kind == BF16:
        _counters.bf16_gemms += 1
        return _bf16_matmul(a.values, b.values).to(dtype)
    _counters.fp8_gemms += 1
    if _scaled_mm_fits(a, b) and _scaled_mm_agrees(a.values.device, b.kind, dtype):
        _counters.native += 1
        return _scaled_mm(a, b, dtype)
    _counters.dequantised += 1
    return (a.dense() @ b.dense().t()).to(dtype)


def row_alignment(device: torch.device, use_fp8: bool) -> int:
    """Padding of an expert's rows that this module's products want on ``device``."""
    return NATIVE_ALIGNMENT if use_fp8 and device_has_scaled_mm(device) else 1


def _describe(operand: Operand) -> str:
    dtype = str(operand.values.dtype).removeprefix("torch.")
    return dtype if operand.kind == BF16 else f"{dtype} {operand.kind}"


# ---------------------------------------------------------------------------------------------------------------------
# bf16


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has fast bf16 products; they accumulate in FP32 like the path without them."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


def _bf16_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.device.type != "cpu" or _cpu_multiplies_bf16():
        return a @ b.t()
    return (a.float() @ b.float().t()).to(torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# torch's scaled GEMM


@functools.cache
def device_has_scaled_mm(device: torch.device) -> bool:
    """Whether torch offers scaled GEMMs with these tiles there: Hopper, and a torch with `scaled_mm` recipes."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and hasattr(torch.nn.functional, "scaled_mm")
        and torch.cuda.get_device_capability(device) == (9, 0)
    )


def _scaled_mm_fits(a: Operand, b: Operand) -> bool:
    """Whether the shapes suit it: whole tiles and blocks, the outer dimensions of tiles in multiples of 16."""
    (num_rows, depth), num_columns = a.values.shape, b.values.shape[0]
    return (
        device_has_scaled_mm(a.values.device)
        and a.kind == TILE
        and depth % 128 == 0
        and num_rows % 16 == 0
        and num_columns % (128 if b.kind == BLOCK else 16) == 0
    )


def _scaled_mm(a: Operand, b: Operand, dtype: torch.dtype) -> torch.Tensor:
    """`scaled_mm` with its scale layouts: tiles column-major; blocks transposed, K blocks padded to a multiple of 4."""
    functional: Any = torch.nn.functional
    recipes = functional.ScalingType
    if a.scales is None or b.scales is None:
        raise TypeError("scaled products take two FP8 operands")
    if b.kind == TILE:
        recipe_b, scales_b = recipes.BlockWise1x128, b.scales.t().contiguous().t()
    else:
        recipe_b = recipes.BlockWise128x128
        scales_b = torch.nn.functional.pad(b.scales, (0, -b.scales.shape[1] % 4)).contiguous().t()
    product: torch.Tensor = functional.scaled_mm(
        a.values.contiguous(),
        b.values.contiguous().t(),
        a.scales.t().contiguous().t(),
        recipes.BlockWise1x128,
        scales_b,
        recipe_b,
        output_dtype=dtype,
    )
    return product


@functools.cache
def _scaled_mm_agrees(device: torch.device, kind_b: str, dtype: torch.dtype) -> bool:
    """One-time self-check on ``device``: does `scaled_mm` compute what the definition says?

    Rows and columns get very different magnitudes, so that a swapped or misread scale cannot pass.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def sample(num_rows: int) -> torch.Tensor:
        x = torch.randn((num_rows, 640), generator=generator, dtype=torch.float32, device="cpu")
        spread = torch.randint(-6, 7, (num_rows, 5), generator=generator, device="cpu").repeat_interleave(128, dim=1)
        return (x * torch.exp2(spread)).to(device=device, dtype=torch.bfloat16)

    a = along_columns(sample(256), True)
    b = along_columns(sample(384), True) if kind_b == TILE else Operand(*fp8.quantize_128x128(sample(384)), BLOCK)
    try:
        got = _scaled_mm(a, b, dtype).float()
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        warnings.warn(f"torch's scaled GEMM is not used on {device} ({error}); operands are dequantised", stacklevel=2)
        return False
    want = a.dense() @ b.dense().t()
    # Row by row: rows of small magnitude would vanish in a norm over everything. 2^-8 is bf16's rounding, and Hopper
    # keeps fewer bits than FP32 inside one tile's accumulation.
    worst = float(((got - want).norm(dim=1) / want.norm(dim=1)).max())
    if not worst < 2e-2:
        warnings.warn(
            f"torch's scaled GEMM on {device} differs from its definition by {worst:.2e}; operands are dequantised",
            stacklevel=2,
        )
        return False
    return True
