"""The NVLink engine: kernels that write and read the peers' memory directly.

Dispatch places every row straight into the receiver's output, combine reads the rows back where they lie and sums them
once; both as `csrc/kernels` says. Each rank runs an operation as one or two launches on one stream. The only host wait
is for the counts of an uncached dispatch, and the rows are already moving by then.

What these kernels do not serve (CPU tensors, rows that are not a multiple of 16 bytes) takes the portable engine, on
all ranks alike, since all ranks pass the same kinds of tensors.
"""

from __future__ import annotations

import collections
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from .._native import _C, ELEMENT_TYPES
from ..errors import ConfigError, DeepEPError
from ..handles import Handle
from ..traffic import TrafficStats
from .arena import Arena
from .aside import Aside
from .combine_inputs import COUNTS, CombineInputs, counts_of
from .dispatch_outputs import DispatchOutputs
from .failures import failure, never_ran, overflowed, refusal
from .low_latency_plans import maker_of, view_maker
from .outputs import Landing, RowPlan, template
from .peer_memory import PeerMemory
from .portable import DispatchRequest, DispatchResult
from .watch import open_domain

_MAX_TOPK_LAYOUT_EXPERTS = 4096
#: Ranks, experts of a rank and channels that the control block has room for (csrc/layout/control_block.h).
MAX_PEERS, MAX_LOCAL_EXPERTS, MAX_CHANNELS = 32, 1024, 128
#: What `_C.DispatchPlan` sends: number of tokens, rows, scales, their strides in elements, topk_idx and topk_weights.
Sent = tuple[int, int, int, tuple[int, ...], int, int]
_UNIT = (1,)
_NO_STRIDES = (0, 0)
#: Buffers of this process by device, and those of them in use: they share the SMs that waiting blocks may take.
_num_buffers: collections.Counter[torch.device] = collections.Counter()
_in_use: weakref.WeakSet[CudaKernels] = weakref.WeakSet()
_sharing = threading.RLock()  # a buffer may end anywhere, since collecting garbage does that


