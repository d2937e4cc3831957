"""Low-latency calls of one shape on kernels: what stays between them, and the tensors that each dispatch hands out.

All of it is made when a shape is seen first, since the host's time for a call is to stay below that of the kernels:
what a call passes is compared with what is expected in one native call, which makes the outputs too, and the small
tensors of many handles lie on one slab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from .. import fp8
from .._native import _C, SCALE_FORMATS
from ..layout import num_local_experts
from .low_latency_regions import Launcher, Region, Regions, RegionShape
from .outputs import RowPlan
from .portable_ll import LowLatencyCombine, LowLatencyDispatch, received_layouts

#: What dispatch leaves on src_info: `HandleShape`, and the address of the block that src_info was cut from. (A copy of
#: the tensor has the attribute too, and lies elsewhere.) The block holds two tables by which combine finds each
#: (source, token, k) without a search, and a third one of their weights if these came along; they are in the storage of
#: src_info, so they live as long.
PLACES = "_deep_ep_places"
#: src_info, layout_range, M, H and E.
Handle = tuple[torch.Tensor, torch.Tensor, int, int, int]

_SLAB_BYTES = 4 << 20
_MAX_PARTS = 256
#: use_fp8, round_scale and use_ue8m0.
_FLAGS: dict[fp8.ScaleFormat | None, tuple[bool, bool, bool]] = {
    None: (False, False, False),
    "fp32": (True, False, False),
    "pow2": (True, True, False),
    "ue8m0": (True, True, True),
}


@dataclass(slots=True, eq=False)
class HandleShape:
    """What the handles of a dispatch plan have in common.

    Attributes:
        rows: [L, R * M, H]; where rows lie by source [R, M, H].
        numbers: M, H and E, as a handle carries them.
        with_weights: dispatch brings the weights of the tokens as well.
        src_info_at, source_tokens_at, positions_at, weights_at: where src_info and the tables start in a block, in
            bytes; layout_range is at 0. Without weights there is no room for theirs. By source positions and weights
            are what the caller gets in place of src_info and layout_range.
    """

    rows: torch.Size
    num_topk: int
    numbers: tuple[int, int, int]
    with_weights: bool
    expert_major: bool
    num_local: int
    src_info_at: int
    source_tokens_at: int
    positions_at: int
    weights_at: int

    @classmethod
    def of(
        cls,
        num_topk: int,
        num_max_tokens: int,
        hidden: int,
        num_experts: int,
        with_weights: bool,
        expert_major: bool,
        num_ranks: int,
        rank: int,
    ) -> HandleShape:
        num_local = num_local_experts(num_experts, num_ranks, rank)
        outputs = _C.LowLatencyOutputs(num_local, num_ranks, num_max_tokens, num_topk, with_weights, expert_major)
        groups = (num_local, num_ranks * num_max_tokens) if expert_major else (num_ranks, num_max_tokens)
        return cls(
            torch.Size((*groups, hidden)),
            num_topk,
            (num_max_tokens, hidden, num_experts),
            with_weights,
            expert_major,
            num_local,
            outputs.src_info_at,
            outputs.source_tokens_at,
            outputs.positions_at,
            outputs.weights_at,
        )


@dataclass(slots=True, eq=False)
class DispatchPlan:
    """Dispatches of one shape and format.

    Attributes:
        run: of `_C.LowLatencyDispatchCalls`.
    """

    region: Region
    run: Callable[..., Any]


@dataclass(slots=True, eq=False)
class CombinePlan:
    """Combines of one shape.

    Attributes:
        run: of `_C.LowLatencyCombineCalls`.
        uses_weights: rows are summed with the weights that came with the dispatch.
    """

    region: Region
    run: Callable[..., Any]
    uses_weights: bool


class Plans:
    """The plans of the present region, by what differs between calls.

    Args:
        operations: which learns what calls may be like.
        index: of the CUDA device, -1 for the CPU.

    Attributes:
        region: for which there are plans.
    """

    def __init__(
        self, regions: Regions, queue: Any, operations: _C.LowLatencyOperations, kernels: Launcher, index: int
    ) -> None:
        self._regions, self._queue, self._operations, self._index = regions, queue, operations, index
        self._rank, self._num_ranks, self._device = kernels.rank, kernels.num_ranks, kernels.device
        self._new = maker_of(kernels.device)
        self.region: Region | None = None
        self._dispatch_of: dict[tuple[object, ...], DispatchPlan] = {}
        self._combine_of: dict[tuple[object, ...], CombinePlan] = {}
        self._shapes: dict[tuple[int, ...], HandleShape] = {}

    def clear(self) -> None:
        """Forget all plans."""
        self._operations.forget_calls()
        self._dispatch_of.clear()
        self._combine_of.clear()

    def of_dispatch(self, request: LowLatencyDispatch) -> DispatchPlan:
        """The plan of a dispatch, made if there is none.

        Raises:
            ConfigError, PoolExhausted, CommTimeout, PeerError: see `Regions.region_for`.
        """
        x, topk_idx, scale_format = request.x, request.topk_idx, request.scale_format
        num_max, num_experts = request.num_max_tokens, request.num_experts
        hidden, num_topk, is_int64 = x.shape[1], topk_idx.shape[1], topk_idx.dtype == torch.int64
        layout = (request.topk_weights is not None, request.expert_major)
        key = (hidden, num_topk, is_int64, num_max, num_experts, scale_format, *layout)
        plan = self._dispatch_of.get(key)
        if plan is None:
            region = self._region_for(RegionShape(num_max, num_topk, num_experts, hidden))
            # All but the dtype of the indices, which is each rank's own affair.
            agreed = (hidden, num_topk, num_max, num_experts, scale_format, *layout)
            native = _C.LowLatencyDispatchPlan(
                region.peers,
                self._queue,
                _signature("low_latency_dispatch", *agreed),
                num_topk,
                is_int64,
                num_experts,
                num_max,
                hidden,
                -1 if scale_format is None else SCALE_FORMATS[scale_format],
                *layout,
            )
            shape = self._handle_shape(num_topk, num_max, hidden, num_experts, *layout)
            plan = self._dispatch_of[key] = self._dispatch_plan(region, native, shape, is_int64, scale_format)
        return plan

    def _dispatch_plan(
        self, region: Region, native: Any, shape: HandleShape, is_int64: bool, scale_format: fp8.ScaleFormat | None
    ) -> DispatchPlan:
        num_groups, capacity, hidden = shape.rows
        rows, *scales = received_layouts(num_groups, capacity, hidden, scale_format)
        dtype = rows[2]
        row_bytes = hidden * dtype.itemsize + sum(4 * columns for (_, _, columns), _, _ in scales)
        calls = _C.LowLatencyDispatchCalls(
            self._operations,
            torch.Tensor,
            self._index,
            shape.numbers[0],
            hidden,
            shape.num_topk,
            is_int64,
            shape.with_weights,
            shape.num_local,
            self._num_ranks,
            native,
            region,
            row_bytes,
            str(dtype).removeprefix("torch."),
            self._new,
            handles_of(self._device, native.outputs, shape, self._num_ranks),
            rows,
            scales[0] if scales else None,
        )
        num_max, _, num_experts = shape.numbers
        layout = (shape.with_weights, shape.expert_major)
        self._operations.add_dispatch(num_max, num_experts, *_FLAGS[scale_format], *layout, calls.try_run)
        return DispatchPlan(region, calls.run)

    def of_combine(self, request: LowLatencyCombine, with_weights: bool) -> CombinePlan:
        """The plan of a combine, made if there is none.

        Args:
            with_weights: the handle has those that came with the dispatch.

        Raises:
            ConfigError, PoolExhausted, CommTimeout, PeerError: see `Regions.region_for`.
        """
        hidden, num_topk = request.x.shape[2], request.topk_idx.shape[1]
        is_int64 = request.topk_idx.dtype == torch.int64
        num_max, num_experts = request.num_max_tokens, request.num_experts
        expert_major = request.expert_major
        shape = self._handle_shape(num_topk, num_max, hidden, num_experts, with_weights, expert_major)
        key = (shape, is_int64, request.sum_at_home, request.use_logfmt)
        plan = self._combine_of.get(key)
        if plan is None:
            region = self._region_for(RegionShape(num_max, num_topk, num_experts, hidden))
            # A rank that has weights sums before it has heard of the homes: one that asks for rows must be told apart.
            # Rows by source are sums already.
            uses_weights = with_weights and expert_major and not (request.sum_at_home or request.use_logfmt)
            agreed = (hidden, num_topk, num_max, num_experts, uses_weights, request.use_logfmt, expert_major)
            native = _C.LowLatencyCombinePlan(
                region.peers,
                self._queue,
                _signature("low_latency_combine", *agreed),
                num_topk,
                is_int64,
                num_experts,
                num_max,
                hidden,
                request.sum_at_home,
                request.use_logfmt,
                expert_major,
            )
            num_groups, capacity, _ = shape.rows
            calls = _C.LowLatencyCombineCalls(
                self._operations,
                torch.Tensor,
                self._index,
                num_groups,
                capacity,
                hidden,
                num_max,
                num_topk,
                is_int64,
                expert_major,
                self._num_ranks,
                (
                    shape.src_info_at,
                    shape.source_tokens_at,
                    shape.positions_at,
                    shape.weights_at if uses_weights else -1,
                ),
                native,
                region,
                2 * hidden,
                self._new,
                ((hidden, 1), torch.bfloat16),
                torch.int64,
            )
            plan = self._combine_of[key] = CombinePlan(region, calls.run, uses_weights)
            self._operations.add_combine(shape, request.sum_at_home, request.use_logfmt, calls.try_run)
        return plan

    def _handle_shape(
        self, num_topk: int, num_max: int, hidden: int, num_experts: int, with_weights: bool, expert_major: bool
    ) -> HandleShape:
        key = (num_topk, num_max, hidden, num_experts, with_weights, expert_major)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = HandleShape.of(*key, self._num_ranks, self._rank)
        return shape

    def _region_for(self, shape: RegionShape) -> Region:
        """`Regions.region_for`; plans of another region are forgotten."""
        region = self._regions.region_for(shape)
        if region is not self.region:
            self.clear()
            self.region = region
        return region


def _signature(operation: str, *shapes: object) -> int:
    """A number that differs wherever ranks disagree."""
    return RowPlan((), "").signature(operation, *shapes)


def maker_of(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
    """A function for a new tensor of these sizes, strides and dtype, with any contents; of a CUDA device, which must be
    the current one."""
    # Torch's compiler has a function of its own for this, at half the host time of torch.empty_strided.
    direct = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if direct is not None:
        return cast(Callable[..., torch.Tensor], direct)
    return lambda sizes, strides, dtype: torch.empty_strided(sizes, strides, dtype=dtype, device=device)


def view_maker() -> Callable[[torch.Tensor, tuple[int, ...], tuple[int, ...], int], torch.Tensor]:
    """A function for a tensor of these sizes, strides and offset on the memory of another, of the same dtype."""
    # Torch's compiler has a function of its own for this too, at half the host time of as_strided. What it makes is no
    # view to autograd, which has no use for these integers and weights.
    direct = getattr(torch._C._dynamo.guards, "_reinterpret_tensor", None)
    if direct is not None:
        return cast(Callable[..., torch.Tensor], direct)
    return lambda tensor, sizes, strides, offset: tensor.as_strided(sizes, strides, offset)


def handles_of(device: torch.device, outputs: Any, shape: HandleShape, num_ranks: int) -> _C.LowLatencyHandles:
    """recv_count and handles for dispatches of one shape, on slabs of ordinary memory.

    A slab saves calls of torch's allocator. As with that, every part belongs to the stream that was current when its
    slab was made; a slab lives as long as a tensor on it. Nobody changes these tensors in place. Not thread safe.

    Args:
        outputs: `_C.LowLatencyOutputs`, which says where each lies in a part.
    """
    new, part_bytes = maker_of(device), outputs.small_block_bytes
    num_groups, capacity, _ = shape.rows
    words = part_bytes // 4
    count: tuple[Any, ...] = ((num_groups,), (1,), outputs.recv_count_at // 4, words)
    src_info: tuple[Any, ...]
    ranges: tuple[Any, ...]
    if shape.expert_major:
        dtype = torch.int64
        src_info = ((num_groups, capacity), (capacity, 1), shape.src_info_at // 4, words)
        ranges = ((num_groups, num_ranks), (num_ranks, 1), 0, part_bytes // 8)
    else:
        dtype = torch.float32
        tables = ((num_groups, capacity, shape.num_topk), (capacity * shape.num_topk, shape.num_topk, 1))
        src_info = (*tables, shape.src_info_at // 4, words)
        ranges = (*tables, shape.weights_at // 4, words) if shape.with_weights else ((0,), (1,), 0, words)

    def make_slab(num_parts: int) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        slab = new((num_parts * words,), (1,), torch.int32)
        return slab.data_ptr(), slab, slab, slab.view(dtype)

    num_parts = max(1, min(_MAX_PARTS, _SLAB_BYTES // part_bytes))
    layouts = [count, src_info, ranges]
    return _C.LowLatencyHandles(make_slab, view_maker(), num_parts, part_bytes, layouts, shape, PLACES, shape.numbers)
