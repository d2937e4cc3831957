"""gather_rows and reduce_rows against references in numpy, and the C++ loops against the torch operations by bits."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deep_ep import ops
from deep_ep.errors import ConfigError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INT_OF = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(INT_OF[x.dtype])


def random_bits(shape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Every bit pattern is as likely: NaN of all payloads, infinities, subnormals."""
    info = torch.iinfo(INT_OF[dtype])
    return (
        torch.randint(info.min, info.max, shape, generator=generator, dtype=torch.int64).to(INT_OF[dtype]).view(dtype)
    )


# ---- gather ----


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.int32, torch.float64, torch.complex128],
)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16, 17, 64, 1000])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gather_moves_bytes(dtype, width, index_dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (11, width * size), dtype=torch.uint8)
    x = raw.view(dtype)
    index = torch.tensor([3, 3, 0, 10, 7], dtype=index_dtype)
    assert torch.equal(ops.gather_rows(x, index).view(torch.uint8), raw[index.long()])


def test_gather_keeps_nan_patterns():
    x = random_bits((50, 33), torch.bfloat16, torch.Generator().manual_seed(1))
    index = torch.arange(49, -1, -1)
    assert torch.equal(bits(ops.gather_rows(x, index)), bits(x.flip(0)))


def test_gather_strided_source_and_target():
    store = torch.arange(12 * 40).view(12, 40)
    target = torch.zeros(4, 60, dtype=torch.int64)
    index = torch.tensor([0, 5, 11, 5])
    out = ops.gather_rows(store[:, 3:20], index, target[:, 7:24])
    assert out.data_ptr() == target[:, 7:24].data_ptr()
    assert torch.equal(out, store[index][:, 3:20])
    assert target[:, :7].sum() == 0 and target[:, 24:].sum() == 0


@pytest.mark.parametrize("shape", [(0, 8, 0), (5, 0, 3), (5, 8, 0), (1, 1, 1)])
def test_gather_empty_and_single(shape):
    rows, width, count = shape
    x = torch.ones(rows, width)
    assert ops.gather_rows(x, torch.zeros(count, dtype=torch.int64)).shape == (count, width)


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
def test_gather_refuses_an_index_outside(bad):
    with pytest.raises(ConfigError, match=rf"index\[2\] is {bad}; expected 0 to 4"):
        ops.gather_rows(torch.ones(5, 4), torch.tensor([0, 4, bad, 1], dtype=torch.int32))


def test_gather_errors():
    x = torch.ones(5, 4)
    index = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ConfigError, match="contiguous rows"):
        ops.gather_rows(x.t(), index)
    with pytest.raises(ConfigError, match="int32 or int64"):
        ops.gather_rows(x, index.float())
    with pytest.raises(ConfigError, match="1-D"):
        ops.gather_rows(x, index.view(1, 2))
    with pytest.raises(ConfigError, match="out is"):
        ops.gather_rows(x, index, torch.empty(3, 4))
    with pytest.raises(ConfigError, match="out is"):
        ops.gather_rows(x, index, torch.empty(2, 4, dtype=torch.float64))
    with pytest.raises(ConfigError, match="expected \\[rows, width\\]"):
        ops.gather_rows(x[0], index)


# ---- reduce ----


def reference_sum(parts, slots, weights, bias, round_every, out_dtype):
    """One token and one addition at a time, in numpy FP32."""
    num_tokens, num_columns = slots.shape
    hidden = parts[0].shape[1]

    def round_to(v):
        return torch.from_numpy(v).to(out_dtype)

    out = torch.empty(num_tokens, hidden, dtype=out_dtype)
    with np.errstate(all="ignore"):
        for token in range(num_tokens):
            total = np.zeros(hidden, dtype=np.float32)
            for tensor in bias:
                total = total + tensor[token].float().numpy()
            group = np.zeros(hidden, dtype=np.float32)
            for column in range(num_columns):
                part = parts[column if len(parts) > 1 else 0]
                slot = int(slots[token, column])
                if slot >= 0:
                    row = part[slot].float().numpy()
                    if weights is not None:
                        row = row * np.float32(weights[token, column].item())
                    if round_every:
                        group = group + row
                    else:
                        total = total + row
                if round_every and ((column + 1) % round_every == 0 or column + 1 == num_columns):
                    total = total + round_to(group).float().numpy()
                    group = np.zeros(hidden, dtype=np.float32)
            out[token] = round_to(total)
    return out


