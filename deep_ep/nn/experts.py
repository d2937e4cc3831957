"""The experts of one rank: SwiGLU MLPs over rows grouped by expert, in bf16 or FP8, with FP32 master weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import fp8
from ..errors import ConfigError
from . import fp8_gemm
from .dispatched import ExpertRows

PRECISIONS = ("fp8", "bf16")


class GroupedMLP(nn.Module):
    """L SwiGLU experts: y = (silu(x W_gate^T) * (x W_up^T)) W_2^T, each on its own segment of rows.

    Rounding points are those of the GPU kernels people use: operands bf16 or FP8, FP32 accumulation, bf16 after each
    GEMM and after the activation. In FP8, forward and input gradient take 1x128 activations or gradients and 128x128
    weights; the weight gradient contracts over tokens, so both operands are tiled anew, 128 tokens to a scale, per
    expert. Routing weights are not applied here; `unpermute` does that.

    Args:
        num_experts: L, experts of this rank; 0 is possible.
        hidden: H.
        intermediate: I.
        precision: "fp8" or "bf16".
        first_expert: global index of the first one; initial weights depend on the global index and the seed only.
        seed: weights are drawn from it: w13 ~ N(0, 1 / H), w2 ~ N(0, 1 / I).
        is_expert: mark the parameters as owned by this rank alone (attribute ``is_expert``), not replicated.
        device: where the parameters live.

    Attributes:
        w13: float32 parameter [L, 2 I, H], gate rows first.
        w2: float32 parameter [L, H, I].

    Quantised weights are kept until the parameter changes: until any `torch.optim` optimizer steps, or the parameter's
    version counter moves. Writing through ``.data`` does neither: call `invalidate_weights` after doing so.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        precision: str = "fp8",
        first_expert: int = 0,
        seed: int = 0,
        is_expert: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ConfigError(f"precision={precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
        if num_experts < 0 or hidden < 1 or intermediate < 1:
            raise ConfigError(
                f"num_experts={num_experts}, hidden={hidden}, intermediate={intermediate}: sizes have to be positive"
            )
        self.num_experts = num_experts
        self.hidden = hidden
        self.intermediate = intermediate
        self.precision = precision
        # Drawn on the CPU in FP32, whatever the defaults are: the same weights on every device.
        w13 = torch.empty((num_experts, 2 * intermediate, hidden), dtype=torch.float32, device="cpu")
        w2 = torch.empty((num_experts, hidden, intermediate), dtype=torch.float32, device="cpu")
        device = torch.get_default_device() if device is None else device
        for expert in range(num_experts):
            generator = torch.Generator("cpu").manual_seed(derive_seed(seed, 2 + first_expert + expert))
            w13[expert].normal_(0.0, hidden**-0.5, generator=generator)
            w2[expert].normal_(0.0, intermediate**-0.5, generator=generator)
        self.w13 = nn.Parameter(w13.to(device))
        self.w2 = nn.Parameter(w2.to(device))
        self.is_expert = is_expert
        self._mark_parameters()
        self._operands = _OperandCache()

    def _mark_parameters(self) -> None:
        for parameter in (self.w13, self.w2):
            parameter.is_expert = self.is_expert  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_parameters()  # copying a parameter drops its attributes

    @property
    def row_alignment(self) -> int:
        """Padding of an expert's rows that suits this precision and device; pass it to `permute_by_expert`."""
        return fp8_gemm.row_alignment(self.w13.device, self.precision == "fp8")

    def forward(self, rows: ExpertRows) -> torch.Tensor:
        """bf16 [M, H] outputs for rows grouped by expert; padding rows give zeros.

        FP8 rows feed the first GEMM unchanged in precision "fp8" and are dequantised in "bf16"; rows of another dtype
        are rounded to bf16 first, and in precision "fp8" quantised here.

        Raises:
            ConfigError: the width or the number of experts does not fit.
        """
        if rows.carrier.dim() != 2 or rows.carrier.shape[1] != self.hidden or len(rows.counts) != self.num_experts:
            raise ConfigError(
                f"rows are {tuple(rows.carrier.shape)} for {len(rows.counts)} experts, expected [rows, {self.hidden}] "
                f"for {self.num_experts}"
            )
        use_fp8 = self.precision == "fp8"
        segments = [
            (start, start + size) if count else (start, start)
            for start, size, count in zip(rows.starts, rows.sizes, rows.counts, strict=True)
        ]
        out: torch.Tensor = _GroupedSwiGLU.apply(  # type: ignore[no-untyped-call]
            rows.carrier.to(torch.bfloat16),
            None if rows.scales is None else rows.rows,
            rows.scales,
            self.w13,
            self.w2,
            self._operands.get("w13", self.w13, use_fp8),
            self._operands.get("w2", self.w2, use_fp8),
            segments,
            use_fp8,
        )
        return out

    def invalidate_weights(self) -> None:
        """Forget quantised weights; needed only after writing to a parameter's ``.data``."""
        self._operands = _OperandCache()

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_experts}, hidden={self.hidden}, intermediate={self.intermediate}, "
            f"precision={self.precision}"
        )


