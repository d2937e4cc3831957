"""FP8 payloads: E4M3 values (`torch.float8_e4m3fn`) under one scale per 1x128 tile or 128x128 block.

The rule, for every device and every caller (dispatch, the MoE layers, the kernels):

    amax    = largest |x| of the tile, NaN ignored, at least 1e-4
    scale   = amax / 448                                    one FP32 division
    inverse = 448 / amax                                    one FP32 division
    q       = E4M3(float(x) * inverse)                      FP32 product, nearest even, saturating at 448
    x'      = round(float(q) * scale)                       FP32 product, one rounding to the output dtype

With power-of-two scales ("pow2", and "ue8m0" which packs them), scale = 2^ceil(log2(amax / 448)), taken from the bits
of the FP32 quotient, and inverse = 1 / scale, which is exact. A NaN stays a NaN, written as one code (0x7F in E4M3, the
canonical quiet NaN elsewhere) since processors differ in NaN payloads. An infinite value makes its tile's scale
infinite: that value becomes NaN, the tile's others zero, and all of them NaN again once dequantised.

UE8M0 scales are biased exponents (2^(byte - 127)), four consecutive tiles to an int32, the first in the lowest byte;
bytes past the last tile are 0.

CPU tensors use the C++ loops, CUDA tensors the kernels when the build has them, other tensors torch operations; all
give the same bits.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from ._native import _C, ELEMENT_TYPES, SCALE_FORMATS, current_stream
from .errors import ConfigError
from .ops import describe, round_fp32, row_major, use_kernels

__all__ = [
    "E4M3_MAX",
    "TILE",
    "ScaleFormat",
    "dequantize_128x128",
    "dequantize_1x128",
    "pack_ue8m0",
    "quantize_128x128",
    "quantize_1x128",
    "quantize_transposed",
    "unpack_ue8m0",
]

TILE = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
ScaleFormat = Literal["fp32", "pow2", "ue8m0"]


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _check_values(operation: str, x: torch.Tensor, least_dim: int) -> None:
    if x.dtype not in ELEMENT_TYPES or x.dim() < least_dim:
        raise ConfigError(
            f"{operation}: x is {describe(x)}; expected bfloat16, float16 or float32 of at least {least_dim} dimensions"
        )


def _check_format(operation: str, scale_format: str) -> int:
    if scale_format not in SCALE_FORMATS:
        raise ConfigError(f'{operation}: scale_format is {scale_format!r}; expected "fp32", "pow2" or "ue8m0"')
    return SCALE_FORMATS[scale_format]


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., W] as [rows, W] with contiguous rows; a copy only where the strides leave no other way."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def scale_columns(channels: int, scale_format: str) -> tuple[torch.dtype, int]:
    """dtype and columns of the scales of rows with ``channels`` channels."""
    tiles = _ceil_div(channels, TILE)
    return (torch.int32, _ceil_div(tiles, 4)) if scale_format == "ue8m0" else (torch.float32, tiles)


def _new_scales(rows: int, channels: int, scale_format: str, column_major: bool, device: torch.device) -> torch.Tensor:
    dtype, columns = scale_columns(channels, scale_format)
    if not column_major:
        return torch.empty((rows, columns), dtype=dtype, device=device)
    # Grouped GEMM libraries load a tile's scales for four rows at a time: the pitch is a multiple of four rows (16
    # bytes). The padding is zeroed, since such a load reads it.
    pitch = _ceil_div(rows, 4) * 4
    return torch.zeros((columns, pitch), dtype=dtype, device=device).t()[:rows]


# ---- torch operations, for devices without loops or kernels of their own ----


def _tile_scales(amax: torch.Tensor, scale_format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, inverse), FP32, of tiles with these magnitudes."""
    amax = amax.clamp(min=AMAX_FLOOR)
    top = torch.full_like(amax, E4M3_MAX)
    scale = amax / top
    if scale_format == "fp32":
        return scale, top / amax
    exponent = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    scale = exponent.view(torch.float32)
    return scale, torch.ones_like(scale) / scale


def _to_e4m3(value: torch.Tensor) -> torch.Tensor:
    # torch's own cast has no saturation before 464; clamp keeps a NaN, whose sign is then dropped.
    codes = value.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    codes.view(torch.uint8).masked_fill_(value.isnan(), 0x7F)
    return codes


def _magnitudes(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), torch.zeros((), dtype=x.dtype, device=x.device), x.abs())


