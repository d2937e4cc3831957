"""Row movement and row sums: the hot loops of dispatch and combine, for tensors on any device.

CPU tensors use the C++ loops of `deep_ep._C`, CUDA tensors its kernels when the build has them, and any other tensor
torch operations. All three give the same bits: sums are made of single FP32 operations in a stated order, and a NaN
result is the one canonical NaN of its type (bf16 0x7FC0, fp16 0x7E00, fp32 0x7FC00000).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._native import _C, ELEMENT_TYPES, current_stream
from .errors import ConfigError

__all__ = ["gather_rows", "reduce_rows", "round_fp32", "row_major"]

_INDEX_DTYPES = (torch.int32, torch.int64)
_CANONICAL_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# Columns whose addresses travel inside a kernel's arguments; more are summed by torch operations.
_MAX_KERNEL_COLUMNS = 128


def describe(tensor: torch.Tensor) -> str:
    """A tensor in words, for error messages."""
    name = str(tensor.dtype).removeprefix("torch.")
    strides = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
    return f"{name} {list(tensor.shape)}{strides} on {tensor.device}"


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the strides of a fresh one, so that it can be viewed as bytes.

    `contiguous()` alone does not do: a dimension of size 1 counts as contiguous with any stride.
    """
    if tensor.dim() == 0 or tensor.stride(-1) == 1:
        return tensor.contiguous()
    return tensor.clone(memory_format=torch.contiguous_format)


def use_kernels(tensor: torch.Tensor) -> bool:
    """Whether CUDA kernels serve this tensor."""
    return tensor.is_cuda and _C.has_cuda


def _check_rows(name: str, value: torch.Tensor, operation: str) -> None:
    if value.dim() != 2 or (value.shape[1] > 1 and value.stride(1) != 1):
        raise ConfigError(
            f"{operation}: {name} is {describe(value)}; expected [rows, width] with contiguous rows "
            "(call .contiguous() first)"
        )


