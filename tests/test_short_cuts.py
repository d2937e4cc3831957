"""Calls that skip the detailed checks: which do, and that their results are those of the long way.

On memory of the CPU, with the stand-ins for kernels of `test_cuda_host_path`; a group of one rank.
"""

from types import SimpleNamespace

import pytest
import torch
from test_cuda_host_path import NUM_CHANNELS, NUM_EXPERTS, NUM_SMS, at, kernels

import deep_ep
from deep_ep import Buffer, Config
from deep_ep._native import _C
from deep_ep.engines.cuda_engine import CudaEngine
from deep_ep.engines.dispatch_outputs import _DLPACK_TYPES
from deep_ep.errors import ConfigError

__all__ = ["kernels"]
T, H, K = 12, 64, 2


def make_inputs(num_ranks: int = 2, scales: bool = True, topk: bool = True):
    return _C.DispatchInputs(
        torch.Tensor, -1, num_ranks, (10, 8), H, (2, 32), 3 if scales else 0, K if topk else 0, True
    )


def make_arguments(num_ranks: int = 2) -> dict[str, torch.Tensor]:
    return {
        "x": torch.zeros(T, H, dtype=torch.float8_e4m3fn),
        "scales": torch.rand(3, T).t(),
        "per_rank": torch.zeros(num_ranks, dtype=torch.int32),
        "in_rank": torch.zeros(T, num_ranks, dtype=torch.bool),
        "per_expert": torch.zeros(NUM_EXPERTS, dtype=torch.int32),
        "topk_idx": torch.zeros(T, K, dtype=torch.int64),
        "topk_weights": torch.zeros(T, K),
    }


def test_addresses_of_a_dispatch():
    args = make_arguments()
    ptr = {name: tensor.data_ptr() for name, tensor in args.items()}
    layout = (ptr["per_expert"], ptr["in_rank"])
    sent = (T, ptr["x"], ptr["scales"], (1, T), ptr["topk_idx"], ptr["topk_weights"])
    assert make_inputs().read(*args.values()) == (sent, layout, NUM_EXPERTS)
    bare = {**args, "scales": None, "topk_idx": None, "topk_weights": None}
    assert make_inputs(scales=False, topk=False).read(*bare.values()) == (
        (T, ptr["x"], 0, (0, 0), 0, 0),
        layout,
        NUM_EXPERTS,
    )
    empty = {name: tensor if tensor.dim() == 1 else tensor[:0] for name, tensor in args.items()}
    assert make_inputs().read(*empty.values())[0][0] == 0
    with pytest.raises(TypeError, match=r"read\(\) takes 7 arguments but 1 were given"):
        make_inputs().read(args["x"])


UNUSUAL = {
    "another dtype": ("x", lambda x: x.view(torch.float8_e5m2)),
    "another hidden size": ("x", lambda x: x[:, :32].contiguous()),
    "rows that are not contiguous": ("x", lambda x: x.t().contiguous().t()),
    "rows at an odd address": ("x", lambda x: torch.zeros(T * H + 1, dtype=torch.uint8)[1:].view(T, H).view(x.dtype)),
    "more rows": ("x", lambda x: torch.cat([x.view(torch.uint8), x.view(torch.uint8)]).view(x.dtype)),
    "a type derived from tensors": ("x", lambda x: torch.nn.Parameter(x, requires_grad=False)),
    "rows in a list": ("x", lambda x: x.float().tolist()),
    "no scales": ("scales", lambda _: None),
    "fewer scales": ("scales", lambda scales: scales[:, :2]),
    "scales of fewer tokens": ("scales", lambda scales: scales[1:]),
    "packed scales": ("scales", lambda scales: scales.contiguous().view(torch.int32)),
    "counts of more ranks": ("per_rank", lambda _: torch.zeros(3, dtype=torch.int32)),
    "counts in int64": ("per_rank", lambda counts: counts.long()),
    "counts with gaps": ("per_rank", lambda _: torch.zeros(4, dtype=torch.int32)[::2]),
    "no counts": ("per_rank", lambda _: None),
    "flags in bytes": ("in_rank", lambda flags: flags.to(torch.uint8)),
    "flags of more tokens": ("in_rank", lambda flags: torch.cat([flags, flags])),
    "flags turned": ("in_rank", lambda flags: flags.t().contiguous().t()),
    "no experts": ("per_expert", lambda counts: counts[:0]),
    "a matrix of experts": ("per_expert", lambda counts: counts[None]),
    "another top-k": ("topk_idx", lambda idx: idx[:, :1].contiguous()),
    "int32 indices": ("topk_idx", lambda idx: idx.int()),
    "no indices": ("topk_idx", lambda _: None),
    "no weights": ("topk_weights", lambda _: None),
    "bf16 weights": ("topk_weights", lambda weights: weights.bfloat16()),
    "weights of one choice": ("topk_weights", lambda weights: weights[:, :1].contiguous()),
    "on another device": ("topk_weights", lambda weights: weights.to("meta")),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_takes_the_long_way(case):
    name, change = UNUSUAL[case]
    args = make_arguments()
    assert make_inputs().read(*args.values()) is not None
    args[name] = change(args[name])
    assert make_inputs().read(*args.values()) is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_two_types_are_taken_for_each_other():
    kinds = [kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)]
    for wanted, code in _DLPACK_TYPES.items():
        inputs = _C.DispatchInputs(torch.Tensor, -1, 2, code, H, (2, 32), 0, 0, True)
        args = {**make_arguments(), "scales": None, "topk_idx": None, "topk_weights": None}
        for dtype in kinds:
            try:
                args["x"] = torch.empty(T, H, dtype=dtype)
            except (RuntimeError, NotImplementedError):
                continue
            assert (inputs.read(*args.values()) is not None) == (dtype is wanted), (wanted, dtype)


