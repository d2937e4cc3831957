"""Low-latency operations on the NVLink engine: one launch each, or two with a receive hook, and no host wait.

Peers write into a region, one symmetric block a rank, of which the kernels keep two sets (`csrc/layout/
low_latency_layout.h`). The ranks reserve it together at the first call and again when a call needs a larger one;
after that nothing is allocated but the outputs, which are ordinary memory of torch.

A call like one before takes `try_dispatch` or `try_combine`, which look at no more than could have changed and cost a
few microseconds. All others are checked in detail by `deep_ep.low_latency` and come through `dispatch` and `combine`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from .. import fp8
from .._native import _C, SCALE_FORMATS
from ..errors import BufferDestroyed, ConfigError
from ..traffic import TrafficStats
from .low_latency_call import Outstanding, ReceiveHook, check_num_outstanding
from .low_latency_plans import (
    PLACES,
    CombinePlan,
    DispatchPlan,
    HandleShape,
    dispatch_plan,
    empty_model,
    is_plain,
)
from .low_latency_regions import Launcher, Region, Regions, RegionShape
from .outputs import RowPlan
from .pool import current_stream_of
from .portable_ll import LowLatencyCombine, LowLatencyDispatch

_DISPATCH, _COMBINE = 0, 1  # LowLatencyKind of csrc/layout/low_latency_layout.h
_NAMES = ("low_latency_dispatch", "low_latency_combine")
_WHOLE, _SEND, _RECEIVE = 0, 1, 2  # LowLatencyPart of csrc/kernels/low_latency_launch.h
_NUM_SETS = 2
_ALL_SMS = 1 << 30
_LIMITS: dict[str, int] = _C.LOW_LATENCY_LIMITS
_FORMATS: dict[tuple[bool, bool, bool], fp8.ScaleFormat | None] = {
    (False, False, False): None,
    (True, False, False): "fp32",
    (True, True, False): "pow2",
    (True, True, True): "ue8m0",
}
_BF16, _FLOAT32 = torch.bfloat16, torch.float32
_empty_like = torch.empty_like
#: Received rows with or without scales, recv_count, and the handle.
Received = tuple[Any, torch.Tensor, tuple[torch.Tensor, torch.Tensor, int, int, int]]


class LowLatencyKernels:
    """Launches the low-latency kernels of one buffer. By one thread at a time, under the engine's lock.

    Args:
        kernels: the buffer's other kernels: stream order, failures and the share of SMs are common.
        lock: the engine's lock, which `try_dispatch`, `try_combine` and receive hooks take themselves.
        traffic: counters of the engine.
        mask_after_s: seconds after which a rank that does not come is masked, so that the others go on without it; 0:
            it is a failure, after the buffer's timeout.

    Attributes:
        masked: int32 [R] on the device; not 0 for ranks that are left out. Kernels set it as well.
        num_pending: operations whose receive hook has not been called.
        index, current_device: of the buffer's device, and a function for that of the calling thread; -1 for the CPU.
    """

    def __init__(
        self, kernels: Launcher, lock: AbstractContextManager[Any], traffic: TrafficStats, mask_after_s: float = 0.0
    ) -> None:
        self._kernels, self._lock, self._traffic = kernels, lock, traffic
        self.device, self.rank, self.num_ranks = kernels.device, kernels.rank, kernels.num_ranks
        self.masked = torch.zeros(self.num_ranks, dtype=torch.int32, device=self.device)
        self._waits = torch.zeros((2, self.num_ranks), dtype=torch.int64, device=self.device)
        self._queue = _C.LowLatencyQueue(kernels.domain, kernels.order)
        self.index = self.masked.get_device()
        on_gpu = self.device.type == "cuda"
        self.current_device: Callable[[], int] = torch._C._cuda_getDevice if on_gpu else lambda: -1
        self._current_stream = current_stream_of(self.device)
        self.regions = Regions(kernels, self.masked, self._waits, mask_after_s)
        self._planned: Region | None = None
        self._outstanding = (Outstanding(), Outstanding())
        self.num_pending = 0
        self._is_closed = False
        # By what differs between calls; of the present region only.
        self._plans: dict[tuple[object, ...], DispatchPlan] = {}
        self._combine_plans: dict[tuple[object, ...], CombinePlan] = {}
        self._shapes: dict[tuple[int, ...], HandleShape] = {}
        self._ticket_like = empty_model((1,), (1,), torch.int64, self.device)
        self._combined_like: dict[tuple[int, int], torch.Tensor] = {}

    # What is served.

    def serves(self, hidden: int, num_topk: int, num_max_tokens: int, num_experts: int, use_fp8: bool = False) -> bool:
        """Whether the kernels take bf16 rows of ``hidden`` columns in calls like this. The same on all ranks.

        What no engine takes, such as a number of experts below 1, counts as served.
        """
        return (
            hidden > 0
            and hidden % (fp8.TILE if use_fp8 else 8) == 0
            and num_topk <= _LIMITS["topk"]
            and num_max_tokens <= _LIMITS["tokens"]
            and num_max_tokens * self.num_ranks <= _LIMITS["packed_rows"]
            and num_experts <= _LIMITS["experts"]
            and -(-num_experts // self.num_ranks) <= _LIMITS["local_experts"]
        )

    # Dispatch.

    def try_dispatch(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        num_max_tokens: Any,
        num_experts: Any,
        recv_stats: Any,
        wait_stats: Any,
        flags: tuple[bool, bool, bool],
        expert_major: bool,
        with_hook: bool,
    ) -> tuple[Received, ReceiveHook | None] | None:
        """`dispatch` for arguments as they come, if the call is like one before.

        Args:
            flags: use_fp8, round_scale and use_ue8m0.

        Returns:
            None if something is new or wrong; then nothing has happened.
        """
        try:
            num_tokens, hidden = x.shape
            idx_tokens, num_topk = topk_idx.shape
            with_weights = topk_weights is not None
            scale_format, idx_dtype = _FORMATS[flags], topk_idx.dtype
            layout = (with_weights, expert_major)
            plan = self._plans[hidden, num_topk, idx_dtype, num_max_tokens, num_experts, scale_format, layout]
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        index = self.index
        if (
            num_tokens != idx_tokens
            or num_tokens > num_max_tokens
            or x.dtype is not _BF16
            or x.get_device() != index
            or topk_idx.get_device() != index
            or not x.is_contiguous()
            or not topk_idx.is_contiguous()
            or x.data_ptr() % 16 != 0
            or (with_weights and not is_plain(topk_weights, _FLOAT32, topk_idx.shape, index))
            or not (recv_stats is None or is_plain(recv_stats, torch.int32, (plan.shape.num_local,), index))
            or not (wait_stats is None or is_plain(wait_stats, torch.int64, (self.num_ranks,), index))
        ):
            return None
        with self._lock:
            if self.current_device() != index or plan.region is not self._planned:
                return None
            if self.num_pending:
                self.check_outstanding("low_latency_dispatch")
            return self._run_dispatch(plan, x, topk_idx, topk_weights, num_tokens, recv_stats, wait_stats, with_hook)

    def dispatch(self, request: LowLatencyDispatch, with_hook: bool) -> tuple[Received, ReceiveHook | None]:
        """Send tokens and receive those of all ranks, on the current stream.

        Args:
            request: checked arguments that `serves` accepts; tensors are contiguous. Expert numbers are checked on the
                device: one outside the experts is a failure that a later call or `check` raises.
            with_hook: only send; the hook receives, on the stream that was current here.

        Returns:
            what comes, whose rows beyond ``count`` are left as they are, and the hook or None.

        Raises:
            ConfigError: the region would have to grow during graph capture.
            PoolExhausted, CommTimeout, PeerError: the region could not be reserved, or an earlier failure.
        """
        x = request.x
        if x.data_ptr() % 16 != 0:
            x = x.clone()
        self._kernels.check()
        return self._run_dispatch(
            self._dispatch_plan(request),
            x,
            request.topk_idx,
            request.topk_weights,
            x.shape[0],
            request.recv_stats,
            request.wait_stats,
            with_hook,
        )

    def _run_dispatch(
        self,
        plan: DispatchPlan,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        num_tokens: int,
        recv_stats: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
        with_hook: bool,
    ) -> tuple[Received, ReceiveHook | None]:
        stream = self._current_stream()
        captured = self._begin(stream)
        rows, scales = _empty_like(plan.rows_like), None
        if plan.scales_like is not None:
            scales = _empty_like(plan.scales_like)
        count, src_info, ranges, small = plan.handles.take(stream, captured)
        if captured:
            plan.region.is_leased = True
        arguments = (
            x.data_ptr(),
            topk_idx.data_ptr(),
            0 if topk_weights is None else topk_weights.data_ptr(),
            num_tokens,
            rows.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            small,
            0 if recv_stats is None else recv_stats.data_ptr(),
            0 if wait_stats is None else wait_stats.data_ptr(),
        )
        self._outstanding[_DISPATCH].num_calls += 1
        self._launch(plan, _DISPATCH, arguments, _SEND if with_hook else _WHOLE, stream, captured)
        self._traffic.add_dispatch(num_tokens, plan.row_bytes, plan.dtype_name)
        received = rows if scales is None else (rows, scales), count, (src_info, ranges, *plan.shape.numbers)
        if not with_hook:
            return received, None
        # The region, the outputs and what is added to must outlive the send.
        return received, self._hook(plan, _DISPATCH, arguments, stream, (received, recv_stats, wait_stats))

    def _dispatch_plan(self, request: LowLatencyDispatch) -> DispatchPlan:
        x, topk_idx, scale_format = request.x, request.topk_idx, request.scale_format
        num_max, num_experts = request.num_max_tokens, request.num_experts
        hidden, num_topk, idx_dtype = x.shape[1], topk_idx.shape[1], topk_idx.dtype
        layout = (request.topk_weights is not None, request.expert_major)
        key = (hidden, num_topk, idx_dtype, num_max, num_experts, scale_format, layout)
        plan = self._plans.get(key)
        if plan is None:
            region = self._region_for(RegionShape(num_max, num_topk, num_experts, hidden))
            # All but the dtype of the indices, which is each rank's own affair.
            agreed = (hidden, num_topk, num_max, num_experts, scale_format, *layout)
            native = _C.LowLatencyDispatchPlan(
                region.peers,
                self._queue,
                _signature("low_latency_dispatch", *agreed),
                num_topk,
                idx_dtype == torch.int64,
                num_experts,
                num_max,
                hidden,
                -1 if scale_format is None else SCALE_FORMATS[scale_format],
                *layout,
            )
            shape = self._handle_shape(num_topk, num_max, hidden, num_experts, *layout)
            plan = dispatch_plan(region, native, shape, self.num_ranks, scale_format, self.device)
            self._plans[key] = plan
        return plan

    def _handle_shape(
        self, num_topk: int, num_max: int, hidden: int, num_experts: int, with_weights: bool, expert_major: bool
    ) -> HandleShape:
        key = (num_topk, num_max, hidden, num_experts, with_weights, expert_major)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = HandleShape.of(*key, self.num_ranks, self.rank)
        return shape

    # Combine.

    def try_combine(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        handle: Any,
        out: Any,
        wait_stats: Any,
        sum_at_home: bool,
        use_logfmt: bool,
        with_hook: bool,
    ) -> tuple[torch.Tensor, ReceiveHook | None] | None:
        """`combine` for arguments as they come, if the call is like one before and the handle as dispatch returned it.

        Returns:
            the combined tokens and the hook or None; or None as `try_dispatch`.
        """
        try:
            src_info, ranges, num_max_tokens, hidden, num_experts = handle
            shape, block = getattr(src_info, PLACES)
            sizes = topk_idx.shape
            num_tokens, num_topk = sizes
            plan = self._combine_plans[shape, topk_idx.dtype, sum_at_home, use_logfmt]
            index = self.index
            if (
                num_topk != shape.num_topk
                or num_tokens > num_max_tokens
                or (num_max_tokens, hidden, num_experts) != shape.numbers
                or (shape.expert_major and ranges.data_ptr() != block)
                or src_info.data_ptr() != block + shape.src_info_at
                or x.shape != shape.rows
                or x.dtype is not _BF16
                or x.get_device() != index
                or topk_idx.get_device() != index
                or not x.is_contiguous()
                or not topk_idx.is_contiguous()
                or x.data_ptr() % 16 != 0
                or (
                    shape.expert_major
                    and (
                        topk_weights.shape != sizes
                        or topk_weights.dtype is not _FLOAT32
                        or topk_weights.get_device() != index
                        or not topk_weights.is_contiguous()
                    )
                )
                or not (wait_stats is None or is_plain(wait_stats, torch.int64, (self.num_ranks,), index))
                or not (out is None or is_plain(out, _BF16, (num_tokens, hidden), index))
            ):
                return None
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        with self._lock:
            if self.current_device() != index or plan.region is not self._planned:
                return None
            if self.num_pending:
                self.check_outstanding("low_latency_combine")
            if out is None:
                out = self.empty_combined(num_tokens, hidden)
            return out, self._run_combine(
                plan,
                x,
                src_info,
                ranges,
                block + shape.source_tokens_at,
                block + shape.positions_at,
                block + shape.weights_at if plan.uses_weights else 0,
                topk_idx,
                topk_weights if shape.expert_major else None,
                num_tokens,
                out,
                wait_stats,
                with_hook,
            )

    def empty_combined(self, num_tokens: int, hidden: int) -> torch.Tensor:
        """bf16 [T, H] with any contents."""
        model = self._combined_like.get((num_tokens, hidden))
        if model is None:
            model = empty_model((num_tokens, hidden), (hidden, 1), _BF16, self.device)
            self._combined_like[num_tokens, hidden] = model
        return _empty_like(model)

    def combine(self, request: LowLatencyCombine, with_hook: bool) -> ReceiveHook | None:
        """Send the experts' rows home and sum them into ``request.out``, on the current stream.

        Args:
            request: checked arguments that `serves` accepts; tensors are contiguous.
            with_hook: only send; the hook returned sums, on the stream that was current here.

        Raises:
            ConfigError, PoolExhausted, CommTimeout, PeerError: as for `dispatch`.
        """
        x, topk_idx, out, src_info = request.x, request.topk_idx, request.out, request.src_info
        places: tuple[Any, int] = getattr(src_info, PLACES, (None, 0))
        shape, block = places
        # A copy of src_info has the attribute, but no tables.
        is_original = shape is not None and src_info.data_ptr() == block + shape.src_info_at
        has_tables = is_original and shape.num_topk == topk_idx.shape[1]
        # Without the tables rows leave in the receive part only, and the caller may write them before. By source a copy
        # of src_info is all that is needed.
        if x.data_ptr() % 16 != 0 or (with_hook and request.expert_major and not has_tables):
            x = x.clone()
        target = out if out.data_ptr() % 16 == 0 else torch.empty_like(out)
        self._kernels.check()
        plan = self._combine_plan(request, has_tables and shape.with_weights)
        source_tokens = positions = weights = 0
        if not request.expert_major:
            positions = src_info.data_ptr()
            source_tokens = block + shape.source_tokens_at if has_tables else 0
        elif has_tables:
            source_tokens, positions = block + shape.source_tokens_at, block + shape.positions_at
            weights = block + shape.weights_at if plan.uses_weights else 0
        hook = self._run_combine(
            plan,
            x,
            src_info,
            request.layout_range,
            source_tokens,
            positions,
            weights,
            topk_idx,
            request.topk_weights,
            topk_idx.shape[0],
            target,
            request.wait_stats,
            with_hook,
        )
        if target is out:
            return hook
        if hook is None:
            out.copy_(target)
            return None
        receive = hook

        def finish() -> None:
            receive()
            out.copy_(target)

        return ReceiveHook(finish)

    def _run_combine(
        self,
        plan: CombinePlan,
        x: torch.Tensor,
        src_info: torch.Tensor,
        ranges: torch.Tensor,
        source_tokens: int,
        positions: int,
        weights: int,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        num_tokens: int,
        out: torch.Tensor,
        wait_stats: torch.Tensor | None,
        with_hook: bool,
    ) -> ReceiveHook | None:
        stream = self._current_stream()
        captured = self._begin(stream)
        if captured:
            plan.region.is_leased = True
        ticket = _empty_like(self._ticket_like) if with_hook else None
        arguments = (
            x.data_ptr(),
            src_info.data_ptr(),
            ranges.data_ptr(),
            source_tokens,
            positions,
            weights,
            topk_idx.data_ptr(),
            0 if topk_weights is None else topk_weights.data_ptr(),
            num_tokens,
            out.data_ptr(),
            0 if wait_stats is None else wait_stats.data_ptr(),
            0 if ticket is None else ticket.data_ptr(),
        )
        self._outstanding[_COMBINE].num_calls += 1
        self._launch(plan, _COMBINE, arguments, _SEND if with_hook else _WHOLE, stream, captured)
        self._traffic.add_combine(num_tokens, plan.row_bytes)
        if ticket is None:
            return None
        kept = (x, src_info, ranges, topk_idx, topk_weights, out, wait_stats, ticket)
        return self._hook(plan, _COMBINE, arguments, stream, kept)

    def _combine_plan(self, request: LowLatencyCombine, with_weights: bool) -> CombinePlan:
        """``with_weights``: the handle has those that came with the dispatch."""
        hidden, num_topk, idx_dtype = request.x.shape[2], request.topk_idx.shape[1], request.topk_idx.dtype
        num_max, num_experts = request.num_max_tokens, request.num_experts
        expert_major = request.expert_major
        shape = self._handle_shape(num_topk, num_max, hidden, num_experts, with_weights, expert_major)
        key = (shape, idx_dtype, request.sum_at_home, request.use_logfmt)
        plan = self._combine_plans.get(key)
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
                idx_dtype == torch.int64,
                num_experts,
                num_max,
                hidden,
                request.sum_at_home,
                request.use_logfmt,
                expert_major,
            )
            plan = self._combine_plans[key] = CombinePlan(region, native.launch, 2 * hidden, uses_weights)
        return plan

    # Launches.

    def _begin(self, stream: int) -> bool:
        """What is launched next on this stream comes after the operation before, whatever stream that was called on.

        Returns:
            whether the stream is being captured into a graph.

        Raises:
            CommTimeout, PeerError, ConfigError: kernels have reported a failure.
        """
        state: int = self._queue.begin(stream)
        if state < 0 or self._kernels.has_failed:
            self._kernels.check()
        return state > 0

    def _launch(
        self,
        plan: DispatchPlan | CombinePlan,
        kind: int,
        arguments: tuple[int, ...],
        part: int,
        stream: int,
        captured: bool,
    ) -> None:
        kernels, name = self._kernels, _NAMES[kind]
        plan.launch(*arguments, part, kernels.blocks(_ALL_SMS), stream, captured)
        kernels.launches[name] = kernels.launches.get(name, 0) + 1

    def check_outstanding(self, operation: str, num_others: int = 0) -> None:
        """Before an operation: whether there is room for it.

        Args:
            num_others: operations outstanding on the portable engine.

        Raises:
            ConfigError: two operations are outstanding, or the one whose set it would use still is. This rank has taken
                part in nothing, so the call may be made again after the hooks.
        """
        check_num_outstanding(operation, self.num_pending + num_others)
        this = self._outstanding[_NAMES.index(operation)]
        age = this.num_calls + 1 - min(this.pending, default=this.num_calls + 1)
        if age >= _NUM_SETS:
            raise ConfigError(
                f"{operation}: the low-latency operation of this kind from {age} calls ago is outstanding, and this "
                "one would use the same part of the buffer; call its receive hook first"
            )

    def _hook(
        self,
        plan: DispatchPlan | CombinePlan,
        kind: int,
        arguments: tuple[int, ...],
        stream: int,
        kept: object,
    ) -> ReceiveHook:
        """The receiving half of the operation begun last, for the stream of its sending half."""
        this, region = self._outstanding[kind], plan.region
        number = this.num_calls
        this.pending.add(number)
        self.num_pending += 1
        region.num_pending += 1
        held: list[object] = [kept]

        def receive() -> None:
            with self._lock:
                if self._is_closed:
                    raise BufferDestroyed(
                        f"receive hook of {_NAMES[kind]}: the buffer was destroyed before it was called"
                    )
                if number not in this.pending:  # forgotten by `recover`
                    return
                if self.current_device() == self.index:
                    self._launch(plan, kind, arguments, _RECEIVE, stream, self._begin(stream))
                else:  # another one than in the thread that made the call
                    with torch.cuda.device(self.device):
                        self._launch(plan, kind, arguments, _RECEIVE, stream, self._begin(stream))
                this.pending.discard(number)
                self.num_pending -= 1
                region.num_pending -= 1
                held.clear()

        return ReceiveHook(receive)

    def refuse(self, operation: str) -> None:
        """Take part in an operation without tokens, after this rank found its own arguments wrong.

        The peers learn of it. Where the call would have been the first one, they are waiting on their hosts to reserve
        the region, and raise.
        """
        region = self.regions.current
        if region is None:
            self.regions.refuse()
            return
        # Where operations are outstanding, it would wait in front of their receive hooks.
        if self.num_pending:
            return
        stream = self._current_stream()
        if self._queue.begin(stream) == 0:
            kind = _NAMES.index(operation)
            self._outstanding[kind].num_calls += 1
            region.peers.refuse(kind, stream)
            self._queue.end(stream)

    # The region.

    def _region_for(self, shape: RegionShape) -> Region:
        """`Regions.region_for`; plans of another region are forgotten."""
        region = self.regions.region_for(shape)
        if region is not self._planned:
            self._plans.clear()
            self._combine_plans.clear()
            self._planned = region
        return region

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
        self._outstanding, self.num_pending = (Outstanding(), Outstanding()), 0
        self.regions.clear()

    def close(self) -> None:
        """Let go of the memory of outputs. The region goes with the heap, and hooks can no longer be called."""
        self._is_closed = True
        self._plans.clear()
        self._combine_plans.clear()


def _signature(operation: str, *shapes: object) -> int:
    """A number that differs wherever ranks disagree."""
    return RowPlan((), "").signature(operation, *shapes)
