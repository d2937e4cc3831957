"""The NVLink engine: when it serves, what it says, and its bits against the portable engine's."""

import dataclasses
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from cases import Case, check_case, generator, make_rows, to_device
from cuda_cases import (
    FP8_OPTIONS,
    SHORT_SLEEP,
    CombineInputs,
    Routing,
    compare_cached,
    compare_dispatch,
    dispatch,
    finished,
    make_bare_kernels,
    make_buffer,
    make_hard_rows,
    make_routing,
    on_cpu,
    rebuilt,
    round_trip,
    run_against_portable,
)
from harness import RankContext, environ, expect_bits, run_ranks, spawn_fresh
from test_properties import draw_case
from test_threads_and_lifetime import run_many_buffers, run_side_by_side, run_threads

import deep_ep
from deep_ep import Buffer, Config
from deep_ep.engines import cuda_engine
from deep_ep.engines.cuda import MAX_PEERS
from deep_ep.engines.failures import refusal
from deep_ep.errors import (
    BufferOverflow,
    CommTimeout,
    ConfigError,
    DeepEPError,
    PeerError,
    PoolExhausted,
    TopologyError,
)

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
    return make_bare_kernels()


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
        # What counts is the row that travels.
        assert bare_kernels.serves(torch.empty(3, 16, dtype=torch.float32, device="cuda:0"), use_fp8=True)
        assert not bare_kernels.serves(torch.empty(3, 24, dtype=torch.bfloat16, device="cuda:0"), use_fp8=True)
        assert bare_kernels.serves_layout(torch.empty(4, 2, dtype=torch.int64, device="cuda:0"), 4096)
        assert not bare_kernels.serves_layout(torch.empty(4, 2, dtype=torch.int64, device="cuda:0"), 4097)


def test_signatures_differ_where_operations_do(bare_kernels):
    x, scales, idx = torch.zeros(4, 64), torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64)

    def sign(rows, *parts, **kwargs) -> int:
        return bare_kernels._plan(rows, **kwargs).signature(*parts)

    seen = [
        sign(x, "dispatch", 8, 10),
        sign(x, "cached dispatch", 8, 10),
        sign(x, "cached dispatch"),
        sign(x.bfloat16(), "dispatch", 8, 10),
        sign(x[:, :32], "dispatch", 8, 10),
        sign(x, "dispatch", 8, 10, scales=scales),
        sign(x, "dispatch", 8, 10, scales=scales[:, :1]),
        sign(x, "dispatch", 8, 10, scales=scales.int()),
        sign(x, "dispatch", 8, 10, scale_format="fp32"),
        sign(x, "dispatch", 8, 10, scale_format="pow2"),
        sign(x, "dispatch", 8, 10, scale_format="ue8m0"),
        sign(x, "dispatch", 8, 10, topk_idx=idx),
        sign(x, "dispatch", 8, 10, topk_idx=idx[:, :1]),
        sign(x, "dispatch", 8, 10, topk_idx=idx.int()),
        sign(x, "dispatch", 9, 10),
        sign(x, "dispatch", 8, 11),
        bare_kernels._combines.signature(x.dtype, 64, 0),
        bare_kernels._combines.signature(x.dtype, 64, 3),
        bare_kernels._combines.signature(x.dtype, 32, 0),
        bare_kernels._combines.signature(torch.bfloat16, 64, 0),
    ]
    assert len(set(seen)) == len(seen)
    assert all(0 <= number < (1 << 64) - 1 for number in seen)  # the last one means a refusal
    assert sign(x[:0], "dispatch", 8, 10) == seen[0]  # ranks may have different numbers of tokens


def test_what_is_told_once_and_what_stays(bare_kernels):
    kernels, released = bare_kernels, []
    told = {"overflow": [(1, 16, 8)], "refused": [0], "error": [(1, 2, 5, 3, 9, 8)]}
    kernels._push = SimpleNamespace(release=lambda: released.append(True))
    kernels._domain = SimpleNamespace(
        take_overflow=lambda: told["overflow"].pop() if told["overflow"] else None,
        take_refused=lambda: told["refused"].pop() if told["refused"] else None,
        error=lambda: told["error"][0] if told["error"] else None,
    )
    with pytest.raises(BufferOverflow, match="rank 1 was to receive 16"):
        kernels.check_results()
    with pytest.raises(PeerError, match="rank 0 gave"):
        kernels.check_results()
    kernels.check_results()
    for _ in range(2):
        with pytest.raises(CommTimeout, match="pushed rows") as first:
            kernels.check()
    told["error"].clear()
    with pytest.raises(CommTimeout) as again:
        kernels.check()
    assert again.value is first.value and released == [True]
    kernels.failure = None
    kernels.check()
    with pytest.raises(CommTimeout, match="did not run for 14 s"):
        kernels.raise_failure("dispatch")  # the host gave up, and no kernel said why