def make_handle(num_ranks: int = 2, num_rows: int = 7) -> list[torch.Tensor]:
    shapes = [(num_ranks, num_ranks), (num_ranks, 5), (num_ranks, 5), (num_rows,)]
    handle = [torch.zeros(shape, dtype=torch.int32) for shape in shapes]
    return [*handle, torch.zeros(T, num_ranks, dtype=torch.bool), torch.zeros(T, num_ranks, dtype=torch.int32)]


def test_addresses_by_a_handle():
    args, handle = make_arguments(), make_handle()
    sent = (T, args["x"].data_ptr(), args["scales"].data_ptr(), (1, T), 0, 0)
    again = make_inputs().read_again
    assert again(args["x"], args["scales"], tuple(handle)) == (sent, 7, handle[5].data_ptr())
    rows, weights = torch.zeros(7, H, dtype=torch.bfloat16), torch.zeros(7, 3)
    read = _C.CombineInputs(torch.Tensor, -1, 2).read
    ends = (handle[0].data_ptr(), handle[5].data_ptr())
    assert read(rows, tuple(handle), None) == (7, H, T, 0, rows.data_ptr(), 0, *ends)
    assert read(rows, tuple(handle), weights) == (7, H, T, 3, rows.data_ptr(), weights.data_ptr(), *ends)
    for dtype in (torch.float16, torch.float32):
        assert read(rows.to(dtype), tuple(handle), None) is not None
    unusual = [
        (torch.zeros(7, H), tuple(handle), weights.double()),
        (torch.zeros(8, H), tuple(handle), None),
        (torch.zeros(7, H, dtype=torch.float64), tuple(handle), None),
        (torch.zeros(7, 3), tuple(handle), None),  # no multiple of 16 bytes
        (torch.zeros(7, 0), tuple(handle), None),
        (torch.zeros(H, 7).t(), tuple(handle), None),
        (torch.zeros(7 * H + 1)[1:].view(7, H), tuple(handle), None),
        (rows, tuple(handle), weights[:6]),
        (rows, tuple(handle), torch.zeros(22)[1:].view(7, 3)),
    ]
    for wrong in unusual:
        assert read(*wrong) is None
    others = [
        handle,
        tuple(handle[:5]),
        None,
        tuple(make_handle(3)),
        (handle[0].long(), *handle[1:]),
        (*handle[:3], handle[3][None], *handle[4:]),
        (*handle[:5], handle[5].long()),
        (*handle[:5], handle[5].t().contiguous().t()),
        (*handle[:4], handle[4][1:], handle[5]),
        (*handle[:4], None, handle[5]),
        (*handle[:5], handle[5].to("meta")),
    ]
    for other in others:
        assert again(args["x"], args["scales"], other) is None and read(rows, other, None) is None
    assert again(args["x"].view(torch.uint8)[1:].view(torch.float8_e4m3fn), args["scales"][1:], tuple(handle)) is None


