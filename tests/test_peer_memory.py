"""Symmetric memory: the arithmetic of its pool, the sockets between ranks, and on GPUs the memory itself."""

import os
import random
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from harness import RankContext, run_ranks, spawn_fresh

from deep_ep._native import _C
from deep_ep.engines import peer_links
from deep_ep.engines.mesh import Members, SoloComm, members_of
from deep_ep.engines.peer_links import GroupLinks, SocketLinks, close_fds
from deep_ep.engines.peer_memory import (
    DeviceReport,
    PeerMemory,
    PoolExhausted,
    check_reports,
    missing_pairs,
    pool_size,
)
from deep_ep.errors import BufferDestroyed, CommTimeout, ConfigError, PeerError, TopologyError

MIB = 1 << 20
SOLO = members_of(None, SoloComm())
on_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and _C.has_cuda), reason="needs a CUDA device and a CUDA build"),
]


# ---------------------------------------------------------------------------------------------------------------
# The pool's arithmetic


def test_allocator_takes_the_best_fit_and_merges():
    pool = _C.BlockAllocator()
    assert pool.allocate(1) == -1
    pool.add(4096, 8192)
    a, b, c = pool.allocate(1), pool.allocate(513), pool.allocate(1024)
    assert (a, b, c) == (4096, 4096 + 512, 4096 + 1536)
    assert (pool.bytes_used, pool.bytes_free, pool.num_used) == (2560, 8192 - 2560, 3)
    assert pool.free(a) and not pool.free(a) and not pool.free(b + 512)
    assert pool.allocate(600) == c + 1024  # not the 512 bytes at the start
    assert pool.allocate(500) == a  # the smallest block that fits
    assert pool.free(a) and pool.free(b)
    assert pool.allocate(1536) == a  # merged
    pool.add(4096 + 8192, 4096)  # appended to the free block at the end
    assert pool.largest_free == pool.bytes_free == 8192 + 4096 - pool.bytes_used
    assert (
        pool.allocate(pool.largest_free + 1) == -1 and pool.allocate(1 << 62) == -1 and pool.allocate(2**63 - 1) == -1
    )


@pytest.mark.parametrize(
    ("offset", "size"), [(-512, 512), (0, 0), (0, -512), (100, 512), (0, 700), (512, 512), (0, 1024)]
)
def test_allocator_refuses_ranges(offset, size):
    pool = _C.BlockAllocator()
    pool.add(512, 1024)
    with pytest.raises(ValueError, match="pool range"):
        pool.add(offset, size)


