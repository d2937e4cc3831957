"""Memory that all ranks of an NVLink domain map, and ordinary torch tensors in it.

Every rank has one address range. It starts with a control block and goes on with the pool; chunks are appended to it
at the same offset on every rank and never move, so that an offset and a rank name a place. Tensors come out of the
pool through torch's own caching allocator (`pool.py`).

A chunk travels between processes as a file descriptor (cuMem), as a fabric handle between hosts of one NVLink fabric,
or, where neither can be exported, as a CUDA IPC handle of one block that cannot grow. No rank's torch memory is ever
shared, so the settings of torch's allocator do not matter.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from .._native import _C
from ..errors import BufferDestroyed, ConfigError, PeerError, PoolExhausted, TopologyError
from .mesh import Members, resolve_timeout
from .peer_links import GroupLinks, Links, SocketLinks, close_fds
from .peer_reach import carries_lines, check_reports, report_device
from .pool import BlockPool, current_stream_of, free_abandoned, is_capturing

logger = logging.getLogger("deep_ep")

#: HandleKind of csrc/runtime/symmetric_heap.h.
HANDLE_KINDS = {"fd": 0, "fabric": 1, "ipc": 2}
_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
_CHUNK_ALIGNMENT = 2 << 20


def resolve_max_pool_bytes(max_pool_bytes: int | None) -> int:
    """The limit of a rank's symmetric memory in bytes: the argument, `DEEP_EP_MAX_POOL_BYTES`, or 0 for none.

    Raises:
        ConfigError: not a number of bytes.
    """
    text = os.environ.get("DEEP_EP_MAX_POOL_BYTES", "").strip()
    source = "max_pool_bytes" if max_pool_bytes is not None or not text else "DEEP_EP_MAX_POOL_BYTES"
    raw: object = max_pool_bytes if max_pool_bytes is not None else (text or 0)
    try:
        value = int(raw)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        value = -1
    if value < 0:
        raise ConfigError(f"{source}={raw!r}: expected a number of bytes, or 0 for no limit but the device's memory")
    return int(value)


def room_below(limit: int, mapped_bytes: int, alignment: int) -> int:
    """The largest chunk, a multiple of ``alignment``, that may be added to ``mapped_bytes``; ``limit`` 0 is none."""
    return 1 << 62 if limit == 0 else max(limit - mapped_bytes, 0) // alignment * alignment


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _set_storage(tensor: Any, storage: torch.UntypedStorage, shape: Sequence[int]) -> None:
    tensor.set_(storage, 0, tuple(shape))  # contiguous; the type stubs lack this form


class _Staging:
    """The block that takes rows when a rank's outputs have no place in the pool, and those it took the place of."""

    def __init__(self, heap: Any) -> None:
        self._heap = heap
        self.num_bytes, self.offset = 0, -1
        self.offsets: list[int] = []
        self._is_leased = False
        self.leased_bytes = 0
        self._retired: list[tuple[Any, int]] = []  # an event behind the last use, and the offset

    def lease(self) -> None:
        if self.num_bytes and not self._is_leased:
            self._is_leased = True
            self.leased_bytes += self.num_bytes

    def replace(self, num_bytes: int, offsets: list[int], rank: int, event: Any) -> None:
        """Take another block; the old one goes back to the pool when ``event`` is done, if no graph writes to it."""
        if self.num_bytes and not self._is_leased:
            self._retired.append((event, self.offset))
        self._is_leased = False
        self.num_bytes, self.offsets = num_bytes, offsets
        self.offset = offsets[rank] if offsets else -1

    def collect(self) -> None:
        """Give back what nobody uses any more. Not under capture, where events cannot be asked."""
        while self._retired and self._retired[0][0].query():
            self._heap.return_block(self._retired.pop(0)[1])


