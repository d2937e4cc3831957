"""The low-latency half of `Buffer`: packed rows per expert for decoding, receive hooks, rank masks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import checks, fp8
from .checks import describe_value
from .config import low_latency_size_hint
from .engines import portable_ll
from .engines.low_latency_call import LowLatencyCall
from .engines.portable import PortableEngine
from .engines.portable_ll import LowLatencyCombine, LowLatencyDispatch
from .errors import ConfigError
from .event import EventOverlap
from .layout import check_topk_range, num_local_experts
from .requests import scale_format_of

LowLatencyHandle = tuple[torch.Tensor, torch.Tensor, int, int, int]
_MAX_OUTSTANDING = 2


class ReceiveHook:
    """Finishes a low-latency operation when called; calling it again does nothing."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish: Callable[[], None] | None = finish

    @property
    def pending(self) -> bool:
        """True until the hook is called."""
        return self._finish is not None

    def __call__(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            with torch.no_grad():
                finish()


class LowLatencyMixin:
    """Low-latency operations of `Buffer`."""

    if TYPE_CHECKING:
        enable_shrink: bool
        group_size: int
        rank: int
        _masked: set[int]

        def _engine(self, operation: str) -> PortableEngine: ...

    _hooks: weakref.WeakSet[ReceiveHook] | None = None
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
    ) -> tuple[
        torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        torch.Tensor,
        LowLatencyHandle,
        EventOverlap,
        Callable[[], None] | None,
    ]:
        """Send tokens to their experts, packed for grouped GEMMs with masked rows.

        Args:
            x: bf16 [T, H], T at most M; H a multiple of 128 for FP8.
            topk_idx: int32 or int64 [T, K], -1 for no selection.
            num_max_dispatch_tokens_per_rank: M, equal on all ranks.
            num_experts: E.
            cumulative_local_expert_recv_stats: int32 [L]; the received counts are added.
            dispatch_wait_recv_cost_stats: int64 [R]; nanoseconds waited for each rank are added.
            use_fp8: send FP8 (E4M3, 1x128 tiles); ``round_scale``: power-of-two scales; ``use_ue8m0`` (with
                ``round_scale``): scales as exponents packed four to an int32.
            async_finish: return an event. Not together with ``return_recv_hook``.
            return_recv_hook: return a function that must be called before the results are used.

        Returns:
            recv_x: bf16 [L, R * M, H], or (E4M3 [L, R * M, H], scales [L, R * M, H / 128] float32 or [..., H / 512]
                int32, stored with tokens innermost). Rows of an expert are packed by source rank, then token.
            recv_count: int32 [L].
            handle: (src_info int32 [L, R * M], layout_range int64 [L, R] = begin << 32 | count, M, H, E).
            event, hook: ``hook`` is None unless asked for.

        Raises:
            ConfigError: bad arguments, more than M tokens, or a third operation while two hooks are outstanding.
            PeerError, CommTimeout: a rank died, refused or is late (without ``enable_shrink``).
        """
        operation = "low_latency_dispatch"
        engine = self._engine(operation)
        kernels = self._kernels(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, use_fp8)
        with LowLatencyCall(engine, operation, kernels, (x, topk_idx), async_finish) as call:
            self._check_outstanding(operation, async_finish, return_recv_hook)
            x = checks.check_tensor(x, "x", operation, dim=2, dtypes=[torch.bfloat16])
            topk_idx = checks.check_topk_idx(topk_idx, operation)
            num_topk = topk_idx.shape[1]
            shape = [x.shape[0], num_topk]
            checks.check_tensor(topk_idx, "topk_idx", operation, dim=2, shape=shape, device=x.device)
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
            scale_format = _scale_format(x.shape[1], use_fp8, round_scale, use_ue8m0)
            num_local = num_local_experts(num_experts, self.group_size, self.rank)
            stats = (cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
            if stats[0] is not None:
                _check_stats(stats[0], "cumulative_local_expert_recv_stats", operation, torch.int32, num_local)
            if stats[1] is not None:
                _check_stats(stats[1], "dispatch_wait_recv_cost_stats", operation, torch.int64, self.group_size)
            request = LowLatencyDispatch(x, topk_idx, num_max, num_experts, scale_format, *stats)
            call.start()
            if kernels is not None:
                output, receive = kernels.dispatch(request, return_recv_hook)
                hook = None if receive is None else ReceiveHook(receive)
                call.keep((output.rows, output.scales, output.count, output.src_info, output.layout_range))
            else:
                output, finish = portable_ll.dispatch(engine, request, self._masked, self.enable_shrink)
                hook = self._finish(finish, return_recv_hook)
        recv_x = output.rows if output.scales is None else (output.rows, output.scales)
        handle = (output.src_info, output.layout_range, num_max, x.shape[1], num_experts)
        return recv_x, output.count, handle, call.event, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
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

        Args:
            x: bf16 [L, R * M, H], rows as dispatched.
            topk_idx: [T, K] as dispatched; entries may have been set to -1 since, to leave them out.
            topk_weights: float32 [T, K].
            handle: of the dispatch.
            use_logfmt: send rows in LogFMT-10 (see `deep_ep.logfmt`). Not together with ``zero_copy``.
            zero_copy: the rows are in `get_next_low_latency_combine_buffer(handle)` already; x only gives the shape.
            out: bf16 [T, H] to write the result to.
            combine_wait_recv_cost_stats: int64 [R]; nanoseconds waited for each rank are added.

        Returns:
            combined x bf16 [T, H], event, hook.

        Raises:
            ConfigError, PeerError, CommTimeout: as for `low_latency_dispatch`.
        """
        operation = "low_latency_combine"
        engine = self._engine(operation)
        kernels = None
        if isinstance(handle, (tuple, list)) and len(handle) == 5 and not use_logfmt:
            kernels = self._kernels(x, topk_idx, handle[2], handle[4], False)
        with LowLatencyCall(engine, operation, kernels, (x, topk_idx, topk_weights, handle), async_finish) as call:
            self._check_outstanding(operation, async_finish, return_recv_hook)
            src_info, layout_range, num_max, hidden, num_experts = self._unpacked(handle, operation)
            shape = [src_info.shape[0], src_info.shape[1], hidden]
            x = checks.check_tensor(x, "x", operation, dim=3, dtypes=[torch.bfloat16], shape=shape)
            topk_idx = checks.check_topk_idx(topk_idx, operation)
            num_tokens, num_topk = topk_idx.shape
            checks.check_tensor(topk_idx, "topk_idx", operation, dim=2, device=x.device)
            if kernels is None:
                check_topk_range(topk_idx, num_experts)
            weights = checks.check_tensor(
                topk_weights,
                "topk_weights",
                operation,
                dim=2,
                dtypes=[torch.float32],
                shape=[num_tokens, num_topk],
                device=x.device,
            )
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
                _check_stats(wait_stats, "combine_wait_recv_cost_stats", operation, torch.int64, self.group_size)
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
            )
            call.start()
            if kernels is not None:
                receive = kernels.combine(request, return_recv_hook)
                hook = None if receive is None else ReceiveHook(receive)
                call.keep((out,))
            else:
                finish = portable_ll.combine(engine, request, self._masked, self.enable_shrink)
                hook = self._finish(finish, return_recv_hook)
        return out, call.event, hook

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """bf16 [L, R * M, H] to write the experts' rows into, for the next `low_latency_combine(zero_copy=True)`.

        Raises:
            ConfigError: the handle is not one of a low-latency dispatch of this group.
        """
        self._engine("get_next_low_latency_combine_buffer")
        src_info, _, _, hidden, _ = self._unpacked(handle, "get_next_low_latency_combine_buffer")
        shape = (src_info.shape[0], src_info.shape[1], hidden)
        if self._combine_buffer is None or self._combine_buffer.shape != shape:
            self._combine_buffer = torch.zeros(shape, dtype=torch.bfloat16, device=src_info.device)
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
        _check_stats(mask_status, "mask_status", "low_latency_query_mask_buffer", torch.int32, self.group_size)
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

    # Internals.

    def _kernels(self, x: object, topk_idx: object, num_max: object, num_experts: object, use_fp8: bool) -> Any:
        """The kernels that serve a call, or None. The arguments are not checked yet."""
        kernels = self._engine("low_latency").low_latency
        if kernels is None or not isinstance(x, torch.Tensor) or not isinstance(topk_idx, torch.Tensor):
            return None
        if topk_idx.dim() != 2 or type(num_max) is not int or type(num_experts) is not int:
            return None
        return kernels if kernels.serves(x, topk_idx.shape[1], num_max, num_experts, use_fp8) else None

    def _check_shrink(self, operation: str) -> None:
        self._engine(operation)
        if not self.enable_shrink:
            raise ConfigError(f"{operation}: rank masks need a buffer constructed with enable_shrink=True")

    def _check_outstanding(self, operation: str, async_finish: bool, return_recv_hook: bool) -> None:
        if async_finish and return_recv_hook:
            raise ConfigError(f"{operation}: async_finish and return_recv_hook exclude each other; pick one")
        pending = [hook for hook in self._hooks or () if hook.pending]
        if len(pending) >= _MAX_OUTSTANDING:
            raise ConfigError(
                f"{operation}: {len(pending)} low-latency operations are outstanding, which is the most that a buffer "
                "holds; call their receive hooks first"
            )

    def _finish(self, finish: Callable[[], None], return_recv_hook: bool) -> ReceiveHook | None:
        if not return_recv_hook:
            finish()
            return None
        hook = ReceiveHook(finish)
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
        num_local = num_local_experts(num_experts, self.group_size, self.rank)
        rows = [num_local, self.group_size * num_max]
        checks.check_tensor(src_info, "handle[0]", operation, dim=2, dtypes=[torch.int32], shape=rows)
        ranges = [num_local, self.group_size]
        checks.check_tensor(layout_range, "handle[1]", operation, dim=2, dtypes=[torch.int64], shape=ranges)
        return src_info, layout_range, num_max, hidden, num_experts

    def _filled_combine_buffer(self, shape: list[int]) -> torch.Tensor:
        buffer, self._combine_buffer = self._combine_buffer, None
        if buffer is None or list(buffer.shape) != shape:
            raise ConfigError(
                "low_latency_combine: zero_copy=True, but the rows were not written into "
                "get_next_low_latency_combine_buffer(handle) of this handle; get it anew for each combine"
            )
        return buffer


def _scale_format(hidden: int, use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> fp8.ScaleFormat | None:
    if use_fp8 and hidden % fp8.TILE != 0:
        raise ConfigError(
            f"low_latency_dispatch: hidden is {hidden}; FP8 needs a multiple of {fp8.TILE}. Pass use_fp8=False or pad x"
        )
    return scale_format_of("low_latency_dispatch", use_fp8, round_scale, use_ue8m0)


def _check_stats(value: torch.Tensor, name: str, operation: str, dtype: torch.dtype, size: int) -> None:
    checks.check_tensor(value, name, operation, dim=1, dtypes=[dtype], shape=[size])