@pytest.mark.parametrize("seed", range(8))
def test_allocator_never_overlaps_or_loses_bytes(seed):
    rng = random.Random(seed)
    pool, total, used = _C.BlockAllocator(), 0, {}
    for _ in range(3000):
        choice = rng.random()
        if choice < 0.01 or total == 0:
            size = 512 * rng.randint(1, 400)
            pool.add(total, size)
            total += size
        elif choice < 0.55:
            size = rng.choice([1, 512, rng.randint(1, 60_000)])
            largest, offset = pool.largest_free, pool.allocate(size)
            rounded = -(-size // 512) * 512
            assert (offset < 0) == (rounded > largest)
            if offset >= 0:
                assert offset % 512 == 0 and offset + rounded <= total
                assert all(offset + rounded <= start or start + length <= offset for start, length in used.items())
                used[offset] = rounded
        elif used:
            offset = rng.choice(list(used))
            assert pool.free(offset)
            del used[offset]
        assert pool.bytes_used == sum(used.values()) and pool.bytes_free == total - pool.bytes_used
        assert pool.num_used == len(used)
    for offset in list(used):
        assert pool.free(offset)
    assert pool.largest_free == pool.bytes_free == total  # everything merged again


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

    # What PeerMemory asks of the heap.

    def offset_of(self, address: int) -> int:
        return address if address < self.mapped else -1

    def is_stand_in(self, address: int) -> bool:
        return address >= self.STAND_INS

    def usage(self) -> dict[str, int]:
        return {"mapped_bytes": self.mapped, "largest_free_bytes": self.pool.largest_free}

    # What torch does.

    def allocate(self, size: int, *, stand_in_only: bool = False) -> "_Block":
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


def _fake_memory(pool: _TorchPool) -> PeerMemory:
    memory = PeerMemory.__new__(PeerMemory)
    memory.heap, memory._storage = pool, pool.allocate
    memory._spares, memory._held = {}, []
    memory._stream, memory._wake_blocks = (lambda: 0), (lambda: None)
    return memory


@pytest.mark.parametrize("seed", range(6))
def test_a_full_pool_never_hides_memory(seed):
    """Whatever was refused before: a request gets memory if torch holds a block for it, or the heap has a segment."""
    rng = random.Random(seed)
    pool = _TorchPool(200 * MIB)
    memory, held, refused = _fake_memory(pool), [], 0
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
        block = memory._try_storage(size)
        if block is None:
            refused += 1
            assert not possible or (small and pool.pool.largest_free < 20 * MIB)
        else:
            assert pool.offset_of(block.data_ptr()) >= 0 and block.nbytes() >= size
            held.append(block)
        del block
        # One spare of the pool's size before and after it grew, one refusal before each, one small segment.
        assert pool.stand_ins.bytes_used <= (200 + 300 + 2 * 90 + 20) * MIB
    assert refused > 20


def test_storage_becomes_an_ordinary_tensor(monkeypatch):
    memory = PeerMemory.__new__(PeerMemory)
    memory.device = torch.device("cpu")
    with pytest.raises(BufferDestroyed):
        memory.try_empty((4,), torch.int32)
    memory._pool, memory._links, memory.heap = object(), GroupLinks(SOLO), _TorchPool(MIB)
    monkeypatch.setattr(memory, "_try_storage", torch.UntypedStorage)
    tensor = memory.try_empty((5, 100), torch.bfloat16)
    assert tensor.shape == (5, 100) and tensor.is_contiguous() and tensor.is_leaf and not tensor._is_view()
    assert tensor.untyped_storage().nbytes() == 1024 and memory.try_empty((0, 3), torch.int8).shape == (0, 3)
    monkeypatch.setattr(memory, "_try_storage", lambda size: None)
    assert memory.try_empty((5,), torch.int8) is None
    memory._pool = None


# ---------------------------------------------------------------------------------------------------------------
# Who reaches whom


def _report(name: str, reach: dict[str, bool], host: str = "h", error: str = "") -> DeviceReport:
    return DeviceReport(name.encode(), f"bus-{name}", host, {k.encode(): v for k, v in reach.items()}, error)


def test_missing_pairs_are_named():
    full = [_report("a", {"a": True, "b": True}), _report("b", {"a": True, "b": True})]
    assert missing_pairs(full) == [] and check_reports(full, False) is None
    one_way = [_report("a", {"a": True, "b": True}), _report("b", {"a": False, "b": True})]
    assert missing_pairs(one_way) == [(1, 0)]
    with pytest.raises(
        TopologyError, match=r"ranks 1->0: rank 1 has GPU bus-b, rank 0 has GPU bus-a.*DEEP_EP_NVL_DOMAIN"
    ):
        check_reports(one_way, False)
    # A GPU that the process does not see is left to the mapping, and one GPU always reaches itself.
    assert missing_pairs([_report("a", {"a": True}), _report("b", {"b": True}), _report("b", {"b": False})]) == []


def test_hosts_and_broken_ranks_are_named():
    two_hosts = [_report("a", {}, "h1"), _report("b", {}, "h2")]
    with pytest.raises(TopologyError, match=r"2 hosts \(h1, h2\)"):
        check_reports(two_hosts, False)
    assert check_reports(two_hosts, True) is None
    with pytest.raises(TopologyError, match=r"ranks \[1\].*rank 1 says: no driver"):
        check_reports([_report("a", {}), _report("", {}, error="no driver")], False)


def _construct_on_cpu(ctx: RankContext) -> str:
    with pytest.raises(TopologyError) as caught:
        PeerMemory(members_of(ctx.group, None), torch.device("cuda"), 4096, MIB)
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_every_rank_learns_why():
    first, second = run_ranks(2, _construct_on_cpu)
    assert first == second and "ranks [0, 1] cannot share GPU memory" in first


# ---------------------------------------------------------------------------------------------------------------
# Sockets


def _open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _exchange_files(ctx: RankContext, rounds: int) -> None:
    before = _open_fds()
    links = SocketLinks(members_of(ctx.group, None), 30.0)
    for number in range(rounds):
        fds = []
        if (ctx.rank + number) % 3 != 2:  # a rank may have nothing to send
            fd = os.memfd_create("exchanged")
            os.write(fd, f"{ctx.rank}/{number}".encode())
            fds = [fd]
        got = links.exchange(f"round {number}", (ctx.rank, number), fds)
        close_fds(fds)
        for rank, (payload, received) in enumerate(got):
            assert payload == (rank, number)
            assert len(received) == (rank != ctx.rank and (rank + number) % 3 != 2)
            for fd in received:
                assert os.pread(fd, 100, 0) == f"{rank}/{number}".encode()
                assert not os.get_inheritable(fd)
            close_fds(received)
    links.close()
    assert _open_fds() == before


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_files_travel_between_ranks(num_ranks):
    run_ranks(num_ranks, _exchange_files, 20)


def _lose_a_rank(ctx: RankContext, how: str) -> tuple[str, int | None, float]:
    links = SocketLinks(members_of(ctx.group, None), 1.0)
    fd = os.memfd_create("exchanged")
    before = _open_fds()
    if ctx.rank == 1:
        if how == "closes":
            links.close()
        elif how == "silent":
            time.sleep(2.5)
        if how != "elsewhere":
            return "", None, 0.0
    started = time.monotonic()
    try:
        links.exchange("one step" if ctx.rank != 1 else "another step", None, [fd])
    except (CommTimeout, PeerError) as error:
        assert _open_fds() == before - ctx.num_ranks + 1  # the sockets are closed, and nothing received stays open
        return f"{type(error).__name__}: {error}", error.peer, time.monotonic() - started
    return "", None, 0.0


def test_a_lost_rank_is_named():
    results = spawn_fresh(3, _lose_a_rank, "closes")
    for rank, (text, peer, waited) in enumerate(results):
        assert rank == 1 or (text.startswith("PeerError") and peer != rank and waited < 0.9)
    assert any(peer == 1 for _, peer, _ in results)  # the others may see first that the rank that saw it gave up
    results = spawn_fresh(3, _lose_a_rank, "silent")
    assert [text.partition(":")[0] for text, _, _ in results].count("CommTimeout") >= 1
    assert any(peer == 1 and "waited" in text and "rank 1" in text for text, peer, _ in results)
    results = spawn_fresh(2, _lose_a_rank, "elsewhere")
    assert all("that rank is at another step" in text or "closed" in text for text, _, _ in results)


def test_strangers_are_turned_away():
    """Somebody who finds the name but does not know the secret takes no rank's place."""
    gathered: list[tuple[str, bytes, str]] = []

    def gather(obj):
        if isinstance(obj, str):
            return [obj, "", ""]
        name, secret, _ = obj
        gathered.append(obj)
        for hello in (b"", b"short", peer_links._HELLO.pack(1, b"x" * 16), peer_links._HELLO.pack(7, secret)):
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.connect(name)
            if hello:
                stranger.send(hello)
            stranger.close()
        for rank in (2, 1):
            friend = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            friend.connect(name)
            friend.send(peer_links._HELLO.pack(rank, secret))
            friends[rank] = friend
        return [obj, ("", b"", ""), ("", b"", "")]

    friends: dict[int, socket.socket] = {}
    # Rank 0 connects to nobody; the backlog has room for its peers only, so the strangers come in one by one.
    listen = socket.socket.listen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "listen", lambda self, backlog: listen(self, backlog + 8))
        links = SocketLinks(Members(0, 3, gather), 10.0)
    assert sorted(links._sockets) == [1, 2]
    for rank, friend in friends.items():
        links._sockets[rank].send(b"%d" % rank)
        assert friend.recv(10) == b"%d" % rank
        friend.close()
    links.close()