def derive_seed(seed: int, stream: int) -> int:
    """Seed of one of a module's random streams; distinct for every (seed, stream) below a million streams."""
    return (seed * 1_000_003 + stream) % (1 << 63)


class _OptimizerSteps:
    """Counts the steps of all optimizers of the process: fused ones write parameters without moving their version."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.count += 1


_optimizer_steps = _OptimizerSteps()


class _OperandCache:
    """GEMM operands of parameters, made once per optimizer step."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[tuple[Any, ...], list[fp8_gemm.Operand]]] = {}

    def get(self, name: str, parameter: torch.Tensor, use_fp8: bool) -> list[fp8_gemm.Operand]:
        # Inference tensors have no version counter: nothing tells when they change.
        version = None if parameter.is_inference() else parameter._version
        key = (version, _optimizer_steps.count, parameter.data_ptr(), parameter.device, use_fp8)
        entry = self._entries.get(name)
        if entry is None or entry[0] != key or version is None:
            # Made in inference mode they could not serve a later training step of the same version.
            with torch.inference_mode(False), torch.no_grad():
                entry = (key, fp8_gemm.weights(parameter.detach(), use_fp8))
            self._entries[name] = entry
        return entry[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> _OperandCache:
        return _OperandCache()

    def __reduce__(self) -> tuple[type[_OperandCache], tuple[()]]:
        return _OperandCache, ()


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [M, 2 I], computed in FP32, rounded once to the input's dtype."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return nn.functional.silu(gate).mul_(up).to(gate_up.dtype)


def swiglu_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Gradient [M, 2 I] of `swiglu` for the gradient [M, I] of its result; FP32 inside, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    grad = grad.float()
    sigmoid = gate.sigmoid()
    activated = gate * sigmoid
    out = torch.empty_like(gate_up)
    # d silu(g) / dg = sigmoid(g) + silu(g) (1 - sigmoid(g))
    grad_gate, grad_up = out.chunk(2, dim=-1)
    grad_up.copy_(grad * activated)
    grad_gate.copy_((sigmoid + activated * (1.0 - sigmoid)).mul_(up).mul_(grad))
    return out


def unit_scale(x: torch.Tensor) -> torch.Tensor:
    """Power of two s, as float32 scalar tensor, that brings max|x| into [0.5, 1); 1 for empty, zero or non-finite x.

    The quantiser floors a tile's maximum at 1e-4. Activations lie above that, but the gradients of a mean over many
    tokens do not: at 1e-9 they would all become zero. Multiplying by a power of two is exact, so gradients are brought
    to unit size before quantising and back after.
    """
    if x.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=x.device)
    low, high = torch.aminmax(x.detach())
    amax = torch.maximum(-low, high).float()
    exponent = torch.frexp(torch.where(amax.isfinite(), amax, 1.0)).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(amax), -exponent)


def _grouped(
    operand: fp8_gemm.Operand,
    weights: list[fp8_gemm.Operand],
    segments: list[tuple[int, int]],
    num_columns: int,
) -> torch.Tensor:
    """bf16 [M, num_columns]: every segment of rows times its expert's weight, transposed."""
    out = torch.zeros((operand.values.shape[0], num_columns), dtype=torch.bfloat16, device=operand.values.device)
    for (start, stop), weight in zip(segments, weights, strict=True):
        if stop > start:
            out[start:stop] = fp8_gemm.matmul(operand.rows(start, stop), weight, torch.bfloat16)
    return out


