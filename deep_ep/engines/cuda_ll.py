"""Low-latency operations on the NVLink engine: one launch each, or two with a receive hook, and no host wait.

Peers write into a region, one symmetric block a rank, of which the kernels keep two sets (`csrc/layout/
low_latency_layout.h`). The ranks reserve it together at the first call and again when a call needs a larger one;
after that nothing is allocated but the outputs, which are ordinary memory of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from .. import fp8
from .._native import _C, SCALE_FORMATS
from ..errors import ConfigError, PeerError, PoolExhausted
from ..layout import num_local_experts
from .arena import Arena
from .outputs import RowPlan
from .portable_ll import LowLatencyCombine, LowLatencyDispatch, LowLatencyOutput

_DISPATCH, _COMBINE = 0, 1  # LowLatencyKind of csrc/layout/low_latency_layout.h
_WHOLE, _SEND, _RECEIVE = 0, 1, 2  # LowLatencyPart of csrc/kernels/low_latency_launch.h
_MAX_OUTSTANDING = 2
_NUM_SETS = 2
_ALL_SMS = 1 << 30
_LIMITS: dict[str, int] = _C.LOW_LATENCY_LIMITS
#: Where combine finds each (source, token, k) without a search: dispatch leaves on src_info its number of selections,
#: and two addresses. They lie in the storage of that tensor, so they live as long.
PLACES = "_deep_ep_places"
_NO_PLACES = (0, 0, 0)
_TICKET_BYTES = 8
_UNIT = (1,)


class Launcher(Protocol):
    """What this module uses of `CudaKernels`."""

    memory: Any
    device: torch.device
    rank: int
    num_ranks: int
    launches: dict[str, int]

    @property
    def domain(self) -> Any: ...
    def enter(self, stream: int | None = None) -> tuple[int, bool]: ...
    def leave(self, stream: int, capturing: bool) -> None: ...
    def blocks(self, num_sms: int) -> int: ...
    def check(self) -> None: ...


class RegionShape(NamedTuple):
    """The largest call that a region takes: tokens a rank, selections a token, experts, and columns."""

    num_max_tokens: int
    num_topk: int
    num_experts: int
    hidden: int

    def covers(self, other: RegionShape) -> bool:
        """Whether a call of this other shape fits."""
        return all(have >= need for have, need in zip(self, other, strict=True))

    def union(self, other: RegionShape) -> RegionShape:
        """The smallest shape that covers both."""
        return RegionShape(*map(max, self, other))

    def num_bytes(self, num_ranks: int) -> int:
        """Of a rank's region."""
        total: int = _C.low_latency_layout(num_ranks, *self)["total"]
        return total


@dataclass(slots=True, eq=False)
class Region:
    """A symmetric block that operations use.

    Attributes:
        peers: `_C.LowLatencyPeers`.
        offset: of the own block in the heap.
        num_pending: operations of this rank whose hook has not been called.
        is_leased: a captured graph uses it, so it stays until the buffer is destroyed.
    """

    shape: RegionShape
    peers: Any
    offset: int
    num_pending: int = 0
    is_leased: bool = False


@dataclass(slots=True, eq=False)
class _DispatchPlan:
    """What does not change between dispatches of the same shapes. Starts are in elements of their tensors."""

    region: Region
    native: Any
    num_topk: int
    rows_block_bytes: int
    small_block_bytes: int
    count_start: int
    src_info_start: int
    count_shape: tuple[int]
    src_info_shape: tuple[int, int]
    src_info_stride: tuple[int, int]
    ranges_shape: tuple[int, int]
    ranges_stride: tuple[int, int]
    places: tuple[int, int]  # bytes from the start of the small block
    new_rows: Callable[[int], torch.Tensor]
    rows_shape: tuple[int, int, int]
    rows_stride: tuple[int, int, int]
    new_scales: Callable[[int], torch.Tensor] | None
    scales_start: int
    scales_shape: tuple[int, int, int]
    scales_stride: tuple[int, int, int]


