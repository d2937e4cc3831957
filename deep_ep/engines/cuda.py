"""The NVLink engine: kernels that write and read the peers' memory directly.

Dispatch places every row straight into the receiver's output, combine reads the rows back where they lie and sums them
once; both as `csrc/kernels` says. Each rank runs an operation as one or two launches on one stream. The only host wait
is for the counts of an uncached dispatch, and the rows are already moving by then.

What these kernels do not serve (CPU tensors, rows that are not a multiple of 16 bytes) takes the portable engine, on
all ranks alike, since all ranks pass the same kinds of tensors.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .._native import _C, ELEMENT_TYPES
from ..errors import BufferOverflow, CommTimeout, ConfigError, DeepEPError, PeerError
from ..handles import Handle
from .peer_memory import PeerMemory, PoolExhausted

_SLAB_ALIGNMENT = 128
_MAX_TOPK_LAYOUT_EXPERTS = 4096
#: Ranks, experts of a rank and channels that the control block has room for (csrc/layout/control_block.h).
MAX_PEERS, MAX_LOCAL_EXPERTS, MAX_CHANNELS = 32, 1024, 128
_OPERATIONS = {1: "dispatch", 2: "combine"}
_PHASES = {1: "announcement", 2: "end of the operation", 3: "layout"}
_TIMEOUT, _SIGNATURE, _OVERFLOW, _EXPERT_RANGE = 1, 2, 3, 4


@dataclass(frozen=True)
class DeviceDispatch:
    """What a dispatch brought; tensors as `Buffer.dispatch` returns them."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_recv_tokens_per_expert: list[int]
    handle: Handle


