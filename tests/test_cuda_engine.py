"""The NVLink engine: when it serves, its bits against the portable engine's, and its memory."""

import dataclasses
import gc
import random
from types import SimpleNamespace

import pytest
import torch
from cases import Case, check_case, generator, make_rows, to_device
from cuda_cases import (
    SHORT_SLEEP,
    Routing,
    dispatch,
    dispatch_everywhere,
    expect_everywhere,
    fill_everywhere,
    finished,
    make_buffer,
    make_routing,
    round_trip,
    run_against_portable,
)
from harness import RankContext, environ, expect_bits, run_ranks, spawn_fresh
from test_properties import draw_case
from test_threads_and_lifetime import run_many_buffers, run_side_by_side, run_threads

import deep_ep
from deep_ep import Buffer
from deep_ep.engines import cuda_engine
from deep_ep.engines.cuda import MAX_PEERS, CudaKernels
from deep_ep.engines.peer_memory import PoolExhausted
from deep_ep.errors import CommTimeout, ConfigError, DeepEPError, PeerError, TopologyError

CUDA_ENV = {"DEEP_EP_TEST_DEVICE": "cuda"}


# ---------------------------------------------------------------------------------------------------------------
# Without a GPU: choices and messages


@pytest.mark.parametrize(
    ("value", "want"), [(None, "auto"), ("", "auto"), ("auto", "auto"), ("cuda", "cuda"), (" portable ", "portable")]
)
def test_wished_engine(value, want):
    with environ(DEEP_EP_ENGINE=value):
        assert cuda_engine.wished_engine() == want


def test_unknown_engine_is_refused():
    with environ(DEEP_EP_ENGINE="gpu"):
        with pytest.raises(ConfigError, match=r"DEEP_EP_ENGINE='gpu'.*portable"):
            cuda_engine.wished_engine()
        with pytest.raises(ConfigError, match="DEEP_EP_ENGINE"):
            Buffer(None, comm=deep_ep.SoloComm())


def test_engine_without_a_gpu():
    with environ(DEEP_EP_ENGINE="cuda"), pytest.raises(TopologyError, match="not on a CUDA device"):
        Buffer(None, comm=deep_ep.SoloComm(), device="cpu")
    for wish in (None, "auto", "portable"):
        with environ(DEEP_EP_ENGINE=wish):
            assert Buffer(None, comm=deep_ep.SoloComm(), device="cpu").engine == "portable"


@pytest.mark.parametrize(
    ("device", "has_cuda", "nodes", "ranks", "capability", "words"),
    [
        ("cpu", True, 1, 2, (9, 0), "not on a CUDA device"),
        ("cuda", False, 1, 2, (9, 0), "without nvcc"),
        ("cuda", True, 2, 4, (9, 0), "2 nodes"),
        ("cuda", True, 1, MAX_PEERS + 1, (9, 0), f"{MAX_PEERS + 1} ranks"),
        ("cuda", True, 1, 2, (8, 6), "8.6"),
        ("cuda", True, 1, MAX_PEERS, (9, 0), ""),
        ("cuda", True, 1, 2, (10, 0), ""),
    ],
)
def test_why_not_cuda(monkeypatch, device, has_cuda, nodes, ranks, capability, words):
    monkeypatch.setattr(cuda_engine, "_C", SimpleNamespace(has_cuda=has_cuda))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)
    topology = SimpleNamespace(num_nodes=nodes, num_ranks=ranks)
    reason = cuda_engine.why_not_cuda(topology, torch.device(device))
    assert words in reason
    assert bool(reason) == bool(words)


@pytest.fixture
def bare_kernels():
    """`CudaKernels` without memory or device: for what needs neither."""
    kernels = CudaKernels.__new__(CudaKernels)
    kernels.rank, kernels.num_ranks, kernels.timeout_s = 0, 4, 2.0
    kernels.device, kernels._signatures = torch.device("cuda", 0), {}
    return kernels


def test_what_is_served(bare_kernels):
    assert not bare_kernels.serves(torch.zeros(4, 64))
    assert not bare_kernels.serves([[1.0]])
    assert not bare_kernels.serves_layout(torch.zeros(4, 2, dtype=torch.int64), 8)
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        assert bare_kernels.serves(torch.empty(0, 8, dtype=torch.bfloat16, device="cuda:0"))
        assert bare_kernels.serves(torch.empty(3, 16, dtype=torch.float8_e4m3fn, device="cuda:0"))
        assert not bare_kernels.serves(torch.empty(3, 12, dtype=torch.bfloat16, device="cuda:0"))
        assert not bare_kernels.serves(torch.empty(64, dtype=torch.bfloat16, device="cuda:0"))
        assert bare_kernels.serves_layout(torch.empty(4, 2, dtype=torch.int64, device="cuda:0"), 4096)
        assert not bare_kernels.serves_layout(torch.empty(4, 2, dtype=torch.int64, device="cuda:0"), 4097)


