"""Peer memory on GPUs: sharing, growth, staging, lifetime, tensors. Ranks beyond the number of GPUs share them."""

import subprocess
import sys
import textwrap
import time

import pytest
import torch
from harness import RankContext, run_ranks, spawn_fresh
from test_peer_memory import open_fds

from deep_ep._native import _C
from deep_ep.engines.arena import SLAB_BYTES, Arena
from deep_ep.engines.mesh import SoloComm, members_of
from deep_ep.engines.peer_memory import PeerMemory
from deep_ep.errors import BufferDestroyed, ConfigError, PoolExhausted

MIB = 1 << 20
SOLO = members_of(None, SoloComm())
on_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and _C.has_cuda), reason="needs a CUDA device and a CUDA build"),
]


#: Ranks, and whether all of them use the first GPU.
RANKS = [(1, False), (2, False), (2, True), (4, False)]


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
    assert memory.live_bytes() >= tensor.nbytes and usage["used_bytes"] + usage["free_bytes"] >= 6 * MIB
    memory.close()
    memory.close()
    return memory.kind


@pytest.mark.parametrize("kind", ["fd", "ipc"])
@pytest.mark.parametrize(("num_ranks", "share"), RANKS)
class TestShared:
    pytestmark = on_gpus

    def test_ranks_read_and_write_each_other(self, num_ranks, share, kind):
        assert run_ranks(num_ranks, _share_memory, share, kind) == [kind] * num_ranks


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
    getattr(torch._C, "_accelerator_setAllocatorSettings", torch.cuda.memory._set_allocator_settings)(settings)
    _share_memory(ctx, False, None)
    _grow(ctx, False)


def _stage(ctx: RankContext, share: bool) -> None:
    members = members_of(ctx.group, None)
    memory = PeerMemory(members, _device(ctx, share), 4096, 16 * MIB, max_pool_bytes=25 * MIB + ctx.rank)
    assert memory.max_pool_bytes == 25 * MIB and memory.usage()["mapped_bytes"] == 18 * MIB

    def check(salt: int) -> None:
        """Every rank writes a row to everybody's staging, and reads what came into its own."""
        mine, zero = _pattern(ctx.rank, salt, 1, 64), torch.zeros(1, dtype=torch.int64, device="cuda")
        _sync(ctx)
        for peer, offset in enumerate(memory.staging_offsets):
            _copy_rows(mine.data_ptr(), memory.bases[peer] + offset + 256 * ctx.rank, zero, 64)
        _sync(ctx)
        assert memory.staging_offset == memory.staging_offsets[ctx.rank]
        got = _read(memory.bases[ctx.rank] + memory.staging_offset, ctx.num_ranks, 64)
        assert torch.equal(got, torch.cat([_pattern(rank, salt, 1, 64) for rank in range(ctx.num_ranks)]))
        _sync(ctx)

    memory.reserve_staging(3 * MIB)
    assert memory.staging_bytes == 4 * MIB and memory.usage()["mapped_bytes"] == 18 * MIB
    check(1)
    tensor = memory.empty((1000, 64), torch.int32)
    _check_reads_and_writes(ctx, memory, tensor, 5)
    memory.reserve_staging(5 * MIB)
    torch.cuda.synchronize()  # the old block comes back once the stream is through
    usage = memory.usage()
    assert usage["mapped_bytes"] == 18 * MIB and usage["used_bytes"] == (2 + 6) * MIB, usage
    check(2)
    memory.lease_staging()
    assert memory.grow(20 * MIB) == 6 * MIB  # up to the limit
    memory.reserve_staging(25 * MIB)  # beyond it
    usage = memory.usage()
    assert usage["mapped_bytes"] == (18 + 6 + 30) * MIB and usage["leased_bytes"] == 6 * MIB, usage
    check(3)
    _check_reads_and_writes(ctx, memory, memory.empty((1000, 64), torch.int32), 6)
    assert memory.grow(2 * MIB) == 0 and memory.rendezvous("end", ctx.rank) == list(range(ctx.num_ranks))
    memory.close()


