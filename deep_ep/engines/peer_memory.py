"""Memory that all ranks of an NVLink domain map, and ordinary torch tensors in it.

Every rank has one address range. It starts with a control block and goes on with the pool; chunks are appended to it
at the same offset on every rank and never move, so that an offset and a rank name a place. Tensors come out of the
pool through torch's own caching allocator (a `torch.cuda.MemPool` over two functions of the extension), so that
`record_stream`, stream order, graph capture and `set_` mean what they always mean.

A chunk travels between processes as a file descriptor (cuMem), as a fabric handle between hosts of one NVLink fabric,
or, where neither can be exported, as a CUDA IPC handle of one block that cannot grow. No rank's torch memory is ever
shared, so the settings of torch's allocator do not matter.
"""

from __future__ import annotations

import atexit
import collections
import ctypes
import functools
import logging
import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._native import _C
from ..errors import BufferDestroyed, ConfigError, DeepEPError, TopologyError
from ..topology import host_identity
from .mesh import Members, resolve_timeout
from .peer_links import GroupLinks, Links, SocketLinks, close_fds

logger = logging.getLogger("deep_ep")

#: HandleKind of csrc/runtime/symmetric_heap.h.
HANDLE_KINDS = {"fd": 0, "fabric": 1, "ipc": 2}
_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
_SMALL_BYTES = 1 << 20  # torch's allocator keeps blocks up to this size apart


class PoolExhausted(DeepEPError, MemoryError):
    """The pool of symmetric memory, or the device, has no room for what was asked."""


# ---------------------------------------------------------------------------------------------------------------
# Which ranks can map whose memory


@dataclass(frozen=True)
class DeviceReport:
    """What a rank tells the others about its GPU.

    Attributes:
        uuid: 16 bytes, the same in every process whatever CUDA_VISIBLE_DEVICES says.
        pci_bus: e.g. ``"0000:1b:00.0"``, for messages.
        host: `deep_ep.topology.host_identity`.
        reach: for the GPUs that this process sees, by UUID, whether its own GPU can map their memory.
        error: why there is no report, else empty.
    """

    uuid: bytes
    pci_bus: str
    host: str
    reach: dict[bytes, bool]
    error: str = ""


def report_device(device: torch.device) -> DeviceReport:
    """The report of this process's rank. Never raises: the reason travels to the other ranks instead."""
    if not _C.has_cuda:
        return DeviceReport(b"", "", host_identity(), {}, "deep_ep was built without nvcc")
    try:
        index = device.index if device.index is not None else torch.cuda.current_device()
        uuid, pci_bus = _C.device_identity(index)
        return DeviceReport(uuid, pci_bus, host_identity(), _C.device_reach(index))
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        return DeviceReport(b"", "", host_identity(), {}, str(error))


def missing_pairs(reports: Sequence[DeviceReport]) -> list[tuple[int, int]]:
    """Pairs (rank, peer) where the rank's GPU is known not to reach the peer's.

    A GPU that the process does not see cannot be asked about; the mapping itself will tell. Two ranks on one GPU
    always reach each other.
    """
    return [
        (rank, peer)
        for rank, mine in enumerate(reports)
        for peer, theirs in enumerate(reports)
        if mine.uuid != theirs.uuid and not mine.reach.get(theirs.uuid, True)
    ]


def check_reports(reports: Sequence[DeviceReport], use_fabric: bool) -> None:
    """The same verdict on every rank.

    Raises:
        TopologyError: a rank has no usable GPU, hosts differ without fabric handles, or a pair cannot share memory.
    """
    broken = {rank: report.error for rank, report in enumerate(reports) if report.error}
    if broken:
        rank, text = next(iter(broken.items()))
        raise TopologyError(f"ranks {sorted(broken)} cannot share GPU memory; rank {rank} says: {text}")
    hosts = sorted({report.host for report in reports})
    if len(hosts) > 1 and not use_fabric:
        raise TopologyError(
            f"the ranks of one NVLink domain run on {len(hosts)} hosts ({', '.join(hosts)}), expected one. Set "
            "DEEP_EP_NVL_DOMAIN to the ranks of a host, or pass use_fabric=True where the hosts share an NVLink fabric"
        )
    pairs = missing_pairs(reports)
    if pairs:
        rank, peer = pairs[0]
        names = ", ".join(f"{a}->{b}" for a, b in pairs[:16]) + (", ..." if len(pairs) > 16 else "")
        raise TopologyError(
            f"no peer access between the GPUs of ranks {names}: rank {rank} has GPU {reports[rank].pci_bus}, rank "
            f"{peer} has GPU {reports[peer].pci_bus}. Use GPUs that `nvidia-smi topo -p2p r` shows as connected, set "
            "DEEP_EP_NVL_DOMAIN to a number of ranks whose GPUs are, or run on the portable engine"
        )


