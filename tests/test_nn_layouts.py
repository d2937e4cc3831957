"""Expert-major layouts, permute and unpermute, against loops over tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_nn_examples import examples

from deep_ep import fp8
from deep_ep.errors import ConfigError
from deep_ep.nn import Dispatched, ExpertRows, build_layout, permute_by_expert, unpermute
from deep_ep.nn.dispatched import make_carrier


class CombineInputs:
    """In place of a buffer: hands out what peers could read, and remembers it. The handle is the number of rows."""

    def __init__(self):
        self.given = []

    def empty_combine_input(self, handle, hidden, dtype):
        self.given.append(torch.empty((handle, hidden), dtype=dtype))
        return self.given[-1]

    def holds(self, tensor):
        return any(t.data_ptr() == tensor.data_ptr() and t.shape == tensor.shape for t in self.given)


def received(num_rows, num_topk, num_local, seed, *, hidden=32, dtype=torch.bfloat16, alignment=1, use_fp8=False):
    """A `Dispatched` as one rank would see it: distinct local experts per row, some absent."""
    g = torch.Generator().manual_seed(seed)
    pool = max(2 * num_local, num_topk)  # upper half: experts of other ranks
    idx = (
        torch.stack([torch.randperm(pool, generator=g)[:num_topk] for _ in range(num_rows)])
        if num_rows
        else torch.empty((0, num_topk), dtype=torch.int64)
    )
    idx = torch.where(idx < num_local, idx, -1)
    weights = torch.rand((num_rows, num_topk), generator=g) * (idx >= 0)
    rows = torch.randn((num_rows, hidden), generator=g).to(dtype)
    counts = [int((idx == e).sum()) for e in range(num_local)]
    scales, carrier = None, rows.requires_grad_()
    if use_fp8:
        rows, scales = fp8.quantize_1x128(rows.detach())
        carrier = make_carrier(num_rows, hidden, rows.device).requires_grad_()
    weights.requires_grad_()
    return Dispatched(rows, scales, carrier, idx, weights, counts, pool, CombineInputs(), num_rows, alignment)


def pairs_by_expert(d):
    """[(row, k), ...] for each expert, in received order."""
    return [
        [(r, k) for r in range(d.num_recv) for k in range(d.topk_idx.shape[1]) if int(d.topk_idx[r, k]) == e]
        for e in range(d.num_local_experts)
    ]


shapes = {
    "num_rows": (0, 1, 2, 17, 40),
    "num_topk": range(1, 7),
    "num_local": range(7),
    "alignment": (1, 2, 16, 128),
    "seed": range(10**6),
}


@examples(60, **shapes)
def test_layouts_equal_loops(num_rows, num_topk, num_local, alignment, seed):
    d = received(num_rows, num_topk, num_local, seed, alignment=alignment)
    row_map, k_map, experts, offsets = [], [], [], [0]
    slots = torch.full((num_rows, num_topk), -1, dtype=torch.int32)
    pairs = pairs_by_expert(d)
    for e, members in enumerate(pairs):
        padding = -len(members) % alignment
        for r, k in members:
            slots[r, k] = len(row_map)
            row_map.append(r)
            k_map.append(k)
            experts.append(e)
        row_map += [-1] * padding
        k_map += [-1] * padding
        experts += [-1] * padding
        offsets.append(len(row_map))
    layout = d.layout()
    assert layout is d.layout(alignment)
    assert [t.tolist() for t in d.row_map] == [row_map, k_map]
    assert torch.equal(layout.slots, slots)
    assert d.m_indices.tolist() == experts and d.m_indices.dtype == torch.int32
    assert d.offsets.tolist() == offsets and d.offsets.dtype == torch.int32
    assert d.counts.tolist() == [len(p) for p in pairs] and d.counts.dtype == torch.int32
    assert d.aligned_counts.tolist() == [b - a for a, b in itertools.pairwise(offsets)]
    assert d.masked_counts.tolist() == d.counts.tolist()
    total = sum(d.counts_list)
    assert d.expected_m == max(1, -(-total // max(1, num_local)))


@examples(40, **shapes, use_fp8=(False, True))
def test_permute_copies_bytes_and_zeroes_padding(num_rows, num_topk, num_local, alignment, seed, use_fp8):
    d = received(num_rows, num_topk, num_local, seed, hidden=160, use_fp8=use_fp8)
    rows = permute_by_expert(d, alignment)
    want_rows = torch.zeros((rows.rows.shape[0], 160), dtype=d.rows.dtype)
    want_scales = None if d.scales is None else torch.zeros((rows.rows.shape[0], d.scales.shape[1]))
    at = 0
    for members in pairs_by_expert(d):
        for i, (r, _) in enumerate(members):
            want_rows.view(torch.uint8)[at + i] = d.rows.detach().view(torch.uint8)[r]
            if want_scales is not None:
                want_scales[at + i] = d.scales[r]
        at += -(-len(members) // alignment) * alignment
    assert at == rows.rows.shape[0]
    assert torch.equal(rows.rows.detach().view(torch.uint8), want_rows.view(torch.uint8))
    assert rows.rows.dtype == (torch.float8_e4m3fn if use_fp8 else torch.bfloat16)
    assert (rows.scales is None) == (want_scales is None)
    if want_scales is not None:
        assert torch.equal(rows.scales, want_scales)
    assert rows.carrier.shape == rows.rows.shape and rows.carrier.requires_grad


@examples(40, **shapes)
def test_unpermute_and_gradients_equal_a_dense_sum(num_rows, num_topk, num_local, alignment, seed):
    """With float32 rows, everything is exact up to FP32 rounding, so autograd of a dense formula is the reference."""
    d = received(num_rows, num_topk, num_local, seed, dtype=torch.float32)
    rows = permute_by_expert(d, alignment)
    factor = torch.arange(1, max(num_local, 1) + 1, dtype=torch.float32)
    expert = torch.zeros(rows.rows.shape[0], dtype=torch.int64)
    for e, (start, size) in enumerate(zip(rows.starts, rows.sizes, strict=True)):
        expert[start : start + size] = e
    y = torch.tanh(rows.rows * factor[expert].unsqueeze(1))
    out = unpermute(y, rows)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1))
    got = torch.autograd.grad((out * probe).sum(), [d.rows, d.topk_weights])

    x = d.rows.detach().clone().requires_grad_()
    w = d.topk_weights.detach().clone().requires_grad_()
    want = torch.zeros_like(x)
    for k in range(num_topk):
        index = d.topk_idx[:, k]
        want = want + torch.where(
            (index >= 0).unsqueeze(1), w[:, k : k + 1] * torch.tanh(x * factor[index.clamp(min=0)].unsqueeze(1)), 0.0
        )
    reference = torch.autograd.grad((want * probe).sum(), [x, w])
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    for g, r in zip(got, reference, strict=True):
        torch.testing.assert_close(g, r, rtol=1e-4, atol=1e-5)


def test_unpermute_rounds_once_in_k_order():
    d = received(30, 5, 6, 3)
    rows = permute_by_expert(d)
    y = torch.randn((rows.rows.shape[0], 32), generator=torch.Generator().manual_seed(1)).bfloat16()
    out = unpermute(y, rows)
    slots = d.layout().slots
    for r in range(30):
        total = torch.zeros(32)
        for k in range(5):
            if slots[r, k] >= 0:
                total = total + y[slots[r, k]].float() * d.topk_weights[r, k].detach()
        assert torch.equal(out[r], total.bfloat16())


def test_gradient_of_fp8_rows_comes_through_the_carrier():
    d = received(20, 4, 4, 7, hidden=256, use_fp8=True)
    assert d.carrier.untyped_storage().nbytes() == 2  # a stand-in, not a second copy of the rows
    rows = permute_by_expert(d, 16)
    probe = torch.randn((rows.rows.shape[0], 256), generator=torch.Generator().manual_seed(0)).bfloat16()
    (grad,) = torch.autograd.grad(rows.carrier, [d.carrier], grad_outputs=[probe])
    want = torch.zeros(20, 256)
    for r in range(20):
        for k in range(4):
            slot = int(rows.layout.slots[r, k])
            if slot >= 0:
                want[r] += probe[slot].float()
    assert torch.equal(grad, want.bfloat16())


@pytest.mark.parametrize("use_fp8", [False, True])
def test_rows_of_a_combine_are_computed_where_peers_read_them(use_fp8):
    d = received(9, 3, 4, 1, use_fp8=use_fp8)
    rows = permute_by_expert(d, 4)
    out = unpermute(rows.carrier * 1.0, rows)
    assert d.buffer.holds(out) and len(d.buffer.given) == 1
    grads = torch.autograd.grad(out.float().sum(), [d.carrier, d.topk_weights])
    assert all(d.buffer.holds(grad) for grad in grads) and len(d.buffer.given) == 3


@examples(20, num_rows=(0, 1, 23), num_topk=range(1, 5), num_local=range(1, 6), seed=range(100), use_fp8=(False, True))
def test_slab(num_rows, num_topk, num_local, seed, use_fp8):
    d = received(num_rows, num_topk, num_local, seed, hidden=128, use_fp8=use_fp8)
    capacity = max(d.counts_list) + 3
    slab = d.slab(capacity).rows.detach().view(torch.uint8).view(num_local, capacity, -1)
    for e, members in enumerate(pairs_by_expert(d)):
        for i, (r, _) in enumerate(members):
            assert torch.equal(slab[e, i], d.rows.detach().view(torch.uint8)[r])
        assert not slab[e, len(members) :].any()
    assert d.slab().rows.shape[0] == num_local * max(d.counts_list)
    if max(d.counts_list):
        with pytest.raises(ConfigError, match="capacity"):
            d.slab(max(d.counts_list) - 1)


def test_errors():
    d = received(4, 2, 2, 0)
    rows = permute_by_expert(d)
    with pytest.raises(ConfigError, match="one row per permuted row"):
        unpermute(torch.zeros((rows.rows.shape[0] + 1, 32), dtype=torch.bfloat16), rows)
    with pytest.raises(ConfigError, match="dispatch"):
        unpermute(torch.zeros(4, 32), ExpertRows.single(torch.zeros(4, 32)))
    with pytest.raises(ConfigError, match="alignment"):
        build_layout(d.topk_idx, d.counts_list, alignment=0)