def assert_same_sum(got: torch.Tensor, want: torch.Tensor):
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(bits(got)[~nan], bits(want)[~nan])
    canonical = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}[got.dtype]
    assert (bits(got)[nan] == canonical).all()


@dataclass
class Sum:
    tokens: int = 5
    columns: int = 4
    hidden: int = 70
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype = torch.bfloat16
    weighted: bool = False
    biases: int = 0
    round_every: int = 0
    one_part: bool = False
    patterns: bool = False
    seed: int = 0

    def check(self):
        generator = torch.Generator().manual_seed(self.seed)
        make = (
            (lambda *shape: random_bits(shape, self.dtype, generator))
            if self.patterns
            else (lambda *shape: torch.randn(*shape, generator=generator).to(self.dtype))
        )
        rows = [int(torch.randint(0, 9, (1,), generator=generator)) for _ in range(self.columns)]
        if self.one_part:
            rows = rows[:1] or [3]
        parts = [make(n, self.hidden) for n in rows] or [make(3, self.hidden)]
        limits = [parts[c if len(parts) > 1 else 0].shape[0] for c in range(self.columns)]
        slots = torch.empty(self.tokens, self.columns, dtype=torch.int32)
        for column, limit in enumerate(limits):
            slots[:, column] = torch.randint(-1, max(limit, 0), (self.tokens,), generator=generator)
        weights = torch.randn(self.tokens, self.columns, generator=generator) if self.weighted else None
        bias = tuple(make(self.tokens, self.hidden) for _ in range(self.biases))
        options = dict(weights=weights, bias=bias, round_every=self.round_every, out_dtype=self.out_dtype)
        got = ops.reduce_rows(parts, slots, **options)
        want = reference_sum(parts, slots, weights, bias, self.round_every, self.out_dtype)
        assert_same_sum(got, want)
        with_torch = torch.empty(self.tokens, self.hidden, dtype=self.out_dtype)
        if self.tokens and self.hidden:
            ops._reduce_with_torch(parts, slots, weights, bias, self.round_every, with_torch)
            assert torch.equal(bits(got), bits(with_torch))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("round_every", [0, 3])
def test_sum_of_all_types(dtype, out_dtype, round_every):
    for seed, patterns in enumerate((False, True)):
        Sum(
            dtype=dtype,
            out_dtype=out_dtype,
            columns=7,
            weighted=True,
            biases=2,
            round_every=round_every,
            patterns=patterns,
            seed=seed,
        ).check()


@settings(max_examples=120, deadline=None)
@given(
    st.builds(
        Sum,
        tokens=st.sampled_from([0, 1, 3, 8]),
        columns=st.integers(0, 17),
        hidden=st.sampled_from([0, 1, 7, 16, 63, 64, 65, 128, 200, 515]),
        dtype=st.sampled_from(FLOATS),
        out_dtype=st.sampled_from(FLOATS),
        weighted=st.booleans(),
        biases=st.integers(0, 3),
        round_every=st.integers(0, 5),
        one_part=st.booleans(),
        patterns=st.booleans(),
        seed=st.integers(0, 1000),
    )
)
def test_sum_of_any_shape(case):
    if case.columns == 0:
        case.one_part = True
    case.check()