@dataclass(slots=True)
class _Outstanding:
    """Operations of a kind, by their number in the order of the calls."""

    num_calls: int = 0
    pending: set[int] = field(default_factory=set)


class LowLatencyKernels:
    """Launches the low-latency kernels of one buffer. By one thread at a time, under the engine's lock.

    Args:
        kernels: the buffer's other kernels: stream order, failures and the share of SMs are common.
        lock: the engine's lock, which receive hooks take.
        mask_after_s: seconds after which a rank that does not come is masked, so that the others go on without it; 0:
            it is a failure, after the buffer's timeout.

    Attributes:
        masked: int32 [R] on the device; not 0 for ranks that are left out. Kernels set it as well.
    """

    def __init__(self, kernels: Launcher, lock: AbstractContextManager[Any], mask_after_s: float = 0.0) -> None:
        self._kernels, self._lock, self._mask_after_s = kernels, lock, mask_after_s
        self.device, self.rank, self.num_ranks = kernels.device, kernels.rank, kernels.num_ranks
        self.masked = torch.zeros(self.num_ranks, dtype=torch.int32, device=self.device)
        self._waits = torch.zeros((2, self.num_ranks), dtype=torch.int64, device=self.device)
        self._region: Region | None = None
        self._retired: list[Region] = []
        self._outstanding = (_Outstanding(), _Outstanding())
        self._plans: dict[tuple[object, ...], _DispatchPlan] = {}
        self._combine_plans: dict[tuple[object, ...], tuple[Region, Any]] = {}
        self._small = Arena.ordinary(self.device)
        self._typed: tuple[torch.UntypedStorage, torch.Tensor, torch.Tensor] | None = None
        empty = torch.empty(0, device=self.device)
        self._new = {
            dtype: empty.to(dtype).new_empty
            for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int32, torch.int64)
        }

    # What is served.

    def serves(
        self, x: torch.Tensor, num_topk: int, num_max_tokens: int, num_experts: int, use_fp8: bool = False
    ) -> bool:
        """Whether the kernels take rows like these. The same on all ranks, which pass the same kinds of tensors.

        Args:
            x: the tokens of a dispatch [T, H] or the rows of a combine [L, R * M, H], bf16.
        """
        hidden = x.shape[-1]
        return (
            x.device == self.device
            and x.dtype is torch.bfloat16
            and hidden > 0
            and hidden % (fp8.TILE if use_fp8 else 8) == 0
            and 0 < num_topk <= _LIMITS["topk"]
            and 0 < num_max_tokens <= _LIMITS["tokens"]
            and num_max_tokens * self.num_ranks <= _LIMITS["packed_rows"]
            and num_experts <= _LIMITS["experts"]
            and -(-num_experts // self.num_ranks) <= _LIMITS["local_experts"]
        )

    # Dispatch.

    def dispatch(
        self, request: LowLatencyDispatch, with_hook: bool
    ) -> tuple[LowLatencyOutput, Callable[[], None] | None]:
        """Send tokens and receive those of all ranks, on the current stream.

        Args:
            request: checked arguments that `serves` accepts; tensors are contiguous. Expert numbers are checked on the
                device: one outside the experts is a failure that a later call or `check` raises.
            with_hook: only send; the function returned receives, on the stream that was current here.

        Returns:
            the outputs, whose rows beyond ``count`` are left as they are, and the function or None.

        Raises:
            ConfigError: too many operations outstanding, or the region would have to grow during graph capture.
            PoolExhausted, CommTimeout, PeerError: the region could not be reserved, or an earlier failure.
        """
        kernels = self._kernels
        kernels.check()
        x, topk_idx = request.x, request.topk_idx
        if x.data_ptr() % 16 != 0:
            x = x.clone()
        stream, capturing = kernels.enter()
        try:
            number = self._count_call(_DISPATCH, "low_latency_dispatch")
            plan = self._dispatch_plan(request, capturing)
            output, rows, small = self._dispatch_outputs(plan, stream, capturing)
            stats, waits = request.recv_stats, request.wait_stats
            arguments = (
                x.data_ptr(),
                topk_idx.data_ptr(),
                x.shape[0],
                rows.data_ptr(),
                small,
                0 if stats is None else stats.data_ptr(),
                0 if waits is None else waits.data_ptr(),
            )
            self._launch(plan.native, "low_latency_dispatch", arguments, _SEND if with_hook else _WHOLE, stream)
        finally:
            kernels.leave(stream, capturing)
        if not with_hook:
            return output, None
        # The region, the outputs and what is added to must outlive the send.
        kept = (output, stats, waits)
        return output, self._hook(_DISPATCH, number, plan.region, plan.native, arguments, stream, kept)

    def _dispatch_plan(self, request: LowLatencyDispatch, capturing: bool) -> _DispatchPlan:
        x, topk_idx = request.x, request.topk_idx
        hidden, num_topk = x.shape[1], topk_idx.shape[1]
        key = (hidden, num_topk, topk_idx.dtype, request.num_max_tokens, request.num_experts, request.scale_format)
        plan = self._plans.get(key)
        if plan is None or plan.region is not self._region:
            shape = RegionShape(request.num_max_tokens, num_topk, request.num_experts, hidden)
            plan = self._plans[key] = self._make_dispatch_plan(request, self.region_for(shape, capturing))
        if capturing:
            plan.region.is_leased = True
        return plan

    def _make_dispatch_plan(self, request: LowLatencyDispatch, region: Region) -> _DispatchPlan:
        hidden, num_topk, idx_dtype = request.x.shape[1], request.topk_idx.shape[1], request.topk_idx.dtype
        scale_format, num_max, num_experts = request.scale_format, request.num_max_tokens, request.num_experts
        num_local, capacity = num_local_experts(num_experts, self.num_ranks, self.rank), self.num_ranks * num_max
        # The dtype of the indices is each rank's own affair.
        signature = _signature("low_latency_dispatch", hidden, num_topk, num_max, num_experts, scale_format)
        native = _C.LowLatencyDispatchPlan(
            region.peers,
            signature,
            num_topk,
            idx_dtype == torch.int64,
            num_experts,
            num_max,
            hidden,
            -1 if scale_format is None else SCALE_FORMATS[scale_format],
        )
        outputs = native.outputs
        plan = _DispatchPlan(
            region,
            native,
            num_topk,
            outputs.rows_block_bytes,
            outputs.small_block_bytes,
            outputs.recv_count_at // 4,
            outputs.src_info_at // 4,
            (num_local,),
            (num_local, capacity),
            (capacity, 1),
            (num_local, self.num_ranks),
            (self.num_ranks, 1),
            (outputs.source_tokens_at, outputs.positions_at),
            self._new[torch.bfloat16 if scale_format is None else torch.float8_e4m3fn],
            (num_local, capacity, hidden),
            (capacity * hidden, hidden, 1),
            None,
            0,
            (0, 0, 0),
            (0, 0, 0),
        )
        if scale_format is not None:
            dtype, columns = fp8.scale_columns(hidden, scale_format)
            plan.new_scales, plan.scales_start = self._new[dtype], outputs.scales_at // 4
            # Stored with tokens innermost, the order in which grouped GEMMs fetch scales.
            plan.scales_shape = (num_local, capacity, columns)
            plan.scales_stride = (columns * capacity, 1, capacity)
        return plan

    def _dispatch_outputs(
        self, plan: _DispatchPlan, stream: int, capturing: bool
    ) -> tuple[LowLatencyOutput, torch.UntypedStorage, int]:
        """The tensors, the storage of the rows and scales, and the address of the block of the small ones."""
        block = torch.UntypedStorage(plan.rows_block_bytes, device=self.device)
        rows = plan.new_rows(0).set_(block, 0, plan.rows_shape, plan.rows_stride)
        scales = None
        if plan.new_scales is not None:
            scales = plan.new_scales(0).set_(block, plan.scales_start, plan.scales_shape, plan.scales_stride)
        storage, start = self._take_small(plan.small_block_bytes, stream, capturing)
        words, longs = self._typed_views(storage)
        first, base = start // 4, storage.data_ptr() + start
        count = words.as_strided(plan.count_shape, _UNIT, first + plan.count_start)
        src_info = words.as_strided(plan.src_info_shape, plan.src_info_stride, first + plan.src_info_start)
        ranges = longs.as_strided(plan.ranges_shape, plan.ranges_stride, start // 8)
        setattr(src_info, PLACES, (plan.num_topk, base + plan.places[0], base + plan.places[1]))
        return LowLatencyOutput(rows, scales, count, src_info, ranges), block, base

    def _take_small(self, num_bytes: int, stream: int, capturing: bool) -> tuple[torch.UntypedStorage, int]:
        part = self._small.take(num_bytes, stream, capturing)
        if part is None:  # ordinary memory: torch raises when there is none
            raise PoolExhausted(f"no memory for {num_bytes} bytes of a handle")
        return part

    def _typed_views(self, storage: torch.UntypedStorage) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 and int64 over a whole storage. Views of them cost half of what tensors of their own do."""
        if self._typed is None or self._typed[0] is not storage:
            num_bytes = storage.nbytes()
            words = self._new[torch.int32](0).set_(storage, 0, (num_bytes // 4,), (1,))
            longs = self._new[torch.int64](0).set_(storage, 0, (num_bytes // 8,), (1,))
            self._typed = storage, words, longs
        return self._typed[1], self._typed[2]

    # Combine.

    def combine(self, request: LowLatencyCombine, with_hook: bool) -> Callable[[], None] | None:
        """Send the experts' rows home and sum them into ``request.out``, on the current stream.

        Args:
            request: checked arguments that `serves` accepts, without logfmt; tensors are contiguous.
            with_hook: only send; the function returned sums, on the stream that was current here. The rows must stay
                as they are until then if ``src_info`` is not the tensor that dispatch returned.

        Raises:
            ConfigError, PoolExhausted, CommTimeout, PeerError: as for `dispatch`.
        """
        kernels = self._kernels
        kernels.check()
        x, topk_idx, out, waits = request.x, request.topk_idx, request.out, request.wait_stats
        if x.data_ptr() % 16 != 0:
            x = x.clone()
        target = out if out.data_ptr() % 16 == 0 else torch.empty_like(out)
        num_topk, places = topk_idx.shape[1], getattr(request.src_info, PLACES, _NO_PLACES)
        if places[0] != num_topk:
            places = _NO_PLACES
        stream, capturing = kernels.enter()
        try:
            number = self._count_call(_COMBINE, "low_latency_combine")
            region, native = self._combine_plan(request, capturing)
            ticket, start = self._take_small(_TICKET_BYTES, stream, capturing) if with_hook else (None, 0)
            arguments = (
                x.data_ptr(),
                request.src_info.data_ptr(),
                request.layout_range.data_ptr(),
                places[1],
                places[2],
                topk_idx.data_ptr(),
                request.topk_weights.data_ptr(),
                topk_idx.shape[0],
                target.data_ptr(),
                0 if waits is None else waits.data_ptr(),
                0 if ticket is None else ticket.data_ptr() + start,
            )
            self._launch(native, "low_latency_combine", arguments, _SEND if with_hook else _WHOLE, stream)
        finally:
            kernels.leave(stream, capturing)

        def deliver() -> None:
            if target is not out:
                out.copy_(target)

        if not with_hook:
            deliver()
            return None
        receive = self._hook(_COMBINE, number, region, native, arguments, stream, (request, x, ticket))

        def finish() -> None:
            receive()
            deliver()

        return finish

    def _combine_plan(self, request: LowLatencyCombine, capturing: bool) -> tuple[Region, Any]:
        hidden, num_topk, idx_dtype = request.x.shape[2], request.topk_idx.shape[1], request.topk_idx.dtype
        num_max, num_experts = request.num_max_tokens, request.num_experts
        key = (hidden, num_topk, idx_dtype, num_max, num_experts, request.sum_at_home)
        plan = self._combine_plans.get(key)
        if plan is None or plan[0] is not self._region:
            region = self.region_for(RegionShape(num_max, num_topk, num_experts, hidden), capturing)
            signature = _signature("low_latency_combine", hidden, num_topk, num_max, num_experts)
            native = _C.LowLatencyCombinePlan(
                region.peers,
                signature,
                num_topk,
                idx_dtype == torch.int64,
                num_experts,
                num_max,
                hidden,
                request.sum_at_home,
                False,
            )
            plan = self._combine_plans[key] = region, native
        if capturing:
            plan[0].is_leased = True
        return plan

    # Launches.

    def _launch(self, native: Any, name: str, arguments: tuple[int, ...], part: int, stream: int) -> None:
        launches = self._kernels.launches
        launches[name] = launches.get(name, 0) + 1
        native.launch(*arguments, part, self._kernels.blocks(_ALL_SMS), stream)

    def _count_call(self, kind: int, operation: str) -> int:
        """The number of the call that begins, if the sets leave room for it.

        Raises:
            ConfigError: two operations are outstanding, or the one whose set it would use still is.
        """
        this = self._outstanding[kind]
        pending = len(self._outstanding[_DISPATCH].pending) + len(self._outstanding[_COMBINE].pending)
        if pending == 0:
            this.num_calls += 1
            return this.num_calls
        oldest = min(this.pending, default=this.num_calls + 1)
        if pending >= _MAX_OUTSTANDING or oldest <= this.num_calls + 1 - _NUM_SETS:
            raise ConfigError(
                f"{operation}: {pending} low-latency operations are outstanding, the oldest of this kind from "
                f"{this.num_calls + 1 - oldest} calls ago; a buffer holds {_MAX_OUTSTANDING}. Call their receive hooks "
                "first (one that was dropped without being called needs `recover`)"
            )
        this.num_calls += 1
        return this.num_calls

    def _hook(
        self,
        kind: int,
        number: int,
        region: Region,
        native: Any,
        arguments: tuple[int, ...],
        stream: int,
        kept: object,
    ) -> Callable[[], None]:
        """The receiving half of an operation, for the stream of its sending half; to be called once."""
        pending, name = self._outstanding[kind].pending, ("low_latency_dispatch", "low_latency_combine")[kind]
        pending.add(number)
        region.num_pending += 1
        held: list[object] = [kept]

        def receive() -> None:
            with self._lock:
                if number not in pending:  # forgotten by `recover`
                    return
                self._kernels.check()
                _, capturing = self._kernels.enter(stream)
                try:
                    self._launch(native, name, arguments, _RECEIVE, stream)
                finally:
                    self._kernels.leave(stream, capturing)
                pending.discard(number)
                region.num_pending -= 1
                held.clear()

        return receive

    def refuse(self, kind: int) -> None:
        """Take part in an operation without tokens, after this rank found its own arguments wrong.

        The peers learn of it. Where the call would have been the first one, they are waiting on their hosts to reserve
        the region, and raise.
        """
        if self._region is None:
            self._kernels.memory.rendezvous("low-latency region", None)
            return
        stream, capturing = self._kernels.enter()
        try:
            # Where operations are outstanding, it would wait in front of their receive hooks.
            if not capturing and not any(each.pending for each in self._outstanding):
                self._outstanding[kind].num_calls += 1
                self._region.peers.refuse(kind, stream)
        finally:
            self._kernels.leave(stream, capturing)

    # The region.

    def region_for(self, shape: RegionShape, capturing: bool) -> Region:
        """The region, large enough for calls of this shape. Collective when the present one is too small for it.

        Raises:
            ConfigError: it is too small during graph capture, or ranks pass different shapes.
            PoolExhausted: symmetric memory has no room, and the limit or the device leaves none; on all ranks.
            CommTimeout, PeerError: a rank did not come, or gave the operation up.
        """
        region = self._region
        if region is None or not region.shape.covers(shape):
            if capturing:
                raise ConfigError(
                    f"low-latency calls of {shape} need a larger region, which cannot be reserved while a CUDA graph "
                    "is captured; make one such call on all ranks before the capture"
                )
            region = self._reserve(shape if region is None else region.shape.union(shape), shape)
        return region

    def _reserve(self, shape: RegionShape, wanted: RegionShape) -> Region:
        memory = self._kernels.memory
        old = [*self._retired] if self._region is None else [*self._retired, self._region]
        # All ranks are in this call, so what they launched before it ends.
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        states = memory.rendezvous(
            "low-latency region", (wanted, [each.num_pending > 0 or each.is_leased for each in old])
        )
        for rank, state in enumerate(states):
            if state is None:
                raise PeerError(
                    f"low-latency region: rank {rank} gave the operation up because of its own arguments; its own "
                    "error says why",
                    operation="low_latency_dispatch",
                    peer=rank,
                )
        shapes = [RegionShape(*state[0]) for state in states]
        if len(set(shapes)) != 1:
            raise ConfigError(f"low-latency calls by rank are {shapes}; expected the same on all ranks")
        num_bytes = shape.num_bytes(self.num_ranks)
        offsets = memory.reserve_block(num_bytes)
        if not offsets:
            memory.grow(num_bytes)
            offsets = memory.reserve_block(num_bytes)
        if not offsets:
            raise PoolExhausted(
                f"low-latency region: no room in symmetric memory for {num_bytes} bytes on every rank, for {shape}: "
                f"{memory.usage()}. Raise max_pool_bytes, leave more of the GPU's memory, or pass smaller maxima"
            )
        addresses = [base + offset for base, offset in zip(memory.bases, offsets, strict=True)]
        peers = _C.LowLatencyPeers(
            self._kernels.domain,
            addresses,
            *shape,
            self.masked.data_ptr(),
            self._waits.data_ptr(),
            self._mask_after_s,
        )
        peers.clear()
        memory.rendezvous("low-latency region is ready", None)
        self._retired = []
        for i, each in enumerate(old):
            if any(state[1][i] for state in states):
                self._retired.append(each)
            else:
                memory.heap.return_block(each.offset)
        self._plans.clear()
        self._combine_plans.clear()
        self._region = Region(shape, peers, offsets[self.rank])
        return self._region

    def usage(self) -> dict[str, int]:
        """``region_bytes`` of symmetric memory in use; ``retired_bytes`` of regions that hooks or graphs still need."""
        regions = [] if self._region is None else [self._region]
        return {
            "region_bytes": sum(each.shape.num_bytes(self.num_ranks) for each in regions),
            "retired_bytes": sum(each.shape.num_bytes(self.num_ranks) for each in self._retired),
        }

    # Masks and waits.

    def set_mask(self, rank: int, masked: bool) -> None:
        """Leave a rank out, or take it in again, in what is enqueued on the current stream from now on."""
        self.masked[rank : rank + 1].fill_(int(masked))

    def last_waits(self) -> dict[str, list[int]]:
        """By operation and rank, the longest wait for that rank in the last operation, in nanoseconds. Waits for the
        device."""
        dispatch, combine = self._waits.tolist()
        return {"low_latency_dispatch": dispatch, "low_latency_combine": combine}

    def recover(self) -> None:
        """Forget all operations. The ranks are idle, and meet again before the next one."""
        for each in self._outstanding:
            each.pending.clear()  # their hooks do nothing any more
        self._outstanding = (_Outstanding(), _Outstanding())
        for region in [*self._retired, *([] if self._region is None else [self._region])]:
            region.num_pending = 0
            region.peers.clear()

    def close(self) -> None:
        """Let go of the memory of small outputs. The region goes with the heap."""
        self._small.clear()
        self._typed = None


def _signature(operation: str, *shapes: object) -> int:
    """A number that differs wherever ranks disagree."""
    return RowPlan((), "").signature(operation, *shapes)
