"""Where the kernels' rows lie: blocks and tensors, growth, limits, staging when the pool is full; room on the SMs."""

import collections
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from cuda_cases import (
    MIB,
    CombineInputs,
    compare_cached,
    compare_dispatch,
    dispatch,
    dispatch_everywhere,
    expect_everywhere,
    fill_everywhere,
    fill_pool,
    finished,
    make_bare_kernels,
    make_buffer,
    make_routing,
    rebuilt,
    round_trip,
)
from harness import RankContext, expect_bits, run_ranks

import deep_ep
from deep_ep import Buffer, Config
from deep_ep.engines import cuda
from deep_ep.engines.combine_inputs import counts_of
from deep_ep.engines.outputs import Field, Landing, RowPlan, template
from deep_ep.errors import PoolExhausted

USAGE_KEYS = {
    "limit_bytes",
    "reserve_bytes",
    "mapped_bytes",
    "control_bytes",
    "num_chunks",
    "used_bytes",
    "free_bytes",
    "largest_free_bytes",
    "low_latency_bytes",
    "staging_bytes",
    "leased_bytes",
    "stand_in_bytes",
}


# ---------------------------------------------------------------------------------------------------------------
# Without a GPU


@pytest.fixture
def bare_kernels():
    return make_bare_kernels()


def test_plans_say_where_fields_lie(bare_kernels):
    x = torch.zeros(4, 256, dtype=torch.bfloat16)
    topk_idx = torch.zeros(4, 3, dtype=torch.int64)
    plan = bare_kernels._plan(x, topk_idx=topk_idx)
    assert bare_kernels._plan(x[:1], topk_idx=topk_idx[:1]) is plan
    assert [field.name for field in plan.fields] == ["rows", "topk_idx", "topk_weights"]
    assert plan.row_bytes == 512 + 24 + 12
    assert plan.starts(5) == ([0, 2560, 2688], 2816)
    assert plan.starts(0) == ([0, 0, 0], 0)
    assert (plan.num_bytes(5, with_src_idx=False), plan.num_bytes(5, with_src_idx=True)) == (2816, 2944)
    assert plan.offsets(4096, [0, 2560, 2688]) == (4096, -1, 4096 + 2560, 4096 + 2688)
    assert plan.named("abc") == (None, "b", "c")
    quantised = bare_kernels._plan(torch.zeros(4, 640), scale_format="ue8m0")
    assert quantised.fields == (Field.of("rows", torch.float8_e4m3fn, 640), Field.of("scales", torch.int32, 2))
    assert quantised.offsets(128, quantised.starts(1)[0]) == (128, 128 + 640, -1, -1)
    assert quantised.named("ab") == ("b", None, None)
    scaled = bare_kernels._plan(torch.zeros(4, 64).char(), torch.zeros(4, 3), topk_idx=topk_idx)
    for capacity in (1, 2, 3, 63, 64, 1000):
        starts, total = scaled.starts(capacity)
        ends = [start + capacity * field.row_bytes for start, field in zip(starts, scaled.fields, strict=True)]
        assert all(start % 128 == 0 for start in [*starts, total])
        assert all(end <= start < end + 128 for end, start in zip(ends, [*starts[1:], total], strict=True))