def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """Power-of-two scales [..., S] float32 as biased exponents, four to an int32: [..., ceil(S / 4)].

    Only the exponent field is kept; the caller guarantees that the scales are powers of two.
    """
    exponent = (scales.contiguous().view(torch.int32) >> 23) & 0xFF
    exponent = torch.nn.functional.pad(exponent, (0, -scales.shape[-1] % 4))
    return exponent.to(torch.uint8).contiguous().view(torch.int32)


def unpack_ue8m0(packed: torch.Tensor, tiles: int) -> torch.Tensor:
    """The float32 scales [..., tiles] of packed UE8M0 words [..., ceil(tiles / 4)]."""
    exponent = row_major(packed).view(torch.uint8)[..., :tiles].to(torch.int32)
    return (exponent << 23).view(torch.float32)


def _quantize_rows_with_torch(x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, scale_format: str) -> None:
    rows, channels = x.shape
    tiles = _ceil_div(channels, TILE)
    padded = torch.nn.functional.pad(x.float(), (0, tiles * TILE - channels)).view(rows, tiles, TILE)
    scale, inverse = _tile_scales(_magnitudes(padded).amax(dim=2), scale_format)
    q.copy_(_to_e4m3(padded * inverse.unsqueeze(2)).view(rows, tiles * TILE)[:, :channels])
    scales.copy_(pack_ue8m0(scale) if scale_format == "ue8m0" else scale)