def test_signatures_differ_where_operations_do(bare_kernels):
    x, scales, idx = torch.zeros(4, 64), torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64)
    sign = bare_kernels._signature
    seen = [
        sign("dispatch", x, None, None, 8, 10),
        sign("cached dispatch", x, None, None, 8, 10),
        sign("dispatch", x.bfloat16(), None, None, 8, 10),
        sign("dispatch", x[:, :32], None, None, 8, 10),
        sign("dispatch", x, scales, None, 8, 10),
        sign("dispatch", x, scales.int(), None, 8, 10),
        sign("dispatch", x, None, (idx, x), 8, 10),
        sign("dispatch", x, None, (idx.int(), x), 8, 10),
        sign("dispatch", x, None, None, 9, 10),
        sign("dispatch", x, None, None, 8, 11),
    ]
    assert len(set(seen)) == len(seen)
    assert all(0 <= number < 1 << 64 for number in seen)
    assert sign("dispatch", x[:0], None, None, 8, 10) == seen[0]  # ranks may have different numbers of tokens


@pytest.mark.parametrize(
    ("record", "kind", "words"),
    [
        ((1, 1, 1, 3, 7, 6), CommTimeout, ["dispatch", "rank 3", "announcement", "epoch 7", "seen 6", "timeout_s"]),
        ((1, 2, 2, 1, 9, 8), CommTimeout, ["combine", "rank 1", "end of the operation"]),
        ((2, 2, 1, 2, 0xAB, 0xCD), PeerError, ["combine", "rank 2", "0xab", "0xcd", "same order"]),
        ((4, 1, 3, 1, 5, 2**64 - 7), ConfigError, ["topk_idx[5, 1] is -7", "-1"]),
        ((9, 0, 0, 0, 0, 0), PeerError, ["error 9"]),
    ],
)
def test_messages_of_failures(bare_kernels, record, kind, words):
    error = bare_kernels._described(record)
    assert type(error) is kind
    assert [word for word in words if word not in str(error)] == []
    if kind is CommTimeout:
        assert (error.peer, error.waited_s) == (record[3], 2.0)


def test_limits_of_the_control_block(bare_kernels):
    bare_kernels._check_limits(4096, 128)
    with pytest.raises(ConfigError, match="4097 experts on 4 ranks"):
        bare_kernels._check_limits(4097, 10)
    with pytest.raises(ConfigError, match="129 channels"):
        bare_kernels._check_limits(8, 129)


def test_a_full_pool_is_an_error_of_this_library():
    assert issubclass(PoolExhausted, DeepEPError)
    assert issubclass(PoolExhausted, MemoryError)


def test_a_refused_previous_event_leaves_nothing_behind():
    buffer = Buffer(None, comm=deep_ep.SoloComm(), device="cpu")
    idx = torch.zeros(2, 1, dtype=torch.int64)
    layout = buffer.get_dispatch_layout(idx, 1)
    args = (layout[0], layout[1], layout[3], layout[2], idx, torch.ones(2, 1))
    with pytest.raises(ConfigError, match="previous_event"):
        buffer.dispatch(torch.zeros(2, 8), None, *args, previous_event=3)
    assert torch.is_grad_enabled()


# ---------------------------------------------------------------------------------------------------------------
# Which engine, and its bits


@pytest.fixture
def on_cuda(monkeypatch):
    monkeypatch.setenv("DEEP_EP_TEST_DEVICE", "cuda")


