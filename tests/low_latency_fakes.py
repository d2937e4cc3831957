"""Low-latency kernels without a GPU: everything native is replaced, and keeps what it was called with."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from deep_ep._native import _C
from deep_ep.engines import cuda_ll, low_latency_regions
from deep_ep.engines.cuda_ll import LowLatencyKernels
from deep_ep.engines.portable_ll import LowLatencyCombine, LowLatencyDispatch
from deep_ep.event import EventOverlap
from deep_ep.layout import num_local_experts

STREAM = 7


class FakePeers:
    def __init__(self, domain: Any, regions: list[int], *rest: Any) -> None:
        self.regions, self.rest, self.clears, self.refusals = regions, rest, 0, []

    def clear(self) -> None:
        self.clears += 1

    def refuse(self, kind: int, stream: int) -> None:
        self.refusals.append((kind, stream))


class FakeQueue:
    """Says what a test wants of the stream: -1 after a failure, 1 under capture."""

    def __init__(self, domain: Any, order: Any) -> None:
        self.state, self.begun, self.ended = 0, [], []

    def begin(self, stream: int) -> int:
        if self.state >= 0:
            self.begun.append(stream)
        return self.state

    def end(self, stream: int) -> None:
        self.ended.append(stream)


BEGIN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_bool
)


class Entry(ctypes.Structure):
    """LowLatencyEntry of csrc/bindings_low_latency.h, whose functions are Python's."""

    _fields_ = (("plan", ctypes.c_void_p), ("begin", BEGIN), ("launch", LAUNCH))


class FakePlan:
    """A plan of combines. Launches are kept on the class, in order: the plan, the addresses and numbers that it was
    given, the part, the number of SMs, and the stream; apart from these, whether they were captured."""

    num_arguments: ClassVar[int] = 12
    launches: ClassVar[list[tuple[Any, ...]]] = []
    captured: ClassVar[list[bool]] = []

    def __init__(
        self, peers: FakePeers, queue: FakeQueue, signature: int, num_topk: int, is_int64: bool, *shape: Any
    ) -> None:
        self.peers, self.signature, self.num_topk, self.is_int64 = peers, signature, num_topk, is_int64
        self.shape = shape
        self.functions = Entry(None, BEGIN(lambda _, stream: queue.begin(stream)), LAUNCH(self.launch))

    @property
    def entry(self) -> int:
        return ctypes.addressof(self.functions)

    def launch(self, _: None, arguments: int, part: int, num_sms: int, stream: int, captured: bool) -> None:
        given = (ctypes.c_int64 * self.num_arguments).from_address(arguments)
        FakePlan.launches.append((self, *given, part, num_sms, stream))
        FakePlan.captured.append(captured)


class FakeDispatchPlan(FakePlan):
    num_arguments = 9

    @property
    def outputs(self) -> Any:
        num_experts, num_max, _, _, with_weights, expert_major = self.shape
        num_ranks = len(self.peers.regions)
        num_local = num_local_experts(num_experts, num_ranks, 1 if num_ranks > 1 else 0)
        return _C.LowLatencyOutputs(num_local, num_ranks, num_max, self.num_topk, with_weights, expert_major)


class FakeMemory:
    """Symmetric memory of ranks that agree, unless a test says what the others answer."""

    def __init__(self, num_ranks: int = 3) -> None:
        self.carries_lines = True
        self.bases, self.room, self.growth = [(1 + rank) << 20 for rank in range(num_ranks)], 1 << 30, 0
        self.blocks: list[int] = []
        self.returned: list[int] = []
        self.asked: list[tuple[str, Any]] = []
        self.answers: dict[int, Any] = {}
        self.heap = SimpleNamespace(return_block=self.returned.append)

    def rendezvous(self, name: str, value: Any) -> list[Any]:
        self.asked.append((name, value))
        return [self.answers.get(rank, value) for rank in range(len(self.bases))]

    def reserve_block(self, num_bytes: int) -> list[int]:
        if num_bytes > self.room:
            return []
        self.blocks.append(num_bytes)
        return [512 * len(self.blocks)] * len(self.bases)

    def grow(self, num_bytes: int) -> int:
        self.room += self.growth
        return self.growth

    def usage(self) -> dict[str, int]:
        return {"free_bytes": self.room}


class FakeKernels:
    def __init__(self, rank: int = 1, num_ranks: int = 3) -> None:
        self.memory, self.device = FakeMemory(num_ranks), torch.device("cpu")
        self.domain, self.order = object(), object()
        self.rank, self.num_ranks = rank, num_ranks
        self.launches: dict[str, int] = {}
        self.failure: Exception | None = None
        self.max_blocks, self.aside = 66, FakeAside()

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure


class FakeLock:
    held = 0
    before: Any = None  # called when it is taken, as another thread might get there first

    def acquire(self) -> None:
        self.held += 1
        if self.before is not None:
            self.before()

    def release(self) -> None:
        self.held -= 1

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *args: object) -> None:
        self.release()


