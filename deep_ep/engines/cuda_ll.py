"""Low-latency operations on the NVLink engine: one launch each, or two with a receive hook, and no host wait.

Peers write into a region, one symmetric block a rank, of which the kernels keep two sets (`csrc/layout/
low_latency_layout.h`). The ranks reserve it together at the first call and again when a call needs a larger one;
after that nothing is allocated but the outputs, which are ordinary memory of torch.

A call like one before takes `try_dispatch` or `try_combine`, which look at no more than could have changed and are one
native call (`csrc/bindings_low_latency_operations.h`). All others are checked in detail by `deep_ep.low_latency` and
come through `dispatch` and `combine`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from .. import fp8
from .._native import _C
from ..errors import BufferDestroyed, ConfigError, PeerError
from ..event import EventHandle, EventOverlap
from ..traffic import TrafficStats
from .aside import Aside
from .calls import tensors_in
from .low_latency_call import ReceiveHook, check_num_outstanding
from .low_latency_plans import PLACES, Handle, Plans
from .low_latency_regions import Launcher, Regions
from .pool import current_stream_of
from .portable_ll import LowLatencyCombine, LowLatencyDispatch

#: By LowLatencyKind of csrc/layout/low_latency_layout.h.
_NAMES = ("low_latency_dispatch", "low_latency_combine")
_NUM_SETS = 2
_LIMITS: dict[str, int] = _C.LOW_LATENCY_LIMITS
Hook = Callable[[], None] | None
#: Received rows with or without scales, recv_count, handle, event, and the receive hook.
Dispatched = tuple[Any, torch.Tensor, Handle, EventOverlap, Hook]
#: Combined tokens, event, and the receive hook.
Combined = tuple[torch.Tensor, EventOverlap, Hook]


class LowLatencyKernels:
    """Launches the low-latency kernels of one buffer. By one thread at a time, under the engine's lock.

    Args:
        kernels: the buffer's other kernels: stream order, failures and the share of SMs are common.
        lock: the engine's, which `try_dispatch`, `try_combine` and receive hooks take themselves.
        traffic: counters of the engine.
        mask_after_s: seconds after which a rank that does not come is masked, so that the others go on without it; 0:
            it is a failure, after the buffer's timeout.

    Attributes:
        masked: int32 [R] on the device; not 0 for ranks that are left out. Kernels set it as well.
        index, current_device: of the buffer's device, and a function for that of the calling thread; -1 for the CPU.
        try_dispatch: what `Buffer.low_latency_dispatch` returns, for its arguments as they come, if the call is like
            one before; None if something is new or wrong, and then nothing has happened. Takes x, topk_idx,
            topk_weights, num_max_tokens, num_experts, recv_stats, wait_stats, out, use_fp8, round_scale, use_ue8m0,
            expert_major and with_hook.
        try_combine: likewise. Takes x, topk_idx, topk_weights, handle, which must be as dispatch returned it, out,
            wait_stats, sum_at_home, use_logfmt and with_hook.
    """

    def __init__(self, kernels: Launcher, lock: Any, traffic: TrafficStats, mask_after_s: float = 0.0) -> None:
        self._kernels, self._lock = kernels, lock
        self.device, self.rank, self.num_ranks = kernels.device, kernels.rank, kernels.num_ranks
        self.masked = torch.zeros(self.num_ranks, dtype=torch.int32, device=self.device)
        self._waits = torch.zeros((2, self.num_ranks), dtype=torch.int64, device=self.device)
        self._queue = _C.LowLatencyQueue(kernels.domain, kernels.order)
        self.index = self.masked.get_device()
        on_gpu = self.device.type == "cuda"
        self.current_device: Callable[[], int] = torch._C._cuda_getDevice if on_gpu else lambda: -1
        self._current_stream = current_stream_of(self.device)
        self._operations = _C.LowLatencyOperations(
            lock,
            kernels,
            self.index,
            self.current_device,
            self._current_stream,
            traffic,
            EventOverlap,
            functools.partial(torch.cuda.device, self.device),
            _raise_failure,
            _raise_destroyed,
            PLACES,
        )
        self.try_dispatch: Callable[..., Dispatched | None] = self._operations.try_dispatch
        self.try_combine: Callable[..., Combined | None] = self._operations.try_combine
        self.regions = Regions(kernels, self.masked, self._waits, mask_after_s)
        self._plans = Plans(self.regions, self._queue, self._operations, kernels, self.index)

    @property
    def num_pending(self) -> int:
        """Operations whose receive hook has not been called."""
        return self._operations.num_pending

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

    # Operations.

    def try_dispatch_aside(self, *arguments: Any) -> Dispatched | None:
        """`try_dispatch` asynchronously, on the communication stream; the event keeps all tensors of the call."""
        done = self._try_aside(self.try_dispatch, arguments)
        if done is None:
            return None
        (recv_x, count, handle), event = done
        return recv_x, count, handle, event, None

    def try_combine_aside(self, *arguments: Any) -> Combined | None:
        """`try_combine`, likewise."""
        done = self._try_aside(self.try_combine, arguments)
        return None if done is None else (done[0][0], done[1], None)

    def _try_aside(
        self, attempt: Callable[..., tuple[Any, ...] | None], arguments: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], EventOverlap] | None:
        """What an attempt made, without the event and the hook, and the event that the caller gets."""
        if arguments[-1]:  # with a hook, which no asynchronous call has
            return None
        with self._lock:
            if self.current_device() != self.index:
                return None
            aside = self.aside
            before = aside.enter(None)
            try:
                done = attempt(*arguments)
                if done is None:
                    return None
                made = done[:-2]
                return made, EventOverlap(EventHandle(), tuple(tensors_in((arguments, made))))
            finally:
                aside.leave(before, join=False)

    def dispatch(self, request: LowLatencyDispatch, with_hook: bool) -> Dispatched:
        """Send tokens and receive those of all ranks, on the current stream.

        Args:
            request: checked arguments that `serves` accepts; tensors are contiguous. Expert numbers are checked on the
                device: one outside the experts is a failure that a later call or `check` raises.
            with_hook: only send; the hook receives, on the stream that was current here.

        Returns:
            as the caller gets it; rows beyond ``count`` are left as they are.

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
        done: Dispatched | None = plan.run(inputs, out, bool(with_hook), recv_stats, wait_stats)
        if done is None:
            _raise_failure(self._kernels)
        return done

    def combine(self, request: LowLatencyCombine, with_hook: bool) -> Hook:
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
        done: Combined | None = plan.run(arguments, target, bool(with_hook), kept)
        if done is None:
            _raise_failure(self._kernels)
        hook = done[2]
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

    # Outstanding operations.

    def check_outstanding(self, operation: str, num_others: int = 0) -> None:
        """Before an operation: whether there is room for it.

        Args:
            num_others: operations outstanding on the portable engine.

        Raises:
            ConfigError: two operations are outstanding, or the one whose set it would use still is. This rank has taken
                part in nothing, so the call may be made again after the hooks.
        """
        check_num_outstanding(operation, self.num_pending + num_others)
        age = self._operations.age(_NAMES.index(operation))
        if age >= _NUM_SETS:
            raise ConfigError(
                f"{operation}: the low-latency operation of this kind from {age} calls ago is outstanding, and this "
                "one would use the same part of the buffer; call its receive hook first"
            )

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
            self._operations.note_call(kind)
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
        self._operations.forget_pending()  # their hooks do nothing any more
        self.regions.clear()

    def close(self) -> None:
        """Let go of the memory of outputs. The region goes with the heap, and hooks can no longer be called."""
        self._operations.close()
        self._plans.clear()


def _raise_failure(kernels: Launcher) -> NoReturn:
    """Raise what the kernels have reported.

    Raises:
        CommTimeout, PeerError, ConfigError: the failure.
    """
    kernels.check()
    raise PeerError("low-latency operation: a failure was reported and is no longer known", operation="low_latency")


def _raise_destroyed(operation: str) -> NoReturn:
    raise BufferDestroyed(f"receive hook of {operation}: the buffer was destroyed before it was called")


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