# ---------------------------------------------------------------------------------------------------------------
# Tensors in the pool

# Torch aborts the process when a pool is destroyed while any thread is inside the context of any pool.
_pool_lock = threading.Lock()
# Memory that was dropped without close(). The garbage collector may run anywhere, also inside that context, so it only
# leaves it here; the next construction or close, on an ordinary path, frees it.
_abandoned: collections.deque[tuple[Any, Any]] = collections.deque()
_live: weakref.WeakSet[PeerMemory] = weakref.WeakSet()


@functools.cache
def _torch_allocator() -> Any:
    """Torch's side of the two functions of the extension; one for the process, since torch keeps pointers to it."""
    plug = torch.cuda.memory.CUDAPluggableAllocator(str(_C.__file__), "deep_ep_pool_malloc", "deep_ep_pool_free")
    return plug.allocator()


def _free_abandoned() -> None:
    while _abandoned:
        pool, heap = _abandoned.popleft()
        with _pool_lock:
            del pool  # the last reference: torch gives the blocks that no tensor uses back to the heap
        heap.destroy()


def _keep_until_process_ends() -> None:
    # At exit a kernel may still wait for a peer. Destroying a pool waits for events; the end of the process does not.
    pools = [memory._pool for memory in _live if memory._pool is not None] + [pool for pool, _ in _abandoned]
    for pool in pools:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))


atexit.register(_keep_until_process_ends)