def gather_rows(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Copies rows of `x` in the order of `index`.

    Rows are moved as bytes, never through a float conversion, so every bit pattern arrives as it left.

    Args:
        x: [T, W] of any dtype; rows contiguous, the row stride may exceed W.
        index: [n] int32 or int64, each in [0, T). On CUDA the values are not read by the host: a row whose index lies
            outside becomes zero bytes.
        out: [n, W] of x's dtype and device with contiguous rows, not overlapping x; allocated when None.

    Returns:
        out, [n, W].

    Raises:
        ConfigError: wrong shape, dtype, device or stride, or (on the CPU) an index outside [0, T).
    """
    _check_rows("x", x, "gather_rows")
    if index.dim() != 1 or index.dtype not in _INDEX_DTYPES or index.device != x.device:
        raise ConfigError(
            f"gather_rows: index is {describe(index)}; expected 1-D int32 or int64 on {x.device}, where x is"
        )
    num_rows, width = index.shape[0], x.shape[1]
    if out is None:
        out = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    else:
        if tuple(out.shape) != (num_rows, width) or out.dtype != x.dtype or out.device != x.device:
            raise ConfigError(
                f"gather_rows: out is {describe(out)}; expected {x.dtype} {[num_rows, width]} on {x.device}"
            )
        _check_rows("out", out, "gather_rows")
    if num_rows == 0 or width == 0:
        return out
    kernels = use_kernels(x)
    if x.device.type != "cpu" and not kernels:
        out.view(torch.uint8).copy_(x.view(torch.uint8).index_select(0, index))
        return out
    index = index.contiguous()
    size = x.element_size()
    arguments = (
        x.data_ptr(),
        x.shape[0],
        x.stride(0) * size,
        index.data_ptr(),
        index.dtype == torch.int64,
        num_rows,
        width * size,
        out.data_ptr(),
        out.stride(0) * size,
    )
    if kernels:
        with torch.cuda.device(x.device):
            _C.cuda_gather_rows(*arguments, current_stream(x.device))
        return out
    bad = _C.gather_rows(*arguments)
    if bad >= 0:
        raise ConfigError(
            f"gather_rows: index[{bad}] is {int(index[bad])}; expected 0 to {x.shape[0] - 1}, since x has "
            f"{x.shape[0]} rows"
        )
    return out


def _check_sum(
    parts: Sequence[torch.Tensor],
    slots: torch.Tensor,
    weights: torch.Tensor | None,
    bias: Sequence[torch.Tensor],
    round_every: int,
) -> None:
    if slots.dim() != 2 or slots.dtype != torch.int32:
        raise ConfigError(f"reduce_rows: slots is {describe(slots)}; expected int32 [T, P]")
    num_tokens, num_columns = slots.shape
    if not parts or (len(parts) != 1 and len(parts) != num_columns):
        raise ConfigError(
            f"reduce_rows: {len(parts)} parts for slots of {num_columns} columns; expected one part a column, or a "
            "single one for all"
        )
    dtype, device, hidden = parts[0].dtype, parts[0].device, parts[0].shape[-1]
    if dtype not in ELEMENT_TYPES:
        raise ConfigError(f"reduce_rows: parts are {dtype}; expected bfloat16, float16 or float32")
    if slots.device != device:
        raise ConfigError(f"reduce_rows: slots is on {slots.device}, parts are on {device}; expected one device")
    for name, group in (("part", parts), ("bias", bias)):
        for tensor in group:
            _check_rows(name, tensor, "reduce_rows")
            if tensor.dtype != dtype or tensor.device != device or tensor.shape[1] != hidden:
                raise ConfigError(
                    f"reduce_rows: a {name} is {describe(tensor)}; expected {dtype} [rows, {hidden}] on {device}, "
                    "as the first part is"
                )
    for tensor in bias:
        if tensor.shape[0] != num_tokens:
            raise ConfigError(f"reduce_rows: a bias is {describe(tensor)}; expected {num_tokens} rows, one a token")
    if weights is not None and (
        tuple(weights.shape) != (num_tokens, num_columns) or weights.dtype != torch.float32 or weights.device != device
    ):
        raise ConfigError(
            f"reduce_rows: weights is {describe(weights)}; expected float32 {[num_tokens, num_columns]} on {device}"
        )
    if round_every < 0:
        raise ConfigError(f"reduce_rows: round_every is {round_every}; expected 0 or a number of columns")


def round_fp32(value: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """FP32 rounded (nearest even) to bf16, fp16 or fp32, every NaN as the type's canonical one.

    Devices and instruction sets disagree about the payload of a NaN; this is what makes results comparable by bits.
    """
    result = torch.empty_like(value, dtype=dtype) if out is None else out
    result.copy_(value)
    result.view(_BITS[dtype]).masked_fill_(value.isnan(), _CANONICAL_NAN[dtype])
    return result


def _reduce_with_torch(
    parts: Sequence[torch.Tensor],
    slots: torch.Tensor,
    weights: torch.Tensor | None,
    bias: Sequence[torch.Tensor],
    round_every: int,
    out: torch.Tensor,
) -> torch.Tensor:
    num_tokens, num_columns = slots.shape
    hidden = out.shape[1]
    total = torch.zeros((num_tokens, hidden), dtype=torch.float32, device=out.device)
    for tensor in bias:
        total = total + tensor.float()
    partial = torch.zeros_like(total) if round_every else total
    for column in range(num_columns):
        part = parts[column] if len(parts) > 1 else parts[0]
        slot = slots[:, column]
        if part.shape[0]:
            rows = part.index_select(0, slot.clamp(min=0)).float()
            if weights is not None:
                rows = rows * weights[:, column : column + 1]
            partial = torch.where((slot >= 0).unsqueeze(1), partial + rows, partial)
        if round_every and ((column + 1) % round_every == 0 or column + 1 == num_columns):
            # An empty group's partial is +0, and no sum that started at +0 is ever -0: adding it changes no bit.
            total = total + partial.to(out.dtype).float()
            partial = torch.zeros_like(total)
    return round_fp32(total if round_every else partial, out.dtype, out)


def reduce_rows(
    parts: Sequence[torch.Tensor],
    slots: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    bias: Sequence[torch.Tensor] = (),
    round_every: int = 0,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sums, for each token, the rows that its slots name.

    The accumulator starts at +0 in FP32. Each bias row is added in order, then each present column in order: the row
    widened to FP32, multiplied by its weight (rounded to FP32, never fused with the addition), and added. One rounding
    to nearest even at the end.

    Args:
        parts: one [n_p, H] tensor a column, or a single one that serves every column; bf16, fp16 or fp32, contiguous
            rows. The same tensor may stand for several columns.
        slots: [T, P] int32, the row of column p's part for each token, -1 for none. On CUDA the values are not read by
            the host: a slot past its part counts as absent.
        weights: [T, P] float32, a factor for each row.
        bias: tensors [T, H] of the parts' dtype, added first.
        round_every: 0, or the number of consecutive columns that form a group of a two-level sum: a group's columns
            are summed in FP32 from +0, rounded to the output dtype, and that value is added in FP32. A group with no
            present column adds nothing.
        out: [T, H] with contiguous rows, not overlapping an input; allocated when None.
        out_dtype: bf16, fp16 or fp32; the dtype of `out`, or else of the parts, when None.

    Returns:
        out, [T, H].

    Raises:
        ConfigError: wrong shape, dtype, device or stride, or (on the CPU) a slot outside its part.
    """
    _check_sum(parts, slots, weights, bias, round_every)
    num_tokens, num_columns = slots.shape
    first = parts[0]
    hidden = first.shape[1]
    if out_dtype is None:
        out_dtype = first.dtype if out is None else out.dtype
    if out_dtype not in ELEMENT_TYPES:
        raise ConfigError(f"reduce_rows: out_dtype is {out_dtype}; expected bfloat16, float16 or float32")
    if out is None:
        out = torch.empty((num_tokens, hidden), dtype=out_dtype, device=first.device)
    else:
        if tuple(out.shape) != (num_tokens, hidden) or out.dtype != out_dtype or out.device != first.device:
            raise ConfigError(
                f"reduce_rows: out is {describe(out)}; expected {out_dtype} {[num_tokens, hidden]} on {first.device}"
            )
        _check_rows("out", out, "reduce_rows")
    if num_tokens == 0 or hidden == 0:
        return out
    kernels = use_kernels(first) and num_columns <= _MAX_KERNEL_COLUMNS and len(bias) <= 2
    if first.device.type != "cpu" and not kernels:
        return _reduce_with_torch(parts, slots, weights, bias, round_every, out)
    size = first.element_size()
    columns = [(part.data_ptr(), part.shape[0], part.stride(0) * size) for part in parts]
    if len(columns) == 1:
        columns = columns * num_columns
    if num_columns > 1 and slots.stride(1) != 1:
        slots = slots.contiguous()
    if weights is not None and num_columns > 1 and weights.stride(1) != 1:
        weights = weights.contiguous()
    arguments = (
        columns,
        [(tensor.data_ptr(), num_tokens, tensor.stride(0) * size) for tensor in bias],
        slots.data_ptr(),
        slots.stride(0),
        0 if weights is None else weights.data_ptr(),
        0 if weights is None else weights.stride(0),
        num_tokens,
        hidden,
        ELEMENT_TYPES[first.dtype],
        ELEMENT_TYPES[out_dtype],
        round_every,
        out.data_ptr(),
        out.stride(0) * out.element_size(),
    )
    if kernels:
        with torch.cuda.device(first.device):
            _C.cuda_reduce_rows(*arguments, current_stream(first.device))
        return out
    bad = _C.reduce_rows(*arguments)
    if bad >= 0:
        token, column = divmod(bad, num_columns)
        rows = columns[column][1]
        raise ConfigError(
            f"reduce_rows: slots[{token}, {column}] is {int(slots[token, column])}; expected -1 or 0 to {rows - 1}, "
            f"since the part of that column has {rows} rows"
        )
    return out
