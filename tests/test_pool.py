"""Blocks of symmetric memory from torch's allocator, and slabs cut from them: what can be tested without a GPU."""

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deep_ep._native import _C
from deep_ep.engines import pool as pool_module
from deep_ep.engines.arena import ALIGNMENT, LARGEST_PART, SLAB_BYTES, Arena
from deep_ep.engines.peer_memory import PeerMemory
from deep_ep.engines.pool import BlockPool, current_stream_of, free_abandoned, pool_size
from deep_ep.errors import BufferDestroyed

MIB = 1 << 20
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------
# Blocks


def test_pool_sizes_are_few_and_close():
    sizes = set()
    for num_bytes in [1, 511, 512, 513, 16384, 16385, *range(3 * MIB, 6 * MIB, 997)]:
        size = pool_size(num_bytes)
        assert size % 512 == 0 and num_bytes <= size <= max(num_bytes * 17 // 16 + 512, 512)
        sizes.add(size)
    assert len(sizes) < 30


class _TorchPool:
    """Torch's caching allocator over the heap's, as far as it matters here: best fit, splitting, merging, no return."""

    STAND_INS = 1 << 56

    def __init__(self, pool_bytes: int):
        self.pool, self.stand_ins = _C.BlockAllocator(), _C.BlockAllocator()
        self.pool.add(0, pool_bytes)
        self.stand_ins.add(0, 1 << 44)
        self.mapped = pool_bytes
        self.free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # by smallness: (bytes, address)
        self.segments: list[tuple[int, int]] = []

    # What BlockPool asks of the heap.

    def is_stand_in(self, address: int) -> bool:
        return address >= self.STAND_INS

    def usage(self) -> dict[str, int]:
        return {"mapped_bytes": self.mapped, "largest_free_bytes": self.pool.largest_free}

    # What torch does.

    def allocate(self, size: int, stand_in_only: bool = False) -> "_Block":
        small = size <= MIB
        fitting = sorted(block for block in self.free[small] if block[0] >= size)
        if fitting:
            bytes_, address = fitting[0]
            self.free[small].remove(fitting[0])
        else:
            bytes_ = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * (2 * MIB)
            address = -1 if stand_in_only else self.pool.allocate(bytes_)
            if address < 0:
                address = self.STAND_INS + self.stand_ins.allocate(bytes_)
            self.segments.append((address, address + bytes_))
        if bytes_ - size > (0 if small else MIB):
            self.free[small].append((bytes_ - size, address + size))
            bytes_ = size
        return _Block(self, small, bytes_, address)

    def release(self, small: bool, bytes_: int, address: int) -> None:
        segment = next(s for s in self.segments if s[0] <= address < s[1])
        for block in list(self.free[small]):
            inside = segment[0] <= block[1] < segment[1]
            if inside and (block[1] + block[0] == address or block[1] == address + bytes_):
                self.free[small].remove(block)
                address, bytes_ = min(address, block[1]), bytes_ + block[0]
        self.free[small].append((bytes_, address))

    def largest_idle(self, small: bool) -> int:
        return max((bytes_ for bytes_, address in self.free[small] if address < self.mapped), default=0)


class _Block:
    def __init__(self, pool: _TorchPool, *place: int):
        self.pool, self.place = pool, place

    def data_ptr(self) -> int:
        return self.place[2]

    def nbytes(self) -> int:
        return self.place[1]

    def __del__(self):
        self.pool.release(*self.place)


def _blocks_of(heap: Any, allocate: Callable[..., Any], span: int = 1 << 50) -> BlockPool:
    blocks = BlockPool.__new__(BlockPool)
    blocks.heap, blocks._base, blocks._span, blocks._device = heap, 0, span, torch.device("cpu")
    blocks._allocate, blocks._until_wake = allocate, 8
    blocks._spares, blocks._held, blocks._leased, blocks.leased_bytes = {}, [], [], 0
    blocks._pool = object()
    return blocks


@pytest.mark.parametrize("seed", range(6))
def test_a_full_pool_never_hides_memory(seed):
    """Whatever was refused before: a request gets memory if torch holds a block for it, or the heap has a segment."""
    rng = random.Random(seed)
    pool = _TorchPool(200 * MIB)
    blocks, held, refused = _blocks_of(pool, pool.allocate), [], 0
    for step in range(1500):
        if step == 700:
            pool.pool.add(pool.mapped, 100 * MIB)
            pool.mapped += 100 * MIB
        if held and rng.random() < (0.45 if step % 300 < 150 else 0.6):
            held.pop(rng.randrange(len(held)))
            continue
        size = pool_size(rng.choice([rng.randint(1, MIB), rng.randint(MIB, 12 * MIB), rng.randint(12 * MIB, 90 * MIB)]))
        small = size <= MIB
        segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * (2 * MIB)
        possible = pool.largest_idle(small) >= size or pool.pool.largest_free >= segment
        taken = blocks.take(size, 0, False)
        if taken is None:
            refused += 1
            assert not possible or (small and pool.pool.largest_free < 20 * MIB)
        else:
            assert taken[1] == taken[0].data_ptr() < pool.mapped and taken[0].nbytes() >= size
            held.append(taken[0])
        del taken
        # One spare of the pool's size before and after it grew, one refusal before each, one small segment.
        assert pool.stand_ins.bytes_used <= (200 + 300 + 2 * 90 + 20) * MIB
    assert refused > 20


def _on_cpu(size: int, stand_in_only: bool = False) -> torch.UntypedStorage:
    return torch.UntypedStorage(size)


def test_blocks_of_sizes_few_and_leases():
    blocks = _blocks_of(None, _on_cpu)
    for size in (0, 1, 511, 512, 513, 5 * MIB, 5 * MIB + 1):
        storage, offset = blocks.take(size, 0, False)
        assert storage.nbytes() == pool_size(max(size, 1)) and offset == storage.data_ptr()
    assert blocks.leased_bytes == 0 and not blocks._leased
    storage, _ = blocks.take(1000, 0, True)
    assert blocks.leased_bytes == 1024 and blocks._leased[0].data_ptr() == storage.data_ptr()
    blocks._allocate = lambda size, stand_in_only=False: None  # a limit that was set on torch
    assert blocks.take(1000, 0, True) is None and blocks.leased_bytes == 1024


def test_memory_that_is_not_the_heaps_is_not_taken():
    """Torch without its caching allocator knows no pools and answers from elsewhere."""

    class Heap:
        def is_stand_in(self, address: int) -> bool:
            return False

    assert _blocks_of(Heap(), _on_cpu, span=4096).take(1000, 0, False) is None


def test_blocks_of_other_streams_are_woken_now_and_then(monkeypatch):
    blocks, woken = _blocks_of(None, _on_cpu), []
    monkeypatch.setattr(pool_module, "is_capturing", lambda: False)
    monkeypatch.setattr(blocks, "_wake_blocks", lambda capturing: woken.append(setattr(blocks, "_until_wake", 8)))
    for _ in range(40):
        assert blocks.take(100, 0) is not None
    assert len(woken) == 5


class _Calls:
    """Torch's low-level calls and the heap's, in the order in which they come."""

    def __init__(self, monkeypatch):
        self.made: list[tuple[Any, ...]] = []
        for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, self._record(name), raising=False)

    def _record(self, name: str) -> Callable[..., None]:
        return lambda *args: self.made.append((name.rpartition("_")[2], *args))

    def activate(self, stand_in_only: bool) -> None:
        self.made.append(("activate", stand_in_only))

    def destroy(self) -> None:
        self.made.append(("destroy",))


