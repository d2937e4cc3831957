"""Received tokens, and the layouts in which grouped GEMMs want them.

`Buffer.dispatch` returns each token once per rank, in (source rank, source token) order. Experts want one copy per
(token, expert) pair, sorted by expert, often with every expert's rows padded to a GEMM tile. `Dispatched` holds the
former and computes the latter on demand; `permute_by_expert` and `unpermute` move rows between the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from .. import ops
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..buffer import Buffer


@dataclass(frozen=True, eq=False)
class ExpertLayout:
    """Where the copy of a received token for each of its experts lies among M expert-major rows.

    Within an expert, rows keep the order in which they were received. Two layouts built from equal inputs are equal
    bit for bit; nothing in them depends on the number of ranks.

    Attributes:
        counts: rows of each local expert without padding.
        starts: first row of each expert.
        sizes: rows of each expert with padding.
        num_rows: M.
        slots: int32 [n, K], expert-major row of pair (received row, k); -1 where k belongs to another rank.
        row_map: int64 [M], received row that an expert-major row copies; -1 in padding.
        k_map: int64 [M], its k; -1 in padding.
    """

    counts: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    num_rows: int
    slots: torch.Tensor
    row_map: torch.Tensor
    k_map: torch.Tensor

    @property
    def num_padding(self) -> int:
        """Rows of M that hold no token."""
        return self.num_rows - sum(self.counts)

    @cached_property
    def gather_index(self) -> torch.Tensor:
        """int64 [M]: `row_map` with 0 in padding, so that it can index."""
        return self.row_map.clamp(min=0) if self.num_padding else self.row_map

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Copy received rows [n, W] of any dtype to expert-major rows [M, W], zeros in padding."""
        if rows.shape[0] == 0:
            return rows.new_zeros((self.num_rows, rows.shape[1]))
        out = ops.gather_rows(rows, self.gather_index)
        if self.num_padding:
            out.view(torch.uint8).masked_fill_((self.row_map < 0).unsqueeze(1), 0)
        return out


