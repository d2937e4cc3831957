"""Grouped experts against an independent dense formula, and what their FP8 really is."""

from __future__ import annotations

import copy

import pytest
import torch

from deep_ep import fp8
from deep_ep.errors import ConfigError
from deep_ep.nn import ExpertRows, GroupedMLP, fp8_gemm
from deep_ep.nn.dispatched import make_carrier

# bf16 rounds with a relative error of at most 2^-9; some six roundings lie between input and output, and errors of
# different elements average out in a norm.
BF16_TOLERANCE = 6e-3
# E4M3 has 3 mantissa bits: at most 2^-4, about 2.6 % in the mean, per operand. Two operands a product and three
# products in a row give roughly sqrt(6) * 2.6 %.
FP8_TOLERANCE = 8e-2
TOLERANCE = {"bf16": BF16_TOLERANCE, "fp8": FP8_TOLERANCE}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def grouped_rows(counts, hidden, *, alignment=1, seed=0, scale=1.0):
    """bf16 rows for experts with these counts, zero rows in the padding; and the mask of real rows."""
    sizes = [-(-c // alignment) * alignment for c in counts]
    starts = [sum(sizes[:e]) for e in range(len(sizes))]
    g = torch.Generator().manual_seed(seed)
    x = torch.zeros((sum(sizes), hidden))
    real = torch.zeros(sum(sizes), dtype=torch.bool)
    for start, count in zip(starts, counts, strict=True):
        x[start : start + count] = torch.randn((count, hidden), generator=g) * scale
        real[start : start + count] = True
    leaf = x.bfloat16().requires_grad_()
    return ExpertRows(leaf, None, leaf, tuple(counts), tuple(starts), tuple(sizes)), real


def dense_reference(x, w13, w2, starts, counts, grad):
    """Output and gradients in float64, one expert after the other."""
    x, w13, w2 = (t.detach().double().requires_grad_() for t in (x, w13, w2))
    out = torch.zeros((x.shape[0], w2.shape[1]), dtype=torch.float64)
    for e, (start, count) in enumerate(zip(starts, counts, strict=True)):
        gate, up = (x[start : start + count] @ w13[e].t()).chunk(2, dim=1)
        part = (gate / (1 + torch.exp(-gate)) * up) @ w2[e].t()
        out = torch.cat([out[:start], part, out[start + count :]])
    return out.detach(), torch.autograd.grad(out, [x, w13, w2], grad.double())


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 128), (96, 200)])
def test_output_and_gradients(precision, alignment, hidden, intermediate):
    counts = [37, 0, 130, 1]
    rows, real = grouped_rows(counts, hidden, alignment=alignment)
    experts = GroupedMLP(4, hidden, intermediate, precision=precision, seed=3)
    out = experts(rows)
    assert out.dtype == torch.bfloat16 and out.shape == rows.rows.shape
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    grad[~real] = 0
    want, want_grads = dense_reference(rows.rows, experts.w13, experts.w2, rows.starts, counts, grad)
    got_grads = torch.autograd.grad(out, [rows.carrier, experts.w13, experts.w2], grad)
    assert not out[~real].any()
    errors = [relative_error(out, want)] + [relative_error(g, w) for g, w in zip(got_grads, want_grads, strict=True)]
    assert max(errors) < TOLERANCE[precision], errors
    if precision == "fp8":  # really coarser than bf16
        assert min(errors) > BF16_TOLERANCE
    assert got_grads[1].dtype == torch.float32
    assert not got_grads[1][1].any() and not got_grads[2][1].any()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_padding_changes_nothing(precision):
    counts = [5, 20]
    packed, _ = grouped_rows(counts, 128)
    padded, real = grouped_rows(counts, 128, alignment=16)
    experts = GroupedMLP(2, 128, 64, precision=precision)
    a, b = experts(packed), experts(padded)
    assert torch.equal(a, b[real])
    grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = torch.zeros_like(b)
    wide[real] = grad
    got = torch.autograd.grad(b, [experts.w13, experts.w2], wide)
    want = torch.autograd.grad(a, [experts.w13, experts.w2], grad)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < 1e-2  # the same tiles; only the order of FP32 sums may differ