def test_where_rows_land(bare_kernels):
    kernels, memory = bare_kernels, bare_kernels.memory
    plan = kernels._plan(torch.zeros(4, 256, dtype=torch.bfloat16))

    def land(capacity: int, with_src_idx: bool = True, may_stage: bool = True) -> Landing | None:
        return kernels._land(plan, capacity, with_src_idx=with_src_idx, may_stage=may_stage)

    in_pool = land(5)
    assert in_pool == Landing(5, (8192, -1, -1, -1, 256, 5), [0], memory.block, (memory.block, 256))
    assert land(5, with_src_idx=False) == Landing(5, (8192, -1, -1, -1, -1, 5), [0], memory.block)
    assert memory.asked == [2560, 2560]
    nowhere = land(0)
    assert nowhere is not None and nowhere.offsets == (0, -1, -1, -1, 0, 0) and nowhere.block is None
    assert memory.asked == [2560, 2560] and kernels._missing == 0

    memory.room = 1000
    assert land(5) is None and kernels._missing == 2560 + 128
    memory.staging_bytes, memory.staging_offset = 2560 + 128, 1 << 15
    assert land(5, may_stage=False) is None and land(6) is None
    assert kernels._missing == 3072 + 128  # the largest; the pool grows by that
    staged = Landing(5, (1 << 15, -1, -1, -1, (1 << 15) + 2560, 5), [0], staged_at=1 << 15)
    assert land(5) == staged and memory.leases == 0
    assert land(5, with_src_idx=False).offsets[4] == -1
    kernels._capturing = True
    assert land(5) == staged and memory.leases == 1
    kernels._capturing, memory.room, kernels._sources.take = False, 1 << 16, lambda *_: None
    assert land(5) == staged  # no place for the source tokens: nothing of it lies in the pool
    assert "5 rows of 512 bytes" in str(kernels._exhausted(plan, 5))