def run_engine(ctx: RankContext) -> None:
    assert ctx.buffer().engine == "cuda"
    buffer = make_buffer(ctx)
    launches = buffer.runtime.kernels.launches
    routing = make_routing(ctx, 1)
    recv, _, _, _, handle, _ = dispatch(buffer, routing)
    assert launches["dispatch_layout"] == launches["dispatch_notify"] == 1
    placed = launches["dispatch_rows"]
    assert placed in (1, 2)  # twice where the first guess of the size was too small
    dispatch(buffer, routing)
    assert launches["dispatch_rows"] == placed + 1
    buffer.dispatch(routing.x, handle=handle)
    buffer.combine(recv, handle)
    assert (launches["dispatch_notify"], launches["dispatch_rows"], launches["combine_rows"]) == (2, placed + 2, 1)
    assert buffer.traffic.dispatch_calls == 3
    finished(buffer)
    assert make_buffer(ctx, "portable").runtime.name == "portable"
    for value, kind, words in (("nccl", ConfigError, "DEEP_EP_ENGINE"), (("cuda", "portable"), ConfigError, "by rank")):
        wish = value if isinstance(value, str) else value[ctx.rank % 2]
        with environ(DEEP_EP_ENGINE=wish), pytest.raises(kind, match=words):
            ctx.fresh_buffer(device=ctx.device)


@pytest.mark.gpu(2)
def test_the_kernels_are_used(on_cuda):
    run_ranks(2, run_engine)


@pytest.mark.gpu
def test_a_single_rank(on_cuda):
    run_ranks(1, run_engine_alone)


def run_engine_alone(ctx: RankContext) -> None:
    got = round_trip(make_buffer(ctx), make_routing(ctx, 2))
    expect_bits(got, round_trip(make_buffer(ctx, "portable"), make_routing(ctx, 2)), "one rank")


@pytest.mark.gpu(2)
@pytest.mark.parametrize(("num_ranks", "count"), [(2, 30), (3, 6)])
def test_random_cases_on_the_kernels(on_cuda, num_ranks, count):
    source = random.Random(40 + num_ranks)
    for _ in range(count):
        case = draw_case(lambda options: source.choice(list(options)), num_ranks)
        check_case(dataclasses.replace(case, domain=None))


@pytest.mark.gpu(2)
@pytest.mark.parametrize("hidden", [8, 16, 2560, 7168, 16384])
def test_row_sizes_on_the_kernels(on_cuda, hidden):
    check_case(Case(2, (130, 75), hidden=hidden, num_topk=4, num_experts=16, num_bias=2, cached_payload="bf16"))


@pytest.mark.gpu(2)
def test_back_to_back_without_synchronisation(on_cuda):
    for launches in run_ranks(2, run_against_portable, 200, 1):
        assert launches["dispatch_notify"] == 200
        assert launches["combine_rows"] >= 200


@pytest.mark.gpu(2)
def test_back_to_back_on_three_ranks(on_cuda):
    run_ranks(3, run_against_portable, 25, 2)


