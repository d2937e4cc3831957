"""FP8 against a reference in numpy float32 with its own E4M3 rounding, and the C++ loops against torch operations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deep_ep import fp8
from deep_ep.errors import ConfigError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FORMATS = ("fp32", "pow2", "ue8m0")
INT_OF = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
# The 127 magnitudes of E4M3 (1 sign, 4 exponent and 3 mantissa bits, bias 7, no infinity) in order.
MAGNITUDES = np.array([(c & 7) * 2.0**-9 if c < 8 else (8 + (c & 7)) * 2.0 ** ((c >> 3) - 10) for c in range(127)])


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def reference_e4m3(v: np.ndarray) -> np.ndarray:
    """Nearest magnitude by distance in float64 (exact), ties to the even code, saturating."""
    magnitude = np.minimum(np.abs(v.astype(np.float64)), 448.0)
    upper = np.searchsorted(MAGNITUDES, magnitude).clip(0, 126)
    lower = (upper - 1).clip(0)
    below, above = magnitude - MAGNITUDES[lower], MAGNITUDES[upper] - magnitude
    code = np.where((below < above) | ((below == above) & (lower % 2 == 0)), lower, upper)
    code = code | np.where(np.signbit(v), 0x80, 0)
    return np.where(np.isnan(v), 0x7F, code).astype(np.uint8)


def reference_quantize(x: torch.Tensor, scale_format: str):
    """(codes [T, H], scales float32 [T, S]) of x [T, H]."""
    values = x.float().numpy()
    tokens, hidden = values.shape
    tiles = -(-hidden // 128)
    codes, scales = np.zeros((tokens, hidden), np.uint8), np.zeros((tokens, tiles), np.float32)
    with np.errstate(all="ignore"):
        for token in range(tokens):
            for tile in range(tiles):
                part = values[token, tile * 128 : (tile + 1) * 128]
                known = np.abs(part[~np.isnan(part)])
                amax = np.float32(max(known.max(initial=0), np.float32(1e-4)))
                scale, inverse = amax / np.float32(448), np.float32(448) / amax
                if scale_format != "fp32":
                    mantissa, exponent = np.frexp(scale)
                    if np.isfinite(scale):
                        scale = np.float32(2.0 ** (exponent - (mantissa == 0.5)))
                    inverse = np.float32(1) / scale
                scales[token, tile] = scale
                codes[token, tile * 128 : (tile + 1) * 128] = reference_e4m3(part * inverse)
    return codes, scales


def reference_pack(scales: np.ndarray) -> np.ndarray:
    tokens, tiles = scales.shape
    words = np.zeros((tokens, -(-tiles // 4)), np.int64)
    for tile in range(tiles):
        byte = np.where(np.isinf(scales[:, tile]), 255, np.frexp(scales[:, tile])[1] + 126).astype(np.int64)
        words[:, tile // 4] |= byte << (8 * (tile % 4))
    return words.astype(np.uint32).view(np.int32)


def hard_values(shape, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal values, wild magnitudes, E4M3 ties, subnormals, zeros of both signs, and in some rows NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float32)
    kind = torch.randint(0, 8, shape, generator=generator)
    x = torch.where(kind == 1, x * torch.randn(shape, generator=generator).mul(20).exp(), x)
    ties = torch.from_numpy((MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2).float()
    picked = ties[torch.randint(0, len(ties), shape, generator=generator)]
    x = torch.where(kind == 2, picked, x)
    x = torch.where(kind == 3, torch.zeros(()), x)
    x = torch.where(kind == 4, -torch.zeros(()), x)
    x = torch.where(kind == 5, x * torch.finfo(dtype).smallest_normal / 8, x)
    if x.dim() and x.shape[0] > 2:
        x[0] = torch.where(kind[0] == 6, torch.nan, x[0])
        x[1] = torch.where((kind[1] == 7) & (x[1] > 1), torch.inf, x[1])
        x[2] = picked[2]
        x[2].reshape(-1)[:1] = 448.0  # scale exactly 1, so that every tie is a tie
    return x.to(dtype)


def torch_quantize(x, scale_format):
    rows = x.reshape(-1, x.shape[-1])
    q = torch.empty(rows.shape, dtype=torch.float8_e4m3fn)
    scales = fp8._new_scales(rows.shape[0], rows.shape[1], scale_format, False, x.device)
    fp8._quantize_rows_with_torch(rows, q, scales, scale_format)
    return q, scales


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("hidden", [1, 7, 16, 127, 128, 129, 512, 640, 1000])
def test_quantize_matches_reference(dtype, scale_format, hidden):
    x = hard_values((9, hidden), dtype, hidden)
    q, scales = fp8.quantize_1x128(x, scale_format=scale_format)
    codes, want_scales = reference_quantize(x, scale_format)
    assert torch.equal(bits(q), torch.from_numpy(codes))
    want = reference_pack(want_scales) if scale_format == "ue8m0" else want_scales
    assert scales.dtype == (torch.int32 if scale_format == "ue8m0" else torch.float32)
    assert torch.equal(bits(scales), bits(torch.from_numpy(want)))
    torch_q, torch_scales = torch_quantize(x, scale_format)
    assert torch.equal(bits(q), bits(torch_q)) and torch.equal(bits(scales), bits(torch_scales))


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("scale_format", FORMATS)
def test_dequantize_matches_reference(out_dtype, scale_format):
    # Every code in every position of a tile, with scales from tiny to huge.
    codes = torch.arange(256, dtype=torch.uint8).repeat(6, 3)[:, :700].contiguous()
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-130, 128, (6, 6), generator=generator)
    scales = torch.ldexp(torch.rand(6, 6, generator=generator) + 1, exponents)
    if scale_format != "fp32":
        scales = torch.ldexp(torch.ones(6, 6), exponents.clamp(-126, 127))
        scales[0, 0] = torch.inf
    given_scales = fp8.pack_ue8m0(scales) if scale_format == "ue8m0" else scales
    q = codes.view(torch.float8_e4m3fn)
    out = fp8.dequantize_1x128(q, given_scales, dtype=out_dtype)
    table = np.concatenate([MAGNITUDES, [np.nan]])
    values = table[codes.numpy() & 0x7F] * np.where(codes.numpy() & 0x80, -1.0, 1.0)
    wide = np.repeat(scales.numpy(), 128, axis=1)[:, :700]
    with np.errstate(all="ignore"):
        product = values.astype(np.float32) * wide
    want = torch.from_numpy(product).to(out_dtype)
    nan = want.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(bits(out)[~nan], bits(want)[~nan])
    assert len(bits(out)[nan].unique()) == 1
    with_torch = torch.empty_like(out)
    fp8._dequantize_rows_with_torch(q, scales, with_torch)
    assert torch.equal(bits(out), bits(with_torch))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 5, 130]),
    hidden=st.integers(1, 400),
    dtype=st.sampled_from(FLOATS),
    scale_format=st.sampled_from(FORMATS),
    seed=st.integers(0, 1000),
)
def test_loops_and_torch_agree_on_any_bits(tokens, hidden, dtype, scale_format, seed):
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(INT_OF[dtype])
    raw = torch.randint(info.min, info.max, (tokens, hidden), generator=generator, dtype=torch.int64)
    x = raw.to(INT_OF[dtype]).view(dtype)
    q, scales = fp8.quantize_1x128(x, scale_format=scale_format)
    assert q.shape == x.shape
    if tokens == 0:
        return
    torch_q, torch_scales = torch_quantize(x, scale_format)
    assert torch.equal(bits(q), bits(torch_q)) and torch.equal(bits(scales), bits(torch_scales))
    transposed_q, transposed_scales = fp8.quantize_transposed(x, scale_format=scale_format)
    want_q, want_scales = torch_quantize(x.t().contiguous(), scale_format)
    assert torch.equal(bits(transposed_q), bits(want_q))
    assert torch.equal(bits(transposed_scales), bits(want_scales))


@pytest.mark.parametrize("dtype", FLOATS)
def test_round_trip_error(dtype):
    x = torch.randn(64, 1024).to(dtype)
    for scale_format in FORMATS:
        y = fp8.dequantize_1x128(*fp8.quantize_1x128(x, scale_format=scale_format), dtype=torch.float32)
        amax = x.float().view(64, 8, 128).abs().amax(2).repeat_interleave(128, 1)
        bound = x.float().abs() * 2.0**-4 * 1.001 + amax / 448 * 2.0**-9  # half a step of 3 mantissa bits; subnormals
        assert ((y - x.float()).abs() <= bound).all()


@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 5, 130])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_column_major_scales(tokens, scale_format):
    x = hard_values((tokens, 700), torch.bfloat16, 1)
    q, scales = fp8.quantize_1x128(x, scale_format=scale_format)
    column_q, column_scales = fp8.quantize_1x128(x, scale_format=scale_format, column_major=True)
    assert torch.equal(bits(q), bits(column_q)) and torch.equal(bits(scales), bits(column_scales))
    assert column_scales.stride() == (1, max(-(-tokens // 4) * 4, 1))
    y = fp8.dequantize_1x128(q, scales)
    assert torch.equal(bits(y), bits(fp8.dequantize_1x128(column_q, column_scales)))


@pytest.mark.parametrize("shape", [(128,), (2, 3, 200), (0,), (0, 128), (3, 0), (2, 0, 256), (1, 1, 1, 5)])
def test_any_leading_shape(shape):
    x = torch.randn(shape).bfloat16()
    for scale_format in FORMATS:
        q, scales = fp8.quantize_1x128(x, scale_format=scale_format)
        tiles = -(-shape[-1] // 128)
        assert q.shape == x.shape
        assert scales.shape == (*shape[:-1], -(-tiles // 4) if scale_format == "ue8m0" else tiles)
        y = fp8.dequantize_1x128(q, scales)
        assert y.shape == x.shape and y.dtype == torch.bfloat16


def test_strided_inputs():
    store = hard_values((40, 3, 300), torch.bfloat16, 8)
    for x in (store[:, 1], store[::2, 0], store[:, :, ::2], store.transpose(0, 2), store[:, 0, 10:210].t()):
        q, scales = fp8.quantize_1x128(x)
        want_q, want_scales = fp8.quantize_1x128(x.contiguous())
        assert torch.equal(bits(q), bits(want_q)) and torch.equal(bits(scales), bits(want_scales))
        if x.dim() == 2:
            got = fp8.quantize_transposed(x)
            want = fp8.quantize_1x128(x.t().contiguous())
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True))
    q, scales = fp8.quantize_1x128(store[:, 0])
    wide_q = torch.cat([q.view(torch.uint8)] * 2, 1).view(torch.float8_e4m3fn)[:, :300]
    wide_scales = torch.stack([scales, scales], 2)[:, :, 0]
    assert torch.equal(bits(fp8.dequantize_1x128(wide_q, wide_scales)), bits(fp8.dequantize_1x128(q, scales)))


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 1300), (2, 2, 5, 140), (0, 128, 128)])
def test_packed_block_scales(shape):
    w = hard_values(shape, torch.bfloat16, 5)
    q, packed = fp8.quantize_128x128(w, scale_format="ue8m0")
    want_q, scales = fp8.quantize_128x128(w, scale_format="pow2")
    blocks = -(-shape[-1] // 128)
    assert packed.dtype == torch.int32 and packed.shape == (*scales.shape[:-1], -(-blocks // 4))
    exponents = packed.contiguous().numpy().view(np.uint8).astype(np.int32)
    assert np.array_equal(exponents[..., :blocks] << 23, scales.numpy().view(np.int32))
    assert not exponents[..., blocks:].any()
    assert torch.equal(bits(q), bits(want_q))
    assert torch.equal(bits(fp8.dequantize_128x128(q, packed)), bits(fp8.dequantize_128x128(want_q, scales)))


@pytest.mark.parametrize(
    "shape", [(128, 128), (1, 1), (130, 300), (3, 257, 128), (2, 2, 5, 140), (0, 128, 128), (2, 0, 7)]
)
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks(shape, scale_format, dtype):
    w = hard_values(shape, dtype, 4)
    q, scales = fp8.quantize_128x128(w, scale_format=scale_format)
    blocks = (-(-shape[-2] // 128), -(-shape[-1] // 128))
    assert q.shape == shape and scales.shape == (*shape[:-2], *blocks)
    y = fp8.dequantize_128x128(q, scales, dtype=torch.float32)
    if not w.numel():
        return
    matrices = w.reshape(-1, *shape[-2:])
    for m, matrix in enumerate(matrices):
        for i in range(blocks[0]):
            for j in range(blocks[1]):
                here = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                block = matrix[here].float()
                # One token of one tile has the block's scale if it holds the block's largest magnitude.
                top = torch.where(block.isnan(), 0.0, block.abs()).max()
                _, scale = reference_quantize(top.view(1, 1), scale_format)
                inverse = (
                    1 / scale if scale_format == "pow2" else np.float32(448) / np.maximum(top.numpy(), np.float32(1e-4))
                )
                with np.errstate(all="ignore"):
                    codes = reference_e4m3(block.numpy() * np.float32(inverse))
                assert np.array_equal(bits(q.view(-1, *shape[-2:])[m])[here].numpy(), codes)
                assert scales.view(-1, *blocks)[m, i, j].item() == scale.item()
    wide = scales.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]]
    assert torch.equal(y.nan_to_num(7.0), (q.float() * wide).nan_to_num(7.0))


def test_block_quantisation_of_strided_weights():
    w = torch.randn(3, 200, 260).bfloat16()
    for view in (w.transpose(1, 2), w[:, ::2], w[:, :, ::2]):
        got, want = fp8.quantize_128x128(view), fp8.quantize_128x128(view.contiguous())
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, want, strict=True))
    q, scales = fp8.quantize_128x128(w)
    assert torch.equal(
        fp8.dequantize_128x128(q.transpose(1, 2), scales.transpose(1, 2)),
        fp8.dequantize_128x128(q, scales).transpose(1, 2),
    )


def test_special_values():
    x = torch.zeros(4, 128)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, -torch.nan
    q, scales = fp8.quantize_1x128(x)
    codes = bits(q)
    assert codes[0, 0] == 0x7F and codes[2, 2] == 0x7F and codes[1, 1] == 0x7F
    assert codes.count_nonzero() == 3
    assert scales[1].item() == float("inf")
    assert scales[3].item() == np.float32(1e-4) / np.float32(448)
    assert fp8.dequantize_1x128(q, scales)[1].isnan().all()


def test_packing_is_little_endian():
    scales = torch.tensor([[1.0, 2.0, 0.5, 4.0, 8.0]])
    packed = fp8.pack_ue8m0(scales)
    assert packed.view(torch.uint8).tolist() == [[127, 128, 126, 129, 130, 0, 0, 0]]
    assert torch.equal(fp8.unpack_ue8m0(packed, 5), scales)


def test_errors():
    x = torch.ones(4, 256, dtype=torch.bfloat16)
    q, scales = fp8.quantize_1x128(x)
    cases = [
        ("expected bfloat16", lambda: fp8.quantize_1x128(x.double())),
        ("at least 1 dimensions", lambda: fp8.quantize_1x128(torch.ones(()))),
        ("scale_format is", lambda: fp8.quantize_1x128(x, scale_format="e8m0")),
        ("expected a 2-D x", lambda: fp8.quantize_1x128(x.view(2, 2, 256), column_major=True)),
        ("expected float8_e4m3fn", lambda: fp8.dequantize_1x128(x, scales)),
        (r"float32 \[4, 2\] or int32 \[4, 1\]", lambda: fp8.dequantize_1x128(q, scales[:, :1])),
        ("scales are", lambda: fp8.dequantize_1x128(q, scales.double())),
        ("dtype is", lambda: fp8.dequantize_1x128(q, scales, dtype=torch.float64)),
        ("at least 2 dimensions", lambda: fp8.quantize_128x128(x[0])),
        ("scale_format is", lambda: fp8.quantize_128x128(x, scale_format="e8m0")),
        (r"float32 \[1, 2\]", lambda: fp8.dequantize_128x128(q, scales)),
        (r"expected \[T, H\]", lambda: fp8.quantize_transposed(x.view(2, 2, 256))),
    ]
    for message, call in cases:
        with pytest.raises(ConfigError, match=message):
            call()