def build_layout(
    topk_idx: torch.Tensor, counts: Sequence[int], *, alignment: int = 1, capacity: int | None = None
) -> ExpertLayout:
    """Lay out pairs of ``topk_idx`` (int [n, K], local experts, -1 absent) expert by expert.

    Args:
        topk_idx: received local indices.
        counts: pairs of each local expert, on the host: the layout is built without waiting for the device.
        alignment: every expert's rows are padded to a multiple of this.
        capacity: give every expert exactly this many rows instead (the slab of masked GEMMs).

    Raises:
        ConfigError: alignment below 1, or an expert has more pairs than ``capacity``.
    """
    if alignment < 1:
        raise ConfigError(f"alignment is {alignment}; give the tile height of the GEMM, 1 or more")
    if capacity is not None and max(counts, default=0) > capacity:
        raise ConfigError(f"capacity={capacity} rows an expert, but one expert received {max(counts)}; raise it")
    device, num_topk = topk_idx.device, topk_idx.shape[1]
    sizes = [-(-c // alignment) * alignment if capacity is None else capacity for c in counts]
    starts = [sum(sizes[:e]) for e in range(len(sizes))]
    num_pairs, num_rows = sum(counts), sum(sizes)
    flat = topk_idx.reshape(-1).long()
    # Absent pairs sort behind all experts; the stable sort keeps received order inside an expert.
    order = torch.where(flat < 0, len(sizes), flat).sort(stable=True).indices[:num_pairs]
    # First aligned row minus first compact row of each expert: what to add to a pair's place in `order`.
    shift = torch.tensor([s - sum(counts[:e]) for e, s in enumerate(starts)], dtype=torch.int64).to(device)
    row = torch.arange(num_pairs, device=device) + shift[flat[order]] if num_pairs else order
    slots = torch.full((flat.numel(),), -1, dtype=torch.int32, device=device)
    slots[order] = row.to(torch.int32)
    row_map = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
    k_map = row_map.clone()
    row_map[row] = torch.div(order, max(num_topk, 1), rounding_mode="floor")
    k_map[row] = order % max(num_topk, 1)
    return ExpertLayout(
        tuple(counts), tuple(starts), tuple(sizes), num_rows, slots.view(topk_idx.shape), row_map, k_map
    )


@dataclass(eq=False)
class ExpertRows:
    """M rows grouped by expert: what `GroupedMLP` takes.

    Attributes:
        rows: bf16 [M, H], or float8_e4m3fn [M, H].
        scales: float32 [M, ceil(H / 128)] beside FP8 rows, else None.
        carrier: the differentiable stand-in of ``rows`` [M, H]: ``rows`` itself unless they are FP8.
        counts, starts, sizes: as in `ExpertLayout`.
        dispatched: where the rows came from; None for rows that were not dispatched.
        layout: how they were permuted; None likewise.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    carrier: torch.Tensor
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    dispatched: Dispatched | None = None
    layout: ExpertLayout | None = None

    @classmethod
    def single(cls, x: torch.Tensor, alignment: int = 1) -> ExpertRows:
        """All rows of ``x`` [T, H] for one expert, zero rows appended up to the alignment; no copy without padding."""
        num_tokens = x.shape[0]
        size = -(-num_tokens // alignment) * alignment
        rows = x if size == num_tokens else torch.nn.functional.pad(x, (0, 0, 0, size - num_tokens))
        return cls(rows, None, rows, (num_tokens,), (0,), (size,))


@dataclass(eq=False)
class Dispatched:
    """Tokens received by one rank in one dispatch, with every layout a GEMM library asks for, computed when asked.

    n received rows, hidden H, top-k K, L local experts. Layout properties use ``expert_alignment``; `layout` and `slab`
    take others.

    Attributes:
        rows: [n, H], bf16 (or whatever was sent), or float8_e4m3fn.
        scales: float32 [n, ceil(H / 128)] beside FP8 rows, else None.
        carrier: differentiable stand-in of ``rows``: the tensor to pass to a function that computes with the rows and
            gives a gradient for them. ``rows`` itself unless they are FP8; then a bf16 tensor [n, H] without storage
            of its own, whose values mean nothing.
        topk_idx: [n, K] local expert, -1 where k belongs to another rank.
        topk_weights: float32 [n, K], differentiable; 0 where ``topk_idx`` is -1.
        counts_list: rows of each local expert, unpadded, as Python ints.
        num_experts: E, over all ranks.
        buffer, handle: for `combine` and cached dispatches.
        expert_alignment: rows of an expert are padded to a multiple of this in the layouts.
        fp8_gradients: the backward of `combine` sends gradients as FP8.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    carrier: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    counts_list: list[int]
    num_experts: int
    buffer: Buffer
    handle: tuple[Any, ...]
    expert_alignment: int = 1
    fp8_gradients: bool = False
    _layouts: dict[tuple[int, int | None], ExpertLayout] = field(default_factory=dict, repr=False)

    @property
    def num_recv(self) -> int:
        """n: received rows."""
        return self.topk_idx.shape[0]

    @property
    def num_local_experts(self) -> int:
        """L."""
        return len(self.counts_list)

    @property
    def is_fp8(self) -> bool:
        """Whether the rows are FP8 with scales."""
        return self.scales is not None

    def layout(self, alignment: int | None = None) -> ExpertLayout:
        """Expert-major layout padded to ``alignment`` (default: ``expert_alignment``); cached."""
        return self._layout(self.expert_alignment if alignment is None else alignment, None)

    def slab_layout(self, capacity: int | None = None) -> ExpertLayout:
        """Layout with ``capacity`` rows for every expert (default: the largest count, aligned); cached."""
        if capacity is None:
            align = self.expert_alignment
            capacity = -(-max(self.counts_list, default=0) // align) * align
        return self._layout(1, capacity)

    def _layout(self, alignment: int, capacity: int | None) -> ExpertLayout:
        key = (alignment, capacity)
        if key not in self._layouts:
            self._layouts[key] = build_layout(self.topk_idx, self.counts_list, alignment=alignment, capacity=capacity)
        return self._layouts[key]

    @cached_property
    def counts(self) -> torch.Tensor:
        """int32 [L]: rows of each local expert."""
        return self._int32(self.counts_list)

    @cached_property
    def aligned_counts(self) -> torch.Tensor:
        """int32 [L]: the same, padded."""
        return self._int32(self.layout().sizes)

    @cached_property
    def offsets(self) -> torch.Tensor:
        """int32 [L + 1]: first row of each expert in the padded layout, then M."""
        layout = self.layout()
        return self._int32((*layout.starts, layout.num_rows))

    @cached_property
    def m_indices(self) -> torch.Tensor:
        """int32 [M]: expert of every expert-major row, -1 in padding (contiguous grouped GEMMs)."""
        layout = self.layout()
        if self.num_recv == 0:
            return torch.empty(0, dtype=torch.int32, device=self.topk_idx.device)
        expert = self.topk_idx[layout.gather_index, layout.k_map.clamp(min=0)]
        return torch.where(layout.row_map < 0, -1, expert).to(torch.int32)

    @property
    def row_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(received row, k) of every expert-major row: two int64 [M], -1 in padding."""
        layout = self.layout()
        return layout.row_map, layout.k_map

    @property
    def masked_counts(self) -> torch.Tensor:
        """int32 [L]: valid rows in each expert's part of a slab (masked grouped GEMMs)."""
        return self.counts

    @property
    def expected_m(self) -> int:
        """Mean rows of an expert, rounded up, at least 1: the hint that masked grouped GEMMs take."""
        return max(1, -(-sum(self.counts_list) // max(1, self.num_local_experts)))

    def slab(self, capacity: int | None = None) -> ExpertRows:
        """Rows as a slab: ``rows.view(L, capacity, H)``, valid up to `masked_counts`, zeros after; differentiable."""
        return _permute(self, self.slab_layout(capacity))

    def _int32(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.topk_idx.device)


def permute_by_expert(dispatched: Dispatched, alignment: int | None = None) -> ExpertRows:
    """Copy received rows to expert-major order, every expert padded with zero rows to ``alignment``.

    FP8 rows and their scales are moved as bytes. The gradient of a received row is the FP32 sum of those of its copies
    in k order, rounded once.

    Args:
        dispatched: what `dispatch` returned.
        alignment: None takes ``dispatched.expert_alignment``.
    """
    return _permute(dispatched, dispatched.layout(alignment))


def unpermute(y: torch.Tensor, rows: ExpertRows) -> torch.Tensor:
    """Sum expert outputs back to received rows: out[r] = sum over k of weight[r, k] * y[slot(r, k)].

    FP32, in k order, one rounding to the dtype of ``y``. Gradients flow to ``y`` and to the routing weights.

    Args:
        y: [M, H] outputs for ``rows``.
        rows: what `permute_by_expert` returned.

    Returns:
        [n, H], ready for `combine`: it lies where peers can read it, so do not write to it after that.

    Raises:
        ConfigError: ``rows`` were not made by `permute_by_expert`, or the number of rows differs.
    """
    layout, dispatched = rows.layout, rows.dispatched
    if layout is None or dispatched is None:
        raise ConfigError("these rows did not come from a dispatch, so there is nothing to sum them back to")
    if y.dim() != 2 or y.shape[0] != layout.num_rows:
        raise ConfigError(f"y is {tuple(y.shape)}, expected [{layout.num_rows}, hidden]: one row per permuted row")
    out: torch.Tensor = _Unpermute.apply(  # type: ignore[no-untyped-call]
        y, dispatched.topk_weights, layout, dispatched.buffer, dispatched.handle
    )
    return out


def _permute(dispatched: Dispatched, layout: ExpertLayout) -> ExpertRows:
    if dispatched.scales is None:
        rows = carrier = _Permute.apply(  # type: ignore[no-untyped-call]
            dispatched.rows, layout, dispatched.buffer, dispatched.handle
        )
        scales = None
    else:
        carrier, rows, scales = _PermuteFP8.apply(  # type: ignore[no-untyped-call]
            dispatched.carrier, dispatched.rows, dispatched.scales, layout, dispatched.buffer, dispatched.handle
        )
    return ExpertRows(rows, scales, carrier, layout.counts, layout.starts, layout.sizes, dispatched, layout)


def make_carrier(num_rows: int, hidden: int, device: torch.device) -> torch.Tensor:
    """bf16 [num_rows, hidden] that takes two bytes of memory: every element is the same one."""
    return torch.zeros(1, dtype=torch.bfloat16, device=device).expand(num_rows, hidden)


def _combine_input(ctx: Any, width: int, like: torch.Tensor) -> torch.Tensor | None:
    """Where to compute rows [n, width] that go into a combine next, so that peers read them without a copy.

    None where the buffer's memory is on another device than its operands: then any new tensor serves.
    """
    out: torch.Tensor = ctx.buffer.empty_combine_input(ctx.handle, width, like.dtype)
    return out if out.device == like.device else None


def _sum_copies(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of received rows, which the backward of dispatch combines."""
    out = _combine_input(ctx, grad.shape[1], grad)
    return ops.reduce_rows([grad.contiguous()], ctx.layout.slots, out=out)


class _Permute(torch.autograd.Function):
    # Contexts keep buffer and handle, not the `Dispatched`: that would keep the received rows until the backward.
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, layout: ExpertLayout, buffer: Buffer, handle: tuple[Any, ...]
    ) -> torch.Tensor:
        ctx.layout, ctx.buffer, ctx.handle = layout, buffer, handle
        return layout.gather(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _sum_copies(ctx, grad), None, None, None


class _PermuteFP8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        carrier: torch.Tensor,
        rows: torch.Tensor,
        scales: torch.Tensor,
        layout: ExpertLayout,
        buffer: Buffer,
        handle: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.layout, ctx.buffer, ctx.handle = layout, buffer, handle
        out_rows, out_scales = layout.gather(rows), layout.gather(scales)
        ctx.mark_non_differentiable(out_rows, out_scales)
        return make_carrier(layout.num_rows, rows.shape[1], rows.device), out_rows, out_scales

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return _sum_copies(ctx, grad), None, None, None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        weights: torch.Tensor,
        layout: ExpertLayout,
        buffer: Buffer,
        handle: tuple[Any, ...],
    ) -> torch.Tensor:
        y = y.contiguous()
        ctx.layout, ctx.buffer, ctx.handle = layout, buffer, handle
        ctx.save_for_backward(y, weights)
        out = _combine_input(ctx, y.shape[1], y)
        return ops.reduce_rows([y], layout.slots, weights=weights.contiguous(), out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layout: ExpertLayout = ctx.layout
        y, weights = ctx.saved_tensors
        grad_rows = layout.gather(grad.contiguous()).float()
        grad_y = grad_weights = None
        if ctx.needs_input_grad[1]:
            # One zero behind the last row serves the absent pairs, and an empty layout too.
            dots = torch.cat([(grad_rows * y).sum(-1), grad_rows.new_zeros(1)])
            slots = layout.slots.long()
            out = _combine_input(ctx, slots.shape[1], dots)
            grad_weights = torch.take(dots, torch.where(slots < 0, layout.num_rows, slots), out=out)
        if ctx.needs_input_grad[0]:
            row_weight = weights.new_zeros(layout.num_rows + 1)
            slots = layout.slots.long()
            row_weight[torch.where(slots < 0, layout.num_rows, slots)] = weights
            grad_y = (grad_rows * row_weight[:-1].unsqueeze(1)).to(y.dtype)
        return grad_y, grad_weights, None, None, None
