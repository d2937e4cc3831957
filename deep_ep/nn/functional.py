"""Differentiable dispatch and combine.

The backward of dispatch is a combine, and the backward of combine is a cached dispatch: the same rows travel the same
routes in the other direction. All ranks of the group have to run both, forward and backward, in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.autograd.function import once_differentiable

from .. import fp8
from ..errors import ConfigError
from .dispatched import Dispatched, make_carrier

if TYPE_CHECKING:
    from ..buffer import Buffer
    from ..event import EventOverlap

Bias: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None"

# What gradients are multiplied by before they are quantised on their way, and divided by at the receiver. The quantiser
# floors a tile's maximum at 1e-4: activations lie above that, but the gradients of a mean over many tokens do not, at
# 1e-9 they would all become zero. A power of two changes no other bit, and a constant is known to all ranks. Tiles keep
# their bits down to a maximum of 5e-24; beyond 2^63 (1e19) bf16 overflows, as a loss that large would anyway.
_GRADIENT_FACTOR = 2.0**64


def dispatch(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    buffer: Buffer,
    *,
    use_fp8: bool = False,
    expert_alignment: int = 1,
    fp8_gradients: bool | None = None,
) -> Dispatched:
    """Send every token to the ranks that own its experts.

    Collective over the buffer's group. May be called again with the same inputs (activation checkpointing).

    Args:
        x: [T, H] tokens; bf16 with ``use_fp8``.
        topk_idx: int32 or int64 [T, K], global expert index, -1 for none.
        topk_weights: float32 [T, K]; the gradient arrives here from `unpermute`.
        num_experts: E, over all ranks.
        buffer: `deep_ep.Buffer` of the expert-parallel group.
        use_fp8: quantise 1x128 tiles to E4M3 on the way: half the bytes, FP32 scales beside.
        expert_alignment: rows of an expert are padded to a multiple of this in the layouts of the result.
        fp8_gradients: send gradients as FP8 in the backward of `combine`, where the largest of each 128 channels lies
            between 5e-24 (smaller ones lose bits) and 9e18; None means the same as ``use_fp8``.

    Returns:
        `Dispatched`.

    Raises:
        ConfigError: shapes or dtypes do not fit; see `Buffer.dispatch` for its own checks and errors.
    """
    if x.dim() != 2 or topk_idx.dim() != 2 or topk_idx.shape[0] != x.shape[0]:
        raise ConfigError(
            f"x is {tuple(x.shape)} and topk_idx {tuple(topk_idx.shape)}; expected [tokens, hidden] and [tokens, topk]"
        )
    if topk_weights.shape != topk_idx.shape or topk_weights.dtype != torch.float32:
        raise ConfigError(
            f"topk_weights is {tuple(topk_weights.shape)} {topk_weights.dtype}, expected float32 "
            f"{tuple(topk_idx.shape)}"
        )
    if use_fp8 and x.dtype != torch.bfloat16:
        raise ConfigError(f"x is {x.dtype}; FP8 dispatch quantises bfloat16 tokens, so convert them first")
    carrier, recv_weights, recv_idx, rows, scales, counts, handle = _Dispatch.apply(  # type: ignore[no-untyped-call]
        x, topk_weights, topk_idx, num_experts, buffer, use_fp8
    )
    return Dispatched(
        rows=carrier if rows is None else rows,
        scales=scales,
        carrier=carrier,
        topk_idx=recv_idx,
        topk_weights=recv_weights,
        counts_list=counts,
        num_experts=num_experts,
        buffer=buffer,
        handle=handle,
        expert_alignment=expert_alignment,
        fp8_gradients=use_fp8 if fp8_gradients is None else fp8_gradients,
    )


def combine(y: torch.Tensor, dispatched: Dispatched, *, bias: Bias = None) -> torch.Tensor:
    """Sum the received rows' outputs back at the tokens' home ranks, in FP32, in rank order.

    Args:
        y: [n, H], one row per received row, already weighted (`unpermute` does that).
        dispatched: what `dispatch` returned.
        bias: None, a tensor [T, H] or a tuple of two that are added first; gradients flow to them.

    Returns:
        [T, H] in the dtype of ``y``.

    Raises:
        ConfigError: the number of rows is not that of the dispatch.
    """
    out, _ = combine_async(y, dispatched, bias=bias, async_finish=False)
    return out


def combine_async(
    y: torch.Tensor, dispatched: Dispatched, *, bias: Bias = None, async_finish: bool = True
) -> tuple[torch.Tensor, EventOverlap]:
    """`combine` without making the current stream wait: ``event.current_stream_wait()`` has to precede any use."""
    if y.dim() != 2 or y.shape[0] != dispatched.num_recv:
        raise ConfigError(f"y is {tuple(y.shape)}, expected [{dispatched.num_recv}, hidden]: one row per received row")
    biases = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
    out, event = _Combine.apply(  # type: ignore[no-untyped-call]
        y, dispatched.buffer, dispatched.handle, dispatched.fp8_gradients, async_finish, *biases
    )
    return out, event


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_idx: torch.Tensor,
        num_experts: int,
        buffer: Buffer,
        use_fp8: bool,
    ) -> tuple[Any, ...]:
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        received, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            use_fp8=use_fp8,
        )
        ctx.buffer, ctx.handle, ctx.dtype = buffer, handle, x.dtype
        ctx.mark_non_differentiable(recv_idx)
        if not use_fp8:
            return received, recv_weights, recv_idx, None, None, counts, handle
        rows, scales = received
        ctx.mark_non_differentiable(rows, scales)
        return (
            make_carrier(rows.shape[0], rows.shape[1], rows.device),
            recv_weights,
            recv_idx,
            rows,
            scales,
            counts,
            handle,
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_rows: torch.Tensor, grad_weights: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_topk_weights, _ = ctx.buffer.combine(
            grad_rows.contiguous(), ctx.handle, topk_weights=grad_weights.contiguous()
        )
        return grad_x.to(ctx.dtype), grad_topk_weights, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        buffer: Buffer,
        handle: tuple[Any, ...],
        fp8_gradients: bool,
        async_finish: bool,
        *biases: torch.Tensor,
    ) -> tuple[torch.Tensor, Any]:
        ctx.buffer, ctx.handle, ctx.fp8_gradients, ctx.num_biases = buffer, handle, fp8_gradients, len(biases)
        bias: Any = None if not biases else biases[0] if len(biases) == 1 else biases
        out, _, event = buffer.combine(y.contiguous(), handle, bias=bias, async_finish=async_finish)
        return out, event

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grad = grad.contiguous()
        if ctx.fp8_gradients:
            wide = grad.float() if grad.dtype == torch.float16 else grad  # fp16 ends at 2^16
            scaled = wide * _GRADIENT_FACTOR
            rows, scales = ctx.buffer.dispatch(scaled, handle=ctx.handle, use_fp8=True)[0]
            grad_y = fp8.dequantize_1x128(rows, scales / _GRADIENT_FACTOR, dtype=grad.dtype)
        else:
            grad_y = ctx.buffer.dispatch(grad, handle=ctx.handle)[0]
        return (grad_y, None, None, None, None, *([grad] * ctx.num_biases))