@pytest.mark.gpu(2)
def test_one_hardware_queue():
    env = {**CUDA_ENV, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    results = spawn_fresh(2, run_against_portable, 60, 3, timeout=120, env=env)
    assert all(isinstance(launches, dict) for launches in results)


def run_mixed_devices(ctx: RankContext) -> None:
    buffer = make_buffer(ctx)
    for step in range(6):
        routing = make_routing(ctx, 50 + step, 5 + step)
        on_cpu = Routing(*(t.cpu() for t in (routing.x, routing.idx, routing.weights)))
        got, want = round_trip(buffer, routing), round_trip(buffer, on_cpu)
        assert all(t.is_cuda for t in got)
        assert not any(t.is_cuda for t in want)
        expect_bits(got, want, f"step {step}: CUDA and CPU tensors on one buffer")
    odd = make_routing(ctx, 60, hidden=12)  # rows of 24 bytes: not for the kernels
    expect_bits(round_trip(buffer, odd), round_trip(make_buffer(ctx, "portable"), odd), "rows of odd sizes")
    finished(buffer)


@pytest.mark.gpu(2)
def test_cpu_and_cuda_calls_on_one_buffer(on_cuda):
    run_ranks(2, run_mixed_devices)


def run_combine_input(ctx: RankContext) -> None:
    buffer, memory_of = make_buffer(ctx), lambda b, t: b.runtime.memory.offset_of(t)
    for hidden, dtype in ((256, torch.bfloat16), (64, torch.float32), (512, torch.float16)):
        recv, _, _, _, handle, _ = dispatch(buffer, make_routing(ctx, 61, 40, hidden))
        rows = make_rows(generator(62, ctx.rank), "fp32", recv.shape[0], hidden).to(ctx.device).to(dtype)
        want = buffer.combine(rows, handle)[0]
        shared = buffer.empty_combine_input(handle, hidden, dtype)
        assert shared.shape == rows.shape
        assert shared.dtype == dtype
        assert memory_of(buffer, shared) is not None
        assert memory_of(buffer, rows) is None
        shared.copy_(rows)
        expect_bits(buffer.combine(shared, handle)[0], want, f"combine from symmetric memory, {dtype}")
        other = make_buffer(ctx)  # memory of one buffer is nothing to another
        expect_bits(other.combine(shared, handle)[0], want, "combine through another buffer")
    finished(buffer)


@pytest.mark.gpu(2)
def test_combine_input_in_symmetric_memory(on_cuda):
    run_ranks(2, run_combine_input)


# ---------------------------------------------------------------------------------------------------------------
# Memory


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


def run_growth(ctx: RankContext) -> None:
    buffer, tokens, hidden = make_buffer(ctx, num_nvl_bytes=0), 2048, 4096
    before = buffer.runtime.memory.usage()
    assert before["mapped_bytes"] >= 256 << 20
    kept = []
    for layer in range(24):  # 32 MiB each
        kept.append(dispatch_everywhere(buffer, fill_everywhere(ctx, tokens, hidden, 4 * layer))[0])
    for layer, recv in enumerate(kept):
        expect_everywhere(ctx, recv, tokens, 4 * layer, f"layer {layer}")
    after = buffer.runtime.memory.usage()
    assert after["num_chunks"] > before["num_chunks"]
    assert after["mapped_bytes"] >= len(kept) * kept[0].nbytes
    del kept, recv
    for _ in range(30):  # blocks come back: no further growth
        dispatch_everywhere(buffer, fill_everywhere(ctx, tokens, hidden, 8))
    assert buffer.runtime.memory.usage()["mapped_bytes"] == after["mapped_bytes"]
    finished(buffer)


@pytest.mark.gpu(2)
def test_the_pool_grows(on_cuda):
    run_ranks(2, run_growth)


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


@pytest.mark.gpu(2)
@pytest.mark.parametrize("run", [run_many_buffers, run_side_by_side])
def test_lifetime_on_gpus(on_cuda, run):
    run_ranks(2, run)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("same_buffer", [True, False])
def test_two_threads_on_gpus(on_cuda, same_buffer):
    run_ranks(2, run_threads, same_buffer)


def run_ordinary_outputs(ctx: RankContext) -> None:
    buffer, routing = make_buffer(ctx), make_routing(ctx, 90, 64, 256)
    side = torch.cuda.Stream()
    fp8 = make_rows(generator(91, ctx.rank), "fp8_scales", 64, 256)
    for _ in range(3):
        recv, idx, weights, _, handle, _ = dispatch(buffer, routing)
        cached = buffer.dispatch(routing.x, handle=handle)[0]
        rows8, scales = buffer.dispatch(to_device(fp8, ctx.device), handle=handle)[0]
        combined = buffer.combine(recv, handle)[0]
        for tensor in (recv, idx, weights, cached, rows8, scales, combined, *handle):
            assert tensor.is_leaf
            assert not tensor.requires_grad
            assert tensor.is_contiguous()
            tensor.record_stream(side)
        for tensor in (recv, weights, cached, scales, combined):
            want = tensor.clone()
            tensor.requires_grad_()
            (tensor.float() * 3).sum().backward()
            assert bool((tensor.grad == 3).all())
            with torch.no_grad():
                tensor.mul_(2)
            expect_bits(tensor.detach(), want * 2, "in-place arithmetic")
        for tensor in (dispatch(buffer, routing)[0], buffer.dispatch(routing.x, handle=handle)[0]):
            want = tensor[:2].clone()
            tensor.set_(tensor.untyped_storage(), tensor.storage_offset(), (2, 256), (256, 1))
            assert tensor.shape == (2, 256)
            expect_bits(tensor, want, "a tensor set to a part of its storage")
            tensor.set_(torch.empty(0, dtype=tensor.dtype, device=ctx.device).untyped_storage(), 0, (0,), (1,))
            assert tensor.numel() == 0
    # A block that another stream still reads is not handed out again.
    recv = dispatch(buffer, routing)[0]
    want = recv.clone()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(SHORT_SLEEP)
        copy = recv.clone()
        recv.record_stream(side)
    del recv
    for step in range(10):
        dispatch(buffer, make_routing(ctx, 92 + step, 64, 256))
    torch.cuda.synchronize()
    expect_bits(copy, want, "rows that a slow stream read")
    finished(buffer)


@pytest.mark.gpu(2)
def test_outputs_are_ordinary_tensors_on_gpus(on_cuda):
    run_ranks(2, run_ordinary_outputs)
