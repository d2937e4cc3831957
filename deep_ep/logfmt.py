"""LogFMT-10: bf16 rows at 10 bits a value, for the combine direction of low-latency mode.

A row is cut into chunks of 1,024 values (512 if 1,024 does not divide H) and each chunk into groups of 128. Every group
sends the largest magnitude and the smallest nonzero one, as bf16. Between them, once the smallest is raised to at
least max / 2^32, 511 magnitudes are spaced evenly in log2:

    step = (log2(max) - log2(min)) / 510         code k in 1..511 stands for 2^(log2(min) + (k - 1) * step)

Code 0 is zero, and the tenth bit is the sign. A value takes the code nearest to it on the linear scale; one at most
half the smallest magnitude becomes zero (it keeps its sign).

A chunk is sent so only if each of its groups has max < 1 and min < max; as min is compared after it was raised, and a
maximum below 2^-90 could not be divided by 2^32, max >= 2^-90 is asked for as well. Other chunks (NaN and infinity
among them) travel as the bf16 they are, bit for bit. Nothing else decides: a receiver reads the form from the
magnitudes. Rows whose H is not a multiple of 512 travel plain altogether, without magnitudes.

Error of a value v of a cast group, with r = 2^step (at most 2^(32 / 510) = 1.0445): |v' - v| <= (r - 1) / (r + 1) * |v|
for the code, at most 2.2 %, plus 2^-8 of it for the rounding to bf16; below min, at most min / 2.

Payload: rows one after the other without padding; the payloads of two sets of rows may be concatenated. A row is
H / 128 pairs (bf16 max, bf16 min), then its chunks, each 2 bytes a value or packed: four codes in five bytes, the first
in the lowest bits, so 160 bits for 16 values.
"""

from __future__ import annotations

import torch

from ._native import _C
from .errors import ConfigError
from .ops import describe

__all__ = ["decode", "encode", "max_encoded_bytes", "simulate"]


def max_encoded_bytes(num_rows: int, hidden: int) -> int:
    """Bytes that the payload of `num_rows` rows takes at most: 2 H + H / 32 a row (2 H if 512 does not divide H)."""
    return _C.logfmt_max_bytes(num_rows, hidden)


def encode(rows: torch.Tensor) -> torch.Tensor:
    """Encodes rows.

    Args:
        rows: [n, H] bf16, any strides. Rows of another device are encoded on the CPU.

    Returns:
        uint8, 1-D, on the device of `rows`: as many bytes as the rows need (H = 7168, all chunks cast: 9,184 a row
        instead of 14,336).

    Raises:
        ConfigError: another dtype or number of dimensions.
    """
    if rows.dtype != torch.bfloat16 or rows.dim() != 2:
        raise ConfigError(f"logfmt.encode: rows is {describe(rows)}; expected bfloat16 [n, H]")
    source = rows.detach().cpu().contiguous()
    num_rows, hidden = source.shape
    payload = torch.empty(max_encoded_bytes(num_rows, hidden), dtype=torch.uint8)
    used = _C.logfmt_encode(source.data_ptr(), num_rows, hidden, payload.data_ptr())
    return payload[:used].to(rows.device)


def decode(payload: torch.Tensor, num_rows: int, hidden: int) -> torch.Tensor:
    """Decodes what `encode` made, or several such payloads one after the other.

    Args:
        payload: uint8, 1-D, on any device.
        num_rows: n, rows that the payload holds.
        hidden: H of the rows.

    Returns:
        [n, H] bf16 on the device of `payload`.

    Raises:
        ConfigError: another dtype, or bytes that are not exactly n rows of this H.
    """
    if payload.dtype != torch.uint8 or payload.dim() != 1:
        raise ConfigError(f"logfmt.decode: payload is {describe(payload)}; expected 1-D uint8")
    if hidden <= 0 or num_rows < 0:
        raise ConfigError(f"logfmt.decode: {num_rows} rows of {hidden} channels; expected at least 0 of at least 1")
    source = payload.cpu().contiguous()
    found = _C.logfmt_count_rows(source.data_ptr(), source.numel(), hidden)
    if found != num_rows:
        holds = "do not end with a row" if found < 0 else f"hold {found} rows"
        raise ConfigError(
            f"logfmt.decode: {source.numel()} bytes {holds} of {hidden} channels; expected {num_rows} rows, as encode "
            "made them for this hidden size"
        )
    rows = torch.empty((num_rows, hidden), dtype=torch.bfloat16)
    _C.logfmt_decode(source.data_ptr(), num_rows, hidden, rows.data_ptr())
    return rows.to(payload.device)


def simulate(rows: torch.Tensor) -> torch.Tensor:
    """`decode(encode(rows))`: what a receiver would see. [..., H] bf16 to the same shape.

    Raises:
        ConfigError: another dtype, or a scalar.
    """
    if rows.dim() == 0 or rows.dtype != torch.bfloat16:
        raise ConfigError(f"logfmt.simulate: rows is {describe(rows)}; expected bfloat16 [..., H]")
    if rows.numel() == 0:
        return rows.clone()
    flat = rows.reshape(-1, rows.shape[-1])
    return decode(encode(flat), *flat.shape).view(rows.shape)
