"""Low-latency calls of one shape on kernels: what stays between them, and the tensors that each dispatch hands out.

All of it is made when a shape is seen first, since the host's time for a call is to stay below that of the kernels:
outputs are copies of empty models, and the small tensors of many handles are cut from one slab at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import fp8
from .._native import _C
from ..layout import num_local_experts
from .low_latency_regions import Region

#: What dispatch leaves on src_info: `HandleShape`, and the address of the block that src_info was cut from. (A copy of
#: the tensor has the attribute too, and lies elsewhere.) The block holds two tables by which combine finds each
#: (source, token, k) without a search, and a third one of their weights if these came along; they are in the storage of
#: src_info, so they live as long.
PLACES = "_deep_ep_places"
#: recv_count, src_info, layout_range, and the address of their block.
Handle = tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]

_SLAB_BYTES = 2 << 20
_MAX_PARTS = 16
_MAX_STREAMS = 4


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
        launch: of `_C.LowLatencyDispatchPlan`.
        rows_like, scales_like: models of the outputs, without memory of their own.
        row_bytes, dtype_name: of what travels, for the traffic counters.
    """

    region: Region
    launch: Callable[..., None]
    shape: HandleShape
    rows_like: torch.Tensor
    scales_like: torch.Tensor | None
    handles: HandleTensors
    row_bytes: int
    dtype_name: str


@dataclass(slots=True, eq=False)
class CombinePlan:
    """Combines of one shape.

    Attributes:
        launch: of `_C.LowLatencyCombinePlan`.
        uses_weights: rows are summed with the weights that came with the dispatch.
    """

    region: Region
    launch: Callable[..., None]
    row_bytes: int
    uses_weights: bool


def dispatch_plan(
    region: Region,
    native: Any,
    shape: HandleShape,
    num_ranks: int,
    scale_format: fp8.ScaleFormat | None,
    device: torch.device,
) -> DispatchPlan:
    """The plan of dispatches whose handles have this shape."""
    dtype = torch.bfloat16 if scale_format is None else torch.float8_e4m3fn
    num_groups, capacity, hidden = shape.rows
    row_bytes, scales_like = hidden * dtype.itemsize, None
    if scale_format is not None:
        scales_dtype, columns = fp8.scale_columns(hidden, scale_format)
        row_bytes += 4 * columns
        # Stored with tokens innermost, the order in which grouped GEMMs fetch scales.
        strides = (columns * capacity, 1, capacity)
        scales_like = empty_model((num_groups, capacity, columns), strides, scales_dtype, device)
    return DispatchPlan(
        region,
        native.launch,
        shape,
        empty_model(shape.rows, (capacity * hidden, hidden, 1), dtype, device),
        scales_like,
        HandleTensors(device, native.outputs, shape, num_ranks),
        row_bytes,
        str(dtype).removeprefix("torch."),
    )


def empty_model(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor without memory, for `torch.empty_like`: the cheapest way to a new tensor of any shape and strides."""
    with torch.inference_mode(False):
        model = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    model.untyped_storage().resize_(0)
    return model


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
        self._device, self._shape, self._num_ranks = device, shape, num_ranks
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
        outputs, num_ranks = self._outputs, self._num_ranks
        num_groups, capacity, _ = self._shape.rows
        # Made in inference mode they could not be changed outside of it, where the next handles may be used.
        with torch.inference_mode(False):
            words = torch.empty(num_parts * self._part_bytes // 4, dtype=torch.int32, device=self._device)
            part = self._part_bytes // 4
            counts = words.as_strided((num_parts, num_groups), (part, 1), outputs.recv_count_at // 4).unbind()
            at = self._shape.src_info_at // 4
            if self._shape.expert_major:
                src_infos = words.as_strided((num_parts, num_groups, capacity), (part, capacity, 1), at).unbind()
                longs = words.view(torch.int64)
                ranges = longs.as_strided((num_parts, num_groups, num_ranks), (part // 2, num_ranks, 1)).unbind()
            else:
                num_topk = self._shape.num_topk
                sizes = (num_parts, num_groups, capacity, num_topk)
                strides = (part, capacity * num_topk, num_topk, 1)
                src_infos = words.as_strided(sizes, strides, at).unbind()
                floats = words.view(torch.float32)
                if self._shape.with_weights:
                    ranges = floats.as_strided(sizes, strides, outputs.weights_at // 4).unbind()
                else:
                    ranges = floats.as_strided((num_parts, 0), (part, 1)).unbind()
        block = words.data_ptr()
        parts = []
        for count, src_info, layout_range in zip(counts, src_infos, ranges, strict=True):
            setattr(src_info, PLACES, (self._shape, block))
            parts.append((count, src_info, layout_range, block))
            block += self._part_bytes
        return parts


def is_plain(tensor: Any, dtype: torch.dtype, shape: tuple[int, ...], index: int) -> bool:
    """Whether kernels can take an optional tensor of the caller as it is."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == shape
        and tensor.dtype is dtype
        and tensor.get_device() == index
        and tensor.is_contiguous()
        and tensor.data_ptr() % 16 == 0
    )
