"""Checks of low-latency arguments. Each raises `ConfigError` saying what was given and what is expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import checks, fp8
from .checks import describe_value
from .engines.cuda_ll import LowLatencyKernels
from .engines.portable_ll import TensorLayout
from .errors import ConfigError
from .requests import scale_format_of

#: Of the address of rows and scales that a dispatch writes to, in bytes.
ALIGNMENT = 16


def checked_scale_format(hidden: int, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> fp8.ScaleFormat | None:
    if use_fp8 and hidden % fp8.TILE != 0:
        raise ConfigError(
            f"low_latency_dispatch: hidden is {hidden}; FP8 needs a multiple of {fp8.TILE}. Pass use_fp8=False or pad x"
        )
    return scale_format_of("low_latency_dispatch", use_fp8, round_scale, use_ue8m0)


def check_finish(operation: str, async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ConfigError(f"{operation}: async_finish and return_recv_hook exclude each other; pick one")


def checked_weights(topk_weights: object, operation: str, shape: list[int], device: torch.device) -> torch.Tensor:
    return checks.check_tensor(
        topk_weights, "topk_weights", operation, dim=2, dtypes=[torch.float32], shape=shape, device=device
    )


def checked_out(
    out: object, layouts: list[TensorLayout], device: torch.device, operation: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and scales to write to, like those that a dispatch would return."""
    is_pair = len(layouts) == 2
    if is_pair and not (isinstance(out, (tuple, list)) and len(out) == 2):
        raise ConfigError(f"{operation}: out is a {describe_value(out)}; expected (rows, scales) of an FP8 dispatch")
    given: Sequence[Any] = out if isinstance(out, (tuple, list)) and is_pair else [out]
    names = ["out[0]", "out[1]"] if is_pair else ["out"]
    for each, name, (sizes, strides, dtype) in zip(given, names, layouts, strict=True):
        checks.check_tensor(each, name, operation, dim=3, dtypes=[dtype], shape=sizes, device=device)
        dims = [dim for dim, size in enumerate(sizes) if size != 1]
        if each.numel() > 0 and any(each.stride(dim) != strides[dim] for dim in dims):
            raise ConfigError(
                f"{operation}: {name} has strides {list(each.stride())}; expected {list(strides)}, as a dispatch "
                "without out returns it"
            )
        if each.data_ptr() % ALIGNMENT != 0:
            raise ConfigError(
                f"{operation}: {name} begins at address {each.data_ptr():#x}; expected a multiple of "
                f"{ALIGNMENT}, where new tensors begin"
            )
    return given[0], given[1] if is_pair else None


def check_by_source(recv_topk_idx: torch.Tensor, num_topk: int, sum_at_home: bool, operation: str) -> None:
    if recv_topk_idx.shape[2] != num_topk:
        raise ConfigError(
            f"{operation}: topk_idx has {num_topk} selections a token but the handle's dispatch had "
            f"{recv_topk_idx.shape[2]}; pass the topk_idx of that dispatch"
        )
    if sum_at_home:
        raise ConfigError(
            f"{operation}: sum_at_home=True, but the handle is of a dispatch with expert_major=False, whose rows are "
            "sums of several experts; leave sum_at_home out, or dispatch with expert_major=True"
        )


def check_device(x: torch.Tensor, kernels: LowLatencyKernels | None, operation: str) -> None:
    if kernels is not None and x.device != kernels.device:
        raise ConfigError(
            f"{operation}: x is on {x.device} but this buffer is on {kernels.device}; move x, or construct a buffer "
            "there"
        )


def check_handle_device(
    src_info: torch.Tensor, layout_range: torch.Tensor, device: torch.device, operation: str
) -> None:
    if src_info.device != device or layout_range.device != device:
        raise ConfigError(
            f"{operation}: the handle is on {src_info.device} and {layout_range.device} but x is on {device}; pass the "
            "handle that a dispatch of tensors on that device returned"
        )


def check_stats(
    value: torch.Tensor,
    name: str,
    operation: str,
    dtype: torch.dtype,
    size: int,
    device: torch.device | None = None,
) -> None:
    checked = checks.check_tensor(value, name, operation, dim=1, dtypes=[dtype], shape=[size], device=device)
    if checked is not value:
        raise ConfigError(f"{operation}: {name} has strides {list(value.stride())}; expected a contiguous tensor")
