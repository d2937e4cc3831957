"""The low-latency half of `Buffer`: packed rows per expert for decoding, receive hooks, rank masks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from . import checks
from .checks import describe_value
from .config import low_latency_size_hint
from .engines import portable_ll
from .engines.cuda_ll import LowLatencyKernels
from .engines.low_latency_call import LowLatencyCall, ReceiveHook, check_num_outstanding
from .engines.portable import PortableEngine
from .engines.portable_ll import LowLatencyCombine, LowLatencyDispatch
from .errors import ConfigError
from .event import EventOverlap
from .layout import check_topk_range, num_local_experts
from .low_latency_checks import (
    check_by_source,
    check_device,
    check_finish,
    check_handle_device,
    check_stats,
    checked_out,
    checked_scale_format,
    checked_weights,
)

#: (src_info, layout_range, M, H, E), or, where rows lie by source, (recv_topk_idx, recv_topk_weights, M, H, E). The
#: first tensor's number of dimensions, two or three, tells which.
LowLatencyHandle = tuple[torch.Tensor, torch.Tensor, int, int, int]


class LowLatencyMixin:
    """Low-latency operations of `Buffer`."""

    if TYPE_CHECKING:
        enable_shrink: bool
        group_size: int
        rank: int
        runtime: PortableEngine | None
        _masked: set[int]

        _mask_timeout_s: float
        _portable_waits: dict[str, list[int]]

        def _engine(self, operation: str) -> PortableEngine: ...

    _hooks: weakref.WeakSet[ReceiveHook] | None = None  # of the portable engine
    _combine_buffer: torch.Tensor | None = None

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes to give as ``num_rdma_bytes``: an upper bound, that callers may allocate by.

        Raises:
            ConfigError: an argument is not positive.
        """
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Kept for callers that alternate between modes. Nothing is left over between operations, so it is free.

        Raises:
            ConfigError: an argument is not positive.
        """
        self._engine("clean_low_latency_buffer")
        low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, self.group_size, num_experts)

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        topk_weights: torch.Tensor | None = None,
        expert_major: bool = True,
        out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[
        torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        torch.Tensor,
        LowLatencyHandle,
        EventOverlap,
        Callable[[], None] | None,
    ]:
        """Send tokens to their experts, packed for grouped GEMMs with masked rows, or once each beside an index.

        Args:
            x: bf16 [T, H], T at most M; H a multiple of 128 for FP8.
            topk_idx: int32 or int64 [T, K], -1 for no selection.
            num_max_dispatch_tokens_per_rank: M, equal on all ranks.
            num_experts: E.
            cumulative_local_expert_recv_stats: int32 [L]; the number of tokens that came for each expert is added.
            dispatch_wait_recv_cost_stats: int64 [R]; nanoseconds waited for each rank are added.
            use_fp8: send FP8 (E4M3, 1x128 tiles); ``round_scale``: power-of-two scales; ``use_ue8m0`` (with
                ``round_scale``): scales as exponents packed four to an int32.
            async_finish: return an event. Not together with ``return_recv_hook``.
            return_recv_hook: return a function that must be called before the results are used. x, topk_idx and
                topk_weights may be written again before that.
            topk_weights: float32 [T, K] that combine will sum by, on all ranks or on none. They travel along, so that
                in combine the ranks of the experts sum their rows at once, also in a call with a hook. In return
                topk_idx and topk_weights of that combine must be those of this call: an entry set to -1 in between
                would still be summed where its expert is. Results have the same bits.
            expert_major: False, on all ranks: a token that any local expert wants comes once, and is not copied to a
                row of each expert. The caller's grouped GEMMs read rows by an index, and the caller sums.
            out: recv_x of an earlier call like this one, or tensors of those shapes, dtypes and strides that begin at
                multiples of 16 bytes, to write to and return; not those of a call whose hook is still to be called. It
                saves the host the time for new ones.

        Returns:
            recv_x: bf16 [L, R * M, H], or (E4M3 [L, R * M, H], scales [L, R * M, H / 128] float32 or [..., H / 512]
                int32, stored with tokens innermost). Rows of an expert are packed by source rank, then token.
            recv_count: int32 [L].
            handle: (src_info int32 [L, R * M], layout_range int64 [L, R] = begin << 32 | count, M, H, E). Weights that
                came stay with these very tensors; a copy of them is a handle without.
            event, hook: ``hook`` is None unless asked for.

            With ``expert_major=False``:

            recv_x: bf16 [R, M, H], or (E4M3 [R, M, H], scales [R, M, H / 128] float32 or [..., H / 512] int32, strides
                (M * columns, 1, M): tokens innermost). Row (r, t) is token t of rank r. Rows of tokens that no local
                expert wants have any contents.
            recv_count: int32 [R], the tokens of each rank, 0 for a masked one.
            handle: (recv_topk_idx int32 [R, M, K], recv_topk_weights, M, H, E). recv_topk_idx is the local expert of
                each selection, -1 for none, for one of another rank, and for tokens from recv_count on.
                recv_topk_weights is float32 [R, M, K], 0 where the index is -1, or of shape [0] without
                ``topk_weights``. Both are to be read only: combine goes by the index. A copy of them is as good.

        Raises:
            ConfigError: bad arguments, more than M tokens, or a third operation while two hooks are outstanding. The
                latter is raised before this rank takes part in anything, so the call may be made again after a hook.
            PeerError, CommTimeout: a rank died, refused or is late (without ``enable_shrink``).
        """
        operation = "low_latency_dispatch"
        engine = self.runtime or self._engine(operation)
        kernels: LowLatencyKernels | None = engine.low_latency
        if kernels is not None and not self._hooks:
            attempt = kernels.try_dispatch_aside if async_finish else kernels.try_dispatch
            taken = attempt(
                x,
                topk_idx,
                topk_weights,
                num_max_dispatch_tokens_per_rank,
                num_experts,
                cumulative_local_expert_recv_stats,
                dispatch_wait_recv_cost_stats,
                out,
                use_fp8,
                round_scale,
                use_ue8m0,
                expert_major,
                return_recv_hook,
            )
            if taken is not None:
                if self._portable_waits:
                    self._portable_waits.pop(operation, None)
                return taken
        kernels = self._kernels(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, use_fp8)
        stats = (cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
        inputs = (x, topk_idx, topk_weights, out, stats)
        with LowLatencyCall(engine, operation, kernels, inputs, async_finish, self._check_room) as call:
            check_finish(operation, async_finish, return_recv_hook)
            x = checks.check_tensor(x, "x", operation, dim=2, dtypes=[torch.bfloat16])
            check_device(x, kernels, operation)
            topk_idx = checks.check_topk_idx(topk_idx, operation)
            shape = [x.shape[0], topk_idx.shape[1]]
            checks.check_tensor(topk_idx, "topk_idx", operation, dim=2, shape=shape, device=x.device)
            if topk_weights is not None:
                topk_weights = checked_weights(topk_weights, operation, shape, x.device)
            num_experts = checks.check_num_experts(num_experts, operation)
            if kernels is None:  # which check it on the device
                check_topk_range(topk_idx, num_experts)
            num_max = checks.check_count(
                num_max_dispatch_tokens_per_rank, "num_max_dispatch_tokens_per_rank", operation, minimum=1
            )
            if x.shape[0] > num_max:
                raise ConfigError(
                    f"{operation}: x has {x.shape[0]} tokens but num_max_dispatch_tokens_per_rank is {num_max}; "
                    "send at most that many, or raise it on all ranks"
                )
            scale_format = checked_scale_format(x.shape[1], use_fp8, round_scale, use_ue8m0)
            num_local = num_local_experts(num_experts, self.group_size, self.rank)
            if stats[0] is not None:
                name = "cumulative_local_expert_recv_stats"
                check_stats(stats[0], name, operation, torch.int32, num_local, x.device)
            if stats[1] is not None:
                name = "dispatch_wait_recv_cost_stats"
                check_stats(stats[1], name, operation, torch.int64, self.group_size, x.device)
            expert_major = bool(expert_major)
            given = None
            if out is not None:
                groups = (num_local, self.group_size * num_max) if expert_major else (self.group_size, num_max)
                layouts = portable_ll.received_layouts(*groups, x.shape[1], scale_format)
                given = checked_out(out, layouts, x.device, operation)
            request = LowLatencyDispatch(
                x, topk_idx, topk_weights, num_max, num_experts, scale_format, *stats, expert_major, given
            )
            call.start()
            if kernels is not None:
                recv_x, count, handle, _, hook = kernels.dispatch(request, return_recv_hook)
                call.keep((recv_x, count, handle))
            else:
                masked = self._masks()
                output, finish = portable_ll.dispatch(engine, request, masked, self._mask_timeout_s)
                self._add_masks(masked)
                hook = self._finish(finish, return_recv_hook)
                recv_x = output.rows if output.scales is None else (output.rows, output.scales)
                count = output.count
                handle = (output.src_info, output.layout_range, num_max, x.shape[1], num_experts)
            self._note_waits(operation, kernels)
        return recv_x, count, handle, call.event, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
        *,
        sum_at_home: bool = False,
    ) -> tuple[torch.Tensor, EventOverlap, Callable[[], None] | None]:
        """Bring the experts' rows home and sum them, weighted.

        Each rank's contributions to a token are summed in FP32 in top-k order and rounded to bf16; these partials are
        summed in FP32 in rank order and rounded once. With ``sum_at_home`` all rows are summed in FP32 in top-k order
        with one rounding.

        After a dispatch with ``expert_major=False`` the caller has summed: row (r, t) of x is what all local experts
        made of token t of rank r, weighted (with recv_topk_weights) and rounded to bf16. These are the ranks' partials.
        Nothing is awaited before they leave. Rows of tokens that no local expert wants are not read.

        Args:
            x: bf16 [L, R * M, H], rows as dispatched; [R, M, H] after ``expert_major=False``.
            topk_idx: [T, K] as dispatched; entries may have been set to -1 since, to leave them out, unless the weights
                went with the dispatch or rows lie by source.
            topk_weights: float32 [T, K]; those of the dispatch if they went with it. After ``expert_major=False`` not
                used, and may be None.
            handle: of the dispatch. If the weights went with it, all ranks pass it as it was returned, or all pass
                copies of its tensors (or ``sum_at_home``, or ``use_logfmt``): then those weights are not used.
            use_logfmt: on all ranks or none; send rows in LogFMT-10 (see `deep_ep.logfmt`). Not with ``zero_copy``.
            zero_copy: the rows are in `get_next_low_latency_combine_buffer(handle)` already; x only gives the shape.
            return_recv_hook: as for `low_latency_dispatch`: x may be written again before the hook is called, the
                handle, topk_idx and topk_weights may not. (Of a handle whose src_info is a copy, x is copied for that.)
            out: bf16 [T, H] to write the result to.
            sum_at_home: not after ``expert_major=False``.
            combine_wait_recv_cost_stats: int64 [R]; nanoseconds waited for each rank are added.

        Returns:
            combined x bf16 [T, H], event, hook.

        Raises:
            ConfigError, PeerError, CommTimeout: as for `low_latency_dispatch`.
        """
        operation = "low_latency_combine"
        engine = self.runtime or self._engine(operation)
        kernels: LowLatencyKernels | None = engine.low_latency
        if kernels is not None and not self._hooks:
            attempt = kernels.try_combine_aside if async_finish else kernels.try_combine
            rows: object = x
            if zero_copy:
                rows = None if use_logfmt else self._filled_like(x)
            taken = attempt(
                rows,
                topk_idx,
                topk_weights,
                handle,
                out,
                combine_wait_recv_cost_stats,
                sum_at_home,
                use_logfmt,
                return_recv_hook,
            )
            if taken is not None:
                if zero_copy:
                    self._combine_buffer = None
                if self._portable_waits:
                    self._portable_waits.pop(operation, None)
                return taken
        if kernels is not None:
            is_handle = isinstance(handle, (tuple, list)) and len(handle) == 5
            num_max, num_experts = (handle[2], handle[4]) if is_handle else (None, None)
            kernels = self._kernels(x, topk_idx, num_max, num_experts, False)
        inputs = (x, topk_idx, topk_weights, handle, combine_wait_recv_cost_stats)
        with LowLatencyCall(engine, operation, kernels, inputs, async_finish, self._check_room) as call:
            check_finish(operation, async_finish, return_recv_hook)
            src_info, layout_range, num_max, hidden, num_experts = self._unpacked(handle, operation)
            shape = [src_info.shape[0], src_info.shape[1], hidden]
            x = checks.check_tensor(x, "x", operation, dim=3, dtypes=[torch.bfloat16], shape=shape)
            check_device(x, kernels, operation)
            check_handle_device(src_info, layout_range, x.device, operation)
            topk_idx = checks.check_topk_idx(topk_idx, operation)
            num_tokens, num_topk = topk_idx.shape
            expert_major = src_info.dim() == 2
            if not expert_major:
                check_by_source(src_info, num_topk, sum_at_home, operation)
            checks.check_tensor(topk_idx, "topk_idx", operation, dim=2, device=x.device)
            if num_tokens > num_max:
                raise ConfigError(
                    f"{operation}: topk_idx has {num_tokens} tokens but the handle's dispatch sent at most {num_max}; "
                    "pass the topk_idx of that dispatch"
                )
            if kernels is None:
                check_topk_range(topk_idx, num_experts)
            weights = None
            if expert_major:
                weights = checked_weights(topk_weights, operation, [num_tokens, num_topk], x.device)
            if use_logfmt and zero_copy:
                raise ConfigError(f"{operation}: use_logfmt encodes rows while sending, so it excludes zero_copy")
            if zero_copy:
                x = self._filled_combine_buffer(shape)
            if out is None:
                out = torch.empty((num_tokens, hidden), dtype=torch.bfloat16, device=x.device)
            checks.check_tensor(
                out,
                "out",
                operation,
                dim=2,
                dtypes=[torch.bfloat16],
                shape=[num_tokens, hidden],
                device=x.device,
            )
            if not out.is_contiguous():
                raise ConfigError(f"{operation}: out has strides {list(out.stride())}; expected a contiguous tensor")
            wait_stats = combine_wait_recv_cost_stats
            if wait_stats is not None:
                name = "combine_wait_recv_cost_stats"
                check_stats(wait_stats, name, operation, torch.int64, self.group_size, x.device)
            request = LowLatencyCombine(
                x,
                topk_idx,
                weights,
                src_info,
                layout_range,
                num_max,
                num_experts,
                use_logfmt,
                sum_at_home,
                out,
                wait_stats,
                expert_major,
            )
            call.start()
            if kernels is not None:
                hook = kernels.combine(request, return_recv_hook)
                call.keep((out, x))
            else:
                masked = self._masks()
                finish = portable_ll.combine(engine, request, masked, self._mask_timeout_s)
                self._add_masks(masked)
                hook = self._finish(finish, return_recv_hook)
            self._note_waits(operation, kernels)
        return out, call.event, hook

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """bf16 [L, R * M, H], or [R, M, H] after ``expert_major=False``, to write the experts' rows into, for the next
        `low_latency_combine(zero_copy=True)`. Any contents.

        Raises:
            ConfigError: the handle is not one of a low-latency dispatch of this group.
        """
        self._engine("get_next_low_latency_combine_buffer")
        src_info, _, _, hidden, _ = self._unpacked(handle, "get_next_low_latency_combine_buffer")
        shape = (src_info.shape[0], src_info.shape[1], hidden)
        if self._combine_buffer is None or self._combine_buffer.shape != shape:
            self._combine_buffer = torch.empty(shape, dtype=torch.bfloat16, device=src_info.device)
        return self._combine_buffer

    # Rank masks.

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of low-latency operations (``mask=True``), or take it in again.

        Raises:
            ConfigError: no such rank, the own rank, or the buffer was made without ``enable_shrink``.
        """
        self._check_shrink("low_latency_update_mask_buffer")
        if not 0 <= rank_to_mask < self.group_size or (mask and rank_to_mask == self.rank):
            raise ConfigError(
                f"low_latency_update_mask_buffer: rank {rank_to_mask} on rank {self.rank} of {self.group_size}; "
                "expected another rank of the group"
            )
        kernels = self._engine("low_latency_update_mask_buffer").low_latency
        if kernels is not None:
            kernels.set_mask(rank_to_mask, mask)
        if mask:
            self._masked.add(rank_to_mask)
        else:
            self._masked.discard(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank and 0 for the others into ``mask_status`` int32 [R].

        Raises:
            ConfigError: wrong tensor, or the buffer was made without ``enable_shrink``.
        """
        self._check_shrink("low_latency_query_mask_buffer")
        check_stats(mask_status, "mask_status", "low_latency_query_mask_buffer", torch.int32, self.group_size)
        kernels = self._engine("low_latency_query_mask_buffer").low_latency
        if kernels is not None:
            mask_status.copy_(kernels.masked)
            return
        mask_status.copy_(torch.tensor([int(r in self._masked) for r in range(self.group_size)], dtype=torch.int32))

    def low_latency_clean_mask_buffer(self) -> None:
        """Take all ranks in again.

        Raises:
            ConfigError: the buffer was made without ``enable_shrink``.
        """
        self._check_shrink("low_latency_clean_mask_buffer")
        kernels = self._engine("low_latency_clean_mask_buffer").low_latency
        if kernels is not None:
            kernels.masked.zero_()
        self._masked.clear()

    # Waits.

    def last_waits(self) -> dict[str, list[int]]:
        """How long this rank waited for each rank in its last low-latency dispatch and combine, to find slow ranks.

        Returns:
            ``{"low_latency_dispatch": [...], "low_latency_combine": [...]}``: nanoseconds by rank, 0 before the first
            call. Kernels give the longest wait for anything of that rank, the portable engine the sum of the waits. Of
            a call with a receive hook, once that was called.

        Waits for the device where the calls run as kernels, so it cannot be captured in a CUDA graph. The calls' own
        arguments ``dispatch_wait_recv_cost_stats`` and ``combine_wait_recv_cost_stats`` add waits up without that.
        """
        kernels: LowLatencyKernels | None = self._engine("last_waits").low_latency
        nothing = [0] * self.group_size
        waits = {"low_latency_dispatch": nothing, "low_latency_combine": list(nothing)}
        return {**(waits if kernels is None else kernels.last_waits()), **self._portable_waits}

    # Internals.

    def _kernels(
        self, x: object, topk_idx: object, num_max: object, num_experts: object, use_fp8: bool
    ) -> LowLatencyKernels | None:
        """The kernels that serve a call, or None. The arguments are not checked yet: wrong ones are for the kernels to
        refuse, since the peers, whose arguments are good, are in them."""
        kernels: LowLatencyKernels | None = self._engine("low_latency").low_latency
        if kernels is None:
            return None
        if isinstance(x, torch.Tensor) and x.device.type != kernels.device.type:
            return None
        if not isinstance(x, torch.Tensor) or not isinstance(topk_idx, torch.Tensor) or x.dim() < 2:
            return kernels
        if topk_idx.dim() != 2 or type(num_max) is not int or type(num_experts) is not int:
            return kernels
        return kernels if kernels.serves(x.shape[-1], topk_idx.shape[1], num_max, num_experts, use_fp8) else None

    def _check_shrink(self, operation: str) -> None:
        self._engine(operation)
        if not self.enable_shrink:
            raise ConfigError(f"{operation}: rank masks need a buffer constructed with enable_shrink=True")

    def _masks(self) -> set[int]:
        """Ranks that an operation on the portable engine leaves out; it may add some."""
        kernels: LowLatencyKernels | None = self._engine("low_latency").low_latency
        if kernels is not None and self.enable_shrink:
            self._masked = {rank for rank, is_masked in enumerate(kernels.masked.tolist()) if is_masked}
        return self._masked

    def _add_masks(self, masked: set[int]) -> None:
        """Leave these ranks out of operations on kernels as well."""
        kernels: LowLatencyKernels | None = self._engine("low_latency").low_latency
        if kernels is not None:
            for rank in masked:
                kernels.set_mask(rank, True)

    def _check_room(self, operation: str, kernels: LowLatencyKernels | None) -> None:
        """Raise where another operation, on these kernels or the portable engine, would be one too many."""
        num_pending = sum(hook.pending for hook in self._hooks or ())
        if num_pending == 0:
            self._hooks = None
        if kernels is not None:
            kernels.check_outstanding(operation, num_pending)
            return
        others: LowLatencyKernels | None = self._engine(operation).low_latency
        check_num_outstanding(operation, num_pending + (0 if others is None else others.num_pending))

    def _note_waits(self, operation: str, kernels: LowLatencyKernels | None) -> None:
        if kernels is None:
            self._portable_waits[operation] = list(self._engine(operation).mesh.last_wait_ns)
        else:
            self._portable_waits.pop(operation, None)

    def _finish(self, finish: Callable[[], None], return_recv_hook: bool) -> ReceiveHook | None:
        if not return_recv_hook:
            finish()
            return None
        hook = ReceiveHook(torch.no_grad()(finish))
        if self._hooks is None:
            self._hooks = weakref.WeakSet()
        self._hooks.add(hook)
        return hook

    def _unpacked(self, handle: LowLatencyHandle, operation: str) -> LowLatencyHandle:
        if not isinstance(handle, (tuple, list)) or len(handle) != 5:
            raise ConfigError(
                f"{operation}: handle is a {describe_value(handle)}; expected the tuple (src_info, layout_range, "
                "num_max_dispatch_tokens_per_rank, hidden, num_experts) that low_latency_dispatch returned"
            )
        src_info, layout_range, num_max, hidden, num_experts = handle
        for i, number in ((2, num_max), (3, hidden), (4, num_experts)):
            checks.check_count(number, f"handle[{i}]", operation, minimum=1)
        if isinstance(src_info, torch.Tensor) and src_info.dim() == 3:
            by_source = [self.group_size, num_max, None]
            index = checks.check_tensor(src_info, "handle[0]", operation, dim=3, dtypes=[torch.int32], shape=by_source)
            has_weights = isinstance(layout_range, torch.Tensor) and layout_range.dim() == 3
            shape = list(index.shape) if has_weights else [0]
            weights = checks.check_tensor(
                layout_range, "handle[1]", operation, dim=len(shape), dtypes=[torch.float32], shape=shape
            )
            return index, weights, num_max, hidden, num_experts
        num_local = num_local_experts(num_experts, self.group_size, self.rank)
        rows = [num_local, self.group_size * num_max]
        src_info = checks.check_tensor(src_info, "handle[0]", operation, dim=2, dtypes=[torch.int32], shape=rows)
        ranges = [num_local, self.group_size]
        layout_range = checks.check_tensor(
            layout_range, "handle[1]", operation, dim=2, dtypes=[torch.int64], shape=ranges
        )
        return src_info, layout_range, num_max, hidden, num_experts

    def _filled_like(self, x: object) -> torch.Tensor | None:
        """The combine buffer, if x is such a tensor, as it has to be."""
        buffer = self._combine_buffer
        if buffer is None or not isinstance(x, torch.Tensor):
            return None
        is_like = (x.shape, x.dtype, x.device) == (buffer.shape, buffer.dtype, buffer.device)
        return buffer if is_like else None

    def _filled_combine_buffer(self, shape: list[int]) -> torch.Tensor:
        buffer, self._combine_buffer = self._combine_buffer, None
        if buffer is None or list(buffer.shape) != shape:
            raise ConfigError(
                "low_latency_combine: zero_copy=True, but the rows were not written into "
                "get_next_low_latency_combine_buffer(handle) of this handle; get it anew for each combine"
            )
        return buffer
