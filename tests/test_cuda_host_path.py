"""What the host does around the kernels of a dispatch, on memory of the CPU: a stand-in moves the rows.

It reads and writes the addresses that the kernels would get, for a group of one rank.
"""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from cases import TorchOperations, laid_out, scale_layouts
from cuda_cases import make_bare_kernels

from deep_ep import checks
from deep_ep.engines.arena import Arena
from deep_ep.engines.combine_inputs import COUNTS
from deep_ep.engines.cuda import CudaKernels
from deep_ep.engines.outputs import template
from deep_ep.engines.portable import DispatchRequest
from deep_ep.errors import CommTimeout, PoolExhausted
from deep_ep.layout import compute_dispatch_layout

CPU = torch.device("cpu")
NUM_EXPERTS, NUM_CHANNELS, NUM_SMS = 6, 5, 10


def at(address: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """The memory at an address as a tensor."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).view(shape)


class MemoryOnCpu:
    """Stands in for `PeerMemory`. Offsets are addresses."""

    rank, num_ranks, num_sharing, bases, device = 0, 1, 1, [0], CPU

    def __init__(self) -> None:
        self.room, self.staging_bytes, self.staging_offset = 1 << 30, 0, -1
        self.asked: list[str] = []

    def take(self, num_bytes: int, stream: int, capturing: bool) -> tuple[torch.UntypedStorage, int] | None:
        if num_bytes > self.room:
            return None
        storage = torch.UntypedStorage(num_bytes + 128)
        return storage, storage.data_ptr()

    def rendezvous(self, name: str, value: object) -> list[object]:
        self.asked.append(name)
        return [value]

    def grow(self, num_bytes: int) -> int:
        self.asked.append("grow")
        return 0

    def reserve_staging(self, num_bytes: int, *, within_limit: bool = False) -> None:
        if within_limit:  # what later calls may use
            raise PoolExhausted("no staging")
        self._staging = torch.UntypedStorage(num_bytes)
        self.staging_bytes, self.staging_offset = num_bytes, self._staging.data_ptr()

    def usage(self) -> dict[str, int]:
        return {}


BEGIN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
LAUNCH = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_bool)


class LayoutEntry(ctypes.Structure):
    """That of csrc/bindings_layout.h, whose functions are Python's."""

    _fields_ = (("owner", ctypes.c_void_p), ("begin", BEGIN), ("launch", LAUNCH))


class FakeLayoutQueue:
    """Stands in for `_C.LayoutQueue`. `state`: what `begin` says; `launches`: stream, and whether it is captured."""

    def __init__(self, domain: "KernelsOnCpu") -> None:
        self.domain, self.state = domain, 0
        self.launches: list[tuple[int, bool]] = []
        self.functions = LayoutEntry(None, BEGIN(lambda _, stream: self.state), LAUNCH(self.launch))

    @property
    def entry(self) -> int:
        return ctypes.addressof(self.functions)

    def launch(self, _: None, arguments: int, stream: int | None, captured: bool) -> None:
        topk_idx, is_int64, *rest = (ctypes.c_int64 * 8).from_address(arguments)
        self.launches.append((stream or 0, captured))
        self.domain.dispatch_layout(topk_idx, bool(is_int64), *rest)


class KernelsOnCpu:
    """Stands in for `_C.PeerDomain` and the plans that it makes."""

    def __init__(self) -> None:
        self.counts: tuple | bool = False
        self.calls: list[str] = []
        self.sent: tuple = ()

    def dispatch_layout(self, topk_idx, is_int64, num_tokens, num_topk, num_experts, per_rank, per_expert, in_rank):
        idx = at(topk_idx, torch.int64 if is_int64 else torch.int32, num_tokens, num_topk)
        layout = compute_dispatch_layout(idx, num_experts, 1, 1)
        at(per_rank, torch.int32, 1).copy_(layout.num_tokens_per_rank)
        at(per_expert, torch.int32, num_experts).copy_(layout.num_tokens_per_expert)
        at(in_rank, torch.bool, num_tokens, 1).copy_(layout.is_token_in_rank)

    def dispatch_plan(self, row_bytes, scales_per_token, num_topk, topk_is_int64, element_type, scale_format):
        assert (element_type, scale_format) == (-1, 0)
        idx_bytes = num_topk * (8 if topk_is_int64 else 4)

        def place(output, heads, sent) -> None:
            self.sent = sent
            _, rows, scales, (scales_stride, scale_stride), topk_idx, topk_weights = sent
            capacity = output[5]
            for token, row in enumerate(heads[:, 0].tolist()):
                if not 0 <= row < capacity:
                    continue
                ctypes.memmove(output[0] + row * row_bytes, rows + token * row_bytes, row_bytes)
                for s in range(scales_per_token):
                    source = scales + 4 * (token * scales_stride + s * scale_stride)
                    ctypes.memmove(output[1] + 4 * (row * scales_per_token + s), source, 4)
                if num_topk:
                    ctypes.memmove(output[2] + row * idx_bytes, topk_idx + token * idx_bytes, idx_bytes)
                    ctypes.memmove(output[3] + row * num_topk * 4, topk_weights + token * num_topk * 4, num_topk * 4)
                if output[4] >= 0:
                    at(output[4] + 4 * row, torch.int32, 1).fill_(token)

        def route(signature, output, fixed_capacity, num_experts, num_channels, layout, handle, sent, num_sms, stream):
            self.calls.append("route")
            assert num_sms == NUM_SMS and num_channels == NUM_CHANNELS
            in_rank = at(layout[1], torch.bool, sent[0], 1)
            num_rows = int(in_rank.sum())
            heads = at(handle[3], torch.int32, sent[0], 1)
            heads.copy_(torch.where(in_rank, in_rank.int().cumsum(0) - 1, -1))
            at(handle[0], torch.int32, 1, 1).fill_(num_rows)
            at(handle[1], torch.int32, 1, num_channels).fill_(11)
            at(handle[2], torch.int32, 1, num_channels).fill_(22)
            fits = fixed_capacity or num_rows <= output[5]
            if fits:
                place(output, heads, sent)
            per_expert = at(layout[0], torch.int32, num_experts).tolist()
            self.counts = (num_rows, fits, per_expert, [[num_rows]], num_rows, 0)

        def repeat(signature, output, num_experts, send_head, sent, num_sms, stream):
            self.calls.append("repeat")
            place(output, at(send_head, torch.int32, sent[0], 1), sent)

        return SimpleNamespace(route=route, repeat=repeat)

    def await_counts(self, num_experts: int) -> tuple | bool:
        return self.counts


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    kernels = make_bare_kernels()
    kernels.rank, kernels.num_ranks, kernels.device = 0, 1, CPU
    kernels.memory, kernels._domain = MemoryOnCpu(), KernelsOnCpu()
    kernels._int32, kernels._index = template(torch.int32, CPU), None
    kernels.layout_queue = FakeLayoutQueue(kernels._domain)
    kernels._layouts = kernels._layout_calls(kernels.layout_queue)
    kernels._small, kernels._sources = Arena.ordinary(CPU), Arena.symmetric(kernels.memory)
    kernels._guess, kernels._staging_refused, kernels._is_full = 0, 0, False

    def copy(copies: list[tuple[int, int, int]], sms: int) -> None:
        kernels._count("dispatch_combine_copy")
        for source, target, num_bytes in copies:
            ctypes.memmove(target, source, num_bytes) if source else ctypes.memset(target, 255, num_bytes)

    kernels._copy = copy
    kernels.blocks = lambda num_sms: num_sms
    return kernels


def make_request(num_tokens: int, scaled: bool, idx_dtype: torch.dtype | None, worst: int = 0) -> DispatchRequest:
    gen = torch.Generator().manual_seed(num_tokens)
    rows = torch.randint(0, 256, (num_tokens, 64), generator=gen, dtype=torch.uint8)
    scales = torch.rand(3, num_tokens, generator=gen).t() if scaled else None
    idx = torch.randint(-1, NUM_EXPERTS, (num_tokens, 2), generator=gen)
    idx[::3] = -1  # tokens that go nowhere
    weights = torch.rand(num_tokens, 2, generator=gen)
    with_topk = idx_dtype is not None
    return DispatchRequest(
        rows,
        scales,
        idx.ge(0).any(1, keepdim=True),
        topk_idx=idx.to(idx_dtype) if with_topk else None,
        topk_weights=weights if with_topk else None,
        num_worst_tokens=worst,
        num_channels=NUM_CHANNELS,
    )


def run(kernels: CudaKernels, request: DispatchRequest):
    """Layout and dispatch; checks all that came."""
    idx = request.topk_idx
    if idx is None:
        idx = torch.where(request.in_rank, 1, -1)
    per_rank, per_expert, in_rank = kernels.layout(idx, NUM_EXPERTS)
    want = compute_dispatch_layout(idx, NUM_EXPERTS, 1, 1)
    assert torch.equal(per_rank, want.num_tokens_per_rank) and torch.equal(per_expert, want.num_tokens_per_expert)
    assert in_rank.dtype == torch.bool and torch.equal(in_rank, request.in_rank)
    request.in_rank = in_rank
    result = kernels.dispatch(request, per_expert, NUM_SMS)
    tokens = in_rank[:, 0].nonzero()[:, 0]
    num_rows = request.num_worst_tokens or len(tokens)
    prefix, sent, received, src_idx, handle_in_rank, head = result.handle
    assert prefix.tolist() == [[len(tokens)]] and head.shape == (len(in_rank), 1)
    assert sent.tolist() == [[11] * NUM_CHANNELS] and received.tolist() == [[22] * NUM_CHANNELS]
    assert head[tokens, 0].tolist() == list(range(len(tokens))) and handle_in_rank is in_rank
    assert src_idx.dtype == torch.int32 and src_idx.shape == (num_rows,)
    assert src_idx.tolist() == tokens.tolist() + [-1] * (num_rows - len(tokens))
    expect_rows(result.rows, request.rows, tokens, num_rows)
    expect_rows(result.scales, request.scales, tokens, num_rows)
    expect_rows(result.topk_idx, request.topk_idx, tokens, num_rows)
    expect_rows(result.topk_weights, request.topk_weights, tokens, num_rows)
    if request.num_worst_tokens:
        assert result.topk_idx is None or result.topk_idx[len(tokens) :].eq(-1).all()
    else:
        assert result.num_recv_tokens_per_expert == per_expert.tolist()
        assert getattr(prefix, COUNTS) == [[len(tokens)]]
    return result


def expect_rows(have: torch.Tensor | None, sent: torch.Tensor | None, tokens: torch.Tensor, num_rows: int) -> None:
    assert (have is None) == (sent is None)
    if have is not None and sent is not None:
        assert have.dtype == sent.dtype and have.shape == (num_rows, sent.shape[1]) and have.is_contiguous()
        assert torch.equal(have[: len(tokens)], sent[tokens]) and not have._is_view()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("idx_dtype", [None, torch.int32, torch.int64])
def test_outputs_have_the_size_of_what_came(kernels, scaled, idx_dtype):
    calls = kernels._domain.calls
    results = [run(kernels, make_request(40, scaled, idx_dtype))]
    assert calls == ["route", "repeat"]  # nobody could guess the first size
    for num_tokens in (40, 39, 42, 1, 0, 40):
        results.append(run(kernels, make_request(num_tokens, scaled, idx_dtype)))
    assert calls[2:] == ["route"] * 6
    run(kernels, make_request(400, scaled, idx_dtype))
    assert calls[-2:] == ["route", "repeat"]
    # Results of earlier calls lie where later ones did not write.
    request, first = make_request(40, scaled, idx_dtype), results[0]
    tokens = request.in_rank[:, 0].nonzero()[:, 0]
    expect_rows(first.rows, request.rows, tokens, len(tokens))
    assert first.handle[3].tolist() == tokens.tolist()
    assert kernels.traffic.dispatch_calls == 8 and kernels.traffic.dispatch_dtypes == {"uint8": 8}
    assert kernels.traffic.dispatch_bytes == kernels.traffic.dispatch_rows * (64 + 12 * scaled)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_handle_repeats_the_routing(kernels, scaled):
    handle = run(kernels, make_request(40, False, torch.int64)).handle
    request = make_request(40, scaled, None)
    request.rows = request.rows.flip(0)
    tokens = request.in_rank[:, 0].nonzero()[:, 0]
    result = kernels.dispatch_cached(request, handle, NUM_SMS)
    expect_rows(result.rows, request.rows, tokens, len(tokens))
    expect_rows(result.scales, request.scales, tokens, len(tokens))
    assert result.handle is None and result.topk_idx is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_scales_of_any_strides_go_to_the_kernel_as_they_lie(kernels, num_tokens, dtype):
    handle = run(kernels, make_request(num_tokens, True, torch.int64)).handle
    values = torch.randint(-(1 << 31), 1 << 31, (num_tokens, 3)).int().view(dtype)
    if dtype == torch.float32:
        values = values.nan_to_num()  # since torch compares values
    layouts = {name: laid_out(values, *layout) for name, layout in scale_layouts(num_tokens, 3).items()}
    layouts["one row for all tokens"] = values[:1].expand(num_tokens, 3)
    usual: dict[str, list[str]] = {}
    for name, scales in layouts.items():
        for kind, worst in (("uncached", 0), ("worst case", num_tokens + 5), ("cached", 0)):
            request = make_request(num_tokens, True, None if kind == "cached" else torch.int64, worst)
            request.rows, request.scales = checks.check_rows((request.rows, scales), "dispatch")
            assert request.scales is scales
            run(kernels, request)  # makes the plan
            with TorchOperations() as operations:
                if kind == "cached":
                    result = kernels.dispatch_cached(request, handle, NUM_SMS)
                else:
                    layout = kernels.layout(torch.where(request.in_rank, 1, -1), NUM_EXPERTS)
                    operations.names.clear()
                    result = kernels.dispatch(request, layout[1], NUM_SMS)
            assert usual.setdefault(kind, operations.names) == operations.names, name
            assert kernels._domain.sent[2:4] == (scales.data_ptr(), scales.stride()), name
            tokens = request.in_rank[:, 0].nonzero()[:, 0]
            expect_rows(result.scales, scales, tokens, worst or len(tokens))
    assert len(kernels._plans) == (2 if dtype == torch.float32 else 3)  # strides are no part of a plan


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
def test_worst_case_has_fixed_outputs(kernels, idx_dtype):
    for worst in (40, 50):
        run(kernels, make_request(40, True, idx_dtype, worst))
    assert kernels._domain.calls == ["route"] * 2 and kernels.traffic.dispatch_rows == 90
    assert kernels.launches["dispatch_combine_copy"] == 2  # what marks padding


def test_rows_come_through_staging_when_the_pool_is_full(kernels):
    kernels.memory.room = 0
    for _ in range(2):
        run(kernels, make_request(40, True, torch.int64))
    # The first size is unknown; afterwards the pool is known to be full, and staging takes the guess.
    assert kernels._is_full and kernels.launches["dispatch_combine_copy"] == 2
    run(kernels, make_request(0, True, torch.int64))
    result = kernels.dispatch_cached(make_request(40, True, None), run(kernels, make_request(40, True, None)).handle, 8)
    assert result.rows.shape[0] == result.scales.shape[0] > 0


def test_a_wait_that_fails_raises(kernels):
    kernels._error = lambda: (1, 1, 1, 3, 7, 6)
    request = make_request(8, False, torch.int64)
    layout = kernels.layout(request.topk_idx, NUM_EXPERTS)
    kernels._await_counts = lambda num_experts: False
    with pytest.raises(CommTimeout, match="rank 3"):
        kernels.dispatch(request, layout[1], NUM_SMS)
