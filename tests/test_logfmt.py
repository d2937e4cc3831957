"""LogFMT-10 against a reference of the format written in numpy, and its stated error bound."""

import numpy as np
import pytest
import torch

from deep_ep import logfmt
from deep_ep.errors import ConfigError

MAX_RELATIVE_ERROR = (2 ** (32 / 510) - 1) / (2 ** (32 / 510) + 1) * (1 + 2**-8) + 2**-8 + 1e-5


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16)


def chunk_size(hidden: int) -> int:
    return 1024 if hidden % 1024 == 0 else 512


def group_range(group: np.ndarray):
    magnitudes = np.abs(group)
    largest = magnitudes.max()
    smallest = magnitudes[magnitudes > 0].min() if (magnitudes > 0).any() else largest
    return largest, max(smallest, largest / 2.0**32)


def is_cast(chunk: np.ndarray) -> bool:
    for group in chunk.reshape(-1, 128):
        if not np.isfinite(group).all():
            return False
        largest, smallest = group_range(group)
        if not (largest < 1 and smallest < largest and largest >= 2.0**-90):
            return False
    return True


def reference(rows: torch.Tensor):
    """Decoded values in float64, NaN where the row travels plain, and the size of the payload."""
    x = rows.double().numpy()
    num_rows, hidden = x.shape
    expected = np.full_like(x, np.nan)
    if hidden % 512:
        return expected, num_rows * hidden * 2
    size = 0
    for row in range(num_rows):
        size += hidden // 128 * 4
        for begin in range(0, hidden, chunk_size(hidden)):
            chunk = x[row, begin : begin + chunk_size(hidden)]
            if not is_cast(chunk):
                size += 2 * chunk.size
                continue
            size += chunk.size * 10 // 8
            for at in range(0, chunk.size, 128):
                group = chunk[at : at + 128]
                largest, smallest = group_range(group)
                levels = np.concatenate([[0.0], np.geomspace(smallest, largest, 511)])
                nearest = np.abs(np.abs(group)[:, None] - levels[None, :]).argmin(axis=1)
                expected[row, begin + at : begin + at + 128] = np.copysign(levels[nearest], group)
    return expected, size


def make_rows(num_rows: int, hidden: int, seed: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, hidden, generator=generator) * 0.1
    return (x * (torch.randn(num_rows, hidden, generator=generator) * spread).exp()).clamp(-0.99, 0.99).bfloat16()


@pytest.mark.parametrize("hidden", [128, 512, 1024, 1536, 2048, 2560])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_matches_reference(hidden, spread):
    rows = make_rows(3, hidden, hidden, spread)
    rows[0, 5] = 0.0
    rows[1, 7] = -0.0
    rows[2, 130 % hidden] = 2.0  # a chunk that has to travel plain
    payload = logfmt.encode(rows)
    decoded = logfmt.decode(payload, 3, hidden)
    expected, size = reference(rows)
    assert payload.numel() == size
    plain = torch.from_numpy(np.isnan(expected))
    assert torch.equal(bits(decoded)[plain], bits(rows)[plain])
    cast = ~plain
    # Near the midpoint of two codes FP32 may choose the other one: a few values differ by one step, none by more.
    want = torch.from_numpy(expected)[cast].bfloat16()
    differs = bits(decoded)[cast] != bits(want)
    assert differs.float().mean() < 0.02 if cast.any() else True
    assert torch.allclose(decoded[cast].double(), want.double(), rtol=0.0445 + 2**-8, atol=0)


@pytest.mark.parametrize("spread", [0.0, 2.0, 20.0])
def test_error_bound(spread):
    rows = make_rows(16, 2048, 3, spread)
    decoded = logfmt.simulate(rows)
    x, y = rows.double(), decoded.double()
    groups = rows.double().abs().view(16, 16, 128)
    floor = (groups.amax(2) * 2.0**-32).repeat_interleave(128, 1)
    error = (x - y).abs()
    assert (error <= x.abs() * MAX_RELATIVE_ERROR + floor * (0.5 + 0.01)).all()
    assert torch.equal(rows.signbit(), decoded.signbit())