def test_tensors_of_one_block_know_nothing_of_each_other():
    storage = torch.UntypedStorage(4096)

    def make(storage, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
        return template(dtype, torch.device("cpu")).data.set_(storage, start // dtype.itemsize, shape, strides)

    rows = make(storage, 0, torch.float32, (4, 8))
    weights = make(storage, 128, torch.float32, (8,))
    idx = make(storage, 256, torch.int64, (2, 3))
    flags = make(storage, 512, torch.bool, (5, 2))
    for tensor, shape, stride in ((rows, (4, 8), (8, 1)), (weights, (8,), (1,)), (flags, (5, 2), (2, 1))):
        assert (tensor.shape, tensor.stride()) == (shape, stride)
        assert tensor.is_leaf and tensor.is_contiguous() and not tensor._is_view() and not tensor.requires_grad
        assert tensor.untyped_storage().data_ptr() == storage.data_ptr()
    assert [t.data_ptr() - storage.data_ptr() for t in (rows, weights, idx, flags)] == [0, 128, 256, 512]
    rows.fill_(3), weights.fill_(2), idx.fill_(-1), flags.fill_(True)
    assert rows.eq(3).all() and weights.eq(2).all() and idx.eq(-1).all() and flags.all()
    # What autograd saved of one stays valid when another is changed.
    factor = torch.ones(4, 8, requires_grad=True)
    product = (factor * rows).sum()
    version = rows._version
    weights.add_(1), idx.zero_()
    assert rows._version == version and weights._version > 0
    product.backward()
    assert factor.grad.eq(3).all()
    weights.requires_grad_()
    (weights * 5).sum().backward()
    assert weights.grad.eq(5).all() and not rows.requires_grad
    rows.set_(rows.untyped_storage(), 8, (1, 8), (8, 1))
    rows.zero_()
    assert rows.shape == (1, 8) and make(storage, 0, torch.float32, (4, 8))[:, 0].tolist() == [3, 0, 3, 3]
    rows.set_(torch.UntypedStorage(0), 0, (0,), (1,))
    assert rows.numel() == 0 and weights.eq(3).all()
    assert make(storage, 640, torch.int32, (0,)).shape == (0,)
    del storage, rows
    assert weights.eq(3).all()  # a part keeps the block


def test_tensors_of_a_block_are_cut_to_what_came():
    fields = [
        Field.of("rows", torch.uint8, 48),
        Field.of("topk_idx", torch.int64, 3),
        Field.of("scales", torch.int32, 1),
    ]
    plan, block = RowPlan(fields, "", torch.device("cpu")), torch.UntypedStorage(1 << 14)
    for capacity in (10, 10, 7):
        starts, total = plan.starts(capacity)
        tensors = plan.tensors(block, capacity, capacity)
        for num_rows in (capacity, 5, 1, 0):
            plan.cut(tensors, num_rows)
            for tensor, field, start in zip(tensors, fields, starts, strict=True):
                assert tensor.shape == (num_rows, field.width) and tensor.dtype == field.dtype
                assert tensor.is_contiguous() and tensor.storage_offset() * tensor.itemsize == start
                assert tensor.untyped_storage().data_ptr() == block.data_ptr() and not tensor._is_view()
        assert block.nbytes() == 1 << 14 and total <= 1 << 14
    assert (plan.payload_bytes, plan.dtype_name) == (52, "uint8")


def test_templates_made_in_inference_serve_training():
    with torch.inference_mode():
        empty = template(torch.float32, torch.device("cpu"))
        in_inference = empty.data.set_(torch.UntypedStorage(64), 0, (4, 2), (2, 1))
        in_inference.resize_(2, 2)
    factor = torch.ones(2, 2, requires_grad=True)
    for rows in (in_inference, empty.data.set_(torch.UntypedStorage(64), 0, (2, 2), (2, 1))):
        assert not rows.is_inference()
        (factor * rows.fill_(3)).sum().backward()  # saves the rows
    assert factor.grad.eq(6).all() and empty.numel() == 0


def test_what_copy_engines_bring(bare_kernels):
    kernels, pushed = bare_kernels, []
    kernels.num_ranks, kernels.rank = 3, 2
    kernels.memory.bases, kernels.memory.staging_offsets = [1000, 2000, 3000], [10, 20, 30]
    sent = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]  # from each rank to each
    rows = torch.zeros(18, 16, dtype=torch.bfloat16)
    assert kernels._pushable(sent, rows) is None
    kernels._push = SimpleNamespace(push=lambda *args: pushed.append(args))
    kernels.memory.staging_bytes = 15 * 32  # rank 2 gets 15 rows back from others
    assert kernels._pushable(sent, rows) is sent
    assert kernels._pushable(sent, torch.zeros(19, 16, dtype=torch.bfloat16)) is sent  # padding
    assert kernels._pushable(sent, rows[:17]) is None
    assert kernels._pushable(sent, rows.float()) is None
    assert kernels._pushable(sent[:2], rows) is None
    assert kernels._pushable(None, rows) is None
    kernels._push_rows(7, rows, sent)
    # In each inbox the rows of rank 1 come first, and those of the home itself are not in it.
    assert pushed[0][:4] == (7, rows.data_ptr(), 32, [3, 6, 9])
    assert pushed[0][4][:2] == [1010 + 2 * 32, 2020 + 4 * 32]
    assert kernels.launches == {"push": 1}
    prefix = torch.tensor([[1, 2, 3], [5, 7, 9], [12, 15, 18]], dtype=torch.int32)
    assert counts_of(prefix) == sent


def test_blocks_that_may_wait_at_once(bare_kernels, monkeypatch):
    """All buffers of all ranks on a GPU find room side by side."""
    monkeypatch.setattr(cuda, "_num_buffers", collections.Counter())
    monkeypatch.setattr(cuda, "_in_use", weakref.WeakSet())
    blocks = bare_kernels.blocks
    cuda._share_blocks(bare_kernels, 1)
    assert [blocks(n) for n in (0, 1, 7, 24, 132, 1000)] == [1, 1, 7, 24, 132, 132]
    others = [make_bare_kernels() for _ in range(3)]
    others[2].device = torch.device("cuda", 1)
    for each in others:
        cuda._share_blocks(each, 1)
    assert [blocks(n) for n in (24, 44, 1000)] == [24, 44, 44]
    assert [each.max_blocks for each in others] == [44, 44, 132]
    bare_kernels.memory.num_sharing = 8
    cuda._share_blocks(others[2], -1)
    del others[2]
    cuda._share_blocks(others[1], -1)
    assert ([blocks(n) for n in (2, 24)], others[0].max_blocks) == ([2, 8], 66)
    del others  # without an end: it may still use its share
    gc.collect()
    for _ in range(100):
        cuda._share_blocks(make_bare_kernels(), 1)
    assert blocks(24) == 1


def test_a_portable_buffer_has_no_symmetric_memory():
    assert Buffer(None, comm=deep_ep.SoloComm(), device="cpu").memory_usage() == {}


# ---------------------------------------------------------------------------------------------------------------
# Outputs that live, growth, lifetime


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setenv("DEEP_EP_TEST_DEVICE", "cuda")


def run_kept_outputs(ctx: RankContext) -> None:
    buffer = make_buffer(ctx)
    kept = []
    for layer in range(30):
        routing = make_routing(ctx, 70 + layer, 100 + 7 * layer, 512)
        recv, idx, weights, _, handle, _ = dispatch(buffer, routing)
        cached = buffer.dispatch(routing.x, handle=handle)[0]
        combined = buffer.combine(recv, handle)[0]
        tensors = (recv, cached, idx, weights, combined, *handle)
        kept.append((tensors, [t.clone() for t in tensors]))
        round_trip(buffer, make_routing(ctx, 300 + layer, 90, 512))  # dropped at once
    for layer, (tensors, clones) in enumerate(kept):
        expect_bits(tensors, tuple(clones), f"outputs of layer {layer} at the end")
        expect_bits(tensors[1], tensors[0], f"cached dispatch of layer {layer}")
    finished(buffer)


@pytest.mark.gpu(2)
def test_outputs_that_are_kept_stay_right(on_cuda):
    run_ranks(2, run_kept_outputs)


def in_pool(buffer, tensor: torch.Tensor) -> bool:
    return buffer.runtime.memory.offset_of(tensor) is not None


def run_growth(ctx: RankContext) -> None:
    buffer, tokens, hidden = make_buffer(ctx, num_nvl_bytes=0), 2048, 4096
    before = buffer.memory_usage()
    assert before["mapped_bytes"] >= 256 * MIB
    kept = []
    for layer in range(24):  # 32 MiB each
        kept.append(dispatch_everywhere(buffer, fill_everywhere(ctx, tokens, hidden, 4 * layer))[0])
        assert in_pool(buffer, kept[-1]), f"layer {layer} came through staging though the pool could grow"
    for layer, recv in enumerate(kept):
        expect_everywhere(ctx, recv, tokens, 4 * layer, f"layer {layer}")
    after = buffer.memory_usage()
    assert after["num_chunks"] > before["num_chunks"]
    assert after["mapped_bytes"] >= len(kept) * kept[0].nbytes
    del kept, recv
    for _ in range(30):  # blocks come back: no further growth
        dispatch_everywhere(buffer, fill_everywhere(ctx, tokens, hidden, 8))
    assert buffer.memory_usage()["mapped_bytes"] == after["mapped_bytes"]
    finished(buffer)


@pytest.mark.gpu(2)
def test_the_pool_grows(on_cuda):
    run_ranks(2, run_growth)


def run_growth_after_staging(ctx: RankContext) -> None:
    """Calls that cannot grow a full pool go through staging, and the next one that can does so for them."""
    buffer = make_buffer(ctx, num_nvl_bytes=0)
    routing = make_routing(ctx, 310, 300, 2048)
    worst = 300 * ctx.num_ranks
    dispatch_everywhere(buffer, fill_everywhere(ctx, 300, 2048, 1))  # staging has room for all that follows
    want = [t.clone() for t in round_trip(buffer, routing)]
    handle = dispatch(buffer, routing)[4]
    before = buffer.memory_usage()
    kept = fill_pool(buffer) if ctx.rank == 0 else []
    for _ in range(2):
        cached = buffer.dispatch(routing.x, handle=handle)[0]
        expect_bits(cached, want[1], "cached")
        assert in_pool(buffer, cached) == (ctx.rank != 0)
        fixed = dispatch(buffer, routing, num_worst_tokens=worst)[0]
        expect_bits(fixed[: want[0].shape[0]], want[0], "worst case")
        assert in_pool(buffer, fixed) == (ctx.rank != 0)
    assert buffer.memory_usage()["num_chunks"] == before["num_chunks"]
    recv = dispatch(buffer, routing)[0]
    expect_bits(recv, want[0], "counted")
    assert buffer.memory_usage()["num_chunks"] == before["num_chunks"] + 1  # on all ranks, for the one that needs it
    assert in_pool(buffer, recv) and in_pool(buffer, buffer.dispatch(routing.x, handle=handle)[0])
    assert in_pool(buffer, dispatch(buffer, routing, num_worst_tokens=worst)[0])
    finished(buffer)
    del kept


@pytest.mark.gpu
def test_a_full_pool_grows_when_it_can(on_gpus):
    on_gpus(2)
    run_ranks(2, run_growth_after_staging)


def run_exhaustion(ctx: RankContext) -> None:
    buffer, routing = make_buffer(ctx, num_nvl_bytes=0), fill_everywhere(ctx, 16, 4096, 1)
    for _ in range(2):
        with pytest.raises(PoolExhausted, match="num_nvl_bytes"):
            dispatch_everywhere(buffer, routing, num_worst_tokens=1 << 20)  # 8 GiB
        recv = dispatch_everywhere(buffer, routing, num_worst_tokens=64)[0]
        expect_everywhere(ctx, recv[: 16 * ctx.num_ranks], 16, 1, "after a full pool")
    finished(buffer)


@pytest.mark.gpu(2)
def test_a_full_pool(on_cuda):
    run_ranks(2, run_exhaustion)


def run_cycles(ctx: RankContext) -> None:
    free = []
    for cycle in range(20):
        buffer = make_buffer(ctx, num_nvl_bytes=0)
        got = round_trip(buffer, make_routing(ctx, 80 + cycle))
        torch.cuda.synchronize()
        ctx.barrier()
        if cycle % 2:
            buffer.destroy()
        del buffer, got
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        ctx.barrier()
        free.append(torch.cuda.mem_get_info()[0])
    # Memory that was dropped without destroy is freed by the next construction: compare every second cycle.
    assert free[-1] >= free[3] - (64 << 20), free


@pytest.mark.gpu(2)
def test_buffers_come_and_go_on_gpus(on_cuda):
    run_ranks(2, run_cycles)


# ---------------------------------------------------------------------------------------------------------------
# A pool that is full and may not grow


def run_full_pool(ctx: RankContext, full_ranks: tuple[int, ...]) -> None:
    limit, hidden, tokens = 64 * MIB, 4096, 150 + 30 * ctx.rank
    buffer, portable = make_buffer(ctx, max_pool_bytes=limit), make_buffer(ctx, "portable")
    launches = buffer.runtime.kernels.launches

    def check(seed: int, is_full: bool, what: str) -> None:
        """All kinds of dispatches and combines, and that they are right."""
        routing = make_routing(ctx, seed, tokens, hidden, "none")
        for worst in (0, sum(150 + 30 * rank for rank in range(ctx.num_ranks)) + 7):
            name = f"{what}, num_worst_tokens={worst}"
            got, other = compare_dispatch(ctx, buffer, portable, routing, name, num_worst_tokens=worst)
            handle = got[4]
            cached = compare_cached(ctx, (buffer, portable), (handle, other), routing.x, name)
            assert [in_pool(buffer, t) for t in (got[0], got[1], got[2], cached)] == [not is_full] * 4, name
            quantised = compare_cached(ctx, (buffer, portable), (handle, other), routing.x, name, use_fp8=True)
            assert in_pool(buffer, quantised[0]) == (not is_full)
            inputs = CombineInputs.make(ctx, portable, other, hidden, torch.bfloat16, 1, seed)
            in_place = buffer.empty_combine_input(handle, hidden)
            assert in_pool(buffer, in_place) == (not is_full)
            in_place.copy_(inputs.rows)
            before = launches.get("push", 0)
            for rows, its_handle in ((inputs.rows, handle), (inputs.rows, rebuilt(handle)), (in_place, handle)):
                out = buffer.combine(rows, its_handle, topk_weights=inputs.weights, bias=inputs.bias)
                expect_bits(out[:2], (inputs.want, inputs.want_weights), f"{name}, combine")
                expect_bits(buffer.combine(rows, its_handle, bias=inputs.bias)[0], inputs.want, f"{name}, combine")
            # Rows for which the pool has no place are brought by copy engines, whatever the handle.
            assert launches.get("push", 0) - before == (6 if is_full else 0 if worst else 2), name
        finished(buffer)

    dispatch_everywhere(buffer, fill_everywhere(ctx, 200, hidden, 1))  # staging has room for more than follows
    check(320, False, "room in the pool")
    staging = buffer.memory_usage()["staging_bytes"]
    assert 0 < staging < limit
    is_full = ctx.rank in full_ranks
    kept = fill_pool(buffer) if is_full else []
    for seed in (321, 322):
        check(seed, is_full, f"ranks {full_ranks} full")
    usage = buffer.memory_usage()
    assert usage["mapped_bytes"] <= limit and usage["staging_bytes"] == staging
    kept.clear()
    check(323, False, "room again")
    # More than staging holds: it may exceed the limit, and only it.
    kept = fill_pool(buffer) if is_full else []
    large = fill_everywhere(ctx, 1500, hidden, 5)
    recv, _, _, _, handle, _ = dispatch_everywhere(buffer, large)
    expect_everywhere(ctx, recv, 1500, 5, "more than staging held")
    expect_bits(buffer.dispatch(large.x, handle=handle)[0], recv, "cached, more than staging held")
    usage = buffer.memory_usage()
    assert usage["staging_bytes"] > staging and usage["mapped_bytes"] <= limit + usage["staging_bytes"], usage
    assert usage["limit_bytes"] == limit
    finished(buffer)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("full_ranks", [(0,), (0, 1)])
def test_a_full_pool_at_its_limit(on_cuda, full_ranks):
    run_ranks(2, run_full_pool, full_ranks)


def run_captured_staging(ctx: RankContext) -> None:
    """What a graph writes to is kept for it: blocks of the pool, and staging that a larger block has replaced."""
    tokens, hidden, limit = 40, 2048, 64 * MIB
    buffer = make_buffer(ctx, max_pool_bytes=limit)
    worst, count = tokens * ctx.num_ranks + 5, tokens * ctx.num_ranks
    static = fill_everywhere(ctx, tokens, hidden, 1)
    dispatch_everywhere(buffer, static, num_worst_tokens=worst)
    graphs, outputs, leased = [], [], [0]
    kept, capture_stream = [], torch.cuda.Stream()
    for is_full in (False, True):
        if is_full:
            dispatch_everywhere(buffer, static)
            kept = fill_pool(buffer)
            with torch.cuda.stream(capture_stream):  # what torch keeps for this stream
                kept += fill_pool(buffer)
            assert not in_pool(buffer, dispatch_everywhere(buffer, static, num_worst_tokens=worst)[0])
        finished(buffer)
        ctx.barrier()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=capture_stream):
            outputs.append(dispatch_everywhere(buffer, static, num_worst_tokens=worst)[0])
        assert in_pool(buffer, outputs[-1]) != is_full
        leased.append(buffer.memory_usage()["leased_bytes"])
    staging = buffer.memory_usage()["staging_bytes"]
    assert leased[1] > 0 and leased[2] == leased[1] + staging
    ctx.barrier()
    # Staging too small for these is replaced; then all that is free is taken and filled with what must not change.
    dispatch_everywhere(buffer, fill_everywhere(ctx, 1000, hidden, 9))
    finished(buffer)
    assert buffer.memory_usage()["staging_bytes"] > staging
    taken = [piece.fill_(77) for piece in fill_pool(buffer)]
    for value in (3, 60):
        static.x.fill_(value + ctx.rank)
        for graph, recv in zip(graphs, outputs, strict=True):
            graph.replay()
            finished(buffer)
            expect_everywhere(ctx, recv[:count], tokens, value, "replay")
    assert all(bool((piece == 77).all()) for piece in taken)
    assert buffer.memory_usage()["leased_bytes"] == leased[2]
    ctx.barrier()
    del kept