def _segment_size(num_bytes: int) -> int:
    # What torch asks of the heap when it has no block for a request of more than 1 MiB.
    return 20 << 20 if num_bytes < 10 << 20 else -(-num_bytes // (2 << 20)) * (2 << 20)


def _set_storage(tensor: Any, storage: torch.UntypedStorage, shape: Sequence[int]) -> None:
    tensor.set_(storage, 0, tuple(shape))  # contiguous; the type stubs lack this form


def _capturing() -> bool:
    # A torch without CUDA has no answer, and no capture.
    return torch.version.cuda is not None and torch.cuda.is_current_stream_capturing()


def pool_size(num_bytes: int) -> int:
    """Bytes asked of the pool for a tensor of ``num_bytes``.

    Large tensors take one of 16 sizes an octave (6 % more at most): the number of received rows changes from call to
    call, and blocks of equal sizes can take each other's place.
    """
    step = 1 << max(num_bytes.bit_length() - 5, 9)
    return -(-num_bytes // step) * step


class PeerMemory:
    """The symmetric memory of one rank of an NVLink domain, with the other ranks' mapped beside it.

    Collective: all ranks construct it together, with equal sizes. Several of them may live in one process, and ranks
    may share a GPU.

    Args:
        members: the ranks of the domain and their object gather, used for construction only (with ``use_fabric`` over
            several hosts also by `grow`).
        device: the CUDA device of this rank.
        control_bytes: size of the control block at offset 0 of each rank's range; zeroed.
        pool_bytes: size of the pool that tensors come from; rounded up with the control block to 2 MiB.
        use_fabric: share by fabric handles; the ranks may run on several hosts of one NVLink fabric.
        kind: ``"fd"``, ``"fabric"`` or ``"ipc"`` to allow that way only; the default is ``"fd"``, or ``"ipc"`` where
            that cannot work, or ``"fabric"`` with ``use_fabric``.
        reserve_bytes: address range of a rank, the limit of its growth; 0: twice the device's memory.
        timeout_s: deadline of each exchange between the ranks; see `resolve_timeout`.

    Attributes:
        heap: `_C.SymmetricHeap`.
        bases: by rank, the address of its range in this process. It does not change.
        rank, num_ranks, device, kind: as given or chosen.

    Raises (on all ranks):
        TopologyError: a pair of ranks cannot map each other's memory.
        PoolExhausted: a device has no room for the control block and the pool.
        ConfigError: sizes that are not positive or differ between ranks, or an unknown kind.
        CommTimeout, PeerError: a rank did not answer or died.
    """

    heap: Any = None
    _pool: Any = None

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
        timeout_s: float | None = None,
    ) -> None:
        _free_abandoned()
        timeout = resolve_timeout(timeout_s)
        self.rank, self.num_ranks, self.device = members.rank, members.size, device
        reports = members.gather(report_device(device))
        check_reports(reports, use_fabric or kind == "fabric")
        if str(device) == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        settings = members.gather((control_bytes, pool_bytes, use_fabric, kind, reserve_bytes))
        positive = control_bytes > 0 and pool_bytes >= 0 and reserve_bytes >= 0
        fits = reserve_bytes == 0 or control_bytes + pool_bytes + 511 <= reserve_bytes
        equal = all(other == settings[0] for other in settings)
        if not (equal and positive and fits and kind in (None, *HANDLE_KINDS)):
            raise ConfigError(
                "peer memory: (control_bytes, pool_bytes, use_fabric, kind, reserve_bytes) by rank is "
                f"{settings}; expected equal values on all ranks, sizes that are not negative and fit into a "
                f"reserve_bytes other than 0, a positive control_bytes, and a kind of {sorted(HANDLE_KINDS)} or None"
            )
        one_host = len({report.host for report in reports}) == 1
        self._links: Links = SocketLinks(members, timeout) if one_host else GroupLinks(members)
        try:
            kinds = [kind] if kind else ["fabric"] if use_fabric else ["fd", "ipc"]
            padded = -(-control_bytes // 512) * 512
            self.kind = self._allocate_first(kinds, padded, pool_bytes, reserve_bytes)
            self.bases: list[int] = self.heap.bases()
            # Stand-ins: by stream, the addresses of the spare one; and those held for good.
            self._spares: dict[int, range] = {}
            self._held: list[torch.UntypedStorage] = []
            self._pool = torch.cuda.MemPool(_torch_allocator())
            self._leased: list[torch.UntypedStorage] = []
            _live.add(self)
        except BaseException:
            self._links.close()
            self._drop_heap()
            raise

    def _allocate_first(self, kinds: Sequence[str], control_bytes: int, pool_bytes: int, reserve_bytes: int) -> str:
        """Make the first chunk in the first way that works on all ranks; returns its kind."""
        reasons = []
        for kind in kinds:
            failure = ""
            try:
                self.heap = _C.SymmetricHeap(
                    self.device.index, self.rank, self.num_ranks, HANDLE_KINDS[kind], reserve_bytes
                )
            except RuntimeError as error:
                failure = str(error)
            failures = self._append(control_bytes + pool_bytes, control_bytes, failure)
            if not failures:
                return kind
            self._drop_heap()
            rank, text = next(iter(failures.items()))
            if any(_OUT_OF_MEMORY in text for text in failures.values()):
                raise PoolExhausted(
                    f"peer memory: {control_bytes + pool_bytes} bytes a rank could not be allocated on ranks "
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

    def try_empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """A contiguous tensor in the pool, for the current stream, with any contents, or None when the pool is full.

        It is an ordinary tensor: torch's caching allocator owns the block (its storage may be up to 6 % larger than
        the tensor), and the block is reused in stream order when the last reference goes. Blocks that wait for
        another stream (`record_stream`) come back at the next allocation of torch outside the pool.

        Raises:
            BufferDestroyed: the memory is closed.
        """
        if self._pool is None:
            raise BufferDestroyed("peer memory: it was closed; construct a new buffer")
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)
        storage = self._try_storage(pool_size(num_bytes))
        if storage is None:
            return None
        if _capturing():
            # A replay writes here for as long as the graph lives, which nobody tells; so it is held until close.
            self._leased.append(storage)
        # Not torch.empty(shape) in the pool: with deterministic algorithms torch fills that, also a stand-in.
        tensor = torch.empty(0, dtype=dtype, device=self.device)
        _set_storage(tensor, storage, shape)
        return tensor

    def _try_storage(self, num_bytes: int) -> torch.UntypedStorage | None:
        with _pool_lock:
            storage = self._storage(num_bytes)
            if storage is None or self.heap.offset_of(storage.data_ptr()) >= 0:
                return storage
            if not self.heap.is_stand_in(storage.data_ptr()):
                return None  # torch runs without its caching allocator, which alone knows pools
            if num_bytes > _SMALL_BYTES:
                self._hold_unless_spare(storage)
            del storage
            return self._storage_when_full(max(num_bytes, _SMALL_BYTES + 512))

    def _storage_when_full(self, num_bytes: int) -> torch.UntypedStorage | None:
        """What is left to try when torch had no block, in the order that keeps a full pool cheap.

        A full heap must not answer torch with a null pointer: torch then empties its whole cache. It hands out a
        stand-in, an address without memory. But torch keeps every block that is dropped, and takes the smallest that
        fits, so a stand-in that is free must be larger than any memory, or it would be taken in its place. Hence one
        spare stand-in per stream, as large as the pool, whose parts answer all later requests that no memory fits.
        Other ones are held for good, which takes addresses only. (Torch keeps blocks up to 1 MiB apart, in segments
        of one size, where any free stand-in is as large as can be; such requests go on as larger ones here.)
        """
        usage = self.heap.usage()
        stream = self._stream()
        if len(self._spares.get(stream, ())) < num_bytes:
            spare = self._storage(max(usage["mapped_bytes"], num_bytes), stand_in_only=True)
            if spare is None:
                return None
            self._spares[stream] = range(spare.data_ptr(), spare.data_ptr() + spare.nbytes())
            del spare
        self._wake_blocks()
        # What the heap has and torch has not is asked for only while no stand-in is free.
        has_room = usage["largest_free_bytes"] >= _segment_size(num_bytes)
        spare = self._storage(len(self._spares[stream])) if has_room else None
        storage = self._storage(num_bytes)
        del spare
        if storage is not None and self.heap.offset_of(storage.data_ptr()) < 0:
            self._hold_unless_spare(storage)
            return None
        return storage

    def _hold_unless_spare(self, stand_in: torch.UntypedStorage) -> None:
        if stand_in.data_ptr() not in self._spares.get(self._stream(), ()):
            self._held.append(stand_in)

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _wake_blocks(self) -> None:
        """Blocks that waited for other streams come back in allocations outside the pool."""
        if not _capturing():
            torch.empty(1, dtype=torch.uint8, device=self.device)

    def _storage(self, num_bytes: int, *, stand_in_only: bool = False) -> torch.UntypedStorage | None:
        self.heap.activate(stand_in_only)
        try:
            with torch.cuda.use_mem_pool(self._pool, self.device):
                return torch.UntypedStorage(num_bytes, device=self.device)
        except torch.cuda.OutOfMemoryError:  # a limit that the caller set on torch
            return None
        finally:
            self.heap.deactivate()

    def offset_of(self, tensor: torch.Tensor) -> int | None:
        """Offset in bytes of the tensor's first element in this rank's range; None elsewhere (empty tensors too)."""
        offset: int = self.heap.offset_of(tensor.data_ptr())
        return offset if offset >= 0 else None

    def grow(self, num_bytes: int) -> int:
        """Append a chunk to the pool of every rank (collective): of the largest size that a rank asks for.

        It allocates and maps device memory, which may wait for kernels that are running: no kernel may wait for this
        call of another rank.

        Returns:
            bytes added, the same on all ranks: the size rounded up to 2 MiB, or 0 when a rank has no memory or no
            addresses left, or the kind is ``"ipc"``.

        Raises:
            CommTimeout, PeerError: a rank did not answer or died.
            BufferDestroyed: the memory is closed.
        """
        if self._pool is None:
            raise BufferDestroyed("peer memory: it was closed; construct a new buffer")
        wanted = max(wish for wish, _ in self._links.exchange("growth", int(num_bytes)))
        if wanted <= 0 or self.kind == "ipc":
            return 0
        before = self.heap.usage()["mapped_bytes"]
        failures = self._append(wanted, 0)
        if failures:
            rank, text = next(iter(failures.items()))
            logger.info("deep_ep: peer memory cannot grow by %d bytes; rank %d says: %s", wanted, rank, text)
        return int(self.heap.usage()["mapped_bytes"] - before)

    def usage(self) -> dict[str, int]:
        """Sizes in bytes of this rank's part. Slow (it walks torch's blocks): for reports.

        Keys: ``reserve_bytes`` address range; ``mapped_bytes`` device memory taken, ``control_bytes`` of which is the
        control block; ``used_bytes`` of the pool are torch's, ``live_bytes`` of which tensors hold, the rest is kept
        for reuse; ``free_bytes`` of the pool are not torch's, ``largest_free_bytes`` in one piece; ``num_chunks``;
        ``stand_in_bytes`` addresses without memory that torch counts as reserved.
        """
        if self._pool is None:
            raise BufferDestroyed("peer memory: it was closed; construct a new buffer")
        usage: dict[str, int] = self.heap.usage()
        segments = [s for s in self._pool.snapshot() if not self.heap.is_stand_in(s["address"])]
        usage["live_bytes"] = sum(int(segment["allocated_size"]) for segment in segments)
        return usage

    def close(self) -> None:
        """Unmap the other ranks' memory and free the own one; again: does nothing.

        Not collective, but no kernel of another rank may use this rank's memory any more: synchronise the ranks
        first. Waits for this device. Tensors that are still alive keep the own memory, which is freed with the last
        of them, at the latest by `torch.cuda.empty_cache()`.

        Raises:
            ConfigError: the current stream is being captured into a graph, where nothing can be freed.
        """
        if self._pool is None:
            return
        if _capturing():
            raise ConfigError("peer memory: close() during graph capture; destroy the buffer after the capture")
        self._leased.clear()
        pool, self._pool = self._pool, None
        self._links.close()
        self._held.clear()
        with _pool_lock:
            del pool  # as in _free_abandoned
        self.heap.destroy()
        _free_abandoned()

    def __del__(self) -> None:
        pool = getattr(self, "_pool", None)
        if pool is not None:
            self._links.close()
            _abandoned.append((pool, self.heap))