def test_fp8_rows_enter_the_first_gemm_unchanged():
    """Rows that arrived as FP8 give the same bits as bf16 rows that the layer quantises with the same rule."""
    rows, _ = grouped_rows([40, 3], 256)
    values, scales = fp8.quantize_1x128(rows.rows.detach())
    carrier = make_carrier(43, 256, values.device).requires_grad_()
    quantised = ExpertRows(values, scales, carrier, rows.counts, rows.starts, rows.sizes)
    experts = GroupedMLP(2, 256, 64, precision="fp8")
    a, b = experts(rows), experts(quantised)
    assert torch.equal(a, b)
    grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (want,) = torch.autograd.grad(a, [rows.carrier], grad)
    (got,) = torch.autograd.grad(b, [carrier], grad)
    assert torch.equal(got, want)
    assert got.dtype == torch.bfloat16 and got.shape == carrier.shape


def test_operands_are_really_fp8():
    fp8_gemm.reset_counters()
    rows, _ = grouped_rows([40, 3], 256)
    experts = GroupedMLP(2, 256, 64, precision="fp8")
    experts(rows).float().square().sum().backward()
    seen = fp8_gemm.counters()
    tile, block = "float8_e4m3fn 1x128", "float8_e4m3fn 128x128"
    # Two experts: two products forward, two input gradients with weights, two weight gradients along tokens.
    assert dict(seen.operands) == {f"{tile} @ {block}": 8, f"{tile} @ {tile}": 4}
    assert seen.fp8_gemms == 12 and seen.bf16_gemms == 0 and seen.native + seen.dequantised == 12
    fp8_gemm.reset_counters()
    rows, _ = grouped_rows([40, 3], 256)
    GroupedMLP(2, 256, 64, precision="bf16")(rows).float().square().sum().backward()
    assert fp8_gemm.counters().fp8_gemms == 0
    assert dict(fp8_gemm.counters().operands) == {"bfloat16 @ bfloat16": 12}


def test_product_is_that_of_the_quantised_values():
    """The product equals the float64 product of the dequantised operands up to FP32 accumulation and one rounding."""
    g = torch.Generator().manual_seed(0)
    a, w = torch.randn((33, 300), generator=g).bfloat16(), torch.randn((1, 70, 300), generator=g)
    left, right = fp8_gemm.along_columns(a, True), fp8_gemm.weights(w, True)[0]
    exact = (
        fp8.dequantize_1x128(left.values, left.scales, dtype=torch.float32).double()
        @ fp8.dequantize_128x128(right.values, right.scales, dtype=torch.float32).double().t()
    )
    assert relative_error(fp8_gemm.matmul(left, right, torch.float32), exact) < 1e-6
    assert relative_error(fp8_gemm.matmul(left, right, torch.bfloat16), exact) < 2.0**-8
    flipped = right.transposed()
    assert torch.equal(flipped.dense(), right.dense().t())