@pytest.mark.parametrize(("num_ranks", "share"), RANKS)
class TestGrowth:
    pytestmark = on_gpus

    def test_chunks_are_appended(self, num_ranks, share):
        run_ranks(num_ranks, _grow, share)

    def test_staging_and_limits(self, num_ranks, share):
        run_ranks(num_ranks, _stage, share)


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
        return torch.cuda.mem_get_info(device)[0], open_fds()

    for cycle in range(cycles):
        memory = PeerMemory(members, device, 4096, 4 * MIB)
        tensor = memory.empty((256,), torch.int32)
        assert memory.offset_of(tensor) is not None
        if cycle % 3 == 0:
            memory.grow(2 * MIB)
        if cycle % 4 == 0:
            memory.reserve_staging(MIB)
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
        run_ranks(2, _leak, 1000, timeout=300)

    def test_the_interpreter_ends_cleanly(self):
        endings = ["", "memory.close()", "del tensor, memory", "memory.close(); tensor.sum().item()"]
        running = []
        for ending in endings:  # side by side, since most of the time is torch's start
            script = f"""
                import torch
                from deep_ep.engines.mesh import SoloComm, members_of
                from deep_ep.engines.peer_memory import PeerMemory
                memory = PeerMemory(members_of(None, SoloComm()), torch.device("cuda"), 4096, 64 << 20)
                memory.reserve_staging(1 << 20)
                tensor = memory.empty((1000, 1000), torch.float32).zero_()
                other = torch.cuda.Stream()
                tensor.record_stream(other)
                {ending}
                print("ended")
            """
            command = [sys.executable, "-c", textwrap.dedent(script)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        try:
            for ending, process in zip(endings, running, strict=True):
                out, err = process.communicate(timeout=120)
                assert (process.returncode, out) == (0, "ended\n"), (ending, err)
                assert "Error" not in err and "Exception" not in err, (ending, err)
        finally:
            for process in running:
                process.kill()
                process.communicate()


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

    def test_recorded_blocks_do_not_pile_up(self):
        """Where the program allocates nothing else, torch would not look for finished streams on its own."""
        memory, side = PeerMemory(SOLO, torch.device("cuda", 0), 4096, 62 * MIB), torch.cuda.Stream()
        mapped, refused, most = memory.usage()["mapped_bytes"], 0, []
        ready = torch.cuda.Event()
        for step in range(200):
            x = memory.try_empty((4 * MIB - 4096 * (step % 5),), torch.uint8)
            if x is None:  # as an engine does
                refused += 1
                memory.grow(8 * MIB)
                continue
            ready.record()
            side.wait_event(ready)
            with torch.cuda.stream(side):
                x.zero_()
            x.record_stream(side)
            del x
            if step % 4 == 3:
                torch.cuda.synchronize()
            most.append(memory.usage()["used_bytes"])
        # Eight allocations between two looks, and what has not finished at a look.
        assert memory.usage()["mapped_bytes"] == mapped and refused == 0 and max(most) <= 60 * MIB, (refused, most)
        memory.close()

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

    def test_arenas(self, solo):
        def tensor_of(arena: Arena, count: int) -> torch.Tensor:
            storage, offset = arena.take(4 * count)
            return torch.empty(0, dtype=torch.int32, device="cuda").set_(storage, offset // 4, (count,), (1,))

        symmetric, ordinary = Arena.symmetric(solo), Arena.ordinary(solo.device)
        for arena, inside in ((symmetric, True), (ordinary, False)):
            tensors = [tensor_of(arena, 100 + number).fill_(number) for number in range(50)]
            other = torch.cuda.Stream()
            with torch.cuda.stream(other):
                apart = tensor_of(arena, 100)
            assert {t.untyped_storage().nbytes() for t in tensors} == {SLAB_BYTES}
            assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
            assert apart.untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr()
            assert all((solo.offset_of(t) is not None) == inside for t in [*tensors, apart])
            assert all(t.eq(number).all() for number, t in enumerate(tensors))
        leased = solo.usage()["leased_bytes"]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [tensor_of(arena, 1000).fill_(3) for arena in (symmetric, ordinary)]
        graph.replay()
        assert all(t.eq(3).all() and t.untyped_storage().nbytes() < SLAB_BYTES for t in captured)
        assert solo.usage()["leased_bytes"] == leased + 4096
        symmetric.clear()

    def test_host_time(self, solo):
        """Far above what is expected (about 7 us and 3 us), to notice a different order of magnitude only."""
        stream = torch.cuda.current_stream().cuda_stream
        for call, limit_us in ((lambda: solo.take(16 * MIB, stream, False), 60), (solo.usage, 1000)):
            times = []
            for _ in range(20):
                started = time.perf_counter()
                for _ in range(50):
                    call()
                times.append((time.perf_counter() - started) / 50 * 1e6)
            assert min(times) < limit_us, times

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
        "settings", ["expandable_segments:True", "max_split_size_mb:64,roundup_power2_divisions:8"]
    )
    def test_settings_of_torchs_allocator_do_not_matter(self, settings):
        spawn_fresh(2, _share_and_grow, settings, timeout=120)
