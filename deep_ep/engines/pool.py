"""Blocks of a symmetric heap for tensors, handed out by torch's own caching allocator.

A `torch.cuda.MemPool` over two functions of the extension: so `record_stream`, stream order, graph capture and `set_`
mean what they always mean. The context of a pool is entered around one allocation only, with torch's low-level calls,
since an allocation is most of the host's work in a short operation.
"""

from __future__ import annotations

import atexit
import collections
import ctypes
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from .._native import _C
from ..errors import BufferDestroyed

_SMALL_BYTES = 1 << 20  # torch's allocator keeps blocks up to this size apart
_WAKE_EVERY = 8  # allocations

# Torch aborts the process when a pool is destroyed while any thread is inside the context of any pool, and one pool's
# context takes one thread at a time.
_pool_lock = threading.Lock()
# Pools that were dropped without close(). The garbage collector may run anywhere, also inside that context, so it only
# leaves them here; the next construction or close, on an ordinary path, frees them.
_abandoned: collections.deque[BlockPool] = collections.deque()
_live: weakref.WeakSet[BlockPool] = weakref.WeakSet()


@functools.cache
def _torch_allocator() -> Any:
    """Torch's side of the two functions of the extension; one for the process, since torch keeps pointers to it."""
    plug = torch.cuda.memory.CUDAPluggableAllocator(str(_C.__file__), "deep_ep_pool_malloc", "deep_ep_pool_free")
    return plug.allocator()


def free_abandoned() -> None:
    """Free what was dropped without close(); for ordinary paths, where no pool is being allocated from."""
    while _abandoned:
        _abandoned.popleft().close()


def _keep_until_process_ends() -> None:
    # At exit a kernel may still wait for a peer. Destroying a pool waits for events; the end of the process does not.
    for blocks in [*_live, *_abandoned]:
        if blocks._pool is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(blocks._pool))


atexit.register(_keep_until_process_ends)