@pytest.mark.skipif(not hasattr(torch.nn.functional, "scaled_mm"), reason="this torch has no scaled GEMM recipes")
@pytest.mark.parametrize(("kind", "dtype"), [(fp8_gemm.BLOCK, torch.bfloat16), (fp8_gemm.TILE, torch.float32)])
@pytest.mark.parametrize("depth", [128, 384, 512, 640])
def test_scale_layouts_pass_torchs_own_checks(kind, dtype, depth):
    """No GPU needed: on the meta device torch checks shapes and strides of a scaled GEMM without computing it."""

    def operand(num_rows: int, kind: str) -> fp8_gemm.Operand:
        scale_rows = num_rows if kind == fp8_gemm.TILE else num_rows // 128
        return fp8_gemm.Operand(
            torch.empty((num_rows, depth), dtype=torch.float8_e4m3fn, device="meta"),
            torch.empty((scale_rows, depth // 128), device="meta"),
            kind,
        )

    product = fp8_gemm._scaled_mm(operand(256, fp8_gemm.TILE), operand(384, kind), dtype)
    assert product.shape == (256, 384) and product.dtype == dtype


@pytest.mark.parametrize("variant", ["foreach", "fused"])  # fused steps do not move a parameter's version counter
def test_weights_are_quantised_once_per_step(variant):
    experts = GroupedMLP(2, 128, 64, precision="fp8")
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1, **{variant: True})
    fp8_gemm.reset_counters()
    with torch.inference_mode():  # evaluation first: what it leaves behind has to serve training too
        experts(grouped_rows([9, 2], 128)[0])
    for _ in range(3):
        experts(grouped_rows([9, 2], 128)[0]).float().sum().backward()
    assert fp8_gemm.counters().weight_quantisations == 2
    before = experts(grouped_rows([9, 2], 128)[0])
    optimizer.step()
    after = experts(grouped_rows([9, 2], 128)[0])
    assert fp8_gemm.counters().weight_quantisations == 4
    assert not torch.equal(before, after)
    with torch.no_grad():
        experts.w13[1].copy_(experts.w13[0])
    experts(grouped_rows([9, 2], 128)[0])
    assert fp8_gemm.counters().weight_quantisations == 5
    experts.w13.data.zero_()
    experts.invalidate_weights()
    assert not experts(grouped_rows([9, 2], 128)[0]).any()
    twin = copy.deepcopy(experts)
    assert twin.w2.is_expert and not twin(grouped_rows([9, 2], 128)[0]).any()


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e6])
def test_gradients_of_any_magnitude_survive_fp8(size):
    """The quantiser floors a tile's maximum at 1e-4; gradients of a mean over many tokens lie far below that."""
    rows, _ = grouped_rows([40, 30], 256)
    experts = GroupedMLP(2, 256, 64, precision="fp8")
    out = experts(rows)
    grad = (torch.randn(out.shape, generator=torch.Generator().manual_seed(2)) * size).bfloat16()
    _, want = dense_reference(rows.rows, experts.w13, experts.w2, rows.starts, rows.counts, grad)
    got = torch.autograd.grad(out, [rows.carrier, experts.w13, experts.w2], grad)
    for g, w in zip(got, want, strict=True):
        assert relative_error(g, w) < FP8_TOLERANCE


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_no_rows_and_no_experts(precision):
    rows, _ = grouped_rows([0, 0], 64)
    experts = GroupedMLP(2, 64, 32, precision=precision)
    out = experts(rows)
    out.sum().backward()
    assert out.shape == (0, 64) and not experts.w13.grad.any() and rows.carrier.grad.shape == (0, 64)
    empty, _ = grouped_rows([], 64)
    none = GroupedMLP(0, 64, 32, precision=precision)
    out = none(empty)
    out.sum().backward()
    assert out.shape == (0, 64) and none.w13.grad.shape == (0, 64, 64)


def test_initial_weights_depend_on_the_global_index_only():
    whole = GroupedMLP(6, 32, 16, seed=11)
    part = GroupedMLP(2, 32, 16, seed=11, first_expert=3)
    assert torch.equal(whole.w13[3:5], part.w13) and torch.equal(whole.w2[3:5], part.w2)
    assert not torch.equal(whole.w13[0], whole.w13[1])
    assert not torch.equal(whole.w13, GroupedMLP(6, 32, 16, seed=12).w13)
    assert whole.w13.is_expert and not GroupedMLP(1, 32, 16, is_expert=False).w13.is_expert


def test_autocast_does_not_reach_inside():
    rows, _ = grouped_rows([9, 2], 128)
    for precision in ("bf16", "fp8"):
        experts = GroupedMLP(2, 128, 64, precision=precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = experts(rows)
        assert torch.equal(inside, experts(rows))


def test_errors():
    with pytest.raises(ConfigError, match="precision"):
        GroupedMLP(1, 16, 16, precision="fp16")
    with pytest.raises(ConfigError, match="positive"):
        GroupedMLP(1, 0, 16)
    with pytest.raises(ConfigError, match="expected"):
        GroupedMLP(2, 16, 16)(grouped_rows([3], 16)[0])