def test_when_a_rank_refuses(bare_kernels):
    kernels, refused = bare_kernels, []
    kernels._domain = SimpleNamespace(refuse=refused.append)
    kernels.refuse("dispatch")
    assert refused == [0] and kernels.launches == {"dispatch_refuse": 1} and kernels._push_number == 0
    kernels.refuse("dispatch")  # it has taken part already
    kernels._launched, kernels._capturing = False, True
    kernels.refuse("dispatch")
    kernels._capturing, kernels.failure = False, refusal(1)
    kernels.refuse("dispatch")
    assert refused == [0]
    # Combines are counted alike on all ranks.
    kernels.failure, kernels.memory.staging_bytes = None, 1
    kernels.refuse("combine")
    assert len(refused) == 2 and kernels._push_number == 1


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
# Rows quantised on the way


def run_quantised(ctx: RankContext, hidden_sizes: tuple[int, ...]) -> dict[str, int]:
    pair = make_buffer(ctx), make_buffer(ctx, "portable")
    tokens = 37 + 5 * ctx.rank
    worst = sum(37 + 5 * rank for rank in range(ctx.num_ranks)) + 3
    kinds = itertools.product(hidden_sizes, (torch.bfloat16, torch.float16, torch.float32), FP8_OPTIONS)
    for number, (hidden, dtype, scales) in enumerate(kinds):
        what, options = f"{hidden} columns of {dtype}, scales {scales}", FP8_OPTIONS[scales]
        routing = make_routing(ctx, 800 + number, tokens, 16)
        routing.x = make_hard_rows(generator(801, ctx.rank, number), dtype, tokens, hidden).to(ctx.device)
        got, other = compare_dispatch(ctx, *pair, routing, what, **options)
        assert got[0][0].dtype == torch.float8_e4m3fn
        compare_cached(ctx, pair, (got[4], other), routing.x, what, **options)
        fixed, other = compare_dispatch(ctx, *pair, routing, f"{what}, worst case", num_worst_tokens=worst, **options)
        compare_cached(ctx, pair, (fixed[4], other), routing.x, f"{what}, worst case", **options)
    launches = dict(pair[0].runtime.kernels.launches)
    # Rows whose quantised size is not served: the same bits by the portable engine, and a handle for both.
    routing = make_routing(ctx, 860, tokens, 24)
    got, other = compare_dispatch(ctx, *pair, routing, "24 columns", use_fp8=True)
    assert pair[0].runtime.kernels.launches.get("dispatch_rows_fp8", 0) == launches["dispatch_rows_fp8"]
    compare_cached(ctx, pair, (got[4], other), routing.x, "the handle of another engine")
    assert pair[0].runtime.kernels.launches["dispatch_rows"] == launches.get("dispatch_rows", 0) + 1
    finished(pair[0])
    return launches


@pytest.mark.gpu
def test_quantised_on_the_way(on_gpus):
    on_gpus(2)
    for launches in run_ranks(2, run_quantised, (16, 640, 1040, 4176, 7168)):
        assert "dispatch_rows" not in launches
        assert launches["dispatch_rows_fp8"] >= 4 * 5 * 9


# ---------------------------------------------------------------------------------------------------------------
# Combine: rows in symmetric memory, copied there, or brought by copy engines


def run_combine_ways(ctx: RankContext, num_cases: int) -> tuple[bool, int]:
    """Every way of passing the rows, one after the other; whether rows can be pushed, and how many combines did."""
    buffer, portable = make_buffer(ctx, num_nvl_bytes=1 << 29), make_buffer(ctx, "portable")
    launches, can_push = buffer.runtime.kernels.launches, buffer.runtime.kernels._push is not None
    cases = [
        ((40, 75, 9), 256, torch.bfloat16, 0, "some"),
        ((0, 33, 5), 64, torch.float32, 2, "rows"),
        ((120, 0, 64), 520, torch.float16, 1, "some"),
        ((1, 1, 1), 16, torch.bfloat16, 0, "skew"),
        ((700, 1100, 30), 4096, torch.bfloat16, 1, "none"),
        ((1050, 1000), 7168, torch.bfloat16, 0, "none"),  # enough for as many copies as a combine makes
    ]
    for number, (tokens, hidden, dtype, num_bias, mask) in enumerate(cases[:num_cases]):
        routing = make_routing(ctx, 820 + number, tokens[ctx.rank], hidden, mask)
        got, other = compare_dispatch(ctx, buffer, portable, routing, f"case {number}")
        handle = got[4]
        del got
        inputs = CombineInputs.make(ctx, portable, other, hidden, dtype, num_bias, number)
        rows, count = inputs.rows, inputs.rows.numel()
        in_place = buffer.empty_combine_input(handle, hidden, dtype).copy_(rows)
        unaligned = torch.empty(count + 1, dtype=dtype, device=ctx.device)[1:].view(rows.shape).copy_(rows)
        ways = {  # rows, handle, and whether they are pushed or copied
            "fresh handle": (rows, handle, can_push, not can_push),
            "rebuilt handle": (rows, rebuilt(handle), False, True),
            "symmetric memory": (in_place, handle, False, False),
            "symmetric memory, rebuilt handle": (in_place, rebuilt(handle), False, False),
            "unaligned": (unaligned, handle, can_push, not can_push),
        }
        for way, (x, its_handle, pushes, copies) in ways.items():
            what = f"case {number}, {way}"
            before = dict(launches)
            expect_bits(buffer.combine(x, its_handle, bias=inputs.bias)[0], inputs.want, what)
            for kernel, expected in (("push", pushes), ("dispatch_combine_copy", copies)):
                done = launches.get(kernel, 0) - before.get(kernel, 0)
                assert done == int(expected and count > 0), f"{what}: {kernel} {done} times"
            both = buffer.combine(x, its_handle, topk_weights=inputs.weights, bias=inputs.bias)
            expect_bits(both[:2], (inputs.want, inputs.want_weights), f"{what}, with weights")
    finished(buffer)
    return can_push, launches.get("push", 0)


