"""Low-latency calls of one shape on kernels: what stays between them, and the tensors that each dispatch hands out.

All of it is made when a shape is seen first, since the host's time for a call is to stay below that of the kernels:
what a call passes is compared with what is expected in one native call, and the small tensors of many handles are cut
from one slab at a time.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch

from .. import fp8
from .._native import _C, SCALE_FORMATS
from ..layout import num_local_experts
from .low_latency_regions import Launcher, Region, Regions, RegionShape
from .outputs import RowPlan
from .portable_ll import LowLatencyCombine, LowLatencyDispatch

#: What dispatch leaves on src_info: `HandleShape`, and the address of the block that src_info was cut from. (A copy of
#: the tensor has the attribute too, and lies elsewhere.) The block holds two tables by which combine finds each
#: (source, token, k) without a search, and a third one of their weights if these came along; they are in the storage of
#: src_info, so they live as long.
PLACES = "_deep_ep_places"
#: recv_count, src_info, layout_range, and what `PLACES` is for them.
Handle = tuple[torch.Tensor, torch.Tensor, torch.Tensor, "tuple[HandleShape, int]"]
#: Addresses and the number of tokens, as the native classes of inputs give them.
Inputs = tuple[int, ...]
#: Sizes, strides and dtype of a tensor.
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]

_SLAB_BYTES = 4 << 20
_MAX_PARTS = 32
_MAX_STREAMS = 4
#: use_fp8, round_scale and use_ue8m0.
_FLAGS: dict[fp8.ScaleFormat | None, tuple[bool, bool, bool]] = {
    None: (False, False, False),
    "fp32": (True, False, False),
    "pow2": (True, True, False),
    "ue8m0": (True, True, True),
}
_AUTOGRAD_OF_VIEWS = functools.reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(key)
        for key in (
            torch._C.DispatchKey.ADInplaceOrView,
            torch._C.DispatchKey.AutogradCPU,
            torch._C.DispatchKey.AutogradCUDA,
        )
    ),
)


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
        read, launch: of `_C.LowLatencyDispatchInputs` and `_C.LowLatencyDispatchPlan`.
        rows, scales: sizes, strides and dtype of these outputs, for `maker_of`; bf16 rows have no scales.
        row_bytes, dtype_name: of what travels, for the traffic counters.
    """

    region: Region
    read: Callable[..., Inputs | None]
    launch: Callable[..., None]
    shape: HandleShape
    rows: Layout
    scales: Layout | None
    handles: HandleTensors
    row_bytes: int
    dtype_name: str


@dataclass(slots=True, eq=False)
class CombinePlan:
    """Combines of one shape.

    Attributes:
        read, launch: of `_C.LowLatencyCombineInputs` and `_C.LowLatencyCombinePlan`.
        uses_weights: rows are summed with the weights that came with the dispatch.
    """

    region: Region
    read: Callable[..., Inputs | None]
    launch: Callable[..., None]
    row_bytes: int
    uses_weights: bool


class Plans:
    """The plans of the present region, by what differs between calls.

    Args:
        index: of the CUDA device, -1 for the CPU.

    Attributes:
        region: for which there are plans.
        dispatches: those that a call may be like, by M, E, the flags of the scale format, whether weights come along,
            and expert_major.
        combines: likewise, by the shape of the handle, sum_at_home and use_logfmt.
    """

    def __init__(self, regions: Regions, queue: Any, kernels: Launcher, index: int) -> None:
        self._regions, self._queue, self._index = regions, queue, index
        self._rank, self._num_ranks, self._device = kernels.rank, kernels.num_ranks, kernels.device
        self.region: Region | None = None
        self.dispatches: dict[tuple[object, ...], list[DispatchPlan]] = {}
        self.combines: dict[tuple[object, ...], list[CombinePlan]] = {}
        self._dispatch_of: dict[tuple[object, ...], DispatchPlan] = {}
        self._combine_of: dict[tuple[object, ...], CombinePlan] = {}
        self._shapes: dict[tuple[int, ...], HandleShape] = {}

    def clear(self) -> None:
        """Forget all plans."""
        for plans in (self.dispatches, self.combines, self._dispatch_of, self._combine_of):
            plans.clear()

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
            alike = (num_max, num_experts, _FLAGS[scale_format], *layout)
            self.dispatches.setdefault(alike, []).append(plan)
        return plan

    def _dispatch_plan(
        self, region: Region, native: Any, shape: HandleShape, is_int64: bool, scale_format: fp8.ScaleFormat | None
    ) -> DispatchPlan:
        dtype = torch.bfloat16 if scale_format is None else torch.float8_e4m3fn
        num_groups, capacity, hidden = shape.rows
        row_bytes, scales = hidden * dtype.itemsize, None
        if scale_format is not None:
            scales_dtype, columns = fp8.scale_columns(hidden, scale_format)
            row_bytes += 4 * columns
            # Stored with tokens innermost, the order in which grouped GEMMs fetch scales.
            scales = ((num_groups, capacity, columns), (columns * capacity, 1, capacity), scales_dtype)
        inputs = _C.LowLatencyDispatchInputs(
            torch.Tensor,
            self._index,
            shape.numbers[0],
            hidden,
            shape.num_topk,
            is_int64,
            shape.with_weights,
            shape.num_local,
            self._num_ranks,
        )
        return DispatchPlan(
            region,
            inputs.read,
            native.launch,
            shape,
            (tuple(shape.rows), (capacity * hidden, hidden, 1), dtype),
            scales,
            HandleTensors(self._device, native.outputs, shape, self._num_ranks),
            row_bytes,
            str(dtype).removeprefix("torch."),
        )

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
            inputs = _C.LowLatencyCombineInputs(
                torch.Tensor,
                self._index,
                num_groups,
                capacity,
                hidden,
                num_max,
                num_topk,
                is_int64,
                expert_major,
                shape.src_info_at,
                self._num_ranks,
            )
            plan = CombinePlan(region, inputs.read, native.launch, 2 * hidden, uses_weights)
            self._combine_of[key] = plan
            self.combines.setdefault((shape, request.sum_at_home, request.use_logfmt), []).append(plan)
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