def _dequantize_rows_with_torch(q: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    wide = scale.repeat_interleave(TILE, dim=1)[:, : q.shape[1]]
    round_fp32(q.float() * wide, out.dtype, out)


# ---- the public functions ----


def quantize_1x128(
    x: torch.Tensor, *, scale_format: ScaleFormat = "fp32", column_major: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises every run of 128 channels under a scale of its own.

    Args:
        x: [..., H] bf16, fp16 or fp32, any strides, any H (the last tile may be partial).
        scale_format: "fp32" (amax / 448), "pow2" (that, rounded up to a power of two) or "ue8m0" (the power of two as
            an exponent byte, four to an int32).
        column_major: lay the scales of a 2-D x out with strides (1, T rounded up to 4), as grouped GEMM libraries ask.

    Returns:
        q: [..., H] float8_e4m3fn, contiguous.
        scales: float32 [..., ceil(H / 128)], or int32 [..., ceil(ceil(H / 128) / 4)] for "ue8m0".

    Raises:
        ConfigError: another dtype, a scalar, an unknown scale format, or column_major with x not 2-D.
    """
    _check_values("quantize_1x128", x, 1)
    code = _check_format("quantize_1x128", scale_format)
    if column_major and x.dim() != 2:
        raise ConfigError(f"quantize_1x128: column_major with x {describe(x)}; expected a 2-D x")
    channels = x.shape[-1]
    rows = _as_rows(x)
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = _new_scales(rows.shape[0], channels, scale_format, column_major, x.device)
    if rows.numel():
        kernels = use_kernels(x)
        if x.device.type != "cpu" and not kernels:
            _quantize_rows_with_torch(rows, q.view(rows.shape), scales, scale_format)
        else:
            arguments = (
                rows.data_ptr(),
                rows.stride(0),
                ELEMENT_TYPES[x.dtype],
                rows.shape[0],
                channels,
                q.data_ptr(),
                channels,
                scales.data_ptr(),
                scales.stride(0),
                scales.stride(1),
                code,
            )
            if kernels:
                with torch.cuda.device(x.device):
                    _C.cuda_quantize_rows(*arguments, current_stream(x.device))
            else:
                _C.quantize_rows(*arguments)
    return q, scales if column_major else scales.view(*x.shape[:-1], scales.shape[1])


def _check_quantized(
    operation: str, q: torch.Tensor, scales: torch.Tensor, expected: dict[torch.dtype, tuple[int, ...]]
) -> None:
    if q.dtype != torch.float8_e4m3fn:
        raise ConfigError(f"{operation}: q is {describe(q)}; expected float8_e4m3fn")
    if scales.device != q.device or expected.get(scales.dtype) != tuple(scales.shape):
        wanted = " or ".join(f"{str(dtype).removeprefix('torch.')} {list(shape)}" for dtype, shape in expected.items())
        raise ConfigError(f"{operation}: scales are {describe(scales)}; expected {wanted} on {q.device}")


def _check_out_dtype(operation: str, dtype: torch.dtype) -> int:
    if dtype not in ELEMENT_TYPES:
        raise ConfigError(f"{operation}: dtype is {dtype}; expected bfloat16, float16 or float32")
    return ELEMENT_TYPES[dtype]


def dequantize_1x128(q: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The inverse of `quantize_1x128`: float(q) * scale in FP32, rounded once.

    Args:
        q: [..., H] float8_e4m3fn, any strides.
        scales: float32 [..., ceil(H / 128)] or packed int32 [..., ceil(ceil(H / 128) / 4)], any strides.
        dtype: bf16, fp16 or fp32.

    Returns:
        [..., H] of `dtype`, contiguous.

    Raises:
        ConfigError: dtypes, shapes or devices that do not fit.
    """
    code = _check_out_dtype("dequantize_1x128", dtype)
    if q.dim() == 0:
        raise ConfigError(f"dequantize_1x128: q is {describe(q)}; expected [..., H]")
    channels = q.shape[-1]
    tiles = _ceil_div(channels, TILE)
    lead = tuple(q.shape[:-1])
    _check_quantized(
        "dequantize_1x128",
        q,
        scales,
        {torch.float32: (*lead, tiles), torch.int32: (*lead, _ceil_div(tiles, 4))},
    )
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if not q.numel():
        return out
    rows = _as_rows(q)
    scale_rows = scales.reshape(rows.shape[0], scales.shape[-1])
    packed = scales.dtype == torch.int32
    kernels = use_kernels(q)
    if q.device.type != "cpu" and not kernels:
        scale = unpack_ue8m0(scale_rows, tiles) if packed else scale_rows
        _dequantize_rows_with_torch(rows, scale, out.view(rows.shape))
        return out
    source = (
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        channels,
        scale_rows.data_ptr(),
        scale_rows.stride(0),
        scale_rows.stride(1),
        packed,
    )
    target = (code, out.data_ptr(), channels)
    if kernels:
        with torch.cuda.device(q.device):
            _C.cuda_dequantize_rows(*source, *target, current_stream(q.device))
    else:
        _C.dequantize_rows(*source, 1, *target)
    return out


def quantize_128x128(w: torch.Tensor, *, scale_format: ScaleFormat = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises every 128x128 block of the last two dimensions (weights) under one scale.

    Args:
        w: [..., N, K] bf16, fp16 or fp32, any strides; blocks at the edges may be partial.
        scale_format: as for `quantize_1x128`.

    Returns:
        q: [..., N, K] float8_e4m3fn, contiguous.
        scales: float32 [..., ceil(N / 128), ceil(K / 128)], or for "ue8m0" int32 [..., ceil(N / 128),
            ceil(ceil(K / 128) / 4)], packed along K.

    Raises:
        ConfigError: another dtype, fewer than two dimensions, or an unknown scale format.
    """
    _check_values("quantize_128x128", w, 2)
    if _check_format("quantize_128x128", scale_format) == SCALE_FORMATS["ue8m0"]:
        q, scales = quantize_128x128(w, scale_format="pow2")
        return q, pack_ue8m0(scales)
    pow2 = scale_format == "pow2"
    num_rows, channels = w.shape[-2:]
    lead = w.shape[:-2]
    blocks = (_ceil_div(num_rows, TILE), _ceil_div(channels, TILE))
    q = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    scales = torch.empty((*lead, *blocks), dtype=torch.float32, device=w.device)
    if not w.numel():
        return q, scales
    matrices = w.reshape(-1, num_rows, channels)
    if w.device.type != "cpu":
        pad = (0, blocks[1] * TILE - channels, 0, blocks[0] * TILE - num_rows)
        tiled = torch.nn.functional.pad(matrices.float(), pad).view(-1, blocks[0], TILE, blocks[1], TILE)
        scale, inverse = _tile_scales(_magnitudes(tiled).amax(dim=(2, 4)), scale_format)
        codes = _to_e4m3(tiled * inverse[:, :, None, :, None])
        codes = codes.view(-1, blocks[0] * TILE, blocks[1] * TILE)[:, :num_rows, :channels]
        q.view(-1, num_rows, channels).copy_(codes)
        scales.copy_(scale.view(scales.shape))
        return q, scales
    if channels > 1 and matrices.stride(2) != 1:
        matrices = matrices.contiguous()
    for matrix, q_matrix, scale_matrix in zip(
        matrices, q.view(-1, num_rows, channels), scales.view(-1, *blocks), strict=True
    ):
        _C.quantize_blocks(
            matrix.data_ptr(),
            matrix.stride(0),
            ELEMENT_TYPES[w.dtype],
            num_rows,
            channels,
            pow2,
            q_matrix.data_ptr(),
            scale_matrix.data_ptr(),
        )
    return q, scales


def dequantize_128x128(q: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The inverse of `quantize_128x128`.

    Args:
        q: [..., N, K] float8_e4m3fn, any strides.
        scales: float32 [..., ceil(N / 128), ceil(K / 128)] or packed int32, any strides.
        dtype: bf16, fp16 or fp32.

    Returns:
        [..., N, K] of `dtype`, contiguous.

    Raises:
        ConfigError: dtypes, shapes or devices that do not fit.
    """
    code = _check_out_dtype("dequantize_128x128", dtype)
    if q.dim() < 2:
        raise ConfigError(f"dequantize_128x128: q is {describe(q)}; expected [..., N, K]")
    num_rows, channels = q.shape[-2:]
    blocks = (_ceil_div(num_rows, TILE), _ceil_div(channels, TILE))
    lead = q.shape[:-2]
    packed = (*lead, blocks[0], _ceil_div(blocks[1], 4))
    _check_quantized("dequantize_128x128", q, scales, {torch.float32: (*lead, *blocks), torch.int32: packed})
    if scales.dtype == torch.int32:
        scales = unpack_ue8m0(scales, blocks[1])
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    if not q.numel():
        return out
    q_matrices, out_matrices = q.reshape(-1, num_rows, channels), out.view(-1, num_rows, channels)
    scale_matrices = scales.reshape(-1, *blocks)
    if q.device.type != "cpu":
        wide = scale_matrices.repeat_interleave(TILE, dim=1)[:, :num_rows]
        _dequantize_rows_with_torch(
            q_matrices.reshape(-1, channels), wide.reshape(-1, blocks[1]), out_matrices.view(-1, channels)
        )
        return out
    if channels > 1 and q_matrices.stride(2) != 1:
        q_matrices = q_matrices.contiguous()
    for q_matrix, scale_matrix, out_matrix in zip(q_matrices, scale_matrices, out_matrices, strict=True):
        _C.dequantize_rows(
            q_matrix.data_ptr(),
            q_matrix.stride(0),
            num_rows,
            channels,
            scale_matrix.data_ptr(),
            scale_matrix.stride(0),
            scale_matrix.stride(1),
            False,
            TILE,
            code,
            out_matrix.data_ptr(),
            channels,
        )
    return out


def quantize_transposed(
    x: torch.Tensor, *, scale_format: ScaleFormat = "fp32", column_major: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises the transpose of x: 1x128 tiles along tokens.

    The weight gradient of a linear layer contracts over tokens, so its operands need their tiles along tokens. Gives
    the bits of `quantize_1x128(x.t())` without making the transpose.

    Args:
        x: [T, H] bf16, fp16 or fp32, any strides.
        scale_format, column_major: as for `quantize_1x128`; the rows are x's channels.

    Returns:
        q: [H, T] float8_e4m3fn, contiguous.
        scales: float32 [H, ceil(T / 128)], or int32 [H, ceil(ceil(T / 128) / 4)] for "ue8m0".

    Raises:
        ConfigError: x not 2-D or of another dtype, or an unknown scale format.
    """
    _check_values("quantize_transposed", x, 2)
    code = _check_format("quantize_transposed", scale_format)
    if x.dim() != 2:
        raise ConfigError(f"quantize_transposed: x is {describe(x)}; expected [T, H]")
    if x.device.type != "cpu" or not x.numel():
        return quantize_1x128(x.t(), scale_format=scale_format, column_major=column_major)
    rows = _as_rows(x)
    num_tokens, channels = rows.shape
    q = torch.empty((channels, num_tokens), dtype=torch.float8_e4m3fn)
    scales = _new_scales(channels, num_tokens, scale_format, column_major, x.device)
    _C.quantize_transposed(
        rows.data_ptr(),
        rows.stride(0),
        ELEMENT_TYPES[x.dtype],
        num_tokens,
        channels,
        q.data_ptr(),
        scales.data_ptr(),
        scales.stride(0),
        scales.stride(1),
        code,
    )
    return q, scales