def _grouped_weight_grad(
    grad: torch.Tensor, x: torch.Tensor, segments: list[tuple[int, int]], use_fp8: bool
) -> torch.Tensor:
    """float32 [L, N, K]: for every expert the transpose of grad [tokens, N] times x [tokens, K]."""
    out = torch.zeros((len(segments), grad.shape[1], x.shape[1]), dtype=torch.float32, device=grad.device)
    for expert, (start, stop) in enumerate(segments):
        if stop > start:
            a = fp8_gemm.along_rows(grad[start:stop], use_fp8)
            b = fp8_gemm.along_rows(x[start:stop], use_fp8)
            out[expert] = fp8_gemm.matmul(a, b, torch.float32)
    return out


class _GroupedSwiGLU(torch.autograd.Function):
    """The whole expert MLP as one node, so that what is kept for the backward is exactly: input rows and gate_up."""

    @staticmethod
    def forward(
        ctx: Any,
        carrier: torch.Tensor,
        values: torch.Tensor | None,
        scales: torch.Tensor | None,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_operands: list[fp8_gemm.Operand],
        w2_operands: list[fp8_gemm.Operand],
        segments: list[tuple[int, int]],
        use_fp8: bool,
    ) -> torch.Tensor:
        ctx.w13_operands, ctx.w2_operands = w13_operands, w2_operands
        ctx.segments, ctx.use_fp8 = segments, use_fp8
        with torch.autocast(carrier.device.type, enabled=False):
            kept: tuple[torch.Tensor, torch.Tensor | None]
            if values is None or scales is None:
                x = fp8_gemm.along_columns(carrier, use_fp8)
                kept = (carrier, None)
            elif use_fp8:
                x = fp8_gemm.Operand(values, scales, fp8_gemm.TILE)
                kept = (values, scales)
            else:
                x = fp8_gemm.along_columns(fp8.dequantize_1x128(values, scales), use_fp8)
                kept = (values, scales)
            gate_up = _grouped(x, w13_operands, segments, w13.shape[1])
            activated = fp8_gemm.along_columns(swiglu(gate_up), use_fp8)
            out = _grouped(activated, w2_operands, segments, w2.shape[1])
        ctx.save_for_backward(*kept, gate_up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, scales, gate_up = ctx.saved_tensors
        segments, use_fp8 = ctx.segments, ctx.use_fp8
        need_x, need_w13, need_w2 = ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4]
        grad_x = grad_w13 = grad_w2 = None
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad.contiguous()
            # Exact, undone at the end; see unit_scale for why the quantiser needs it.
            factor = unit_scale(grad) if use_fp8 else None
            if factor is not None:
                grad = grad * factor.to(grad.dtype)
            if need_w2:
                grad_w2 = _grouped_weight_grad(grad, swiglu(gate_up), segments, use_fp8)
            if need_x or need_w13:
                w2_flipped = [w.transposed() for w in ctx.w2_operands]
                grad_act = _grouped(fp8_gemm.along_columns(grad, use_fp8), w2_flipped, segments, gate_up.shape[1] // 2)
                grad_gate_up = swiglu_backward(grad_act, gate_up)
                if need_w13:
                    x = values if scales is None else fp8.dequantize_1x128(values, scales)
                    grad_w13 = _grouped_weight_grad(grad_gate_up, x, segments, use_fp8)
                if need_x:
                    w13_flipped = [w.transposed() for w in ctx.w13_operands]
                    grad_x = _grouped(
                        fp8_gemm.along_columns(grad_gate_up, use_fp8), w13_flipped, segments, values.shape[1]
                    )
            if factor is not None:
                grad_x = None if grad_x is None else grad_x.div_(factor.to(grad_x.dtype))
                grad_w13 = None if grad_w13 is None else grad_w13.div_(factor)
                grad_w2 = None if grad_w2 is None else grad_w2.div_(factor)
        return grad_x, None, None, grad_w13, grad_w2, None, None, None, None
