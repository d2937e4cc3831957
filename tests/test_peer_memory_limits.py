"""Symmetric memory's limits, staging and recovery, over real sockets between ranks and heaps without memory."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import RankContext, environ, run_ranks, spawn_fresh

from deep_ep._native import _C
from deep_ep.engines import peer_memory
from deep_ep.engines.mesh import members_of
from deep_ep.engines.peer_memory import PeerMemory, resolve_max_pool_bytes, room_below
from deep_ep.engines.peer_reach import DeviceReport
from deep_ep.errors import BufferDestroyed, CommTimeout, ConfigError, PeerError, PoolExhausted

MIB = 1 << 20
CPU = torch.device("cpu")


class Heap:
    """`_C.SymmetricHeap` on a device of `device_bytes`, without the memory."""

    device_bytes = 1 << 30

    def __init__(self, device: Any, rank: int, num_ranks: int, kind: int, reserve_bytes: int):
        self.kind, self.num_ranks = kind, num_ranks
        self.pool, self.mapped, self.control, self.chunks, self.pending = _C.BlockAllocator(), 0, 0, 0, (0, 0)
        self.reserve_bytes = reserve_bytes or 4 * self.device_bytes

    def granularity(self) -> int:
        return 2 * MIB

    def create_chunk(self, num_bytes: int, control_bytes: int) -> tuple[int, int, bytes]:
        size = -(-num_bytes // self.granularity()) * self.granularity()
        if self.kind == 2 and self.mapped:
            raise RuntimeError("a fixed size")
        if self.mapped + size > self.device_bytes:
            raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")
        self.pending = (size, control_bytes)
        return size, -1, b""

    def import_chunk(self, peer: int, num_bytes: int, fd: int, blob: bytes) -> None:
        assert num_bytes == self.pending[0]

    def commit_chunk(self) -> None:
        size, control = self.pending
        self.pool.add(self.mapped + control, size - control)
        self.mapped, self.control, self.chunks = self.mapped + size, self.control + control, self.chunks + 1

    def discard_chunk(self) -> None:
        self.pending = (0, 0)

    def reserve_block(self, num_bytes: int) -> int:
        return self.pool.allocate(num_bytes)

    def return_block(self, offset: int) -> None:
        assert self.pool.free(offset)

    def bases(self) -> list[int]:
        return [(rank + 1) << 40 for rank in range(self.num_ranks)]

    def usage(self) -> dict[str, int]:
        return {
            "reserve_bytes": self.reserve_bytes,
            "mapped_bytes": self.mapped,
            "control_bytes": self.control,
            "used_bytes": self.pool.bytes_used,
            "free_bytes": self.pool.bytes_free,
            "largest_free_bytes": self.pool.largest_free,
            "num_chunks": self.chunks,
            "stand_in_bytes": 0,
        }

    def destroy(self) -> None:
        self.mapped = 0


class Blocks:
    """`BlockPool` without torch's pool."""

    def __init__(self, heap: Heap, base: int, span: int, device: torch.device):
        self.heap, self.closed, self.leased_bytes = heap, False, 0

    def close(self) -> None:
        self.closed = True
        self.heap.destroy()

    def abandon(self) -> None:
        self.close()


class Event:
    """Done when told so."""

    done: bool = False

    def query(self) -> bool:
        return Event.done