@pytest.fixture
def buffer(kernels, monkeypatch):
    """One whose engine has these kernels. `buffer.long` counts calls that took the long way."""
    buffer = Buffer(None, comm=deep_ep.SoloComm(), device="cpu")
    engine = CudaEngine.__new__(CudaEngine)
    engine.__dict__.update(buffer.runtime.__dict__)
    engine.memory, engine.kernels, engine.ranks_per_gpu = kernels.memory, kernels, 1
    engine._prefix_shape, engine.low_latency = (1, 1), SimpleNamespace(close=lambda: None)
    kernels.traffic = engine.traffic
    kernels.open_events = []
    kernels._order = SimpleNamespace(
        begin=lambda stream: kernels.open_events.append("begin") or False,
        end=lambda stream: kernels.open_events.append("end"),
        close=lambda: None,
    )
    kernels._domain.error, kernels._domain.close = (lambda: None), (lambda: None)
    kernels._domain.refuse = lambda stream: kernels.open_events.append("refuse")
    kernels._is_open = False
    kernels.read_combine = _C.CombineInputs(torch.Tensor, -1, 1).read
    kernels.memory.offset_of, kernels.memory.close = (lambda tensor: tensor.data_ptr()), (lambda: None)
    kernels.serves = lambda rows, use_fp8=False: isinstance(rows, torch.Tensor)
    kernels.serves_layout = lambda *_: True
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)

    def combine_rows(signature, rows, weights, number, inbox, prefix, num_tokens, heads, hidden, kind, biases, *rest):
        out, num_topk, out_weights, _, _ = rest
        x = at(rows[0], torch.bfloat16, int(at(prefix, torch.int32, 1)), hidden)
        for token, row in enumerate(at(heads, torch.int32, num_tokens).tolist()):
            at(out, torch.bfloat16, num_tokens, hidden)[token] = x[row] if row >= 0 else 0
            if num_topk:
                given = at(weights[0], torch.float32, len(x), num_topk)
                at(out_weights, torch.float32, num_tokens, num_topk)[token] = given[row] if row >= 0 else 0

    kernels._domain.combine_rows = combine_rows
    long_way = engine.call
    buffer.long = []
    engine.call = lambda operation, *rest: buffer.long.append(operation) or long_way(operation, *rest)
    buffer.runtime = engine
    yield buffer
    buffer.destroy()


def make_call(seed: int = 0, num_tokens: int = T, scaled: bool = True):
    gen = torch.Generator().manual_seed(seed)
    idx = torch.randint(-1, NUM_EXPERTS, (num_tokens, K), generator=gen)
    idx[::3] = -1
    rows = torch.randint(0, 100, (num_tokens, H), generator=gen, dtype=torch.uint8).view(torch.float8_e4m3fn)
    x = (rows, torch.rand(num_tokens, 3, generator=gen)) if scaled else torch.rand(num_tokens, H).bfloat16()
    return x, idx, torch.rand(num_tokens, K, generator=gen)