@pytest.mark.gpu
def test_ways_of_passing_rows_to_combine(on_gpus):
    on_gpus(2)
    for can_push, pushes in run_ranks(2, run_combine_ways, 6):
        assert can_push == (torch.cuda.device_count() > 1)
        assert pushes >= 20 if can_push else pushes == 0


@pytest.mark.gpu(2)
def test_combine_where_only_some_ranks_push(on_gpus):
    """Of three ranks on two GPUs two share one, where copies would wait behind kernels."""
    on_gpus(3)
    results = run_ranks(3, run_combine_ways, 5)
    assert torch.cuda.device_count() != 2 or not (results[0][0] or results[2][0])
    assert all((pushes > 0) == can_push for can_push, pushes in results)


def run_mixed_combines(ctx: RankContext, count: int, seed: int) -> None:
    """Combines back to back whose ranks pass their rows in different ways, with sizes that change from call to call."""
    pick = random.Random(seed)  # equal on all ranks
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    prepared = []
    for number in range(count):
        tokens = [pick.choice((0, 1, 33, 400, 1100)) for _ in range(ctx.num_ranks)]
        hidden, mask = pick.choice((64, 2048, 4096)), pick.choice(("none", "rows", "all", "skew"))
        routing = make_routing(ctx, 1000 * seed + number, tokens[ctx.rank], hidden, mask)
        other = dispatch(portable, on_cpu(routing))[4]
        num_bias = pick.randint(0, 2)
        inputs = CombineInputs.make(ctx, portable, other, hidden, torch.bfloat16, num_bias, 1000 * seed + number)
        calls = [(pick.randint(max(0, number - 4), number), pick.random() < 0.3) for _ in range(3)]
        prepared.append((routing, inputs, calls))
    torch.cuda.synchronize()
    ctx.barrier()
    handles, results = [], []
    for number, (routing, _, calls) in enumerate(prepared):
        handles.append(dispatch(buffer, routing)[4])
        for which, aside in calls:
            inputs, handle = prepared[which][1], handles[which]
            rows, way = inputs.rows, (number + which + ctx.rank) % 3
            if way == 1:
                rows = buffer.empty_combine_input(handle, rows.shape[1]).copy_(rows)
            elif way == 2:
                handle = rebuilt(handle)
            out = buffer.combine(rows, handle, topk_weights=inputs.weights, bias=inputs.bias, async_finish=aside)
            if aside:
                out[2].current_stream_wait()
            results.append((out, which, f"step {number}, combine of step {which}, way {way}"))
    finished(buffer)
    for out, which, what in results:
        expect_bits(out[:2], (prepared[which][1].want, prepared[which][1].want_weights), what)


@pytest.mark.gpu
def test_combines_back_to_back_in_different_ways(on_gpus):
    on_gpus(2)
    run_ranks(2, run_mixed_combines, 24, 21)


def run_budgets(ctx: RankContext) -> None:
    buffer, tokens = make_buffer(ctx), 300 + 11 * ctx.rank
    routing = make_routing(ctx, 870, tokens, 1024)
    want = [t.clone() for t in round_trip(make_buffer(ctx, "portable"), routing)]
    handle = dispatch(buffer, routing)[4]
    quantised = [t.clone() for t in buffer.dispatch(routing.x, handle=handle, use_fp8=True)[0]]
    for num_sms in (2, 4, 6, 0, 1, 3, 7, 21, 24, 131, 256):
        config = Config(num_sms)
        expect_bits(round_trip(buffer, routing, config=config), tuple(want), f"{num_sms} SMs")
        fixed = round_trip(buffer, routing, sum(300 + 11 * rank for rank in range(ctx.num_ranks)), config)
        expect_bits(fixed[4:], tuple(want[4:]), f"{num_sms} SMs, worst case")
        got = buffer.dispatch(routing.x, handle=handle, use_fp8=True, config=config)[0]
        expect_bits(got, tuple(quantised), f"{num_sms} SMs, quantised")
    finished(buffer)


@pytest.mark.gpu
def test_every_budget_gives_the_same_bits(on_gpus):
    on_gpus(2)
    run_ranks(2, run_budgets)


# ---------------------------------------------------------------------------------------------------------------
# Threads, lifetime, outputs


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