class _Pool:
    id = (0, 7)


def test_an_allocation_enters_the_pool_and_leaves_it(monkeypatch):
    calls = _Calls(monkeypatch)
    allocate = pool_module._allocation_in(_Pool(), calls, CPU)
    around = [("beginAllocateCurrentThreadToPool", None, (0, 7)), ("endAllocateToPool", None, (0, 7))]
    released = ("releasePool", None, (0, 7))
    assert allocate(100).nbytes() == 100 and allocate(200, True).nbytes() == 200
    assert calls.made == [("activate", False), *around, released, ("activate", True), *around, released]
    for error, outcome in ((torch.cuda.OutOfMemoryError, None), (ValueError, ValueError)):

        def fail(*args, error=error, **kwargs):
            raise error("no")

        calls.made.clear()
        monkeypatch.setattr(torch, "UntypedStorage", fail)
        allocate = pool_module._allocation_in(_Pool(), calls, CPU)
        if outcome is None:
            assert allocate(100) is None
        else:
            with pytest.raises(outcome):
                allocate(100)
        assert calls.made == [("activate", False), *around, released]  # left, whatever happened


def test_a_torch_without_the_low_level_calls(monkeypatch):
    entered, pool = [], _Pool()

    class Context:
        def __init__(self, *args):
            entered.append(args)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return False

    calls = _Calls(monkeypatch)
    monkeypatch.delattr(torch._C, "_cuda_releasePool")
    monkeypatch.setattr(torch.cuda, "use_mem_pool", Context)
    assert pool_module._allocation_in(pool, calls, CPU)(100).nbytes() == 100
    assert entered == [(pool, CPU)] and calls.made == [("activate", False)]