def test_group_links_carry_no_files():
    links = GroupLinks(SOLO)
    assert links.exchange("x", 5) == [(5, [])]
    with pytest.raises(ConfigError, match="between hosts"):
        links.exchange("x", 5, [0])


# ---------------------------------------------------------------------------------------------------------------
# On GPUs. Ranks beyond the number of GPUs share them.


def _device(ctx: RankContext, share: bool) -> torch.device:
    device = torch.device("cuda", 0 if share else ctx.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _copy_rows(source: int, target: int, index: torch.Tensor, width: int) -> None:
    """Rows `index` of the int32 rows at `source`, to `target`; both are addresses, also of other ranks' memory."""
    stream = torch.cuda.current_stream().cuda_stream
    size = 4 * width
    _C.cuda_gather_rows(source, 1 << 20, size, index.data_ptr(), True, len(index), size, target, size, stream)


def _read(address: int, rows: int, width: int) -> torch.Tensor:
    out = torch.empty(rows, width, dtype=torch.int32, device="cuda")
    _copy_rows(address, out.data_ptr(), torch.arange(rows, device="cuda"), width)
    return out


def _pattern(rank: int, salt: int, rows: int, width: int) -> torch.Tensor:
    return (torch.arange(rows * width, device="cuda").view(rows, width) * 31 + rank * 7 + salt).to(torch.int32)


def _sync(ctx: RankContext) -> None:
    torch.cuda.synchronize()
    ctx.barrier()


def _check_reads_and_writes(ctx: RankContext, memory: PeerMemory, tensor: torch.Tensor, salt: int) -> None:
    """Every rank reads the others' `tensor` (same shape on all), then writes one row to each of them."""
    members = members_of(ctx.group, None)
    rows, width = tensor.shape
    tensor.copy_(_pattern(ctx.rank, salt, rows, width))
    offsets = members.gather(memory.offset_of(tensor))
    _sync(ctx)
    for peer, offset in enumerate(offsets):
        assert torch.equal(_read(memory.bases[peer] + offset, rows, width), _pattern(peer, salt, rows, width)), peer
    _sync(ctx)
    mine = torch.full((1, width), 1000 + ctx.rank, dtype=torch.int32, device="cuda")
    for peer, offset in enumerate(offsets):
        target = memory.bases[peer] + offset + 4 * width * ctx.rank
        _copy_rows(mine.data_ptr(), target, torch.zeros(1, dtype=torch.int64, device="cuda"), width)
    _sync(ctx)
    assert tensor[: ctx.num_ranks, 0].tolist() == [1000 + rank for rank in range(ctx.num_ranks)]
    _sync(ctx)


def _share_memory(ctx: RankContext, share: bool, kind: str | None) -> str:
    device = _device(ctx, share)
    memory = PeerMemory(members_of(ctx.group, None), device, 5000, 6 * MIB, kind=kind)
    assert memory.bases == memory.heap.bases() and len(set(memory.bases)) == ctx.num_ranks
    for peer in range(ctx.num_ranks):  # the control blocks are zeroed before any rank can look
        assert not _read(memory.bases[peer], 5, 250).any()
    ctx.barrier()
    tensor = memory.empty((300, 64), torch.int32)
    assert tensor.device == device and memory.offset_of(tensor) >= 5000
    _check_reads_and_writes(ctx, memory, tensor, 1)
    usage = memory.usage()
    assert usage["control_bytes"] == 5120 and usage["mapped_bytes"] % (2 * MIB) == 0
    assert usage["live_bytes"] >= tensor.nbytes and usage["used_bytes"] + usage["free_bytes"] >= 6 * MIB
    memory.close()
    memory.close()
    return memory.kind


@pytest.mark.parametrize("kind", [None, "fd", "ipc"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
class TestShared:
    pytestmark = on_gpus

    def test_ranks_read_and_write_each_other(self, num_ranks, share, kind):
        kinds = run_ranks(num_ranks, _share_memory, share, kind)
        assert len(set(kinds)) == 1 and (kind is None or kinds[0] == kind)


def _grow(ctx: RankContext, share: bool) -> None:
    memory = PeerMemory(members_of(ctx.group, None), _device(ctx, share), 4096, 4 * MIB)
    bases = list(memory.bases)
    first = memory.empty((16, 32), torch.int32)  # torch takes 2 MiB for small tensors
    first.fill_(ctx.rank + 5)
    assert memory.try_empty((40, MIB), torch.int8) is None
    with pytest.raises(PoolExhausted, match="no room for"):
        memory.empty((40, MIB), torch.int8)
    sizes = members_of(ctx.group, None).gather(memory.grow(41 * MIB if ctx.rank == 0 else 3))
    assert sizes == [42 * MIB] * ctx.num_ranks and memory.usage()["num_chunks"] == 2
    large = memory.empty((40 * MIB // 256, 64), torch.int32)
    _check_reads_and_writes(ctx, memory, large, 2)
    assert memory.bases == bases == memory.heap.bases() and first.eq(ctx.rank + 5).all()
    assert memory.grow(1 << 50) == 0 and memory.grow(0) == 0
    # More than the device has: no rank grows, and the memory goes on as before.
    if not share:
        total = torch.cuda.get_device_properties(memory.device).total_memory
        assert memory.grow(total) == 0 and memory.usage()["num_chunks"] == 2
    del large
    _check_reads_and_writes(ctx, memory, memory.empty((1000, 64), torch.int32), 3)
    memory.close()
    with pytest.raises(BufferDestroyed):
        memory.grow(1)


def _share_and_grow(ctx: RankContext, settings: str) -> None:
    torch.cuda.memory._set_allocator_settings(settings)
    _share_memory(ctx, False, None)
    _grow(ctx, False)


@pytest.mark.parametrize(("num_ranks", "share"), [(1, False), (2, False), (2, True), (4, False)])
class TestGrowth:
    pytestmark = on_gpus

    def test_chunks_are_appended(self, num_ranks, share):
        run_ranks(num_ranks, _grow, share)


def _refuse(ctx: RankContext) -> None:
    device, members = _device(ctx, False), members_of(ctx.group, None)
    with pytest.raises(PoolExhausted, match="could not be allocated on ranks"):
        PeerMemory(members, device, 4096, torch.cuda.get_device_properties(device).total_memory * 3 // 2)
    with pytest.raises(ConfigError, match="expected equal values"):
        PeerMemory(members, device, 4096, MIB * (1 + ctx.rank))
    with pytest.raises(ConfigError, match="fit into a reserve_bytes"):
        PeerMemory(members, device, 4096, 8 * MIB, reserve_bytes=MIB)
    fixed = PeerMemory(members, device, 4096, MIB, kind="ipc")
    assert fixed.grow(2 * MIB) == 0
    several = [PeerMemory(members, device, 4096, 4 * MIB, reserve_bytes=16 * MIB) for _ in range(3)]
    tensors = [memory.empty((8, 8), torch.int32) for memory in several]
    for memory, tensor in zip(several, tensors, strict=True):
        assert [other.offset_of(tensor) is not None for other in several] == [other is memory for other in several]
    assert several[0].grow(16 * MIB) == 0  # past the reserved addresses
    _check_reads_and_writes(ctx, several[1], tensors[1], 4)
    for memory in [fixed, *several]:
        memory.close()


def _leak(ctx: RankContext, cycles: int) -> None:
    device, members = _device(ctx, False), members_of(ctx.group, None)

    def state() -> tuple[int, int]:
        _sync(ctx)
        return torch.cuda.mem_get_info(device)[0], _open_fds()

    for cycle in range(cycles):
        memory = PeerMemory(members, device, 4096, 4 * MIB)
        tensor = memory.empty((256,), torch.int32)
        assert memory.offset_of(tensor) is not None
        if cycle % 3 == 0:
            memory.grow(2 * MIB)
        del tensor
        ctx.barrier()
        if cycle % 5 == 4:
            del memory  # without close: the next construction frees it
        else:
            memory.close()
        if cycle == 29:
            before = state()
    PeerMemory(members, device, 4096, 0).close()
    free, fds = state()
    assert fds == before[1] and free >= before[0] - 16 * MIB, (before, free, fds)


class TestLifetime:
    pytestmark = on_gpus

    def test_refusals_and_several_memories(self):
        run_ranks(2, _refuse)

    @pytest.mark.slow
    def test_a_thousand_cycles_leak_nothing(self):
        run_ranks(2, _leak, 1000, timeout=400)

    def test_some_cycles_leak_nothing(self):
        run_ranks(2, _leak, 60)

    @pytest.mark.parametrize(
        "ending", ["", "memory.close()", "del tensor, memory", "memory.close(); tensor.sum().item()"]
    )
    def test_the_interpreter_ends_cleanly(self, ending):
        script = f"""
            import torch
            from deep_ep.engines.mesh import SoloComm, members_of
            from deep_ep.engines.peer_memory import PeerMemory
            memory = PeerMemory(members_of(None, SoloComm()), torch.device("cuda"), 4096, 64 << 20)
            tensor = memory.empty((1000, 1000), torch.float32).zero_()
            other = torch.cuda.Stream()
            tensor.record_stream(other)
            {ending}
            print("ended")
        """
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120, check=False
        )
        assert (result.returncode, result.stdout) == (0, "ended\n"), result.stderr
        assert "Error" not in result.stderr and "Exception" not in result.stderr


@pytest.fixture
def solo():
    memory = PeerMemory(SOLO, torch.device("cuda", 0), 4096, 128 * MIB)
    yield memory
    memory.close()


class TestTensors:
    """What torch promises of its tensors holds for these, in one process."""

    pytestmark = on_gpus

    def test_ordinary_tensors(self, solo):
        x = solo.empty((1000, 512), torch.bfloat16)
        assert x.is_leaf and not x._is_view() and x.is_contiguous() and x.storage_offset() == 0
        x.fill_(2).requires_grad_()
        (x.float() * 3).sum().backward()
        assert x.grad.eq(3).all() and solo.offset_of(x.grad) is None  # only what is asked for lies in the pool
        y = solo.empty((4, 8), torch.int32)
        y.set_(y.untyped_storage(), 0, (2, 8), (8, 1))
        assert solo.offset_of(y) is not None and y.shape == (2, 8)
        assert solo.try_empty((0, 8), torch.int32).shape == (0, 8)
        for dtype in (torch.float8_e4m3fn, torch.uint8, torch.int64, torch.float32):
            assert solo.empty((3, 16), dtype).dtype == dtype

    def test_blocks_are_reused_in_stream_order(self, solo):
        seen = set()
        for rows in range(5000, 5100):  # sizes that differ a little take the same block
            x = solo.empty((rows, 4096), torch.uint8)
            seen.add(x.data_ptr())
            del x
        assert len(seen) == 1 and solo.usage()["used_bytes"] < 32 * MIB

    def test_record_stream_holds_a_block_back(self, solo):
        side = torch.cuda.Stream()
        x = solo.empty((16 * MIB,), torch.uint8)
        address = x.data_ptr()
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            x.record_stream(side)
        del x
        y = solo.empty((16 * MIB,), torch.uint8)
        assert y.data_ptr() != address
        torch.cuda.synchronize()
        torch.empty(1, device="cuda")  # torch looks after finished streams in allocations outside the pool
        z = solo.empty((16 * MIB,), torch.uint8)
        assert z.data_ptr() == address and y.data_ptr() != address

    def test_a_full_pool_finds_blocks_of_finished_streams(self, solo):
        side = torch.cuda.Stream()
        x = solo.empty((120 * MIB,), torch.uint8)
        with torch.cuda.stream(side):
            x.record_stream(side)
        del x
        torch.cuda.synchronize()
        assert solo.try_empty((120 * MIB,), torch.uint8) is not None

    def test_a_full_pool_leaves_torch_alone(self, solo):
        cached = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
        del cached
        before = torch.cuda.memory_stats()
        held = [solo.empty((40 * MIB,), torch.uint8) for _ in range(3)]
        for size in (40, 39, 24, 40, 9):
            for _ in range(100):
                assert solo.try_empty((size * MIB,), torch.uint8) is None
        after = torch.cuda.memory_stats()
        for key in ("num_ooms", "num_alloc_retries", "num_device_free"):
            assert after.get(key, 0) == before.get(key, 0), key
        assert solo.usage()["stand_in_bytes"] <= 40 * MIB + solo.usage()["mapped_bytes"]  # however many refusals
        address = held.pop(1).data_ptr()
        assert solo.empty((24 * MIB,), torch.uint8).data_ptr() == address  # memory wins over a stand-in
        assert solo.try_empty((300 * MIB,), torch.uint8) is None  # larger than the pool

    def test_deterministic_mode_fills_no_stand_in(self, solo):
        torch.use_deterministic_algorithms(True)
        try:
            held = solo.empty((100 * MIB,), torch.uint8)
            assert solo.try_empty((100 * MIB,), torch.uint8) is None
            torch.cuda.synchronize()
        finally:
            torch.use_deterministic_algorithms(False)
        assert held is not None

    def test_tensors_outlive_the_memory(self):
        free = []
        for _ in range(3):  # the first round loads kernels
            memory = PeerMemory(SOLO, torch.device("cuda", 0), 4096, 64 * MIB)
            x = memory.empty((MIB,), torch.int32).fill_(7)
            memory.close()
            assert x.eq(7).all() and x.add_(1).sum().item() == 8 * MIB
            del x
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            free.append(torch.cuda.mem_get_info()[0])
        assert free[2] >= free[0] - 16 * MIB

    def test_allocation_under_graph_capture(self, solo):
        x = torch.ones(1000, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = solo.empty((1000,), torch.float32)
            y.copy_(x * 2)
        assert solo.offset_of(y) is not None
        for value in (1.0, 5.0):
            x.fill_(value)
            graph.replay()
            assert y.eq(2 * value).all()

    def test_two_streams_and_threads(self, solo):
        from concurrent.futures import ThreadPoolExecutor

        def work(number: int) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                for step in range(200):
                    x = solo.try_empty((1000 + step, 64), torch.int32)
                    if x is not None:
                        x.fill_(number)
                        assert x.eq(number).all()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))

    @pytest.mark.parametrize(
        "settings", ["expandable_segments:True", "max_split_size_mb:64", "roundup_power2_divisions:8"]
    )
    def test_settings_of_torchs_allocator_do_not_matter(self, settings):
        spawn_fresh(2, _share_and_grow, settings, timeout=120)