class HandleTensors:
    """recv_count, src_info and layout_range of dispatches of one shape, cut from slabs of ordinary memory. By source,
    what a handle has in place of the last two.

    Views of a slab are made for many handles at once, which costs a fraction of making each. As with torch's allocator,
    every part belongs to the stream that was current when its slab was made; a slab lives as long as a tensor on it.
    Nobody changes these tensors in place. Not thread safe.

    Args:
        outputs: `_C.LowLatencyOutputs`, which says where each lies in a part.
    """

    def __init__(self, device: torch.device, outputs: Any, shape: HandleShape, num_ranks: int) -> None:
        self._new, self._shape, self._num_ranks = maker_of(device), shape, num_ranks
        self._outputs = outputs
        self._part_bytes: int = outputs.small_block_bytes
        self._num_parts = max(1, min(_MAX_PARTS, _SLAB_BYTES // self._part_bytes))
        self._parts: dict[int, list[Handle]] = {}

    def take(self, stream: int, captured: bool) -> Handle:
        """Those of the next dispatch, with any contents.

        Args:
            stream: handle of the current stream.
            captured: whether it is being captured into a graph: a replay writes again to what the capture took, so that
                is a block of its own.
        """
        if captured:
            return self._cut(1)[0]
        parts = self._parts.get(stream)
        if not parts:
            if len(self._parts) >= _MAX_STREAMS and stream not in self._parts:
                del self._parts[next(iter(self._parts))]
            parts = self._parts[stream] = self._cut(self._num_parts)
        return parts.pop()

    def _cut(self, num_parts: int) -> list[Handle]:
        # Made in inference mode they could not be changed outside of it, where the next handles may be used.
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._cut(num_parts)
        words = self._new((num_parts * self._part_bytes // 4,), (1,), torch.int32)
        with _plain_views():
            views = self._views(words, num_parts)
        start = words.data_ptr()
        places = [(self._shape, start + i * self._part_bytes) for i in range(num_parts)]
        for src_info, place in zip(views[1], places, strict=True):
            setattr(src_info, PLACES, place)
        return list(zip(*views, places, strict=True))

    def _views(self, words: torch.Tensor, num_parts: int) -> tuple[Sequence[torch.Tensor], ...]:
        """recv_count, src_info and layout_range of all parts."""
        outputs, num_ranks, part = self._outputs, self._num_ranks, self._part_bytes // 4
        num_groups, capacity, _ = self._shape.rows
        counts = words.as_strided((num_parts, num_groups), (part, 1), outputs.recv_count_at // 4).unbind()
        at = self._shape.src_info_at // 4
        if self._shape.expert_major:
            src_infos = words.as_strided((num_parts, num_groups, capacity), (part, capacity, 1), at).unbind()
            longs = words.view(torch.int64)
            ranges = longs.as_strided((num_parts, num_groups, num_ranks), (part // 2, num_ranks, 1)).unbind()
            return counts, src_infos, ranges
        num_topk = self._shape.num_topk
        sizes = (num_parts, num_groups, capacity, num_topk)
        strides = (part, capacity * num_topk, num_topk, 1)
        src_infos = words.as_strided(sizes, strides, at).unbind()
        floats = words.view(torch.float32)
        if self._shape.with_weights:
            return counts, src_infos, floats.as_strided(sizes, strides, outputs.weights_at // 4).unbind()
        return counts, src_infos, floats.as_strided((num_parts, 0), (part, 1)).unbind()


def _plain_views() -> AbstractContextManager[Any]:
    """Views made in here are tensors of their own to autograd, which has no use for these integers and weights: they
    cost a quarter less."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOGRAD_OF_VIEWS)