def test_closed_and_abandoned_pools(monkeypatch):
    calls = _Calls(monkeypatch)
    blocks = _blocks_of(calls, _on_cpu)
    blocks.take(1000, 0, True)
    assert not blocks.closed
    blocks.close()
    assert blocks.closed and not blocks._leased and calls.made == [("destroy",)]
    with pytest.raises(BufferDestroyed):
        blocks.take(1000, 0, False)
    dropped = _blocks_of(calls, _on_cpu)
    dropped.abandon()
    del dropped
    assert calls.made == [("destroy",)]  # not yet: the collector may run in the middle of an allocation
    free_abandoned()
    assert calls.made == [("destroy",)] * 2


def test_storage_becomes_an_ordinary_tensor():
    memory = PeerMemory.__new__(PeerMemory)
    memory.device = CPU
    with pytest.raises(BufferDestroyed):
        memory.try_empty((4,), torch.int32)
    memory._blocks, memory._stream = _blocks_of(None, _on_cpu), (lambda: 0)
    memory._base, memory._span = 0, 1 << 50
    tensor = memory.try_empty((5, 100), torch.bfloat16)
    assert tensor.shape == (5, 100) and tensor.is_contiguous() and tensor.is_leaf and not tensor._is_view()
    assert tensor.untyped_storage().nbytes() == 1024 and memory.try_empty((0, 3), torch.int8).shape == (0, 3)
    assert memory.offset_of(tensor[1:]) == tensor.data_ptr() + 200
    memory._base = tensor.data_ptr() + 1
    assert memory.offset_of(tensor) is None and memory.offset_of(torch.empty(0)) is None
    memory._blocks._allocate = lambda size, stand_in_only=False: None
    assert memory.try_empty((5,), torch.int8) is None
    memory._blocks._pool = None
    with pytest.raises(BufferDestroyed):
        memory.try_empty((4,), torch.int32)