@pytest.mark.gpu
def test_a_graph_keeps_its_staging(on_gpus):
    on_gpus(2)
    run_ranks(2, run_captured_staging)


def run_usage(ctx: RankContext) -> None:
    buffer = make_buffer(ctx, max_pool_bytes=(300 + ctx.rank) * MIB)
    first = buffer.memory_usage()
    assert set(first) == USAGE_KEYS
    assert first["limit_bytes"] == 300 * MIB  # the smallest of the ranks' counts for all
    assert (first["staging_bytes"], first["leased_bytes"], first["num_chunks"]) == (0, 0, 1)
    assert 256 * MIB <= first["mapped_bytes"] <= 300 * MIB <= first["reserve_bytes"]
    kept = [round_trip(buffer, make_routing(ctx, 330 + step, 100, 1024)) for step in range(4)]
    usage = buffer.memory_usage()
    assert usage["staging_bytes"] > 0
    assert usage["used_bytes"] >= usage["staging_bytes"] + sum(outputs[0].nbytes for outputs in kept)
    for found in (first, usage):
        assert found["used_bytes"] + found["free_bytes"] == found["mapped_bytes"] - found["control_bytes"]
        assert found["largest_free_bytes"] <= found["free_bytes"]
    assert usage["mapped_bytes"] == first["mapped_bytes"]
    finished(buffer)
    assert make_buffer(ctx, "portable").memory_usage() == {}


