"""The NVLink engine: kernels that write and read the peers' memory directly.

Dispatch places every row straight into the receiver's output, combine reads the rows back where they lie and sums them
once; both as `csrc/kernels` says. Each rank runs an operation as one or two launches on one stream. The only host wait
is for the counts of an uncached dispatch, and the rows are already moving by then.

What these kernels do not serve (CPU tensors, rows that are not a multiple of 16 bytes) takes the portable engine, on
all ranks alike, since all ranks pass the same kinds of tensors.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import fp8
from .._native import _C, ELEMENT_TYPES
from ..errors import ConfigError, DeepEPError, PoolExhausted
from ..handles import Handle
from .arena import Arena
from .combine_inputs import COUNTS, CombineInputs, counts_of
from .failures import failure, never_ran, overflowed, refusal
from .outputs import SRC_IDX, Field, Landing, RowPlan, TensorMaker, aligned
from .peer_memory import PeerMemory
from .portable import DispatchResult
from .watch import open_domain

_MAX_TOPK_LAYOUT_EXPERTS = 4096
#: Ranks, experts of a rank and channels that the control block has room for (csrc/layout/control_block.h).
MAX_PEERS, MAX_LOCAL_EXPERTS, MAX_CHANNELS = 32, 1024, 128
_UNIT = (1,)
_NO_PLACE = (torch.UntypedStorage(0), 0)
_COUNTS_FAILED, _COUNTS_REFUSED = 0, 2
_FORMATS: dict[fp8.ScaleFormat, int] = {"fp32": 0, "pow2": 1, "ue8m0": 2}
#: Buffers of this process by device: the SMs that waiting blocks may take are shared between them.
_num_buffers: collections.Counter[torch.device] = collections.Counter()


@dataclass(slots=True)
class DeviceRows:
    """What a dispatch sends. ``scale_format``: the rows are quantised on the way; ``scales`` is None then."""

    rows: torch.Tensor
    scales: torch.Tensor | None = None
    scale_format: fp8.ScaleFormat | None = None


class CudaKernels(CombineInputs):
    """Launches the kernels of one buffer. Between `begin` and `end`, by one thread at a time.

    Args:
        memory: the peers' memory; its control block belongs to this object.
        timeout_s: deadline of every wait on the device.
    """

    def __init__(self, memory: PeerMemory, timeout_s: float) -> None:
        self.memory = memory
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
        self._comm_stream: torch.cuda.Stream | None = None
        self._plans: dict[object, RowPlan] = {}
        self._tensor = TensorMaker(self.device)
        self._small, self._sources = Arena.ordinary(self.device), Arena.symmetric(memory)
        self._guess = 0
        self._staging_refused = 0
        self._missing = 0  # bytes that the pool could not give
        self._is_full = False  # whether it cannot grow, the same on all ranks
        self._failure: DeepEPError | None = None
        self._stream, self._capturing, self._launched = 0, False, False
        self.launches: dict[str, int] = {}
        self._is_open = True
        _num_buffers[self.device] += 1

    # What is served.

    def serves(self, rows: object, use_fp8: bool = False) -> bool:
        """Whether the kernels move rows like these; with ``use_fp8`` as FP8.

        Raises:
            ConfigError: rows on another GPU than the buffer's.
        """
        if not isinstance(rows, torch.Tensor) or not rows.is_cuda or rows.dim() != 2:
            return False
        if rows.device != self.device:
            raise ConfigError(
                f"x is on {rows.device} but this buffer is on {self.device}; move x, or construct a buffer there"
            )
        row_bytes = rows.shape[1] * (1 if use_fp8 else rows.element_size())
        return row_bytes > 0 and row_bytes % 16 == 0

    def serves_layout(self, topk_idx: torch.Tensor, num_experts: int) -> bool:
        """Whether the layout kernel counts these."""
        return topk_idx.device == self.device and num_experts <= _MAX_TOPK_LAYOUT_EXPERTS

    # Streams.

    def comm_stream(self) -> torch.cuda.Stream:
        """The stream of asynchronous calls, made when first needed."""
        if self._comm_stream is None:
            self._comm_stream = torch.cuda.Stream(device=self.device, priority=-1)
        return self._comm_stream

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
        """Blocks that may wait for peers at once: all buffers of all ranks on this GPU must find room side by side."""
        most = self._num_sms // (self.memory.num_sharing * _num_buffers[self.device]) or 1
        return most if num_sms > most else num_sms or 1

    # Operations.

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int32 [R], int32 [E], bool [T, R]: tokens per rank and per expert, and where each goes."""
        num_tokens, num_topk = topk_idx.shape
        num_ranks = self.num_ranks
        words, first = self._words(num_ranks + num_experts)
        per_rank = words.as_strided((num_ranks,), _UNIT, first)
        per_expert = words.as_strided((num_experts,), _UNIT, first + num_ranks)
        storage, start = self._bytes(num_tokens * num_ranks)
        in_rank = self._tensor(storage, start, torch.bool, (num_tokens, num_ranks))
        self._count("dispatch_layout")
        base = words.data_ptr() + 4 * first
        self._domain.dispatch_layout(
            topk_idx.data_ptr(),
            topk_idx.dtype == torch.int64,
            num_tokens,
            num_topk,
            num_experts,
            base,
            base + 4 * num_ranks,
            storage.data_ptr() + start,
            self._stream,
        )
        return per_rank, per_expert, in_rank

    def dispatch(
        self,
        x: DeviceRows,
        in_rank: torch.Tensor,
        per_rank: torch.Tensor,
        per_expert: torch.Tensor,
        topk: tuple[torch.Tensor, torch.Tensor] | None,
        num_worst_tokens: int,
        num_channels: int,
        num_sms: int,
    ) -> DispatchResult:
        """Route anew: exchange counts, write the handle, place the rows."""
        num_experts = per_expert.shape[0]
        self._check_limits(num_experts, num_channels)
        num_tokens, num_ranks = x.rows.shape[0], self.num_ranks
        if not num_worst_tokens and self._capturing:
            raise ConfigError(
                "dispatch: the number of received tokens is not known while a CUDA graph is captured; pass "
                "num_worst_tokens, or a handle"
            )
        plan = self._plan(x, topk)
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
        sms = self.blocks(num_sms)
        if num_worst_tokens:
            self._mark_unused(plan, landing, sms)
        # The handle's own tensors: prefix matrix [R, R], two channel matrices [R, C], heads [T, R].
        matrix, channels = num_ranks * num_ranks, num_ranks * num_channels
        words, first = self._words(matrix + 2 * channels + num_tokens * num_ranks)
        base = words.data_ptr() + 4 * first
        sent_at, received_at, heads_at = matrix, matrix + channels, matrix + 2 * channels
        send_head = base + 4 * heads_at
        signature = plan.signature("worst-case dispatch" if num_worst_tokens else "dispatch", num_experts, num_channels)
        self._count("dispatch_notify")
        self._domain.dispatch_notify(
            signature,
            landing.offsets,
            bool(num_worst_tokens),
            num_tokens,
            num_experts,
            num_channels,
            per_rank.data_ptr(),
            per_expert.data_ptr(),
            in_rank.data_ptr(),
            base,
            base + 4 * sent_at,
            base + 4 * received_at,
            send_head,
            self._stream,
        )
        self._place(x, plan, topk, num_experts, send_head, landing, signature, sms, announce=False)
        by_rank, by_channel = (num_ranks, 1), (num_channels, 1)
        prefix = words.as_strided((num_ranks, num_ranks), by_rank, first)
        sent_matrix = words.as_strided((num_ranks, num_channels), by_channel, first + sent_at)
        received_matrix = words.as_strided((num_ranks, num_channels), by_channel, first + received_at)
        head = words.as_strided((num_tokens, num_ranks), by_rank, first + heads_at)
        counts: list[int] = []
        num_rows = num_worst_tokens
        if not num_worst_tokens:
            self._await_counts()
            num_rows, fits, counts, sent, most, away = self._domain.counts(num_experts)
            setattr(prefix, COUNTS, sent)
            if not fits:
                # Some rank guessed too little: all ranks know, make room together, and place the rows once more.
                landing = self._land_together(plan, num_rows, most)
                again = plan.signature("dispatch again", num_experts, num_channels)
                self._place(x, plan, topk, num_experts, send_head, landing, again, sms, announce=True)
            # A little more than the last size, so that a size that varies does not place twice each time.
            self._guess = num_rows + num_rows // 16 + 64
            # Staging for rows like these in bf16: those of a dispatch that finds the pool full, and those of an
            # ordinary tensor that copy engines bring to a combine. All ranks see the same counts.
            wanted = max(most, away) * (2 * x.rows.shape[1] + 256)
            if wanted > self.memory.staging_bytes and wanted > self._staging_refused:
                self._reserve_staging(wanted)
        tensors, src = self._cut(plan, landing, num_rows, sms, with_src_idx=True)
        src_idx = self._tensor(src[0], src[1], torch.int32, (num_rows,))
        handle = (prefix, sent_matrix, received_matrix, src_idx, in_rank, head)
        scales, idx, weights = plan.named(tensors)
        return DispatchResult(tensors[0], scales, idx, weights, counts, handle)

    def dispatch_cached(self, x: DeviceRows, handle: Handle, num_sms: int) -> DispatchResult:
        """Repeat the routing of a handle."""
        plan, num_rows, sms = self._plan(x, None), handle[3].shape[0], self.blocks(num_sms)
        landing = self._land(plan, num_rows, with_src_idx=False)
        if landing is None:
            raise self._exhausted(plan, num_rows)
        signature = plan.signature("cached dispatch")
        self._place(x, plan, None, 0, handle[5].data_ptr(), landing, signature, sms, announce=True)
        tensors, _ = self._cut(plan, landing, num_rows, sms, with_src_idx=False)
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
        num_tokens, hidden = send_head.shape[0], rows.shape[1]
        num_topk = 0 if weights is None else weights.shape[1]
        sms = self.blocks(num_sms)
        # All ranks count alike, whether or not they push: a peer may.
        number, row_bytes = 0, hidden * rows.element_size()
        sent: list[list[int]] | None = None
        if not self._capturing and self.memory.staging_bytes:
            self._push_number += 1
            number = self._push_number
        copies: list[tuple[int, int, int]] = []
        kept: list[torch.UntypedStorage] = []
        row_offset = self._offset(rows)
        if row_offset < 0:
            sent = self._pushable(getattr(handle[0], COUNTS, None), rows) if number else None
            if sent is None:
                row_offset = self._to_heap(rows, copies, kept)
                if row_offset < 0 and number:
                    # A wait for the device, where the only other way is to give up.
                    sent = self._pushable(counts_of(handle[0]), rows)
                if row_offset < 0 and sent is None:
                    raise self._no_room("combine", "x", rows)
        weight_offset = -1 if weights is None else self._offset(weights)
        if weights is not None and weight_offset < 0:
            weight_offset = self._to_heap(weights, copies, kept)
            if weight_offset < 0:
                weight_offset = self._behind_inbox(weights, num_tokens, row_bytes, copies)
        out = torch.empty((num_tokens, hidden), dtype=rows.dtype, device=self.device)
        out_weights = None
        if weights is not None:
            out_weights = torch.empty((num_tokens, num_topk), dtype=torch.float32, device=self.device)
        if copies:
            self._copy(copies, sms)
        if sent is not None and self._push is not None:
            self._push.mark_ready(self._stream)
        self._count("combine_rows")
        self._domain.combine_rows(
            self._plan(DeviceRows(rows), None).signature("combine", num_topk),
            (rows.data_ptr(), row_offset),
            (0 if weights is None else weights.data_ptr(), weight_offset),
            number,
            self.memory.bases[self.rank] + self.memory.staging_offset if number else 0,
            handle[0].data_ptr(),
            num_tokens,
            send_head.data_ptr(),
            hidden,
            ELEMENT_TYPES[rows.dtype],
            [bias.data_ptr() for bias in biases],
            out.data_ptr(),
            num_topk,
            0 if out_weights is None else out_weights.data_ptr(),
            sms,
            self._stream,
        )
        if sent is not None:
            self._push_rows(number, rows, sent)
        return out, out_weights

    def refuse(self, operation: str) -> None:
        """Take part in an operation without moving anything, so that the peers learn of it and go on."""
        if self._launched or self._capturing or self._failure is not None:
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
        if self._failure is not None or self._domain.error() is not None:
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

    @property
    def has_failed(self) -> bool:
        """Whether a failure has been raised, and nothing recovered from it since."""
        return self._failure is not None

    def raise_failure(self, operation: str) -> None:
        """Raise the first failure that a kernel reported; the buffer is unusable until `recover`."""
        if self._failure is None:
            record = self._domain.error()
            if record is not None:
                self._failure = failure(record, self.rank, self.timeout_s, self.launches)
            else:
                self._failure = never_ran(operation, 2 * self.timeout_s + 10)
            if self._push is not None:
                self._push.release()
        raise self._failure

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
        self._failure, self._push_number, self._guess = None, 0, 0
        self.memory.rendezvous("recover: all ranks start anew", None)

    def close(self) -> None:
        """Free the record that kernels write. The memory is closed by its owner."""
        if self._is_open:
            self._is_open = False
            _num_buffers[self.device] -= 1
        if self._push is not None:
            self._push.release()
            self._push.close()
        self._small.clear()
        self._sources.clear()
        self._order.close()
        self._domain.close()

    # Memory.

    def _plan(self, x: DeviceRows, topk: tuple[torch.Tensor, torch.Tensor] | None) -> RowPlan:
        rows, scales = x.rows, x.scales
        of_scales = None if scales is None else (scales.dtype, scales.shape[1])
        of_topk = None if topk is None else (topk[0].dtype, topk[0].shape[1])
        key = (rows.dtype, rows.shape[1], of_scales, x.scale_format, of_topk)
        plan = self._plans.get(key)
        if plan is None:
            hidden = rows.shape[1]
            fields = [Field.of("rows", torch.float8_e4m3fn if x.scale_format else rows.dtype, hidden)]
            if x.scale_format is not None:
                fields.append(Field.of("scales", *fp8.scale_columns(hidden, x.scale_format)))
            elif of_scales is not None:
                fields.append(Field.of("scales", *of_scales))
            if of_topk is not None:
                fields += [Field.of("topk_idx", *of_topk), Field.of("topk_weights", torch.float32, of_topk[1])]
            plan = self._plans[key] = RowPlan(fields, repr(key))
        return plan

    def _bytes(self, num_bytes: int) -> tuple[torch.UntypedStorage, int]:
        part = self._small.take(num_bytes, self._stream, self._capturing)
        if part is None:  # ordinary memory: torch raises when there is none
            raise PoolExhausted(f"no memory for {num_bytes} bytes of a handle")
        return part

    def _words(self, num_words: int) -> tuple[torch.Tensor, int]:
        part = self._small.take_words(num_words, self._stream, self._capturing)
        if part is None:
            raise PoolExhausted(f"no memory for {4 * num_words} bytes of a handle")
        return part

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

    def _mark_unused(self, plan: RowPlan, landing: Landing, sms: int) -> None:
        """Fill what tells rows apart from padding with -1, before peers write the rows that exist."""
        base = self.memory.bases[self.rank]
        fills = [(landing.offsets[4], SRC_IDX.row_bytes)]
        fills += [(landing.offsets[2], field.row_bytes) for field in plan.fields if field.name == "topk_idx"]
        if landing.capacity:
            self._copy([(0, base + at, aligned(landing.capacity * row_bytes)) for at, row_bytes in fills], sms)

    def _cut(
        self, plan: RowPlan, landing: Landing, num_rows: int, sms: int, *, with_src_idx: bool
    ) -> tuple[list[torch.Tensor], tuple[torch.UntypedStorage, int]]:
        """The tensors of what has landed, in the plan's order, the first ``num_rows`` rows; and the place of src_idx.

        What landed in staging memory is copied out of it.
        """
        block, starts, src = landing.block, landing.starts, landing.src
        if landing.staged_at >= 0 and num_rows:
            block, starts, src = self._unstage(plan, landing, num_rows, sms, with_src_idx)
        if block is None:
            tensors = [
                torch.empty((num_rows, field.width), dtype=field.dtype, device=self.device) for field in plan.fields
            ]
        else:
            make = self._tensor
            tensors = [
                make(block, start, field.dtype, (num_rows, field.width))
                for field, start in zip(plan.fields, starts, strict=True)
            ]
        if src is None and with_src_idx:
            src = self._bytes(4)
        return tensors, src or _NO_PLACE

    def _unstage(
        self, plan: RowPlan, landing: Landing, num_rows: int, sms: int, with_src_idx: bool
    ) -> tuple[torch.UntypedStorage, list[int], tuple[torch.UntypedStorage, int]]:
        starts, total = plan.starts(num_rows)
        src_bytes = aligned(num_rows * SRC_IDX.row_bytes) if with_src_idx else 0
        block = torch.UntypedStorage(total, device=self.device)
        src = self._bytes(max(src_bytes, 4))
        staged, to = self.memory.bases[self.rank] + landing.staged_at, block.data_ptr()
        copies = [
            (staged + source, to + target, aligned(num_rows * field.row_bytes))
            for field, source, target in zip(plan.fields, landing.starts, starts, strict=True)
        ]
        if with_src_idx:
            copies.append((self.memory.bases[self.rank] + landing.offsets[4], src[0].data_ptr() + src[1], src_bytes))
        self._copy(copies, sms)
        return block, starts, src

    def _exhausted(self, plan: RowPlan, num_rows: int) -> PoolExhausted:
        return PoolExhausted(
            f"dispatch: no room in symmetric memory for {num_rows} rows of {plan.row_bytes} bytes: "
            f"{self.memory.usage()}. Drop received tensors earlier, or construct the buffer with a larger "
            "num_nvl_bytes or max_pool_bytes"
        )

    # Launches.

    def _await_counts(self) -> None:
        outcome = self._domain.wait_counts()
        if outcome == _COUNTS_FAILED:
            self.raise_failure("dispatch")
        if outcome == _COUNTS_REFUSED:
            # The kernel behind the one that told it notes the refusal as well: it is taken when both have ended.
            torch.cuda.current_stream(self.device).synchronize()
            raise refusal(self._domain.take_refused() or 0)

    def _place(
        self,
        x: DeviceRows,
        plan: RowPlan,
        topk: tuple[torch.Tensor, torch.Tensor] | None,
        num_experts: int,
        send_head: int,
        landing: Landing,
        signature: int,
        sms: int,
        *,
        announce: bool,
    ) -> None:
        rows, scales = x.rows, x.scales
        idx, weights = topk if topk is not None else (None, None)
        quantize = x.scale_format is not None
        self._count("dispatch_rows_fp8" if quantize else "dispatch_rows")
        self._domain.dispatch_rows(
            signature,
            announce,
            landing.offsets,
            rows.shape[0],
            send_head,
            rows.data_ptr(),
            plan.fields[0].row_bytes,
            0 if scales is None else scales.data_ptr(),
            plan.fields[1].width if quantize or scales is not None else 0,
            (0, 0) if scales is None else scales.stride(),
            0 if idx is None else idx.data_ptr(),
            idx is not None and idx.dtype == torch.int64,
            0 if weights is None else weights.data_ptr(),
            0 if idx is None else idx.shape[1],
            num_experts,
            ELEMENT_TYPES[rows.dtype] if quantize else -1,
            0 if x.scale_format is None else _FORMATS[x.scale_format],
            sms,
            self._stream,
        )

    def _copy(self, copies: list[tuple[int, int, int]], sms: int) -> None:
        """(from, to, bytes) within this rank's memory, on the SMs of the call; from 0: fill with -1."""
        self._count("dispatch_combine_copy")
        _C.copy_segments(copies, sms, self._stream)

    def _check_limits(self, num_experts: int, num_channels: int) -> None:
        local = -(-num_experts // self.num_ranks)
        if local > MAX_LOCAL_EXPERTS or num_channels > MAX_CHANNELS:
            raise ConfigError(
                f"dispatch: {num_experts} experts on {self.num_ranks} ranks and {num_channels} channels; the kernels "
                f"take at most {MAX_LOCAL_EXPERTS} experts a rank and {2 * MAX_CHANNELS} SMs"
            )