def test_bytes_on_the_wire():
    rows = make_rows(4, 7168, 1, 1.0)
    assert logfmt.encode(rows).numel() == 4 * (7168 * 10 // 8 + 7168 // 128 * 4)
    assert logfmt.max_encoded_bytes(4, 7168) == 4 * (2 * 7168 + 7168 // 32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.0, 3e38])
def test_large_and_special_chunks_travel_bit_for_bit(value):
    rows = make_rows(2, 1024, 5, 1.0)
    rows[1, 1000] = value
    decoded = logfmt.simulate(rows)
    assert torch.equal(bits(decoded[1]), bits(rows[1]))
    assert not torch.equal(bits(decoded[0]), bits(rows[0]))  # the other row was cast


def test_nan_payload_and_subnormals_survive_plain():
    rows = torch.zeros(1, 512, dtype=torch.bfloat16)
    rows.view(torch.int16)[0, :4] = torch.tensor([0x7FA5, -0x0001, 0x0001, -0x8000], dtype=torch.int32).to(torch.int16)
    assert torch.equal(bits(logfmt.simulate(rows)), bits(rows))


def test_constant_zero_and_tiny_groups_travel_plain():
    for value in (0.0, 0.25, 1e-30):
        rows = torch.full((1, 512), value, dtype=torch.bfloat16)
        rows[0, 0] *= 0.5  # only the first group could be cast
        assert torch.equal(bits(logfmt.simulate(rows)), bits(rows))


def test_values_far_below_the_maximum_become_zero():
    rows = torch.full((1, 512), 0.5, dtype=torch.bfloat16)
    rows[0, ::128] = 0.25
    rows[0, 1::128] = 2.0**-40
    rows[0, 2::128] = -(2.0**-40)
    decoded = logfmt.simulate(rows)
    assert (decoded[0, 1::128] == 0).all() and (decoded[0, 2::128] == 0).all()
    assert decoded[0, 2::128].signbit().all()


def test_payloads_concatenate():
    first, second = make_rows(3, 1024, 1, 1.0), make_rows(2, 1024, 2, 1.0)
    second[1, 3] = 9.0
    joined = torch.cat([logfmt.encode(first), logfmt.encode(second)])
    decoded = logfmt.decode(joined, 5, 1024)
    assert torch.equal(bits(decoded[:3]), bits(logfmt.simulate(first)))
    assert torch.equal(bits(decoded[3:]), bits(logfmt.simulate(second)))


def test_decoding_is_idempotent_on_the_extremes():
    rows = make_rows(8, 1024, 9, 1.0)
    groups, decoded = rows.view(8, 8, 128), logfmt.simulate(rows).view(8, 8, 128)
    assert torch.equal(groups.abs().amax(2), decoded.abs().amax(2))


@pytest.mark.parametrize("shape", [(0, 1024), (0, 100), (5, 0)])
def test_empty(shape):
    rows = torch.empty(shape, dtype=torch.bfloat16)
    assert logfmt.encode(rows).numel() == 0
    assert logfmt.simulate(rows).shape == rows.shape


def test_any_leading_shape_and_strides():
    rows = make_rows(6, 1024, 4, 1.0)
    assert torch.equal(logfmt.simulate(rows.view(2, 3, 1024)).view(6, 1024), logfmt.simulate(rows))
    wide = torch.cat([rows, rows], dim=1)[:, :1024]
    assert torch.equal(logfmt.encode(wide), logfmt.encode(rows))


def test_errors():
    rows = make_rows(2, 512, 1, 1.0)
    with pytest.raises(ConfigError, match="bfloat16"):
        logfmt.encode(rows.float())
    with pytest.raises(ConfigError, match="uint8"):
        logfmt.decode(rows, 2, 512)
    payload = logfmt.encode(rows)
    with pytest.raises(ConfigError, match="do not end with a row"):
        logfmt.decode(payload[:-1], 2, 512)
    with pytest.raises(ConfigError, match="hold 2 rows"):
        logfmt.decode(payload, 3, 512)
    with pytest.raises(ConfigError, match="at least 1"):
        logfmt.decode(payload, 2, 0)