def test_threads_enter_a_pool_one_at_a_time():
    inside, most = [], []

    def allocate(size: int, stand_in_only: bool = False) -> torch.UntypedStorage:
        inside.append(1)
        most.append(len(inside))
        storage = torch.UntypedStorage(size)
        inside.pop()
        return storage

    blocks = [_blocks_of(None, allocate) for _ in range(2)]

    def work(pool: BlockPool) -> None:
        for _ in range(300):
            pool.take(600, 0, False)

    threads = [threading.Thread(target=work, args=(pool,)) for pool in blocks * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 1200 and max(most) == 1


# ---------------------------------------------------------------------------------------------------------------
# Slabs


class _Source:
    """Gives storages until `room` is used up, and remembers what it was asked."""

    def __init__(self, room: int = 1 << 40):
        self.room, self.asked = room, []

    def __call__(self, num_bytes: int, stream: int, capturing: bool) -> torch.UntypedStorage | None:
        self.asked.append((num_bytes, stream, capturing))
        if num_bytes > self.room:
            return None
        self.room -= num_bytes
        return torch.UntypedStorage(num_bytes)


@pytest.mark.parametrize("seed", range(4))
def test_parts_never_overlap(seed):
    rng, source = random.Random(seed), _Source()
    arena, parts, streams = Arena(source, CPU), [], {}
    for number in range(3000):
        size = rng.choice([0, 1, 127, 128, 129, rng.randint(1, 5000), rng.randint(1, LARGEST_PART), LARGEST_PART + 1])
        if rng.random() < 0.9:
            size = min(size, 20_000)
        stream = rng.choice([3, 3, 3, 3, 4])
        storage, offset = arena.take(size, stream, False)
        assert offset % ALIGNMENT == 0 and offset + size <= storage.nbytes()
        assert storage.nbytes() == (max(size, 1) if size > LARGEST_PART else SLAB_BYTES)
        assert streams.setdefault(storage.data_ptr(), stream) == stream  # a slab belongs to one stream
        parts.append((storage.data_ptr() + offset, size, number, storage))
    parts.sort(key=lambda part: part[:2])
    for (start, size, *_), (following, *_) in itertools.pairwise(parts):
        assert start + size <= following
    used = sum(size for _, size, *_ in parts)
    assert sum(size for size, *_ in source.asked) < 1.6 * used + 2 * SLAB_BYTES  # little is lost at the ends of slabs


def test_a_slab_lives_as_long_as_a_tensor_on_it():
    source = _Source()
    arena = Arena(source, CPU)
    tensors = []
    for number in range(100):
        storage, offset = arena.take(50_000, 0, False)
        tensors.append(torch.empty(0, dtype=torch.int32).set_(storage, offset // 4, (12_500,), (1,)).fill_(number))
        del storage
    arena.clear()
    assert len(source.asked) > 1
    for number, tensor in enumerate(tensors):
        assert tensor.eq(number).all() and tensor.is_leaf and not tensor._is_view()


def test_streams_keep_their_slabs():
    source = _Source()
    arena = Arena(source, CPU)
    for _ in range(50):  # a call on each of two streams takes no new slab each time
        for stream in (1, 2):
            arena.take(1000, stream, False)
    assert source.asked == [(SLAB_BYTES, 1, False), (SLAB_BYTES, 2, False)]
    for stream in range(3, 30):
        arena.take(1000, stream, False)
    assert len(arena._slabs) == len(arena._used) == 4  # programs that make streams all the time keep no slab for each


def test_captured_parts_are_apart():
    source = _Source()
    arena = Arena(source, CPU)
    _, before = arena.take(500, 5, False)
    captured = [arena.take(500, 5, True) for _ in range(3)]
    _, after = arena.take(500, 5, False)
    assert (before, after) == (0, 512) and [offset for _, offset in captured] == [0, 0, 0]
    assert source.asked == [(SLAB_BYTES, 5, False), *[(500, 5, True)] * 3]


def test_a_source_without_room():
    arena = Arena(_Source(room=3000), CPU)
    storage, offset = arena.take(2000, 0, False)  # no slab, but the part itself fits
    assert (storage.nbytes(), offset) == (2000, 0)
    assert arena.take(2000, 0, False) is None and arena.take(LARGEST_PART + 1, 0, False) is None
    assert arena.take(0, 0, False) is not None


def test_arenas_on_both_kinds_of_memory():
    storage, offset = Arena.ordinary(CPU).take(10)
    assert (storage.nbytes(), storage.device, offset) == (SLAB_BYTES, CPU, 0)
    memory = PeerMemory.__new__(PeerMemory)
    memory.device, memory._blocks = CPU, _blocks_of(None, _on_cpu)
    arena = Arena.symmetric(memory)
    (first, start), (second, next_start) = arena.take(100), arena.take(100)
    assert first.data_ptr() == second.data_ptr() and (start, next_start) == (0, 128)
    assert arena.take(100, None, True)[0].nbytes() == 512 and memory._blocks.leased_bytes == 512
    memory._blocks._allocate = lambda size, stand_in_only=False: None
    assert arena.take(LARGEST_PART + 1) is None
    memory._blocks._pool = None
    assert current_stream_of(CPU)() == 0
