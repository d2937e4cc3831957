"""The same modules on a CUDA device: equal to the CPU within rounding, with scaled GEMMs where the device has them."""

from __future__ import annotations

import pytest
import torch
from test_nn_experts import BF16_TOLERANCE, FP8_TOLERANCE, dense_reference, grouped_rows, relative_error
from test_nn_layouts import received

from deep_ep.nn import GroupedMLP, MoE, Router, fp8_gemm, permute_by_expert, unpermute

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def hopper() -> bool:
    return torch.cuda.get_device_capability(CUDA) == (9, 0)


@pytest.mark.parametrize("use_fp8", [False, True])
@pytest.mark.parametrize("alignment", [1, 128])
def test_layout_and_permute_equal_the_cpu(use_fp8, alignment):
    here = received(77, 6, 5, 4, hidden=256, use_fp8=use_fp8)
    there = received(77, 6, 5, 4, hidden=256, use_fp8=use_fp8)
    for name in ("rows", "carrier", "topk_idx", "topk_weights"):
        setattr(there, name, getattr(there, name).detach().to(CUDA))
    there.scales = None if there.scales is None else there.scales.to(CUDA)
    a, b = permute_by_expert(here, alignment), permute_by_expert(there, alignment)
    assert torch.equal(a.rows.detach().view(torch.uint8), b.rows.cpu().view(torch.uint8))
    assert torch.equal(here.m_indices, there.m_indices.cpu()) and torch.equal(here.offsets, there.offsets.cpu())
    assert torch.equal(a.layout.slots, b.layout.slots.cpu())
    if a.scales is not None:
        assert torch.equal(a.scales, b.scales.cpu())
    y = torch.randn((a.layout.num_rows, 256), generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(unpermute(y, a).detach(), unpermute(y.to(CUDA), b).cpu())


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_experts_against_a_dense_formula(precision):
    fp8_gemm.reset_counters()
    experts = GroupedMLP(4, 512, 256, precision=precision, device=CUDA)
    rows, real = grouped_rows([200, 0, 1, 77], 512, alignment=experts.row_alignment)
    rows.rows = rows.carrier = rows.rows.detach().to(CUDA).requires_grad_()
    out = experts(rows)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    grad[~real] = 0
    grad = grad.to(CUDA)
    want, want_grads = dense_reference(
        rows.rows.cpu(), experts.w13.cpu(), experts.w2.cpu(), rows.starts, rows.counts, grad.cpu()
    )
    got_grads = torch.autograd.grad(out, [rows.carrier, experts.w13, experts.w2], grad)
    tolerance = FP8_TOLERANCE if precision == "fp8" else BF16_TOLERANCE
    assert relative_error(out.cpu(), want) < tolerance
    for got, wanted in zip(got_grads, want_grads, strict=True):
        assert relative_error(got.cpu(), wanted) < tolerance
    if precision == "fp8":
        assert fp8_gemm.counters().fp8_gemms == 18  # six products for each of three experts with rows


@pytest.mark.parametrize(("kind", "dtype"), [(fp8_gemm.BLOCK, torch.bfloat16), (fp8_gemm.TILE, torch.float32)])
@pytest.mark.parametrize("shape", [(128, 128, 128), (256, 4096, 7168), (128, 1536, 384), (2048, 7168, 256)])
def test_scaled_gemm_is_used_on_hopper_and_right(kind, dtype, shape):
    if not hopper():
        pytest.skip("torch's scaled GEMMs with these tiles exist on Hopper only")
    fp8_gemm.reset_counters()
    num_rows, num_columns, depth = shape
    g = torch.Generator(device=CUDA).manual_seed(0)
    a = torch.randn((num_rows, depth), generator=g, device=CUDA).bfloat16()
    b = torch.randn((num_columns, depth), generator=g, device=CUDA).bfloat16()
    left = fp8_gemm.along_columns(a, True)
    right = fp8_gemm.along_columns(b, True) if kind == fp8_gemm.TILE else fp8_gemm.weights(b.unsqueeze(0), True)[0]
    got = fp8_gemm.matmul(left, right, dtype)
    assert fp8_gemm.counters().native == 1, "see the warning of the self-check"
    # Hopper sums one tile's products with fewer bits than FP32.
    assert got.dtype == dtype and relative_error(got, left.dense() @ right.dense().t()) < 5e-3


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("num_tokens", [0, 1, 130])
def test_layer_equals_the_cpu(precision, num_tokens):
    kwargs = {"precision": precision, "num_shared_experts": 1, "scoring": "sigmoid", "seed": 5}
    here = MoE(256, 128, 6, 3, **kwargs)
    there = MoE(256, 128, 6, 3, device=CUDA, **kwargs)
    x = torch.randn((num_tokens, 256), generator=torch.Generator().manual_seed(1))
    a, b = x.clone().requires_grad_(), x.to(CUDA).requires_grad_()
    out_here, out_there = here(a), there(b)
    (out_here.square().sum() / 1e6).backward()
    (out_there.square().sum() / 1e6).backward()
    here.update_bias()
    there.update_bias()
    assert torch.equal(here.load(), there.load().cpu())
    # Both quantise the same values; a bf16 rounding that falls the other way moves an FP8 value by one step at times.
    tolerance = 2e-2 if precision == "fp8" else BF16_TOLERANCE
    if num_tokens:
        assert relative_error(out_there.cpu(), out_here) < tolerance
        assert relative_error(b.grad.cpu(), a.grad) < tolerance
        for (name, p), (_, q) in zip(here.named_parameters(), there.named_parameters(), strict=True):
            assert relative_error(q.grad.cpu(), p.grad) < 2 * tolerance, name
    assert out_there.device.type == "cuda" and out_there.dtype == torch.float32


def test_router_selects_the_same_experts():
    here = Router(128, 32, 6, num_groups=8, topk_groups=3, scoring="sigmoid", seed=2)
    there = Router(128, 32, 6, num_groups=8, topk_groups=3, scoring="sigmoid", seed=2, device=CUDA)
    x = torch.randn((500, 128), generator=torch.Generator().manual_seed(0))
    same = (here(x).topk_idx == there(x.to(CUDA)).topk_idx.cpu()).float().mean()
    assert same > 0.999  # FP32 sums in another order may swap two equal scores
    torch.nn.init.zeros_(there.weight)
    assert there(x.to(CUDA)).topk_idx.cpu().tolist() == [[0, 1, 2, 3, 4, 5]] * 500