class CudaKernels(DispatchOutputs, CombineInputs):
    """Launches the kernels of one buffer. Between `begin` and `end`, by one thread at a time.

    Args:
        memory: the peers' memory; its control block belongs to this object.
        timeout_s: deadline of every wait on the device.
        traffic: what is moved is counted there.

    Attributes:
        failure: what kernels have reported and was raised; None after `recover`.
        max_blocks: that may wait for peers at once: all buffers of all ranks on this GPU must find room side by side.
    """

    def __init__(self, memory: PeerMemory, timeout_s: float, traffic: TrafficStats) -> None:
        self.memory, self.traffic = memory, traffic
        self.device = memory.device
        self.rank, self.num_ranks = memory.rank, memory.num_ranks
        self.timeout_s = timeout_s
        self._index: int = memory.device.index
        with torch.cuda.device(self.device):
            _C.load_peer_kernels()
            _C.load_low_latency_kernels()
            self._domain = open_domain(memory.bases, memory.rank, timeout_s)
            self._order = _C.StreamOrder()
            can_push = self.num_ranks > 1 and memory.num_sharing == 1 and _C.PushCopies.available()
            self._push = _C.PushCopies(self._domain) if can_push else None
        self._push_number = 0
        self._num_sms: int = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._plans, self._alike = {}, {}
        self._combines, self._new = RowPlan((), "combine"), maker_of(self.device)
        self.read_combine = _C.CombineInputs(torch.Tensor, self._index, self.num_ranks).read
        self._int32 = template(torch.int32, self.device)
        self._layouts = self._layout_calls(_C.LayoutQueue(self._domain, self._order))
        self._small, self._sources = Arena.ordinary(self.device), Arena.symmetric(memory)
        self._guess, self._last_rows = 0, 0
        self._last_handle, self._next_handle, self._view = None, None, view_maker()
        self._staging_refused = 0
        self._missing, self._is_full = 0, False
        self.failure: DeepEPError | None = None
        self.max_blocks = 1
        self._stream, self._capturing, self._launched = 0, False, False
        self.launches: dict[str, int] = {}
        self._is_open = True
        _share_blocks(self, 1)

    # What is served.

    def serves(self, rows: object, use_fp8: bool = False) -> bool:
        """Whether the kernels move rows like these; with ``use_fp8`` as FP8.

        Raises:
            ConfigError: rows on another GPU than the buffer's.
        """
        if not isinstance(rows, torch.Tensor) or not rows.is_cuda:
            return False
        shape = rows.shape
        if len(shape) != 2:
            return False
        if rows.device != self.device:
            raise ConfigError(
                f"x is on {rows.device} but this buffer is on {self.device}; move x, or construct a buffer there"
            )
        row_bytes = shape[1] * (1 if use_fp8 else rows.element_size())
        return row_bytes > 0 and row_bytes % 16 == 0

    def serves_layout(self, topk_idx: torch.Tensor, num_experts: int) -> bool:
        """Whether the layout kernel counts these."""
        return topk_idx.device == self.device and num_experts <= _MAX_TOPK_LAYOUT_EXPERTS

    # Streams.

    def comm_stream(self) -> torch.cuda.Stream:
        """The stream of asynchronous calls, made when first needed."""
        return self.aside.stream

    @functools.cached_property
    def aside(self) -> Aside:
        """Operations on that stream."""
        return Aside(torch.cuda.Stream(device=self.device, priority=-1))

    def begin(self) -> None:
        """The next operation runs on the current stream, after the one before, whatever stream that was called on."""
        self._stream = torch._C._cuda_getCurrentRawStream(self._index)
        # The order of a captured graph is that of its replays.
        self._capturing = self._order.begin(self._stream)
        self._launched = False

    def end(self) -> None:
        """The operation is enqueued, or has failed."""
        if not self._capturing:
            self._order.end(self._stream)

    @property
    def order(self) -> _C.StreamOrder:
        """The order of the buffer's operations on different streams."""
        return self._order

    @property
    def domain(self) -> _C.PeerDomain:
        """The kernels' view of the ranks."""
        return self._domain

    def blocks(self, num_sms: int) -> int:
        """Blocks of an operation that may take so many SMs."""
        most = self.max_blocks
        return most if num_sms > most else num_sms or 1

    # Operations.

    # Methods that are looked up once: each time makes an object.

    @functools.cached_property
    def _launch_combine(self) -> Callable[..., None]:
        return self._domain.combine_rows

    @functools.cached_property
    def _await_counts(self) -> Callable[[int], tuple[int, bool, list[int], list[list[int]], int, int] | bool]:
        return self._domain.await_counts

    @functools.cached_property
    def _error(self) -> Callable[[], tuple[int, int, int, int, int, int] | None]:
        return self._domain.error

    @functools.cached_property
    def _try_layout(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None]:
        return self._layouts.try_run

    def _layout_calls(self, queue: Any) -> _C.LayoutCalls:
        new, index = maker_of(self.device), -1 if self.device.index is None else self.device.index

        def make_slab(num_bytes: int) -> tuple[int, torch.Tensor, torch.Tensor]:
            slab = new((num_bytes // 4,), (1,), torch.int32)
            return slab.data_ptr(), slab, slab.view(torch.bool)

        limit = _MAX_TOPK_LAYOUT_EXPERTS
        return _C.LayoutCalls(torch.Tensor, index, queue, self.num_ranks, limit, make_slab, view_maker())

    def try_layout(self, topk_idx: Any, num_experts: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """`layout` of arguments as they came; None if they are unusual or kernels have reported a failure."""
        if self.failure is not None:
            return None
        if torch.is_inference_mode_enabled():  # whose tensors are of less use outside
            with torch.inference_mode(False):
                return self.try_layout(topk_idx, num_experts)
        made = self._try_layout(topk_idx, num_experts, torch._C._cuda_getCurrentRawStream(self._index))
        if made is not None:
            self._count("dispatch_layout")
        return made

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int32 [R], int32 [E], bool [T, R]: tokens per rank and per expert, and where each goes."""
        is_int64, stream = topk_idx.dtype is torch.int64, torch._C._cuda_getCurrentRawStream(self._index)
        num_tokens, num_topk = topk_idx.shape
        with torch.inference_mode(False):
            made = self._layouts.run(topk_idx.data_ptr(), is_int64, num_tokens, num_topk, num_experts, stream)
        if made is None:
            self.raise_failure("get_dispatch_layout")
        self._count("dispatch_layout")
        return made

    def dispatch(self, request: DispatchRequest, per_expert: torch.Tensor, num_sms: int) -> DispatchResult:
        """Route anew: exchange counts, write the handle, place the rows."""
        in_rank = request.in_rank
        return self.run_dispatch(
            self._plan(request.rows, request.scales, request.scale_format, request.topk_idx),
            self._sent(request),
            (per_expert.data_ptr(), in_rank.data_ptr()),
            in_rank,
            per_expert.shape[0],
            request.num_worst_tokens,
            request.num_channels,
            num_sms,
        )

    def run_dispatch(
        self,
        plan: RowPlan,
        sent: Sent,
        layout: tuple[int, int],
        in_rank: torch.Tensor,
        num_experts: int,
        num_worst_tokens: int,
        num_channels: int,
        num_sms: int,
    ) -> DispatchResult:
        """`dispatch` of what lies at these addresses.

        Args:
            layout: num_tokens_per_expert and is_token_in_rank, from which the tokens of each rank are counted.
        """
        self._check_limits(num_experts, num_channels)
        if not num_worst_tokens and self._capturing:
            raise ConfigError(
                "dispatch: the number of received tokens is not known while a CUDA graph is captured; pass "
                "num_worst_tokens, or a handle"
            )
        sms = self.blocks(num_sms)
        # Only here can the pool grow, so it does before staging is used, and also for calls that had to use staging.
        grows = not num_worst_tokens and not self._is_full
        landing = None
        if not (grows and self._missing):
            landing = self._land(plan, num_worst_tokens or self._guess, with_src_idx=True, may_stage=not grows)
        if landing is None:
            if num_worst_tokens:
                self._missing = 0  # what was asked for may be far more than is ever needed
                raise self._exhausted(plan, num_worst_tokens)
            # A capacity of 0 fits nowhere, so all ranks come to the point where they make room together.
            landing = Landing(0, (0, 0, 0, 0, 0, 0), [])
        if num_worst_tokens:
            self._mark_unused(plan, landing, sms)
        memory = self._take_handle(sent[0], num_channels)
        signature = plan.signature("worst-case dispatch" if num_worst_tokens else "dispatch", num_experts, num_channels)
        self._launched = True
        plan.route(
            signature,
            landing.offsets,
            bool(num_worst_tokens),
            num_experts,
            num_channels,
            layout,
            memory.addresses,
            sent,
            sms,
            self._stream,
        )
        # Whatever needs no counts is done while the device counts.
        self._count("dispatch_notify")
        self._count(plan.kernel)
        # As many rows as last time: often that is right, and no tensor needs to be changed later.
        expected = num_worst_tokens or min(self._last_rows, landing.capacity)
        tensors = self._tensors(plan, landing, expected)
        result = None if tensors is None else self._result(plan, tensors, memory, in_rank)
        num_rows = num_worst_tokens
        counts: list[int] = []
        if not num_worst_tokens:
            self._prepare(memory.key)
            told = self._await_counts(num_experts)
            if isinstance(told, bool):
                self._raise_no_counts(refused=told)
            num_rows, fits, counts, sent_counts, most, away = told
            setattr(memory.tensors[0], COUNTS, sent_counts)
            if not fits:
                # Some rank guessed too little: all ranks know, make room together, and place the rows once more.
                landing = self._land_together(plan, num_rows, most)
                signature = plan.signature("dispatch again", num_experts, num_channels)
                self._repeat(plan, num_experts, memory.addresses[3], sent, landing, signature, sms)
                tensors, expected = self._tensors(plan, landing, num_rows), num_rows
                result = None if tensors is None else self._result(plan, tensors, memory, in_rank)
            # A little more than the last size, so that a size that varies does not place twice each time; and a round
            # number, so that the places in a block seldom change.
            self._last_rows = num_rows
            self._guess = (num_rows + num_rows // 16 + 64 + 127) // 128 * 128
            # Staging for rows like these in bf16: those of a dispatch that finds the pool full, and those of an
            # ordinary tensor that copy engines bring to a combine. All ranks see the same counts.
            wanted = max(most, away) * (2 * plan.hidden + 256)
            if wanted > self.memory.staging_bytes and wanted > self._staging_refused:
                self._reserve_staging(wanted)
        if result is None or tensors is None:
            tensors = self._unstage(plan, landing, num_rows, sms, with_src_idx=True)
            result = self._result(plan, tensors, memory, in_rank)
        elif expected != num_rows:
            plan.cut(tensors[:-1], num_rows)
            tensors[-1].resize_(num_rows)
        result.num_recv_tokens_per_expert = counts
        self.traffic.add_dispatch(num_rows, plan.payload_bytes, plan.dtype_name)
        return result

    def dispatch_cached(self, request: DispatchRequest, handle: Handle, num_sms: int) -> DispatchResult:
        """Repeat the routing of a handle."""
        plan = self._plan(request.rows, request.scales, request.scale_format)
        return self.run_cached(plan, self._sent(request), handle[3].shape[0], handle[5].data_ptr(), num_sms)

    def run_cached(self, plan: RowPlan, sent: Sent, num_rows: int, send_head: int, num_sms: int) -> DispatchResult:
        """`dispatch_cached` of what lies at these addresses."""
        sms = self.blocks(num_sms)
        landing = self._land(plan, num_rows, with_src_idx=False)
        if landing is None:
            raise self._exhausted(plan, num_rows)
        self._repeat(plan, 0, send_head, sent, landing, plan.signature("cached dispatch"), sms)
        tensors = self._tensors(plan, landing, num_rows)
        if tensors is None:
            tensors = self._unstage(plan, landing, num_rows, sms, with_src_idx=False)
        self.traffic.add_dispatch(num_rows, plan.payload_bytes, plan.dtype_name)
        return DispatchResult(tensors[0], tensors[1] if len(tensors) > 1 else None)

    def combine(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor | None,
        biases: list[torch.Tensor],
        handle: Handle,
        num_sms: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum what the ranks made of this rank's tokens."""
        send_head = handle[5]
        inputs = (
            rows.shape[0],
            rows.shape[1],
            send_head.shape[0],
            0 if weights is None else weights.shape[1],
            rows.data_ptr(),
            0 if weights is None else weights.data_ptr(),
            handle[0].data_ptr(),
            send_head.data_ptr(),
        )
        return self.run_combine(rows, weights, [bias.data_ptr() for bias in biases], handle[0], inputs, num_sms)

    def run_combine(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor | None,
        biases: list[int],
        rank_prefix: torch.Tensor,
        inputs: tuple[int, ...],
        num_sms: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`combine` of what lies at these addresses.

        Args:
            inputs: as `_C.CombineInputs` gives them.
        """
        num_rows, hidden, num_tokens, num_topk, rows_at, weights_at, prefix_at, head_at = inputs
        dtype, sms = rows.dtype, self.blocks(num_sms)
        # All ranks count alike, whether or not they push: a peer may.
        number, row_bytes = 0, hidden * dtype.itemsize
        sent: list[list[int]] | None = None
        if not self._capturing and self.memory.staging_bytes:
            self._push_number += 1
            number = self._push_number
        copies: list[tuple[int, int, int]] = []
        kept: list[torch.UntypedStorage] = []
        row_offset = self._offset(rows)
        if row_offset < 0:
            sent = self._pushable(getattr(rank_prefix, COUNTS, None), rows) if number else None
            if sent is None:
                row_offset = self._to_heap(rows, copies, kept)
                if row_offset < 0 and number:
                    # A wait for the device, where the only other way is to give up.
                    sent = self._pushable(counts_of(rank_prefix), rows)
                if row_offset < 0 and sent is None:
                    raise self._no_room("combine", "x", rows)
        weight_offset = -1 if weights is None else self._offset(weights)
        if weights is not None and weight_offset < 0:
            weight_offset = self._to_heap(weights, copies, kept)
            if weight_offset < 0:
                weight_offset = self._behind_inbox(weights, num_tokens, row_bytes, copies)
        out = self._new((num_tokens, hidden), (hidden, 1), dtype)
        out_weights = None
        if weights is not None:
            out_weights = self._new((num_tokens, num_topk), (max(num_topk, 1), 1), torch.float32)
        if copies:
            self._copy(copies, sms)
        self._count("combine_rows")
        self._launch_combine(
            self._combines.signature(dtype, hidden, num_topk),
            (rows_at, row_offset),
            (weights_at, weight_offset),
            number,
            self.memory.bases[self.rank] + self.memory.staging_offset if number else 0,
            prefix_at,
            num_tokens,
            head_at,
            hidden,
            ELEMENT_TYPES[dtype],
            biases,
            out.data_ptr(),
            num_topk,
            0 if out_weights is None else out_weights.data_ptr(),
            sms,
            self._stream,
        )
        if sent is not None:
            self._push_rows(number, rows, sent)
        self.traffic.add_combine(num_rows, row_bytes)
        return out, out_weights

    def refuse(self, operation: str) -> None:
        """Take part in an operation without moving anything, so that the peers learn of it and go on."""
        if self._launched or self._capturing or self.failure is not None:
            return
        if operation == "combine" and self.memory.staging_bytes:
            self._push_number += 1
        self._count("dispatch_refuse")
        self._domain.refuse(self._stream)

    # Failures.

    def check(self) -> None:
        """Raise the failure that kernels have reported, if any.

        Raises:
            CommTimeout, ConfigError, PeerError: see `raise_failure`.
        """
        if self.failure is not None or self._error() is not None:
            self.raise_failure("check")

    def check_results(self) -> None:
        """Raise what made results of earlier calls incomplete without breaking the buffer.

        Apart from `check`, since ranks learn of it at different times, and must not fall out of step.

        Raises:
            BufferOverflow: rows of a worst-case dispatch were left out; with the rank, its total and its capacity.
            PeerError: a rank gave an operation up because of its own arguments.
        """
        overflow = self._domain.take_overflow()
        if overflow is not None:
            raise overflowed(*overflow)
        refused = self._domain.take_refused()
        if refused is not None:
            raise refusal(refused)

    def raise_failure(self, operation: str) -> NoReturn:
        """Raise the first failure that a kernel reported; the buffer is unusable until `recover`."""
        if self.failure is None:
            record = self._error()
            if record is not None:
                self.failure = failure(record, self.rank, self.timeout_s)
            else:
                self.failure = never_ran(operation, 2 * self.timeout_s + 10)
            if self._push is not None:
                self._push.release()
        raise self.failure

    def recover(self, forget: Callable[[], None]) -> None:
        """Start anew after a failure. Collective: returns when no rank has anything of earlier operations under way.

        Args:
            forget: called while all ranks are idle, to make other parts of the buffer start anew.

        Raises:
            CommTimeout, PeerError: a rank did not come.
        """
        if self._push is not None:
            self._push.release()
        # A kernel may still wait for a peer that gave up: this rank's own refusal, or what the peer never began.
        self._domain.give_up()
        torch.cuda.synchronize(self.device)
        self.memory.rendezvous("recover: all ranks are idle", None)
        self._domain.reset()
        forget()
        self.failure, self._push_number, self._guess = None, 0, 0
        self.memory.rendezvous("recover: all ranks start anew", None)

    def close(self) -> None:
        """Free the record that kernels write. The memory is closed by its owner."""
        if self._is_open:
            self._is_open = False
            _share_blocks(self, -1)
        if self._push is not None:
            self._push.release()
            self._push.close()
        self._next_handle = self._flat = None
        self._small.clear()
        self._layouts.clear()
        self._sources.clear()
        self._order.close()
        self._domain.close()

    # Parts of a dispatch.

    def _sent(self, request: DispatchRequest) -> Sent:
        """What `_C.DispatchPlan` sends."""
        rows, scales, idx, weights = request.rows, request.scales, request.topk_idx, request.topk_weights
        return (
            rows.shape[0],
            rows.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            _NO_STRIDES if scales is None else scales.stride(),
            0 if idx is None else idx.data_ptr(),
            0 if weights is None else weights.data_ptr(),
        )

    def _repeat(
        self,
        plan: RowPlan,
        num_experts: int,
        send_head: int,
        sent: Sent,
        landing: Landing,
        signature: int,
        sms: int,
    ) -> None:
        """Place rows by heads that are known."""
        self._count(plan.kernel)
        plan.repeat(signature, landing.offsets, num_experts, send_head, sent, sms, self._stream)

    def _raise_no_counts(self, *, refused: bool) -> NoReturn:
        if not refused:
            self.raise_failure("dispatch")
        # The kernel behind the one that told it notes the refusal as well: it is taken when both have ended.
        torch.cuda.current_stream(self.device).synchronize()
        raise refusal(self._domain.take_refused() or 0)

    def _check_limits(self, num_experts: int, num_channels: int) -> None:
        local = -(-num_experts // self.num_ranks)
        if local > MAX_LOCAL_EXPERTS or num_channels > MAX_CHANNELS:
            raise ConfigError(
                f"dispatch: {num_experts} experts on {self.num_ranks} ranks and {num_channels} channels; the kernels "
                f"take at most {MAX_LOCAL_EXPERTS} experts a rank and {2 * MAX_CHANNELS} SMs"
            )


def _share_blocks(kernels: CudaKernels, change: int) -> None:
    """A buffer begins (1) or ends (-1): the shares of all on its device change. One that is only dropped keeps its
    share, since its kernels may still run."""
    with _sharing:
        _num_buffers[kernels.device] += change
        (_in_use.add if change > 0 else _in_use.discard)(kernels)
        for each in list(_in_use):
            if each.device == kernels.device:
                num_waiting = each.memory.num_sharing * _num_buffers[kernels.device]
                each.max_blocks = each._num_sms // num_waiting or 1