def call_dispatch(buffer, x, idx, weights, **options):
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, NUM_EXPERTS)
    given = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    return buffer.dispatch(
        x, **{**given, "topk_idx": idx, "topk_weights": weights, "config": Config(NUM_SMS), **options}
    )


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        a, b = (value.view(torch.uint8) if value.dtype.itemsize == 1 else value for value in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("scaled", [False, True])
def test_both_ways_bring_the_same(buffer, kernels, scaled):
    for seed, num_tokens in ((0, 12), (1, 12), (2, 30), (3, 0), (4, 29)):
        x, idx, weights = make_call(seed, num_tokens, scaled)
        first = call_dispatch(buffer, x, idx, weights, num_tokens_per_rdma_rank=torch.ones(1, dtype=torch.int32))
        assert buffer.long.pop() == "dispatch"
        got = call_dispatch(buffer, x, idx, weights, expert_alignment=4)
        assert buffer.long == [] and kernels.open_events[-2:] == ["begin", "end"]
        assert same(first[:3], got[:3]) and same(first[4], got[4]) and got[5].event is None
        assert got[3] == [-(-count // 4) * 4 for count in first[3]]
        handle = got[4]
        buffer.dispatch(x, handle=handle, config=Config(NUM_SMS))  # makes the plan
        buffer.long.clear()
        again = buffer.dispatch(x, handle=handle, config=Config(NUM_SMS))
        assert buffer.long == [] and same(again[0], got[0]) and again[1:5] == (None,) * 4
        rows = torch.rand(handle[3].shape[0], H).bfloat16()
        for given in (None, got[2]):
            quick = buffer.combine(rows, handle, topk_weights=given)
            assert buffer.long == []
            slow = buffer.combine(rows, list(handle), topk_weights=given)
            assert buffer.long.pop() == "combine" and same(quick[:2], slow[:2]) and quick[0].shape == (num_tokens, H)


def test_which_calls_take_the_long_way(buffer):
    x, idx, weights = make_call()
    call_dispatch(buffer, x, idx, weights)
    buffer.long.clear()
    handle = call_dispatch(buffer, x, idx, weights)[4]
    assert buffer.long == []
    call_dispatch(buffer, x, idx, weights, num_worst_tokens=20)
    call_dispatch(buffer, list(x), idx, weights)
    call_dispatch(buffer, x, idx, weights, num_tokens_per_rdma_rank=torch.zeros(1, dtype=torch.int32))
    assert buffer.long == ["dispatch"] * 3
    wrong = [
        {"expert_alignment": 0},
        {"expert_alignment": 2.0},
        {"num_worst_tokens": -1},
        {"config": 16},
        {"use_ue8m0": True},
        {"use_fp8": True},
        {"handle": handle},
        {"topk_weights": None},
        {"topk_idx": None},
        {"num_tokens_per_rank": None},
        {"is_token_in_rank": idx},
    ]
    for options in wrong:
        buffer.long.clear()
        with pytest.raises(ConfigError):
            call_dispatch(buffer, x, idx, weights, **options)
        assert buffer.long == ["dispatch"] and torch.is_grad_enabled()


def test_a_failure_is_told_to_the_peers_and_leaves_nothing_behind(buffer, kernels, monkeypatch):
    x, idx, weights = make_call()
    handle = call_dispatch(buffer, x, idx, weights)[4]
    rows = torch.rand(handle[3].shape[0], H).bfloat16()
    kernels.open_events.clear()
    buffer.long.clear()
    with pytest.raises(ConfigError, match="channels"):
        call_dispatch(buffer, x, idx, weights, config=Config(1000))
    assert kernels.open_events[-3:] == ["begin", "refuse", "end"] and buffer.long == []

    def broken(num_sms: int) -> int:
        assert not torch.is_grad_enabled()
        raise MemoryError("no blocks")

    monkeypatch.setattr(kernels, "blocks", broken)
    for call in (lambda: call_dispatch(buffer, x, idx, weights), lambda: buffer.combine(rows, handle)):
        kernels.open_events.clear()
        with pytest.raises(MemoryError, match="no blocks"):
            call()
        assert kernels.open_events[-3:] == ["begin", "refuse", "end"] and buffer.long == []
        assert torch.is_grad_enabled() and buffer.runtime.lock.acquire(blocking=False)
        buffer.runtime.lock.release()
    monkeypatch.undo()


class OnDevice:
    """Stands in for `torch.cuda.device`."""

    def __init__(self, device: object) -> None:
        pass

    def __enter__(self) -> None:
        self.before = torch._C._cuda_getDevice
        torch._C._cuda_getDevice = lambda: None

    def __exit__(self, *_: object) -> None:
        torch._C._cuda_getDevice = self.before


def test_a_thread_on_another_device_takes_the_long_way(buffer, monkeypatch):
    x, idx, weights = make_call()
    call_dispatch(buffer, x, idx, weights)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    buffer.long.clear()
    call_dispatch(buffer, x, idx, weights)
    assert buffer.long == ["dispatch"]


def test_a_failed_buffer_says_so_at_once(buffer, kernels):
    x, idx, weights = make_call()
    handle = call_dispatch(buffer, x, idx, weights)[4]
    kernels._error = lambda: (1, 1, 1, 3, 7, 6)
    kernels.open_events.clear()
    with pytest.raises(deep_ep.CommTimeout, match="rank 3"):
        buffer.combine(torch.zeros(handle[3].shape[0], H).bfloat16(), handle)
    assert kernels.open_events == []


def test_channels_of_the_handle(buffer):
    x, idx, weights = make_call()
    assert call_dispatch(buffer, x, idx, weights)[4][1].shape == (1, NUM_CHANNELS)
