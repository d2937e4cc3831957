"""Where the rows of a dispatch land, and the tensors that they become.

Outputs have a place in the pool, which peers write, or, where it is full, in staging memory, from where one copy on the
SMs of the call moves them. Only an uncached dispatch can make the pool grow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from .. import fp8
from .._native import _C, ELEMENT_TYPES
from ..errors import PoolExhausted
from .kernel_state import KernelState
from .outputs import SRC_IDX, Field, HandleMemory, Landing, RowPlan, aligned
from .portable import DispatchResult

_UNIT = (1,)
#: What DLPack calls elements; only those that no other type of torch shares its name with.
_DLPACK_TYPES = {
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float8_e4m3fn: (10, 8),
    torch.float8_e5m2: (12, 8),
    torch.int32: (0, 32),
}
_FORMATS: dict[fp8.ScaleFormat | None, int] = {None: 0, "fp32": 0, "pow2": 1, "ue8m0": 2}


def memory_of(result: DispatchResult) -> tuple[torch.Tensor, ...]:
    """One tensor on each storage of what a dispatch brought: see `RowPlan.tensors` and `DispatchOutputs._make_handle`.

    Received tensors share a block, those of the handle that are this rank's own another. src_idx lies with neither, and
    is_token_in_rank is the caller's, who may have made it on any stream, and now gets it with the handle.
    """
    if result.handle is None:
        return (result.rows,)
    prefix, _, _, src_idx, in_rank, _ = result.handle
    return result.rows, prefix, src_idx, in_rank


class DispatchOutputs(KernelState):
    """A part of `CudaKernels`."""

    _domain: _C.PeerDomain
    _plans: dict[object, RowPlan]
    #: Plans that `RowPlan.read` serves, by scale format, and whether scales and top-k are given.
    _alike: dict[tuple[fp8.ScaleFormat | None, bool, bool], list[RowPlan]]
    _staging_refused: int
    _last_handle: tuple[int, int, int] | None  # see `HandleMemory.key`
    _next_handle: HandleMemory | None  # made ahead
    _flat: tuple[torch.UntypedStorage, torch.Tensor] | None = None  # all of the last handle's storage, as int32
    _view: Callable[..., torch.Tensor]  # see `view_maker`
    _layouts: _C.LayoutCalls

    def _plan(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None = None,
        scale_format: fp8.ScaleFormat | None = None,
        topk_idx: torch.Tensor | None = None,
    ) -> RowPlan:
        """What a dispatch of these brings; with ``scale_format`` the rows are quantised on the way."""
        of_scales = None if scales is None else (scales.dtype, scales.shape[1])
        of_topk = None if topk_idx is None else (topk_idx.dtype, topk_idx.shape[1])
        key = (rows.dtype, rows.shape[1], of_scales, scale_format, of_topk)
        plan = self._plans.get(key)
        if plan is None:
            hidden, given_scales = rows.shape[1], of_scales
            fields = [Field.of("rows", torch.float8_e4m3fn if scale_format else rows.dtype, hidden)]
            if scale_format is not None:
                of_scales = fp8.scale_columns(hidden, scale_format)
            if of_scales is not None:
                fields.append(Field.of("scales", *of_scales))
            if of_topk is not None:
                fields += [Field.of("topk_idx", *of_topk), Field.of("topk_weights", torch.float32, of_topk[1])]
            native = self._domain.dispatch_plan(
                fields[0].row_bytes,
                0 if of_scales is None else of_scales[1],
                0 if of_topk is None else of_topk[1],
                of_topk is not None and of_topk[0] is torch.int64,
                -1 if scale_format is None else ELEMENT_TYPES[rows.dtype],
                _FORMATS[scale_format],
            )
            inputs = self._inputs(rows.dtype, hidden, given_scales, of_topk)
            kernel = "dispatch_rows" if scale_format is None else "dispatch_rows_fp8"
            plan = self._plans[key] = RowPlan(fields, repr(key), self.device, native, inputs, kernel)
            if inputs is not None:
                alike = (scale_format, given_scales is not None, of_topk is not None)
                self._alike.setdefault(alike, []).append(plan)
        return plan

    def _inputs(
        self,
        dtype: torch.dtype,
        hidden: int,
        of_scales: tuple[torch.dtype, int] | None,
        of_topk: tuple[torch.dtype, int] | None,
    ) -> _C.DispatchInputs | None:
        """What looks at the arguments of such dispatches; None if it could take others for them."""
        scales_dtype, num_scales = of_scales or (torch.float32, 0)
        topk_dtype, num_topk = of_topk or (torch.int64, 0)
        rows_type, scales_type = _DLPACK_TYPES.get(dtype), _DLPACK_TYPES.get(scales_dtype)
        if rows_type is None or scales_type is None:
            return None
        return _C.DispatchInputs(
            torch.Tensor,
            -1 if self.device.index is None else self.device.index,
            self.num_ranks,
            rows_type,
            hidden,
            scales_type,
            num_scales,
            num_topk,
            topk_dtype is torch.int64,
        )

    def alike(self, scale_format: fp8.ScaleFormat | None, scales: object, topk_idx: object) -> Sequence[RowPlan]:
        """Plans that a dispatch of these may be like."""
        return self._alike.get((scale_format, scales is not None, topk_idx is not None), ())

    # A place.

    def _land(self, plan: RowPlan, capacity: int, *, with_src_idx: bool, may_stage: bool = True) -> Landing | None:
        """Memory for ``capacity`` rows: of the pool, else staging memory, else None."""
        starts, total = plan.starts(capacity)
        if total == 0:
            return Landing(0, (*(-1 if at < 0 else 0 for at in plan.offsets(0, starts)), 0, 0), starts)  # type: ignore[arg-type]
        src: tuple[torch.UntypedStorage, int] | None = None
        taken = self.memory.take(total, self._stream, self._capturing)
        if taken is not None and with_src_idx:
            src = self._sources.take(capacity * SRC_IDX.row_bytes, self._stream, self._capturing)
            if src is None:
                taken = None
        if taken is not None:
            block, base = taken
            src_at = -1
            if src is not None:
                src_at = src[0].data_ptr() + src[1] - self.memory.bases[self.rank]
            return Landing(capacity, (*plan.offsets(base, starts), src_at, capacity), starts, block, src)
        num_bytes = plan.num_bytes(capacity, with_src_idx=with_src_idx)
        self.note_missing(num_bytes)
        if not may_stage or num_bytes > self.memory.staging_bytes:
            return None
        if self._capturing:
            self.memory.lease_staging()
        base = self.memory.staging_offset
        src_at = base + total if with_src_idx else -1
        return Landing(capacity, (*plan.offsets(base, starts), src_at, capacity), starts, staged_at=base)

    def _land_together(self, plan: RowPlan, num_rows: int, most: int) -> Landing:
        """Memory for the rows, which all ranks grow if any of them has too little. Collective.

        Args:
            most: rows of the rank that receives the most.

        Raises:
            PoolExhausted: on all ranks; some rank has no memory for its rows, not even in staging.
        """
        landing = self._land(plan, num_rows, with_src_idx=True, may_stage=False)
        # Twice what is missing now: a pool that is full once will be again.
        wish = 2 * self._missing + (32 << 20) if self._missing else 0
        wish = max(self.memory.rendezvous("symmetric memory that is missing", wish))
        if wish:
            self._is_full = self.memory.grow(wish) == 0
        self._missing = 0
        landing = landing or self._land(plan, num_rows, with_src_idx=True)
        if any(self.memory.rendezvous("room for the rows of a dispatch", landing is None)):
            self.memory.reserve_staging(plan.num_bytes(most, with_src_idx=True))
            landing = landing or self._land(plan, num_rows, with_src_idx=True)
        if landing is None:
            raise self._exhausted(plan, num_rows)
        return landing

    def _reserve_staging(self, wanted: int) -> None:
        """Collective, with the same number on all ranks."""
        try:
            self.memory.reserve_staging(wanted + wanted // 8, within_limit=True)
        except PoolExhausted:  # on all ranks alike; there are ways without staging
            self._staging_refused = wanted

    def _exhausted(self, plan: RowPlan, num_rows: int) -> PoolExhausted:
        return PoolExhausted(
            f"dispatch: no room in symmetric memory for {num_rows} rows of {plan.row_bytes} bytes: "
            f"{self.memory.usage()}. Drop received tensors earlier, or construct the buffer with a larger "
            "num_nvl_bytes or max_pool_bytes"
        )

    def _mark_unused(self, plan: RowPlan, landing: Landing, sms: int) -> None:
        """Fill what tells rows apart from padding with -1, before peers write the rows that exist."""
        base = self.memory.bases[self.rank]
        fills = [(landing.offsets[4], SRC_IDX.row_bytes)]
        fills += [(landing.offsets[2], field.row_bytes) for field in plan.fields if field.name == "topk_idx"]
        if landing.capacity:
            self._copy([(0, base + at, aligned(landing.capacity * row_bytes)) for at, row_bytes in fills], sms)

    # Its tensors.

    def _bytes(self, num_bytes: int) -> tuple[torch.UntypedStorage, int]:
        """Ordinary memory: the storage, and the offset in it."""
        part = self._small.take(num_bytes, self._stream, self._capturing)
        if part is None:  # torch raises when there is none
            raise PoolExhausted(f"no memory for {num_bytes} bytes of a handle")
        return part

    def _take_handle(self, num_tokens: int, num_channels: int) -> HandleMemory:
        """Memory for a new handle."""
        key, made = (num_tokens, num_channels, self._stream), self._next_handle
        if made is None or made.key != key or self._capturing:
            return self._make_handle(key)
        self._next_handle = None
        return made

    @functools.cached_property
    def _prepare_layout(self) -> Callable[[int], None]:
        return self._layouts.prepare  # looked up once: each time makes an object

    def _prepare(self, key: tuple[int, int, int]) -> None:
        """Make what the next layout and dispatch need, if they are like the last two; while the device counts.

        Args:
            key: see `HandleMemory`.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._prepare(key)
        try:
            self._prepare_layout(self._stream)
            if self._last_handle == key and (self._next_handle is None or self._next_handle.key != key):
                self._next_handle = self._make_handle(key)
        except RuntimeError:  # out of memory: the call that needs it says so, for this one is under way
            pass
        self._last_handle = key
        return None

    def _make_handle(self, key: tuple[int, int, int]) -> HandleMemory:
        if torch.is_inference_mode_enabled():  # whose tensors are of less use outside
            with torch.inference_mode(False):
                return self._make_handle(key)
        num_tokens, num_channels, _ = key
        num_ranks = self.num_ranks
        # Prefix matrix [R, R], two channel matrices [R, C], heads [T, R].
        matrix, channels = num_ranks * num_ranks, num_ranks * num_channels
        sent_at, received_at, heads_at = matrix, matrix + channels, matrix + 2 * channels
        storage, start = self._bytes(4 * (heads_at + num_tokens * num_ranks))
        base = storage.data_ptr() + start
        if self._flat is None or self._flat[0] is not storage:
            self._flat = (storage, self._int32.data.set_(storage, 0, (storage.nbytes() // 4,), _UNIT))
        flat, view, first = self._flat[1], self._view, start // 4
        if self._capturing:
            self._flat = None  # the storage belongs to the graph
        by_rank, by_channel = (num_ranks, 1), (num_channels, 1)
        return HandleMemory(
            key,
            (base, base + 4 * sent_at, base + 4 * received_at, base + 4 * heads_at),
            (
                view(flat, (num_ranks, num_ranks), by_rank, first),
                view(flat, (num_ranks, num_channels), by_channel, first + sent_at),
                view(flat, (num_ranks, num_channels), by_channel, first + received_at),
                view(flat, (num_tokens, num_ranks), by_rank, first + heads_at),
            ),
        )

    @staticmethod
    def _result(
        plan: RowPlan, tensors: list[torch.Tensor], memory: HandleMemory, in_rank: torch.Tensor
    ) -> DispatchResult:
        """What an uncached dispatch brought, without the counts. The last of the tensors is src_idx."""
        prefix, sent, received, head = memory.tensors
        handle = (prefix, sent, received, tensors[-1], in_rank, head)
        return DispatchResult(tensors[0], *plan.named(tensors), [], handle)

    def _tensors(self, plan: RowPlan, landing: Landing, num_rows: int) -> list[torch.Tensor] | None:
        """The tensors of rows of a landing in the pool, in the plan's order, and src_idx behind them if it has one.

        None elsewhere; `_unstage` makes them.
        """
        if landing.block is None:
            return None
        tensors = plan.tensors(landing.block, landing.capacity, num_rows)
        if landing.src is not None:
            storage, start = landing.src
            tensors.append(self._int32.data.set_(storage, start // 4, (num_rows,), _UNIT))
        return tensors

    def _unstage(
        self, plan: RowPlan, landing: Landing, num_rows: int, sms: int, *, with_src_idx: bool
    ) -> list[torch.Tensor]:
        """`_tensors` of the first ``num_rows`` rows of what has landed in staging memory, copied out of it."""
        if num_rows == 0:
            fields = (*plan.fields, SRC_IDX) if with_src_idx else plan.fields
            shapes = [(0,) if field is SRC_IDX else (0, field.width) for field in fields]
            return [
                torch.empty(shape, dtype=field.dtype, device=self.device)
                for shape, field in zip(shapes, fields, strict=True)
            ]
        starts, total = plan.starts(num_rows)
        block = torch.UntypedStorage(total, device=self.device)
        staged, to = self.memory.bases[self.rank] + landing.staged_at, block.data_ptr()
        copies = [
            (staged + source, to + target, aligned(num_rows * field.row_bytes))
            for field, source, target in zip(plan.fields, landing.starts, starts, strict=True)
        ]
        src = None
        if with_src_idx:
            src_bytes = aligned(num_rows * SRC_IDX.row_bytes)
            src = self._bytes(src_bytes)
            copies.append((self.memory.bases[self.rank] + landing.offsets[4], src[0].data_ptr() + src[1], src_bytes))
        self._copy(copies, sms)
        tensors = self._tensors(plan, Landing(num_rows, landing.offsets, starts, block, src), num_rows)
        return tensors or []