class PeerMemory:
    """The symmetric memory of one rank of an NVLink domain, with the other ranks' mapped beside it.

    Collective: all ranks construct it together, with equal sizes. Several of them may live in one process, and ranks
    may share a GPU.

    Args:
        members: the ranks of the domain and their object gather, used for construction and `recover` (with
            ``use_fabric`` over several hosts also by the other collective methods).
        device: the CUDA device of this rank.
        control_bytes: size of the control block at offset 0 of each rank's range; zeroed.
        pool_bytes: size of the pool that tensors come from; rounded up with the control block to 2 MiB, and cut to
            ``max_pool_bytes``.
        use_fabric: share by fabric handles; the ranks may run on several hosts of one NVLink fabric.
        kind: ``"fd"``, ``"fabric"`` or ``"ipc"`` to allow that way only; the default is ``"fd"``, or ``"ipc"`` where
            that cannot work, or ``"fabric"`` with ``use_fabric``.
        reserve_bytes: address range of a rank, the limit of its growth; 0: twice the device's memory.
        max_pool_bytes: limit of the device memory that a rank maps as its own, control block and staging included; the
            smallest one that a rank gives counts for all. See `resolve_max_pool_bytes`. Staging that fits nowhere else
            goes beyond it, since no operation could go on without it.
        timeout_s: deadline of each exchange between the ranks; see `resolve_timeout`.

    Attributes:
        heap: `_C.SymmetricHeap`.
        bases: by rank, the address of its range in this process. It does not change.
        max_pool_bytes: the limit that counts; 0: none.
        rank, num_ranks, device, kind: as given or chosen.
        num_sharing: ranks on this rank's GPU, itself included.
        max_sharing: the largest `num_sharing` of the ranks, the same on all of them.
        carries_lines: see `deep_ep.engines.peer_reach.carries_lines`; the same on all of them.

    Raises (on all ranks):
        TopologyError: a pair of ranks cannot map each other's memory.
        PoolExhausted: a device has no room for the control block and the pool.
        ConfigError: sizes that are not positive or differ between ranks, or an unknown kind.
        CommTimeout, PeerError: a rank did not answer or died.
    """

    heap: Any = None
    _blocks: Any = None

    def __init__(
        self,
        members: Members,
        device: torch.device,
        control_bytes: int,
        pool_bytes: int,
        *,
        use_fabric: bool = False,
        kind: str | None = None,
        reserve_bytes: int = 0,
        max_pool_bytes: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        free_abandoned()
        self._timeout_s = resolve_timeout(timeout_s)
        limit = resolve_max_pool_bytes(max_pool_bytes)
        self.rank, self.num_ranks, self.device = members.rank, members.size, device
        reports = members.gather(report_device(device))
        check_reports(reports, use_fabric or kind == "fabric")
        self.carries_lines = carries_lines(reports)
        sharing = Counter(report.uuid for report in reports)
        self.num_sharing, self.max_sharing = sharing[reports[self.rank].uuid], max(sharing.values())
        if str(device) == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        offers = members.gather(((control_bytes, pool_bytes, use_fabric, kind, reserve_bytes), limit))
        settings = [setting for setting, _ in offers]
        positive = control_bytes > 0 and pool_bytes >= 0 and reserve_bytes >= 0
        fits = reserve_bytes == 0 or control_bytes + pool_bytes + 511 <= reserve_bytes
        equal = all(other == settings[0] for other in settings)
        if not (equal and positive and fits and kind in (None, *HANDLE_KINDS)):
            raise ConfigError(
                "peer memory: (control_bytes, pool_bytes, use_fabric, kind, reserve_bytes) by rank is "
                f"{settings}; expected equal values on all ranks, sizes that are not negative and fit into a "
                f"reserve_bytes other than 0, a positive control_bytes, and a kind of {sorted(HANDLE_KINDS)} or None"
            )
        self.max_pool_bytes = min((limit for _, limit in offers if limit), default=0)
        padded = _round_up(control_bytes, 512)
        if 0 < self.max_pool_bytes < _round_up(padded, _CHUNK_ALIGNMENT):
            raise ConfigError(
                f"max_pool_bytes={self.max_pool_bytes}: the control block alone takes "
                f"{_round_up(padded, _CHUNK_ALIGNMENT)} bytes; expected more, or 0 for no limit"
            )
        one_host = len({report.host for report in reports}) == 1
        self._links: Links = SocketLinks(members, self._timeout_s) if one_host else GroupLinks(members)
        try:
            kinds = [kind] if kind else ["fabric"] if use_fabric else ["fd", "ipc"]
            self.kind = self._allocate_first(kinds, padded, pool_bytes, reserve_bytes)
            self.bases: list[int] = self.heap.bases()
            usage = self.heap.usage()
            span = usage["mapped_bytes"] if self.kind == "ipc" else usage["reserve_bytes"]
            self._base, self._span = self.bases[self.rank], span
            self._stream = current_stream_of(self.device)
            self._staging = _Staging(self.heap)
            self._blocks = BlockPool(self.heap, self._base, span, self.device)
        except BaseException:
            self._links.close()
            self._drop_heap()
            raise

    def _allocate_first(self, kinds: Sequence[str], control_bytes: int, pool_bytes: int, reserve_bytes: int) -> str:
        """Make the first chunk in the first way that works on all ranks; returns its kind."""
        reasons = []
        size = control_bytes + pool_bytes
        for kind in kinds:
            failure = ""
            try:
                self.heap = _C.SymmetricHeap(
                    self.device.index, self.rank, self.num_ranks, HANDLE_KINDS[kind], reserve_bytes
                )
                size = min(size, room_below(self.max_pool_bytes, 0, self.heap.granularity()))
            except RuntimeError as error:
                failure = str(error)
            failures = self._append(size, control_bytes, failure)
            if not failures:
                return kind
            self._drop_heap()
            rank, text = next(iter(failures.items()))
            if any(_OUT_OF_MEMORY in text for text in failures.values()):
                raise PoolExhausted(
                    f"peer memory: {size} bytes a rank could not be allocated on ranks "
                    f"{sorted(failures)}; rank {rank} says: {text}. Ask for a smaller pool, or leave more of the GPU's "
                    "memory to it (torch.cuda.empty_cache() gives back what torch holds)"
                )
            reasons.append(f"as {kind!r} on ranks {sorted(failures)} (rank {rank} says: {text})")
            logger.info("deep_ep: rank %d: peer memory %s failed", self.rank, reasons[-1])
        advice = "Run all ranks in one container with the same GPUs visible, or use the portable engine"
        if kinds == ["fabric"]:
            advice = "Fabric handles need a running IMEX domain; without one, pass use_fabric=False"
        raise TopologyError(f"GPU memory could not be shared between the ranks: {'; '.join(reasons)}. {advice}")

    def _drop_heap(self) -> None:
        if self.heap is not None:
            self.heap.destroy()
            self.heap = None

    def _append(self, num_bytes: int, control_bytes: int, failure: str = "") -> dict[int, str]:
        """Append a chunk on all ranks, or on none. Returns the reasons by rank, the same on all of them."""
        size, blob, own_fds = 0, b"", []
        received: list[tuple[Any, list[int]]] = []
        finished = False
        try:
            if not failure:
                try:
                    size, fd, blob = self.heap.create_chunk(num_bytes, control_bytes)
                    own_fds = [fd] if fd >= 0 else []
                except RuntimeError as error:
                    failure = str(error)
            received = self._links.exchange("new chunk", (size, blob, failure), own_fds)
            failures = {rank: offer[2] for rank, (offer, _) in enumerate(received) if offer[2]}
            if not failures:
                answers = self._links.exchange("mapping", self._import(received))
                failures = {rank: text for rank, (text, _) in enumerate(answers) if text}
            if not failures:
                self.heap.commit_chunk()
                finished = True
        finally:
            close_fds(own_fds)
            for _, fds in received:
                close_fds(fds)
            if not finished and self.heap is not None:
                self.heap.discard_chunk()
        return failures

    def _import(self, received: Sequence[tuple[Any, list[int]]]) -> str:
        for peer, ((size, blob, _), fds) in enumerate(received):
            if peer == self.rank:
                continue
            try:
                self.heap.import_chunk(peer, size, fds[0] if fds else -1, blob)
            except (RuntimeError, ValueError) as error:
                return f"rank {self.rank} could not map the memory of rank {peer}: {error}"
        return ""

    def _check_open(self) -> None:
        if self._blocks is None or self._blocks.closed:
            raise BufferDestroyed("peer memory: it was closed; construct a new buffer")

    # Memory for tensors.

    def take(
        self, num_bytes: int, stream: int, capturing: bool | None = None
    ) -> tuple[torch.UntypedStorage, int] | None:
        """One block of the pool for the current stream, with any contents, or None when the pool is full.

        Torch's caching allocator owns the block, and it is reused in stream order when the last tensor on it goes.
        Blocks that wait for another stream (`record_stream`) come back a few calls after that stream is done.

        Args:
            num_bytes: size in bytes; the block may be up to 6 % larger (see `pool_size`).
            stream: handle of the current stream of the device (``cudaStream_t``).
            capturing: whether that stream is being captured into a graph, where the caller knows. Blocks taken then
                are held until `close`, since replays write to them.

        Returns:
            the block, and its offset in bytes in this rank's range.

        Raises:
            BufferDestroyed: the memory is closed.
        """
        taken: tuple[torch.UntypedStorage, int] | None = self._blocks.take(num_bytes, stream, capturing)
        return taken

    def try_empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """A contiguous tensor in the pool, for the current stream, with any contents, or None when the pool is full.

        It is an ordinary tensor on a block of `take`.

        Raises:
            BufferDestroyed: the memory is closed.
        """
        self._check_open()
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        taken = self.take(num_bytes, self._stream())
        if taken is None:
            return None
        # Not torch.empty(shape) in the pool: with deterministic algorithms torch fills that, also a stand-in.
        tensor = torch.empty(0, dtype=dtype, device=self.device)
        _set_storage(tensor, taken[0], shape)
        return tensor

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """`try_empty`, for callers that have no other way.

        Raises:
            PoolExhausted: no block of the pool is large enough.
            BufferDestroyed: the memory is closed.
        """
        tensor = self.try_empty(shape, dtype)
        if tensor is None:
            usage = self.heap.usage()
            raise PoolExhausted(
                f"the pool of symmetric memory has no room for {tuple(shape)} {dtype}: {usage['used_bytes']} bytes are "
                f"in use or kept for reuse, {usage['largest_free_bytes']} are free in one piece. Drop received tensors "
                "earlier, or construct the buffer with a larger pool"
            )
        return tensor

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Offset in bytes of the tensor's first element in this rank's range; None elsewhere (empty tensors too)."""
        offset: int = tensor.data_ptr() - self._base
        return offset if 0 <= offset < self._span else None

    # What the ranks do together.

    def grow(self, num_bytes: int) -> int:
        """Append a chunk to the pool of every rank (collective): of the largest size that a rank asks for.

        It allocates and maps device memory, which may wait for kernels that are running: no kernel may wait for this
        call of another rank.

        Returns:
            bytes added, the same on all ranks: the size rounded up to 2 MiB, or what `max_pool_bytes` leaves of it, or
            0 when a rank has no memory or no addresses left, or the kind is ``"ipc"``.

        Raises:
            CommTimeout, PeerError: a rank did not answer or died.
            BufferDestroyed: the memory is closed.
        """
        self._check_open()
        self._collect()
        wanted = max(wish for wish, _ in self._links.exchange("growth", int(num_bytes)))
        before, granularity = self.heap.usage()["mapped_bytes"], self.heap.granularity()
        # Both are the same on all ranks, and so is the limit.
        wanted = min(_round_up(wanted, granularity), room_below(self.max_pool_bytes, before, granularity))
        if wanted <= 0 or self.kind == "ipc":
            return 0
        failures = self._append(wanted, 0)
        if failures:
            rank, text = next(iter(failures.items()))
            logger.info("deep_ep: peer memory cannot grow by %d bytes; rank %d says: %s", wanted, rank, text)
        return int(self.heap.usage()["mapped_bytes"] - before)

    @property
    def staging_bytes(self) -> int:
        """Size of the staging block of every rank; 0 before `reserve_staging`."""
        return self._staging.num_bytes

    @property
    def staging_offset(self) -> int:
        """Offset of this rank's staging block in its range; -1 without one."""
        return self._staging.offset

    @property
    def staging_offsets(self) -> list[int]:
        """By rank, the offset of its staging block; empty without one."""
        return self._staging.offsets

    def reserve_staging(self, num_bytes: int, *, within_limit: bool = False) -> None:
        """Have a staging block of at least ``num_bytes`` on every rank (collective).

        Returns at once while the present block is large enough, so all ranks pass the same number, or numbers that are
        all larger than `staging_bytes`; the largest counts. The block comes from free room of the pool, else from a
        new chunk, which may exceed `max_pool_bytes` unless ``within_limit`` (the same on all ranks) forbids it. A
        block that it replaces goes back to the pool when the work of the current stream up to here is done: call it on
        the stream of the operation that needs the memory, after the launches that use the old block. It maps memory,
        as `grow`.

        Raises:
            PoolExhausted: some rank has no memory left, or the limit is reached; raised on all ranks, which keep the
                block that they had.
            CommTimeout, PeerError: a rank did not answer or died.
            BufferDestroyed: the memory is closed.
        """
        if num_bytes <= self._staging.num_bytes:
            return
        self._check_open()
        self._collect()
        wanted = max(wish for wish, _ in self._links.exchange("staging", int(num_bytes)))
        granularity = self.heap.granularity()
        # An eighth more, so that sizes that grow slowly do not replace it at each step.
        wanted = _round_up(wanted + wanted // 8, granularity)
        offsets = self.reserve_block(wanted)
        if not offsets:
            mapped = self.heap.usage()["mapped_bytes"]
            if within_limit and wanted > room_below(self.max_pool_bytes, mapped, granularity):
                failures = {self.rank: f"max_pool_bytes is {self.max_pool_bytes}, of which {mapped} are mapped"}
            else:
                failures = self._append(wanted, 0)
            offsets = [] if failures else self.reserve_block(wanted)
            if not offsets:
                rank, text = next(iter(failures.items()), (self.rank, "another thread took the memory"))
                raise PoolExhausted(
                    f"peer memory: no room for {wanted} bytes of staging on every rank; rank {rank} says: {text}. "
                    "Drop received tensors earlier, or leave more of the GPU's memory to the pool"
                )
        self._staging.replace(wanted, offsets, self.rank, self._event())

    def lease_staging(self) -> None:
        """Keep the present staging block until `close`, also when a larger one replaces it: a graph writes to it."""
        self._staging.lease()

    def rendezvous(self, name: str, value: Any) -> list[Any]:
        """Wait for all ranks at the same point (collective).

        Args:
            name: what the ranks do, the same on all of them; errors name it.
            value: a small picklable object for the other ranks.

        Returns:
            the values by rank.

        Raises:
            CommTimeout, PeerError: a rank did not come before the deadline, died, or is at another point.
            BufferDestroyed: the memory is closed.
        """
        self._check_open()
        return [item for item, _ in self._links.exchange(name, value)]

    def recover(self, members: Members) -> None:
        """Make the exchanges usable again after one of them failed (collective over ``members``).

        No operation may be running: neither on a device nor in a thread.

        Raises:
            PeerError: the failure came while a chunk was appended, and only some ranks have it; on all ranks.
            TopologyError: some ranks could not connect; on all ranks.
            BufferDestroyed: the memory of some rank is closed; on all ranks.
        """
        is_closed = self._blocks is None or self._blocks.closed
        mapped = 0 if is_closed else self.heap.usage()["mapped_bytes"]
        states = members.gather((is_closed, self._links.closed, mapped, self._staging.num_bytes))
        gone = [rank for rank, state in enumerate(states) if state[0]]
        if gone:
            raise BufferDestroyed(f"recover: the buffer of ranks {gone} was destroyed; construct a new one")
        sizes = [state[2] for state in states]
        if len(set(sizes)) != 1:
            raise PeerError(
                f"recover: the ranks map {sizes} bytes of symmetric memory, since growing it failed half-way; destroy "
                "the buffer and construct a new one on all ranks",
                operation="recover",
                peer=next(rank for rank, size in enumerate(sizes) if size != sizes[0]),
            )
        if any(state[1] for state in states):
            self._links.close()
            self._links = SocketLinks(members, self._timeout_s)
        if len({state[3] for state in states}) != 1:  # some ranks replaced their block before the failure
            self._staging.replace(0, [], self.rank, self._event())

    def reserve_block(self, num_bytes: int) -> list[int]:
        """Reserve a block of the pool on every rank (collective), with any contents.

        Returns:
            its offsets by rank; empty, and nothing reserved, if some rank has no room. `return_block` of the heap gives
            the own one back.
        """
        self._check_open()
        offset = self.heap.reserve_block(num_bytes)
        finished = False
        try:
            offsets = [item for item, _ in self._links.exchange("staging block", offset)]
            finished = min(offsets) >= 0
        finally:
            if not finished and offset >= 0:
                self.heap.return_block(offset)
        return offsets if finished else []

    def _event(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _collect(self) -> None:
        if not is_capturing():
            self._staging.collect()

    # Reports and the end.

    def usage(self) -> dict[str, int]:
        """Sizes in bytes of this rank's part. Takes some microseconds.

        Keys: ``limit_bytes`` is `max_pool_bytes`, 0 for none; ``reserve_bytes`` address range; ``mapped_bytes`` device
        memory taken, ``control_bytes`` of which is the control block and the rest the pool, in ``num_chunks`` pieces;
        ``used_bytes`` of the pool are torch's (in tensors, or kept for reuse) or staging; ``free_bytes`` of it are not,
        ``largest_free_bytes`` in one piece; ``staging_bytes`` is the present staging block; ``leased_bytes`` are held
        for captured graphs until `close`; ``stand_in_bytes`` addresses without memory that torch counts as reserved.

        Raises:
            BufferDestroyed: the memory is closed.
        """
        self._check_open()
        self._collect()
        usage: dict[str, int] = self.heap.usage()
        usage["limit_bytes"] = self.max_pool_bytes
        usage["staging_bytes"] = self._staging.num_bytes
        usage["leased_bytes"] = self._staging.leased_bytes + self._blocks.leased_bytes
        return usage

    def live_bytes(self) -> int:
        """Bytes of the pool that tensors hold, of ``used_bytes``. Slow (it walks torch's blocks): for reports.

        Raises:
            BufferDestroyed: the memory is closed.
        """
        self._check_open()
        size: int = self._blocks.live_bytes()
        return size

    def close(self) -> None:
        """Unmap the other ranks' memory and free the own one; again: does nothing.

        Not collective, but no kernel of another rank may use this rank's memory any more: synchronise the ranks
        first. Waits for this device. Tensors that are still alive keep the own memory, which is freed with the last
        of them, at the latest by `torch.cuda.empty_cache()`.

        Raises:
            ConfigError: the current stream is being captured into a graph, where nothing can be freed.
        """
        if self._blocks is None or self._blocks.closed:
            return
        if is_capturing():
            raise ConfigError("peer memory: close() during graph capture; destroy the buffer after the capture")
        self._links.close()
        self._blocks.close()
        free_abandoned()

    def __del__(self) -> None:
        blocks = self._blocks
        if blocks is not None and not blocks.closed:
            self._links.close()
            blocks.abandon()