class FakeAside:
    """The stream of asynchronous operations: what was done with it, launches so far included."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []

    def enter(self, event: None) -> str:
        self.done.append(("enter", event, len(FakePlan.launches)))
        return "before"

    def leave(self, before: str, *, join: bool) -> None:
        self.done.append(("leave", before, join, len(FakePlan.launches)))


def install_fakes(monkeypatch: Any) -> None:
    """Let `LowLatencyKernels` find these in place of what is native."""
    for name, fake in (
        ("LowLatencyPeers", FakePeers),
        ("LowLatencyQueue", FakeQueue),
        ("LowLatencyDispatchPlan", FakeDispatchPlan),
        ("LowLatencyCombinePlan", FakePlan),
    ):
        monkeypatch.setattr(_C, name, fake, raising=False)
    monkeypatch.setattr(cuda_ll, "current_stream_of", lambda _: lambda: STREAM)
    monkeypatch.setattr(FakePlan, "launches", [])
    monkeypatch.setattr(FakePlan, "captured", [])


def capture(ll: LowLatencyKernels, monkeypatch: Any, on: bool = True) -> None:
    """The current stream is captured from now on, or no more."""
    ll._queue.state = int(on)
    monkeypatch.setattr(low_latency_regions, "is_capturing", lambda: on)


def dispatch_request(
    num_tokens: int = 3, hidden: int = 256, num_max: int = 4, num_experts: int = 7, **given: Any
) -> LowLatencyDispatch:
    x = torch.zeros((num_tokens, hidden), dtype=torch.bfloat16)
    idx = torch.zeros((num_tokens, given.get("num_topk", 2)), dtype=given.get("idx_dtype", torch.int64))
    weights = torch.ones(idx.shape) if given.get("with_weights") else None
    stats = (given.get("recv"), given.get("wait"))
    layout = given.get("expert_major", True)
    return LowLatencyDispatch(x, idx, weights, num_max, num_experts, given.get("scale_format"), *stats, layout)


def dispatch(ll: LowLatencyKernels, request: LowLatencyDispatch, with_hook: bool) -> tuple[Any, Any]:
    """The outputs by name, and the hook."""
    recv_x, count, handle, event, hook = ll.dispatch(request, with_hook)
    assert (type(event), event.event, event.extra_tensors) == (EventOverlap, None, None)
    rows, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
    src_info, layout_range, num_max, hidden, num_experts = handle
    assert (num_max, hidden, num_experts) == (request.num_max_tokens, request.x.shape[1], request.num_experts)
    return SimpleNamespace(
        rows=rows, scales=scales, count=count, src_info=src_info, layout_range=layout_range, handle=handle
    ), hook


def combine_request(output: Any, num_tokens: int = 3, num_topk: int = 2, **given: Any) -> LowLatencyCombine:
    expert_major = output.src_info.dim() == 2
    hidden, num_max = output.rows.shape[2], output.rows.shape[1] // (3 if expert_major else 1)
    return LowLatencyCombine(
        torch.zeros(output.rows.shape, dtype=torch.bfloat16),
        torch.zeros((num_tokens, num_topk), dtype=torch.int64),
        torch.ones((num_tokens, num_topk)) if expert_major else None,
        given.get("src_info", output.src_info),
        output.layout_range,
        num_max,
        7,
        given.get("use_logfmt", False),
        given.get("sum_at_home", False),
        torch.empty((num_tokens, hidden), dtype=torch.bfloat16),
        None,
        expert_major,
    )


def quick_dispatch(ll: LowLatencyKernels, request: LowLatencyDispatch, with_hook: bool = False, **other: Any) -> Any:
    flags = {None: (False, False, False), "fp32": (True, False, False), "pow2": (True, True, False)}
    arguments = {
        "x": request.x,
        "topk_idx": request.topk_idx,
        "topk_weights": request.topk_weights,
        "num_max_tokens": request.num_max_tokens,
        "num_experts": request.num_experts,
        "recv_stats": request.recv_stats,
        "wait_stats": request.wait_stats,
        "out": None,
        **dict(zip(("use_fp8", "round_scale", "use_ue8m0"), flags[request.scale_format], strict=True)),
        "expert_major": request.expert_major,
        "with_hook": with_hook,
    }
    assert other.keys() <= arguments.keys()
    return ll.try_dispatch(*{**arguments, **other}.values())


def quick_combine(ll: LowLatencyKernels, output: Any, request: LowLatencyCombine, **other: Any) -> Any:
    arguments = {
        "x": request.x,
        "topk_idx": request.topk_idx,
        "topk_weights": request.topk_weights,
        "handle": output.handle,
        "out": request.out,
        "wait_stats": None,
        "sum_at_home": request.sum_at_home,
        "use_logfmt": request.use_logfmt,
        "with_hook": False,
    }
    assert other.keys() <= arguments.keys()
    return ll.try_combine(*{**arguments, **other}.values())