@pytest.mark.gpu
def test_memory_usage(on_gpus):
    on_gpus(2)
    run_ranks(2, run_usage)


# ---------------------------------------------------------------------------------------------------------------
# Room for blocks


def run_two_buffers(ctx: RankContext) -> None:
    """Buffers side by side, with the largest budgets, on streams of their own: all blocks that wait find room."""
    gc.collect()  # buffers of earlier tests
    config, everything = Config(256), 1 << 20
    sms = torch.cuda.get_device_properties(ctx.device).multi_processor_count
    first = make_buffer(ctx)
    blocks, sharing = first.runtime.kernels.blocks, first.runtime.memory.num_sharing
    alone, others = blocks(everything), cuda._num_buffers[first.runtime.kernels.device]
    assert alone == sms // (sharing * others)
    second = make_buffer(ctx)
    together = [buffer.runtime.kernels.blocks(everything) for buffer in (first, second)]
    assert together == [sms // (sharing * (others + 1))] * 2
    assert blocks(2) == 2
    routing = make_routing(ctx, 340, 600, 1024)
    want = [t.clone() for t in round_trip(make_buffer(ctx, "portable"), routing)]
    pairs = [(buffer, torch.cuda.Stream()) for buffer in (first, second)]
    torch.cuda.synchronize()
    results = []
    for _ in range(6):
        for buffer, stream in pairs:
            with torch.cuda.stream(stream):
                results.append(round_trip(buffer, routing, config=config))
    finished(first)
    finished(second)
    for number, got in enumerate(results):
        expect_bits(got, tuple(want), f"round trip {number}")
    ctx.barrier()
    second.destroy()
    assert blocks(everything) == alone
    ctx.barrier()


@pytest.mark.gpu
def test_buffers_share_the_sms(on_gpus):
    on_gpus(2)
    run_ranks(2, run_two_buffers)


@pytest.mark.gpu(2)
def test_ranks_and_buffers_share_the_sms(on_gpus):
    on_gpus(3)
    run_ranks(3, run_two_buffers)