def in_fakes(ctx: RankContext, work: Callable[..., Any], *args: Any) -> Any:
    """Run ``work(ctx, *args)`` with the classes above in the place of GPU memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heap, "device_bytes", 1 << 30)
        patch.setattr(Event, "done", False)
        namespace = type("Extension", (), {"SymmetricHeap": Heap, "has_cuda": True})
        patch.setattr(peer_memory, "_C", namespace)
        patch.setattr(peer_memory, "BlockPool", Blocks)
        patch.setattr(peer_memory, "report_device", lambda device: DeviceReport(b"%d" % ctx.rank, "bus", "host", {}))
        patch.setattr(PeerMemory, "_event", lambda self: Event())
        return work(ctx, *args)


def counted(memory: PeerMemory) -> list[str]:
    """The names of the exchanges from now on."""
    names, exchange = [], memory._links.exchange

    def counting(what: str, payload: Any, fds: Any = ()) -> Any:
        names.append(what)
        return exchange(what, payload, fds)

    memory._links.exchange = counting
    return names


# ---------------------------------------------------------------------------------------------------------------
# Limits


def test_the_limit_comes_from_the_argument_or_the_environment():
    with environ(DEEP_EP_MAX_POOL_BYTES=None):
        assert resolve_max_pool_bytes(None) == 0 and resolve_max_pool_bytes(5) == 5
    with environ(DEEP_EP_MAX_POOL_BYTES=" 4096 "):
        assert resolve_max_pool_bytes(None) == 4096 and resolve_max_pool_bytes(0) == 0
    with environ(DEEP_EP_MAX_POOL_BYTES="1G"), pytest.raises(ConfigError, match="DEEP_EP_MAX_POOL_BYTES='1G'"):
        resolve_max_pool_bytes(None)
    for wrong in (-1, "many", [1]):
        with pytest.raises(ConfigError, match="max_pool_bytes="):
            resolve_max_pool_bytes(wrong)


def test_room_below_a_limit():
    assert room_below(0, 5, 512) > 1 << 60
    assert room_below(4096, 0, 512) == 4096 and room_below(4095, 0, 512) == 3584
    assert room_below(4096, 3900, 512) == 0 == room_below(4096, 5000, 512)


def _limits(ctx: RankContext) -> None:
    members = members_of(ctx.group, None)
    # The smallest limit counts, the pool is cut to it, and growth stops there on every rank.
    memory = PeerMemory(members, CPU, 4096, 40 * MIB, max_pool_bytes=(0, 33 * MIB, 90 * MIB)[ctx.rank])
    assert memory.max_pool_bytes == 33 * MIB and memory.usage()["mapped_bytes"] == 32 * MIB
    assert memory.usage()["limit_bytes"] == 33 * MIB and memory.grow(2 * MIB) == 0
    memory.close()
    memory = PeerMemory(members, CPU, 4096, 4 * MIB, max_pool_bytes=33 * MIB if ctx.rank == 2 else None)
    sizes = [memory.grow(wish) for wish in (3 * MIB * ctx.rank, 0, 20 * MIB, 9 * MIB)]
    assert sizes == [6 * MIB, 0, 20 * MIB, 0] and memory.usage()["mapped_bytes"] == 32 * MIB
    memory.close()
    memory = PeerMemory(members, CPU, 4096, 4 * MIB)
    assert memory.max_pool_bytes == 0 and memory.grow(100 * MIB) == 100 * MIB
    if ctx.rank == 1:
        Heap.device_bytes = 120 * MIB
    assert memory.grow(100 * MIB) == 0 and memory.grow(2 * MIB) == 2 * MIB
    memory.close()
    with pytest.raises(BufferDestroyed):
        memory.usage()
    with pytest.raises(ConfigError, match="control block alone takes 4194304"):
        PeerMemory(members, CPU, 3 * MIB, 4 * MIB, max_pool_bytes=3 * MIB if ctx.rank == 0 else 0)


def test_the_smallest_limit_counts():
    run_ranks(3, in_fakes, _limits)


# ---------------------------------------------------------------------------------------------------------------
# Staging


def _staging(ctx: RankContext) -> None:
    members = members_of(ctx.group, None)
    memory = PeerMemory(members, CPU, 4096, 16 * MIB, max_pool_bytes=40 * MIB)
    assert (memory.staging_bytes, memory.staging_offset, memory.staging_offsets) == (0, -1, [])
    memory.lease_staging()
    if ctx.rank == 1:
        memory.heap.reserve_block(1 * MIB)  # offsets need not be equal
    exchanges = counted(memory)
    memory.reserve_staging(0)
    assert exchanges == []
    memory.reserve_staging((3 + ctx.rank) * MIB)
    assert memory.staging_bytes == 6 * MIB  # the largest wish, an eighth more, whole chunks
    assert memory.staging_offset == (4096 if ctx.rank == 0 else 4096 + MIB)
    assert memory.staging_offsets == [4096, 4096 + MIB] and memory.usage()["staging_bytes"] == 6 * MIB
    exchanges.clear()
    memory.reserve_staging(6 * MIB)
    assert exchanges == [] and memory.staging_bytes == 6 * MIB

    # A larger one takes new memory; the old one comes back when the stream is through.
    used = memory.usage()["used_bytes"]
    memory.reserve_staging(12 * MIB)
    assert memory.staging_bytes == 14 * MIB and memory.usage()["mapped_bytes"] == (18 + 14) * MIB
    assert memory.usage()["used_bytes"] == used + 14 * MIB
    Event.done = True
    assert memory.usage()["used_bytes"] == used + 8 * MIB

    # A leased one never does.
    memory.lease_staging()
    memory.lease_staging()
    assert memory.usage()["leased_bytes"] == 14 * MIB
    with pytest.raises(PoolExhausted, match=f"max_pool_bytes is {40 * MIB}, of which {32 * MIB}"):
        memory.reserve_staging(15 * MIB, within_limit=True)
    memory.reserve_staging(15 * MIB)  # 18 MiB, beyond the limit of 40: no operation could go on without it
    usage = memory.usage()
    assert memory.staging_bytes == 18 * MIB and usage["mapped_bytes"] == 50 * MIB
    assert usage["leased_bytes"] == 14 * MIB and usage["used_bytes"] == used + 26 * MIB
    assert memory.grow(2 * MIB) == 0

    # No memory on one rank: all ranks say so, and keep what they have.
    if ctx.rank == 1:
        Heap.device_bytes = 0
    before = memory.usage(), memory.staging_offsets
    with pytest.raises(PoolExhausted, match=r"no room for .* of staging on every rank; rank 1 says"):
        memory.reserve_staging(30 * MIB)
    assert (memory.usage(), memory.staging_offsets) == before and memory.staging_bytes == 18 * MIB
    memory.close()
    with pytest.raises(BufferDestroyed):
        memory.reserve_staging(100 * MIB)


def test_staging():
    run_ranks(2, in_fakes, _staging)


def _fixed_size(ctx: RankContext) -> None:
    memory = PeerMemory(members_of(ctx.group, None), CPU, 4096, 16 * MIB, kind="ipc")
    memory.reserve_staging(MIB)
    assert memory.staging_bytes == 2 * MIB and memory.grow(MIB) == 0
    with pytest.raises(PoolExhausted, match="a fixed size"):
        memory.reserve_staging(30 * MIB)
    memory.close()


def test_staging_where_memory_cannot_grow():
    run_ranks(2, in_fakes, _fixed_size)


# ---------------------------------------------------------------------------------------------------------------
# Meeting, and meeting again


def _meet(ctx: RankContext) -> None:
    memory = PeerMemory(members_of(ctx.group, None), CPU, 4096, 4 * MIB)
    for number in range(3):
        assert memory.rendezvous("here", (ctx.rank, number)) == [(rank, number) for rank in range(ctx.num_ranks)]
    memory.close()
    with pytest.raises(BufferDestroyed):
        memory.rendezvous("here", None)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rendezvous(num_ranks):
    run_ranks(num_ranks, in_fakes, _meet)


def _late(ctx: RankContext) -> str:
    members = members_of(ctx.group, None)
    memory = PeerMemory(members, CPU, 4096, 4 * MIB, timeout_s=0.7)
    memory.recover(members)
    links = memory._links
    memory.reserve_staging(MIB)
    if ctx.rank == 1:
        time.sleep(1.5)
    try:
        memory.grow(2 * MIB)
        seen = ""
    except (CommTimeout, PeerError) as error:
        seen = f"{type(error).__name__} {error.peer}"
    with pytest.raises(PeerError):
        memory.rendezvous("too early", None)
    memory.recover(members)
    assert memory._links is not links and not memory._links.closed
    assert memory.rendezvous("again", ctx.rank) == list(range(ctx.num_ranks))
    assert memory.grow(2 * MIB) == 2 * MIB and memory.staging_bytes == 2 * MIB

    # A rank that replaced its staging alone, and one whose memory is another's size.
    if ctx.rank == 0:
        memory._staging.replace(4 * MIB, [0] * ctx.num_ranks, 0, Event())
    memory.recover(members)
    assert memory.staging_bytes == 0 and memory.staging_offsets == []
    if ctx.rank == 0:
        memory.heap.create_chunk(2 * MIB, 0)
        memory.heap.commit_chunk()
    with pytest.raises(PeerError, match="half-way"):
        memory.recover(members)
    ctx.barrier()
    if ctx.rank == 1:
        memory.close()
    with pytest.raises(BufferDestroyed, match=r"ranks \[1\] was destroyed"):
        memory.recover(members)
    memory.close()
    return seen


def test_recovery_after_a_late_rank():
    seen = spawn_fresh(3, in_fakes, _late)
    assert "CommTimeout 1" in seen and "" not in seen
