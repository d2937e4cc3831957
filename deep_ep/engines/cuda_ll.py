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
from typing import Any, NoReturn

import torch

from .. import fp8
from .._native import _C
from ..errors import BufferDestroyed, ConfigError, PeerError
from ..traffic import TrafficStats
from .aside import Aside
from .low_latency_call import Outstanding, ReceiveHook, check_num_outstanding
from .low_latency_plans import PLACES, CombinePlan, DispatchPlan, Handle, Plans
from .low_latency_regions import Launcher, Regions
from .pool import current_stream_of
from .portable_ll import LowLatencyCombine, LowLatencyDispatch

_DISPATCH, _COMBINE = 0, 1  # LowLatencyKind of csrc/layout/low_latency_layout.h
_NAMES = ("low_latency_dispatch", "low_latency_combine")
_WHOLE, _SEND = 0, 1  # LowLatencyPart of csrc/kernels/low_latency_launch.h
_NUM_SETS = 2
_ALL_SMS = 1 << 30
_LIMITS: dict[str, int] = _C.LOW_LATENCY_LIMITS
#: Received rows with or without scales, recv_count, and the handle.
Received = tuple[Any, torch.Tensor, Handle]


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
        self._plans = Plans(self.regions, self._queue, kernels, self.index)
        self._outstanding = (Outstanding(), Outstanding())
        self.num_pending = 0
        self._is_closed = False

    @property
    def aside(self) -> Aside:
        """Where asynchronous operations run."""
        return self._kernels.aside

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
        out: Any,
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
        kernels = self._kernels
        with self._lock:
            if self.current_device() != self.index or kernels.has_failed:
                return None
            if self.num_pending and not self._has_room("low_latency_dispatch"):
                return None
            try:
                plans = self._plans.dispatches[
                    num_max_tokens, num_experts, flags, topk_weights is not None, expert_major
                ]
            except (KeyError, TypeError):
                return None
            part, num_sms, stream = _SEND if with_hook else _WHOLE, kernels.blocks(_ALL_SMS), self._current_stream()
            for plan in plans:
                done = plan.try_run(x, topk_idx, topk_weights, recv_stats, wait_stats, out, part, num_sms, stream)
                if done is not None:
                    return self._dispatched(plan, done, stream, recv_stats, wait_stats)
        return None

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
        x, weights, recv_stats, wait_stats = request.x, request.topk_weights, request.recv_stats, request.wait_stats
        rows, scales = request.out or (None, None)
        if x.data_ptr() % 16 != 0:
            x = x.clone()
        self._kernels.check()
        plan = self._plans.of_dispatch(request)
        inputs = (
            x.data_ptr(),
            request.topk_idx.data_ptr(),
            _address(weights),
            x.shape[0],
            _address(recv_stats),
            _address(wait_stats),
            _address(rows),
            _address(scales),
        )
        out = rows if scales is None else (rows, scales)
        part, stream = _SEND if with_hook else _WHOLE, self._current_stream()
        done = plan.run(inputs, out, part, self._kernels.blocks(_ALL_SMS), stream)
        if done is None:
            self._raise_failure()
        return self._dispatched(plan, done, stream, recv_stats, wait_stats)

    def _dispatched(
        self,
        plan: DispatchPlan,
        done: tuple[Received, int, bytes | None],
        stream: int,
        recv_stats: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
    ) -> tuple[Received, ReceiveHook | None]:
        """What `dispatch` returns, of what the plan has done."""
        received, num_tokens, sent = done
        self._outstanding[_DISPATCH].num_calls += 1
        self._count("low_latency_dispatch")
        self._traffic.add_dispatch(num_tokens, plan.row_bytes, plan.dtype_name)
        if sent is None:
            return received, None
        # The region, the outputs and what is added to must outlive the send.
        return received, self._hook(plan, _DISPATCH, sent, stream, (received, recv_stats, wait_stats))

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
        kernels = self._kernels
        with self._lock:
            if self.current_device() != self.index or kernels.has_failed:
                return None
            if self.num_pending and not self._has_room("low_latency_combine"):
                return None
            try:
                src_info, ranges, num_max_tokens, hidden, num_experts = handle
                shape, block = getattr(src_info, PLACES)
                if (num_max_tokens, hidden, num_experts) != shape.numbers:
                    return None
                plans = self._plans.combines[shape, sum_at_home, use_logfmt]
            except (AttributeError, KeyError, TypeError, ValueError):
                return None
            part, num_sms, stream = _SEND if with_hook else _WHOLE, kernels.blocks(_ALL_SMS), self._current_stream()
            for plan in plans:
                done = plan.try_run(
                    x, src_info, ranges, topk_idx, topk_weights, out, wait_stats, block, part, num_sms, stream
                )
                if done is not None:
                    out = done[0]
                    kept = (x, src_info, ranges, topk_idx, topk_weights, out, wait_stats)
                    return out, self._combined(plan, done, stream, kept)
        return None

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
        plan = self._plans.of_combine(request, has_tables and shape.with_weights)
        source_tokens = positions = weights = 0
        if not request.expert_major:
            positions = src_info.data_ptr()
            source_tokens = block + shape.source_tokens_at if has_tables else 0
        elif has_tables:
            source_tokens, positions = block + shape.source_tokens_at, block + shape.positions_at
            weights = block + shape.weights_at if plan.uses_weights else 0
        arguments = (
            x.data_ptr(),
            src_info.data_ptr(),
            request.layout_range.data_ptr(),
            source_tokens,
            positions,
            weights,
            topk_idx.data_ptr(),
            _address(request.topk_weights),
            topk_idx.shape[0],
            target.data_ptr(),
            _address(request.wait_stats),
        )
        kept = (x, src_info, request.layout_range, topk_idx, request.topk_weights, target, request.wait_stats)
        part, stream = _SEND if with_hook else _WHOLE, self._current_stream()
        done = plan.run(arguments, part, self._kernels.blocks(_ALL_SMS), stream)
        if done is None:
            self._raise_failure()
        hook = self._combined(plan, done, stream, kept)
        if target is out:
            return hook
        if hook is None:
            out.copy_(target)
            return None
        receive = hook

        def finish() -> None:
            receive()
            out.copy_(target)

        return ReceiveHook(torch.no_grad()(finish))

    def _combined(
        self,
        plan: CombinePlan,
        done: tuple[object, int, bytes | None, torch.Tensor | None],
        stream: int,
        kept: tuple[object, ...],
    ) -> ReceiveHook | None:
        """The hook of what the plan has done; ``kept``: the tensors that it uses."""
        _, num_tokens, sent, ticket = done
        self._outstanding[_COMBINE].num_calls += 1
        self._count("low_latency_combine")
        self._traffic.add_combine(num_tokens, plan.row_bytes)
        if sent is None:
            return None
        return self._hook(plan, _COMBINE, sent, stream, (kept, ticket))

    # Launches.

    def _has_room(self, operation: str) -> bool:
        """Whether there is room for an operation, without an error if there is none."""
        try:
            self.check_outstanding(operation)
        except ConfigError:
            return False
        return True

    def _raise_failure(self) -> NoReturn:
        """Raise what the kernels have reported.

        Raises:
            CommTimeout, PeerError, ConfigError: the failure.
        """
        self._kernels.check()
        raise PeerError("low-latency operation: a failure was reported and is no longer known", operation="low_latency")

    def _count(self, name: str) -> None:
        launches = self._kernels.launches
        try:
            launches[name] += 1
        except KeyError:
            launches[name] = 1

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
        sent: bytes,
        stream: int,
        kept: object,
    ) -> ReceiveHook:
        """The receiving half of the operation begun last, for the stream of its sending half."""
        this, region = self._outstanding[kind], plan.region
        number = this.num_calls
        this.pending.add(number)
        self.num_pending += 1
        region.num_pending += 1
        return ReceiveHook(self._receive, plan, kind, this, number, sent, stream, kept=kept)

    def _receive(
        self,
        plan: DispatchPlan | CombinePlan,
        kind: int,
        this: Outstanding,
        number: int,
        sent: bytes,
        stream: int,
    ) -> None:
        """What the hook of an operation does, whose number in ``this`` is given."""
        with self._lock:
            if self._is_closed:
                raise BufferDestroyed(f"receive hook of {_NAMES[kind]}: the buffer was destroyed before it was called")
            if number not in this.pending:  # forgotten by `recover`
                return
            if self.current_device() == self.index:
                self._launch_receive(plan, kind, sent, stream)
            else:  # another one than in the thread that made the call
                with torch.cuda.device(self.device):
                    self._launch_receive(plan, kind, sent, stream)
            this.pending.discard(number)
            self.num_pending -= 1
            plan.region.num_pending -= 1

    def _launch_receive(self, plan: DispatchPlan | CombinePlan, kind: int, sent: bytes, stream: int) -> None:
        if self._kernels.has_failed or not plan.receive(sent, self._kernels.blocks(_ALL_SMS), stream):
            self._raise_failure()
        self._count(_NAMES[kind])

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


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
