"""Low-latency kernels without a GPU: everything native is replaced, and keeps what it was called with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from deep_ep._native import _C
from deep_ep.engines import low_latency_regions
from deep_ep.engines.cuda_ll import LowLatencyKernels
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


class FakePlan:
    """A plan of either kind. Launches are kept on the class, in order, without whether they were captured."""

    launches: ClassVar[list[tuple[Any, ...]]] = []
    captured: ClassVar[list[bool]] = []

    def __init__(
        self, peers: FakePeers, queue: FakeQueue, signature: int, num_topk: int, is_int64: bool, *shape: Any
    ) -> None:
        self.peers, self.signature, self.is_int64, self.shape = peers, signature, is_int64, shape
        num_experts, num_max = shape[:2]
        num_ranks = len(peers.regions)
        rank = 1 if num_ranks > 1 else 0
        num_local = num_local_experts(num_experts, num_ranks, rank)
        self.outputs = _C.LowLatencyOutputs(num_local, num_ranks, num_max, num_topk)

    def launch(self, *arguments: Any) -> None:
        FakePlan.launches.append((self, *arguments[:-1]))
        FakePlan.captured.append(arguments[-1])


class FakeMemory:
    """Symmetric memory of ranks that agree, unless a test says what the others answer."""

    def __init__(self, num_ranks: int = 3) -> None:
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

    @property
    def has_failed(self) -> bool:
        return self.failure is not None

    def blocks(self, num_sms: int) -> int:
        return min(num_sms, 66)

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure


class FakeLock:
    held = 0

    def __enter__(self) -> None:
        self.held += 1

    def __exit__(self, *args: object) -> None:
        self.held -= 1


def install_fakes(monkeypatch: Any) -> None:
    """Let `LowLatencyKernels` find these in place of what is native."""
    for name, fake in (
        ("LowLatencyPeers", FakePeers),
        ("LowLatencyQueue", FakeQueue),
        ("LowLatencyDispatchPlan", FakePlan),
        ("LowLatencyCombinePlan", FakePlan),
    ):
        monkeypatch.setattr(_C, name, fake, raising=False)
    monkeypatch.setattr(FakePlan, "launches", [])
    monkeypatch.setattr(FakePlan, "captured", [])


def capture(ll: LowLatencyKernels, monkeypatch: Any, on: bool = True) -> None:
    """The current stream is captured from now on, or no more."""
    ll._queue.state = int(on)
    monkeypatch.setattr(low_latency_regions, "is_capturing", lambda: on)
