"""Argument checks of the public surface. Each raises `ConfigError` saying what was given and what is expected.

What only needs a copy (a non-contiguous tensor) is copied; what cannot be meant (a wrong shape) is refused. Scales are
taken as they lie: both engines read them by their strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .errors import ConfigError

#: x alone, or FP8 rows with one row of scales per token.
Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

TOPK_IDX_DTYPES = (torch.int64, torch.int32)
COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_DTYPES = (torch.float32, torch.int32)


def _shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def describe_value(value: Any) -> str:
    """Type and length of a value, for messages."""
    name = type(value).__name__
    return f"{name} of {len(value)}" if hasattr(value, "__len__") else name


def check_tensor(
    value: Any,
    name: str,
    operation: str,
    *,
    dim: int,
    dtypes: Sequence[torch.dtype] | None = None,
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Check one tensor argument and return it contiguous.

    Args:
        shape: expected sizes, None where any size will do.
        device: expected device.
    """
    if not isinstance(value, torch.Tensor):
        raise ConfigError(f"{operation}: {name} is a {type(value).__name__}; expected a {dim}-D torch.Tensor")
    if dtypes is not None and value.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ConfigError(f"{operation}: {name} is {_shape(value)}; expected dtype {names}")
    sizes = value.shape
    if len(sizes) != dim or not (shape is None or sizes == shape or _matches(shape, sizes)):
        wanted = [("any" if size is None else size) for size in (shape if shape is not None else [None] * dim)]
        raise ConfigError(f"{operation}: {name} is {_shape(value)}; expected shape {wanted}".replace("'", ""))
    if device is not None and value.device != device:
        raise ConfigError(
            f"{operation}: {name} is on {value.device} but x is on {device}; all tensors of a call share one device"
        )
    return value if value.is_contiguous() else value.contiguous()


def _matches(shape: Sequence[int | None], sizes: Sequence[int]) -> bool:
    return all(want is None or want == have for want, have in zip(shape, sizes, strict=True))


def _is_plain_matrix(value: Any) -> bool:
    """Whether `check_tensor` would return it as it is. A short cut for what nearly every call passes."""
    return isinstance(value, torch.Tensor) and len(value.shape) == 2 and value.is_contiguous()


def check_topk_idx(
    value: Any, operation: str, num_tokens: int | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """`topk_idx` int32 or int64 [T, K], K of at least 1."""
    topk_idx: torch.Tensor = value
    if num_tokens is not None or not (_is_plain_matrix(value) and value.dtype in TOPK_IDX_DTYPES):
        shape = None if num_tokens is None else (num_tokens, None)
        topk_idx = check_tensor(value, "topk_idx", operation, dim=2, dtypes=TOPK_IDX_DTYPES, shape=shape, device=device)
    if topk_idx.shape[1] == 0:
        raise ConfigError(f"{operation}: topk_idx is {_shape(topk_idx)}; expected [T, K] with K of at least 1")
    return topk_idx


def check_num_experts(value: Any, operation: str) -> int:
    """A positive number of experts."""
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"{operation}: num_experts is {value!r}; expected a positive integer")
    return value


def check_rows(x: Any, operation: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [T, H] of any dtype, or (x of a 1-byte dtype, scales [T, S] float32 or int32 of any strides).

    Returns:
        contiguous rows; and the scales with the strides given, None without.
    """
    scales: Any = None
    if isinstance(x, (tuple, list)):
        if len(x) != 2:
            raise ConfigError(f"{operation}: x is a {type(x).__name__} of {len(x)}; expected x or (x, scales)")
        x, scales = x
    rows = x if _is_plain_matrix(x) else check_tensor(x, "x", operation, dim=2)
    num_tokens, hidden = rows.shape
    if hidden == 0:
        raise ConfigError(f"{operation}: x is {_shape(rows)}; expected [T, H] with H of at least 1")
    if scales is None:
        return rows, None
    if rows.element_size() != 1:
        raise ConfigError(
            f"{operation}: x is {_shape(rows)} and comes with scales; expected a 1-byte dtype such as float8_e4m3fn "
            "(pass x alone to send it unscaled)"
        )
    if not (
        isinstance(scales, torch.Tensor)
        and scales.layout is torch.strided
        and len(scales.shape) == 2
        and scales.dtype in SCALE_DTYPES
        and scales.shape[0] == num_tokens
        and scales.device == rows.device
    ):
        scales = check_tensor(
            scales, "scales", operation, dim=2, dtypes=SCALE_DTYPES, shape=(num_tokens, None), device=rows.device
        )
    if scales.shape[1] == 0:
        raise ConfigError(f"{operation}: scales is {_shape(scales)}; expected [T, S] with S of at least 1")
    return rows, scales


def check_bias(bias: Any, operation: str, rows: torch.Tensor, num_tokens: int) -> list[torch.Tensor]:
    """None, one tensor, or a pair of tensors [T, H] of x's dtype."""
    if bias is None:
        return []
    given = list(bias) if isinstance(bias, (tuple, list)) else [bias]
    if len(given) > 2:
        raise ConfigError(f"{operation}: bias is a tuple of {len(given)}; expected None, one tensor, or two")
    shape = [num_tokens, rows.shape[1]]
    return [
        check_tensor(item, f"bias[{i}]", operation, dim=2, dtypes=[rows.dtype], shape=shape, device=rows.device)
        for i, item in enumerate(given)
        if item is not None
    ]


def check_count(value: Any, name: str, operation: str, *, minimum: int) -> int:
    """An integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{operation}: {name} is {value!r}; expected an integer of at least {minimum}")
    return value