class CudaKernels:
    """Launches the kernels of one buffer.

    Args:
        memory: the peers' memory; its control block belongs to this object.
        timeout_s: deadline of every wait on the device.
    """

    def __init__(self, memory: PeerMemory, timeout_s: float) -> None:
        self.memory = memory
        self.device = memory.device
        self.rank, self.num_ranks = memory.rank, memory.num_ranks
        self.timeout_s = timeout_s
        self._domain = _C.PeerDomain(memory.bases, memory.rank, timeout_s)
        self._lock = threading.Lock()
        self._comm_stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None
        self._last_event = torch.cuda.Event()
        self._signatures: dict[object, int] = {}
        self._guess = 0
        self._failure: DeepEPError | None = None
        self.launches: dict[str, int] = {}

    # What is served.

    def serves(self, rows: torch.Tensor) -> bool:
        """Whether the kernels move rows like these.

        Raises:
            ConfigError: rows on another GPU than the buffer's.
        """
        if not isinstance(rows, torch.Tensor) or not rows.is_cuda or rows.dim() != 2:
            return False
        if rows.device != self.device:
            raise ConfigError(
                f"x is on {rows.device} but this buffer is on {self.device}; move x, or construct a buffer there"
            )
        row_bytes = rows.shape[1] * rows.element_size()
        return row_bytes > 0 and row_bytes % 16 == 0

    def serves_layout(self, topk_idx: torch.Tensor, num_experts: int) -> bool:
        """Whether the layout kernel counts these."""
        return topk_idx.is_cuda and num_experts <= _MAX_TOPK_LAYOUT_EXPERTS

    # Streams.

    def comm_stream(self) -> torch.cuda.Stream:
        """The stream of asynchronous calls, made when first needed."""
        if self._comm_stream is None:
            self._comm_stream = torch.cuda.Stream(device=self.device, priority=-1)
        return self._comm_stream

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """Operations of a buffer run in the order of the calls, whatever streams they are called on."""
        with contextlib.ExitStack() as device:
            if torch.cuda.current_device() != self.device.index:  # the current device is that of the thread
                device.enter_context(torch.cuda.device(self.device))
            stream = torch.cuda.current_stream(self.device)
            # A captured graph is ordered by whoever replays it.
            capturing = torch.cuda.is_current_stream_capturing()
            if self._last is not None and self._last != stream and not capturing:
                stream.wait_event(self._last_event)
            try:
                yield
            finally:
                if not capturing:
                    self._last_event.record(stream)
                    self._last = stream

    # Operations.

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int32 [R], int32 [E], bool [T, R]: tokens per rank and per expert, and where each goes."""
        num_tokens, num_topk = topk_idx.shape
        counts = torch.empty(self.num_ranks + num_experts, dtype=torch.int32, device=topk_idx.device)
        in_rank = torch.empty((num_tokens, self.num_ranks), dtype=torch.bool, device=topk_idx.device)
        with self.ordered():
            self._count("dispatch_layout")
            self._domain.dispatch_layout(
                topk_idx.data_ptr(),
                topk_idx.dtype == torch.int64,
                num_tokens,
                num_topk,
                num_experts,
                counts.data_ptr(),
                counts[self.num_ranks :].data_ptr(),
                in_rank.data_ptr(),
                self._stream(),
            )
        return counts[: self.num_ranks], counts[self.num_ranks :], in_rank

    def dispatch(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        in_rank: torch.Tensor,
        per_rank: torch.Tensor,
        per_expert: torch.Tensor,
        topk: tuple[torch.Tensor, torch.Tensor] | None,
        num_worst_tokens: int,
        num_channels: int,
        num_sms: int,
    ) -> DeviceDispatch:
        """Route anew: exchange counts, write the handle, place the rows."""
        self._check_limits(per_expert.shape[0], num_channels)
        num_tokens, num_experts, num_ranks = rows.shape[0], per_expert.shape[0], self.num_ranks
        if not num_worst_tokens and torch.cuda.is_current_stream_capturing():
            raise ConfigError(
                "dispatch: the number of received tokens is not known while a CUDA graph is captured; pass "
                "num_worst_tokens, or a handle"
            )
        out = self._try_outputs(rows, scales, topk, num_worst_tokens or self._guess)
        if out is None:
            if num_worst_tokens:
                raise self._exhausted(rows, num_worst_tokens)
            # A capacity of 0 fits nowhere, so all ranks come to the point where they make room together.
            out = _Outputs(self, rows, scales, topk, 0, with_src_idx=True)
        if num_worst_tokens:
            out.mark_unused()
        matrices = self._ints(num_ranks * (num_ranks + 2 * num_channels))
        prefix = matrices[: num_ranks * num_ranks].view(num_ranks, num_ranks)
        sent, received = matrices[num_ranks * num_ranks :].view(2, num_ranks, num_channels).unbind(0)
        send_head = self._ints(num_tokens * num_ranks).view(num_tokens, num_ranks)
        kind = "worst-case dispatch" if num_worst_tokens else "dispatch"
        signature = self._signature(kind, rows, scales, topk, num_experts, num_channels)
        self._domain.expect_counts()
        self._count("dispatch_notify")
        self._domain.dispatch_notify(
            signature,
            out.offsets(),
            bool(num_worst_tokens),
            num_tokens,
            num_experts,
            num_channels,
            per_rank.data_ptr(),
            per_expert.data_ptr(),
            in_rank.data_ptr(),
            prefix.data_ptr(),
            sent.data_ptr(),
            received.data_ptr(),
            send_head.data_ptr(),
            self._stream(),
        )
        self._place(rows, scales, topk, num_experts, send_head, out, signature, num_sms, announce=False)
        counts: list[int] = []
        if not num_worst_tokens:
            if not self._domain.wait_counts():
                self.raise_failure("dispatch")
            num_recv, fits = self._domain.counts()
            counts = self._domain.expert_counts(num_experts)
            if not fits:
                # Some rank guessed too little: all ranks know, make room together, and place the rows once more.
                out = self._grown_outputs(rows, scales, topk, num_recv)
                again = self._signature("dispatch again", rows, scales, topk, num_experts, num_channels)
                self._place(rows, scales, topk, num_experts, send_head, out, again, num_sms, announce=True)
            out.trim(num_recv)
            # A little more than the last size, so that a size that varies does not place twice each time.
            self._guess = num_recv + num_recv // 16 + 64
        handle = (prefix, sent, received, out.src_idx, in_rank, send_head)
        return DeviceDispatch(out.rows, out.scales, out.topk_idx, out.topk_weights, counts, handle)

    def dispatch_cached(
        self, rows: torch.Tensor, scales: torch.Tensor | None, handle: Handle, num_sms: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Repeat the routing of a handle."""
        out = _Outputs(self, rows, scales, None, handle[3].shape[0], with_src_idx=False)
        signature = self._signature("cached dispatch", rows, scales, None, 0, 0)
        self._place(rows, scales, None, 0, handle[5], out, signature, num_sms, announce=True)
        return out.rows, out.scales

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
        rows, weights = self._shared(rows), None if weights is None else self._shared(weights)
        num_topk = 0 if weights is None else weights.shape[1]
        out = torch.empty((num_tokens, hidden), dtype=rows.dtype, device=rows.device)
        out_weights = None
        if weights is not None:
            out_weights = torch.empty((num_tokens, num_topk), dtype=torch.float32, device=rows.device)
        self._count("combine_rows")
        self._domain.combine_rows(
            self._signature("combine", rows, None, None, num_topk, 0),
            self._offset(rows),
            -1 if weights is None else self._offset(weights),
            num_tokens,
            send_head.data_ptr(),
            hidden,
            ELEMENT_TYPES[rows.dtype],
            [bias.data_ptr() for bias in biases],
            out.data_ptr(),
            num_topk,
            0 if out_weights is None else out_weights.data_ptr(),
            num_sms,
            self._stream(),
        )
        return out, out_weights

    # Failures.

    def check(self) -> None:
        """Raise the failure that kernels have reported, if any.

        Raises:
            CommTimeout, ConfigError, PeerError: see `raise_failure`.
        """
        if self._failure is not None or self._domain.error() is not None:
            self.raise_failure("check")

    def check_overflow(self) -> None:
        """Raise if rows of a worst-case dispatch were left out since the last call.

        Apart from `check`, since ranks learn of it at different times, and must not fall out of step.

        Raises:
            BufferOverflow: with the rank, its total and its capacity.
        """
        overflow = self._domain.take_overflow()
        if overflow is not None:
            rank, total, capacity = overflow
            raise BufferOverflow(
                f"dispatch: rank {rank} was to receive {total} tokens but num_worst_tokens is {capacity}; the rows "
                f"beyond it were left out. Pass at least {total} (tokens of a rank x ranks is always enough)"
            )

    def raise_failure(self, operation: str) -> None:
        """Raise the first failure that a kernel reported; the buffer is unusable from then on."""
        if self._failure is None:
            record = self._domain.error()
            self._failure = self._described(record) if record is not None else PeerError(f"{operation} failed")
        raise self._failure

    def _described(self, record: tuple[int, int, int, int, int, int]) -> DeepEPError:
        error, operation_code, phase_code, peer, expected, seen = record
        operation = _OPERATIONS.get(operation_code, "an operation")
        phase = _PHASES.get(phase_code, "a phase")
        if error == _TIMEOUT:
            return CommTimeout(
                f"{operation}: rank {self.rank} waited {self.timeout_s:g} s on the device for rank {peer} ({phase}, "
                f"expected epoch {expected}, seen {seen}). Is rank {peer} alive and calling {operation}? A larger "
                "timeout_s (or DEEP_EP_TIMEOUT_S) gives slow ranks more time",
                operation=operation,
                phase=phase,
                peer=peer,
                waited_s=self.timeout_s,
            )
        if error == _SIGNATURE:
            return PeerError(
                f"{operation}: rank {peer} is in another operation than rank {self.rank}, or passes other shapes or "
                f"dtypes (signatures {expected:#x} and {seen:#x}); all ranks must make the same calls in "
                "the same order",
                operation=operation,
                peer=peer,
            )
        if error == _EXPERT_RANGE:
            signed = seen - (1 << 64) if seen >> 63 else seen
            return ConfigError(
                f"get_dispatch_layout: topk_idx[{expected}, {peer}] is {signed}, outside the experts; mark a skipped "
                "selection with -1"
            )
        return PeerError(f"{operation}: the device reported error {error}", operation=operation)

    def close(self) -> None:
        """Free the record that kernels write. The memory is closed by its owner."""
        self._last = None
        self._domain.close()

    # Internals.

    def _try_outputs(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        topk: tuple[torch.Tensor, torch.Tensor] | None,
        capacity: int,
    ) -> _Outputs | None:
        try:
            return _Outputs(self, rows, scales, topk, capacity, with_src_idx=True)
        except PoolExhausted:
            return None

    def _grown_outputs(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        topk: tuple[torch.Tensor, torch.Tensor] | None,
        num_recv: int,
    ) -> _Outputs:
        """Outputs of the exact size, in memory that all ranks grow if any of them has too little. Collective."""
        out = self._try_outputs(rows, scales, topk, num_recv)
        row_bytes = rows.shape[1] * rows.element_size() + 64
        row_bytes += 0 if scales is None else 4 * scales.shape[1]
        row_bytes += 0 if topk is None else 12 * topk[0].shape[1]
        # Twice what is missing now: a pool that is full once will be again.
        wish = 0 if out is not None else 2 * num_recv * row_bytes + (32 << 20)
        self.memory.grow(wish)
        out = out or self._try_outputs(rows, scales, topk, num_recv)
        if out is None:
            raise self._exhausted(rows, num_recv)
        return out

    def _exhausted(self, rows: torch.Tensor, num_rows: int) -> PoolExhausted:
        usage = self.memory.usage()
        return PoolExhausted(
            f"dispatch: no room in symmetric memory for {num_rows} rows of {rows.shape[1]} {rows.dtype}: {usage}. Drop "
            "received tensors earlier, or construct the buffer with a larger num_nvl_bytes"
        )

    def _place(
        self,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        topk: tuple[torch.Tensor, torch.Tensor] | None,
        num_experts: int,
        send_head: torch.Tensor,
        out: _Outputs,
        signature: int,
        num_sms: int,
        *,
        announce: bool,
    ) -> None:
        self._count("dispatch_rows")
        idx, weights = topk if topk is not None else (None, None)
        self._domain.dispatch_rows(
            signature,
            announce,
            out.offsets(),
            rows.shape[0],
            send_head.data_ptr(),
            rows.data_ptr(),
            rows.shape[1] * rows.element_size(),
            0 if scales is None else scales.data_ptr(),
            0 if scales is None else scales.shape[1],
            (0, 0) if scales is None else tuple(scales.stride()),
            0 if idx is None else idx.data_ptr(),
            idx is not None and idx.dtype == torch.int64,
            0 if weights is None else weights.data_ptr(),
            0 if idx is None else idx.shape[1],
            num_experts,
            max(num_sms, 2),
            self._stream(),
        )

    def _shared(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself where the peers can read it, else a copy in their reach."""
        if self.memory.offset_of(tensor) is not None and tensor.data_ptr() % 16 == 0:
            return tensor
        copy = self.memory.empty(tensor.shape, tensor.dtype)
        copy.copy_(tensor)
        return copy

    def _offset(self, tensor: torch.Tensor) -> int:
        offset = self.memory.offset_of(tensor)
        return 0 if offset is None else offset

    def _ints(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32, device=self.device)

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _count(self, kernel: str) -> None:
        self.launches[kernel] = self.launches.get(kernel, 0) + 1

    def _signature(self, operation: str, rows: torch.Tensor, scales: Any, topk: Any, *numbers: int) -> int:
        """A number that differs wherever ranks disagree about an operation."""
        of_scales = None if scales is None else (scales.dtype, scales.shape[1])
        of_topk = None if topk is None else (topk[0].dtype, topk[0].shape[1])
        key = (operation, rows.dtype, rows.shape[1], of_scales, of_topk, *numbers)
        known = self._signatures.get(key)
        if known is None:
            text = repr(key).encode()
            known = self._signatures[key] = zlib.crc32(text) << 16 | zlib.adler32(text) & 0xFFFF
        return known

    def _check_limits(self, num_experts: int, num_channels: int) -> None:
        local = -(-num_experts // self.num_ranks)
        if local > MAX_LOCAL_EXPERTS or num_channels > MAX_CHANNELS:
            raise ConfigError(
                f"dispatch: {num_experts} experts on {self.num_ranks} ranks and {num_channels} channels; the kernels "
                f"take at most {MAX_LOCAL_EXPERTS} experts a rank and {2 * MAX_CHANNELS} SMs"
            )


class _Outputs:
    """The tensors that peers fill: the rows, and one slab for everything small."""

    def __init__(
        self,
        kernels: CudaKernels,
        rows: torch.Tensor,
        scales: torch.Tensor | None,
        topk: tuple[torch.Tensor, torch.Tensor] | None,
        capacity: int,
        *,
        with_src_idx: bool,
    ) -> None:
        self._memory = kernels.memory
        self.capacity = capacity
        self._offset_by_name: dict[str, int] = {}
        wanted = {"rows": (rows.shape[1], rows.dtype)}
        if scales is not None:
            wanted["scales"] = (scales.shape[1], scales.dtype)
        if topk is not None:
            wanted["topk_idx"] = (topk[0].shape[1], topk[0].dtype)
            wanted["topk_weights"] = (topk[0].shape[1], torch.float32)
        if with_src_idx:
            wanted["src_idx"] = (1, torch.int32)
        # What lives as long as the handle is kept apart from the rows, which callers drop early.
        first = 1 if with_src_idx else len(wanted)
        names = list(wanted)
        views = self._allocate({name: wanted[name] for name in names[:first]})
        views.update(self._allocate({name: wanted[name] for name in names[first:]}))
        self.rows = views["rows"]
        self.scales = views.get("scales")
        self.topk_idx = views.get("topk_idx")
        self.topk_weights = views.get("topk_weights")
        src_idx = views.get("src_idx")
        self.src_idx = src_idx.view(-1) if src_idx is not None else kernels._ints(0)

    def _allocate(self, wanted: dict[str, tuple[int, torch.dtype]]) -> dict[str, torch.Tensor]:
        """Tensors [capacity, width] in one block of the pool."""
        starts, total = [], 0
        for width, dtype in wanted.values():
            starts.append(total)
            size = self.capacity * width * dtype.itemsize
            total += -(-size // _SLAB_ALIGNMENT) * _SLAB_ALIGNMENT
        block = self._memory.empty((total,), torch.uint8).untyped_storage() if total else None
        base = self._memory.heap.offset_of(block.data_ptr()) if block is not None else -1
        tensors = {}
        for (name, (width, dtype)), start in zip(wanted.items(), starts, strict=True):
            tensor = torch.empty(0, dtype=dtype, device=self._memory.device)
            if block is not None:
                # Not a view: callers may give the tensor other storage, or ask it for gradients.
                tensor.set_(block, start // dtype.itemsize, (self.capacity, width), (width, 1))
            else:
                tensor = tensor.view(0, width)
            tensors[name] = tensor
            self._offset_by_name[name] = base + start if base >= 0 else 0
        return tensors

    def offsets(self) -> tuple[int, int, int, int, int, int]:
        """Where the peers write: offsets into this rank's heap, -1 for an absent tensor, and the capacity."""
        names = ("rows", "scales", "topk_idx", "topk_weights", "src_idx")
        offsets = [self._offset_by_name.get(name, -1) for name in names]
        return offsets[0], offsets[1], offsets[2], offsets[3], offsets[4], self.capacity

    def mark_unused(self) -> None:
        """Fill what tells rows apart from padding, before peers write the rows that exist."""
        for tensor in (self.topk_idx, self.src_idx):
            if tensor is not None:
                tensor.fill_(-1)

    def trim(self, num_rows: int) -> None:
        """Give the tensors their exact number of rows."""
        for tensor in (self.rows, self.scales, self.topk_idx, self.topk_weights, self.src_idx):
            if tensor is not None and tensor.shape[0] != num_rows:
                shape = (num_rows, *tensor.shape[1:])
                tensor.set_(tensor.untyped_storage(), tensor.storage_offset(), shape, tensor.stride())