def test_sum_is_not_fused_and_in_order():
    # 1 + 2^-24 - 1 depends on the order; (1 + 2^-12)^2 - 1 on whether the product is rounded first.
    x = torch.tensor([[1.0], [2.0**-24], [-1.0], [1 + 2.0**-12]])
    slots = torch.tensor([[0, 1, 2], [0, 2, 1]], dtype=torch.int32)
    assert ops.reduce_rows([x], slots).flatten().tolist() == [0.0, 2.0**-24]
    weights = torch.tensor([[1.0, 1 + 2.0**-12]])
    total = ops.reduce_rows([x], torch.tensor([[2, 3]], dtype=torch.int32), weights=weights)
    assert total.item() == 2.0**-11  # the fused result would be 2^-11 + 2^-24


def test_a_two_level_sum_rounds_each_group():
    x = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    slots = torch.tensor([[0, 1, 2, -1]], dtype=torch.int32)
    assert ops.reduce_rows([x], slots).item() == 258.0
    assert ops.reduce_rows([x], slots, round_every=2).item() == 256.0  # 257 rounds to 256, then 257 again


def test_nothing_present_is_positive_zero():
    x = torch.full((2, 40), -0.0, dtype=torch.bfloat16)
    slots = torch.tensor([[-1, -1], [0, 1]], dtype=torch.int32)
    assert (bits(ops.reduce_rows([x], slots)) == 0).all()


def test_sum_into_strided_rows():
    x = torch.randn(6, 90).bfloat16()
    store = torch.zeros(3, 100, dtype=torch.bfloat16)
    slots = torch.tensor([[0, 1], [2, 3], [4, -1]], dtype=torch.int32)
    out = ops.reduce_rows([x[:, 5:70]], slots, out=store[:, 10:75])
    assert torch.equal(out, ops.reduce_rows([x[:, 5:70].contiguous()], slots))
    assert store[:, :10].abs().sum() == 0 and store[:, 75:].abs().sum() == 0
    spread = torch.full((3, 4), -1, dtype=torch.int32)
    spread[:, ::2] = slots
    assert torch.equal(out, ops.reduce_rows([x[:, 5:70]], spread[:, ::2]))


def test_big_sum_uses_threads_and_keeps_the_bits():
    x = torch.randn(3000, 1024).bfloat16()
    slots = torch.randint(-1, 3000, (1000, 8), dtype=torch.int32)
    got = ops.reduce_rows([x], slots)
    want = torch.empty_like(got)
    ops._reduce_with_torch([x], slots, None, (), 0, want)
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize(("value", "part_rows"), [(5, 5), (-2, 5), (0, 0)])
def test_sum_refuses_a_slot_outside(value, part_rows):
    slots = torch.tensor([[0, -1], [0, value]], dtype=torch.int32)
    parts = [torch.ones(2, 4), torch.ones(part_rows, 4)]
    with pytest.raises(ConfigError, match=rf"slots\[1, 1\] is {value}; .* {part_rows} rows"):
        ops.reduce_rows(parts, slots)


def test_sum_errors():
    x = torch.ones(3, 8, dtype=torch.bfloat16)
    slots = torch.zeros(2, 2, dtype=torch.int32)
    cases = {
        "slots is": dict(parts=[x], slots=slots.long()),
        "3 parts": dict(parts=[x, x, x], slots=slots),
        "0 parts": dict(parts=[], slots=slots),
        "expected bfloat16, float16 or float32": dict(parts=[x.double()], slots=slots),
        "a part is": dict(parts=[x, x.float()], slots=slots),
        "contiguous rows": dict(parts=[torch.ones(8, 3).t()], slots=slots),
        "a bias is": dict(parts=[x], slots=slots, bias=(x[:, :4],)),
        "2 rows, one a token": dict(parts=[x], slots=slots, bias=(x,)),
        "weights is": dict(parts=[x], slots=slots, weights=torch.ones(2, 3)),
        "round_every": dict(parts=[x], slots=slots, round_every=-1),
        "out is": dict(parts=[x], slots=slots, out=torch.empty(2, 9)),
        "out_dtype": dict(parts=[x], slots=slots, out_dtype=torch.int32),
    }
    for message, arguments in cases.items():
        with pytest.raises(ConfigError, match=message):
            ops.reduce_rows(arguments.pop("parts"), arguments.pop("slots"), **arguments)