def _segment_size(num_bytes: int) -> int:
    # What torch asks of the heap when it has no block for a request of more than 1 MiB.
    return 20 << 20 if num_bytes < 10 << 20 else -(-num_bytes // (2 << 20)) * (2 << 20)


def is_capturing() -> bool:
    """Whether the current stream is being captured into a graph."""
    # A torch without CUDA has no answer, and no capture.
    return torch.version.cuda is not None and torch.cuda.is_current_stream_capturing()


def current_stream_of(device: torch.device) -> Callable[[], int]:
    """A function for the handle of the current stream of a CUDA device with an index; it gives 0 on the CPU."""
    if device.type != "cuda":
        return lambda: 0
    raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw_stream is not None:
        return functools.partial(raw_stream, device.index)
    return lambda: int(torch.cuda.current_stream(device).cuda_stream)


def pool_size(num_bytes: int) -> int:
    """Bytes asked of the pool for a tensor of ``num_bytes``, which is positive.

    Large tensors take one of 16 sizes an octave (6 % more at most): the number of received rows changes from call to
    call, and blocks of equal sizes can take each other's place.
    """
    step = 1 << max(num_bytes.bit_length() - 5, 9)
    return -(-num_bytes // step) * step


def _allocation_in(pool: Any, heap: Any, device: torch.device) -> Callable[..., torch.UntypedStorage | None]:
    """A function that allocates in ``pool``; without a reference to it, so that its owner can destroy it.

    It returns None when a limit that the caller set on torch is reached.
    """
    activate = heap.activate
    storage_type: Callable[..., torch.UntypedStorage] = torch.UntypedStorage
    out_of_memory = torch.cuda.OutOfMemoryError
    names = ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool", "_cuda_releasePool")
    if not all(hasattr(torch._C, name) for name in names):
        reference: Callable[[], Any] = weakref.ref(pool)

        def allocate_in_context(num_bytes: int, stand_in_only: bool = False) -> torch.UntypedStorage | None:
            activate(stand_in_only)
            try:
                with torch.cuda.use_mem_pool(reference(), device):
                    return storage_type(num_bytes, device=device)
            except out_of_memory:
                return None

        return allocate_in_context
    begin, end, release = (getattr(torch._C, name) for name in names)
    index, pool_id = device.index, pool.id

    def allocate(num_bytes: int, stand_in_only: bool = False) -> torch.UntypedStorage | None:
        activate(stand_in_only)
        begin(index, pool_id)
        try:
            return storage_type(num_bytes, device=device)
        except out_of_memory:
            return None
        finally:
            end(index, pool_id)
            release(index, pool_id)

    return allocate


def _closed(num_bytes: int, stand_in_only: bool = False) -> torch.UntypedStorage | None:
    raise BufferDestroyed("peer memory: it was closed; construct a new buffer")


class BlockPool:
    """The blocks of one heap.

    Args:
        heap: `_C.SymmetricHeap` whose first chunk is committed. Closed with this object.
        base, span: the range of addresses that can only be memory of this heap.
        device: a CUDA device with an index.
    """

    def __init__(self, heap: Any, base: int, span: int, device: torch.device) -> None:
        self.heap = heap
        self._base, self._span, self._device = base, span, device
        # Stand-ins: by stream, the addresses of the spare one; and those held for good.
        self._spares: dict[int, range] = {}
        self._held: list[torch.UntypedStorage] = []
        self._leased: list[torch.UntypedStorage] = []
        #: Bytes held for captured graphs.
        self.leased_bytes = 0
        self._until_wake = _WAKE_EVERY
        self._pool: Any = torch.cuda.MemPool(_torch_allocator())
        self._allocate = _allocation_in(self._pool, heap, device)
        _live.add(self)

    def take(
        self, num_bytes: int, stream: int, capturing: bool | None = None
    ) -> tuple[torch.UntypedStorage, int] | None:
        """See `PeerMemory.take`."""
        if capturing is None:
            capturing = is_capturing()
        step = 1 << max(num_bytes.bit_length() - 5, 9)
        size = -(-num_bytes // step) * step or step  # pool_size
        with _pool_lock:
            self._until_wake -= 1
            if not self._until_wake:
                self._wake_blocks(capturing)
            storage = self._allocate(size)
            if storage is None:
                return None  # a limit that the caller set on torch
            offset = storage.data_ptr() - self._base
            if not 0 <= offset < self._span:
                if not self.heap.is_stand_in(storage.data_ptr()):
                    return None  # torch runs without its caching allocator, which alone knows pools
                if size > _SMALL_BYTES:
                    self._hold_unless_spare(storage, stream)
                del storage  # free before the next requests
                storage = self._take_when_full(max(size, _SMALL_BYTES + 512), stream, capturing)
                if storage is None:
                    return None
                offset = storage.data_ptr() - self._base
            if capturing:
                # A replay writes here for as long as the graph lives, which nobody tells; so it is held until close.
                self._leased.append(storage)
                self.leased_bytes += size
        return storage, offset

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._pool is None

    def live_bytes(self) -> int:
        """Bytes of the blocks that tensors hold. Slow: it walks torch's blocks."""
        segments = [s for s in self._pool.snapshot() if not self.heap.is_stand_in(s["address"])]
        return sum(int(segment["allocated_size"]) for segment in segments)

    def close(self) -> None:
        """Destroy torch's pool and the heap; again: does nothing. Not while the current stream is captured."""
        with _pool_lock:
            self._allocate = _closed
            self._leased.clear()
            self._held.clear()
            self._pool = None  # the last reference: torch gives the blocks that no tensor uses back to the heap
        self.heap.destroy()

    def abandon(self) -> None:
        """Leave it to the next ordinary path to close this pool: for destructors."""
        _abandoned.append(self)

    def _in_heap(self, storage: torch.UntypedStorage) -> bool:
        return 0 <= storage.data_ptr() - self._base < self._span

    def _take_when_full(self, num_bytes: int, stream: int, capturing: bool) -> torch.UntypedStorage | None:
        """What is left to try when torch had no block, in the order that keeps a full pool cheap.

        A full heap must not answer torch with a null pointer: torch then empties its whole cache. It hands out a
        stand-in, an address without memory. But torch keeps every block that is dropped, and takes the smallest that
        fits, so a stand-in that is free must be larger than any memory, or it would be taken in its place. Hence one
        spare stand-in per stream, as large as the pool, whose parts answer all later requests that no memory fits.
        Other ones are held for good, which takes addresses only. (Torch keeps blocks up to 1 MiB apart, in segments
        of one size, where any free stand-in is as large as can be; such requests go on as larger ones here.)
        """
        usage = self.heap.usage()
        if len(self._spares.get(stream, ())) < num_bytes:
            spare = self._allocate(max(usage["mapped_bytes"], num_bytes), True)
            if spare is None:
                return None
            self._spares[stream] = range(spare.data_ptr(), spare.data_ptr() + spare.nbytes())
            del spare
        self._wake_blocks(capturing)
        # What the heap has and torch has not is asked for only while no stand-in is free.
        has_room = usage["largest_free_bytes"] >= _segment_size(num_bytes)
        spare = self._allocate(len(self._spares[stream])) if has_room else None
        storage = self._allocate(num_bytes)
        del spare
        if storage is not None and not self._in_heap(storage):
            self._hold_unless_spare(storage, stream)
            return None
        return storage

    def _hold_unless_spare(self, stand_in: torch.UntypedStorage, stream: int) -> None:
        if stand_in.data_ptr() not in self._spares.get(stream, ()):
            self._held.append(stand_in)

    def _wake_blocks(self, capturing: bool) -> None:
        """Let torch look for blocks that waited for other streams (`record_stream`) and are free now.

        It does so in allocations outside of pools only. Where a program makes no others, such blocks would sleep until
        the pool is full, so that its memory ends up spread over more blocks than the program needs.
        """
        self._until_wake = _WAKE_EVERY
        if not capturing:
            torch.UntypedStorage(1, device=self._device)
