"""The symmetric memory of low-latency operations: one block a rank, reserved by all ranks together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .._native import _C
from ..errors import ConfigError, PeerError, PoolExhausted
from .aside import Aside
from .pool import is_capturing


class Launcher(Protocol):
    """What this module uses of `CudaKernels`."""

    memory: Any
    device: torch.device
    rank: int
    num_ranks: int
    launches: dict[str, int]

    @property
    def domain(self) -> Any: ...
    @property
    def order(self) -> Any: ...
    @property
    def aside(self) -> Aside: ...
    @property
    def failure(self) -> Exception | None: ...
    @property
    def max_blocks(self) -> int: ...
    def check(self) -> None: ...


class RegionShape(NamedTuple):
    """The largest call that a region takes: tokens a rank, selections a token, experts, and columns."""

    num_max_tokens: int
    num_topk: int
    num_experts: int
    hidden: int

    def covers(self, other: RegionShape) -> bool:
        """Whether a call of this other shape fits."""
        return all(have >= need for have, need in zip(self, other, strict=True))

    def union(self, other: RegionShape) -> RegionShape:
        """The smallest shape that covers both."""
        return RegionShape(*map(max, self, other))

    def num_bytes(self, num_ranks: int) -> int:
        """Of a rank's region."""
        total: int = _C.low_latency_layout(num_ranks, *self)["total"]
        return total


@dataclass(slots=True, eq=False)
class Region:
    """A symmetric block that operations use.

    Attributes:
        peers: `_C.LowLatencyPeers`.
        offset: of the own block in the heap.
        num_pending: operations of this rank whose hook has not been called.
        is_leased: a captured graph uses it, so it stays until the buffer is destroyed.
    """

    shape: RegionShape
    peers: Any
    offset: int
    num_pending: int = 0
    is_leased: bool = False

    def lease(self) -> None:
        """A captured graph uses it from now on."""
        self.is_leased = True


class Regions:
    """The region of a buffer, and those before it that are still needed.

    Args:
        masked, waits: what regions have in common, on the device; see `csrc/runtime/low_latency_peers.h`.
        mask_after_s: as for `LowLatencyKernels`.
    """

    def __init__(self, kernels: Launcher, masked: torch.Tensor, waits: torch.Tensor, mask_after_s: float) -> None:
        self._kernels, self._device = kernels, kernels.device
        self._masked, self._waits, self._mask_after_s = masked, waits, mask_after_s
        self.current: Region | None = None
        self.retired: list[Region] = []

    def region_for(self, shape: RegionShape) -> Region:
        """The region, large enough for calls of this shape. Collective when the present one is too small for it.

        Raises:
            ConfigError: it is too small during graph capture, or ranks pass different shapes.
            PoolExhausted: symmetric memory has no room, and the limit or the device leaves none; on all ranks.
            CommTimeout, PeerError: a rank did not come, or gave the operation up.
        """
        region = self.current
        if region is None or not region.shape.covers(shape):
            if is_capturing():
                raise ConfigError(
                    f"low-latency calls of {shape} need a larger region, which cannot be reserved while a CUDA graph "
                    "is captured; make one such call on all ranks before the capture"
                )
            region = self._reserve(shape if region is None else region.shape.union(shape), shape)
        return region

    def _reserve(self, shape: RegionShape, wanted: RegionShape) -> Region:
        memory = self._kernels.memory
        old = [*self.retired] if self.current is None else [*self.retired, self.current]
        # All ranks are in this call, so what they launched before it ends.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        states = memory.rendezvous(
            "low-latency region", (wanted, [each.num_pending > 0 or each.is_leased for each in old])
        )
        for rank, state in enumerate(states):
            if state is None:
                raise PeerError(
                    f"low-latency region: rank {rank} gave the operation up because of its own arguments; its own "
                    "error says why",
                    operation="low_latency_dispatch",
                    peer=rank,
                )
        shapes = [RegionShape(*state[0]) for state in states]
        if len(set(shapes)) != 1:
            raise ConfigError(f"low-latency calls by rank are {shapes}; expected the same on all ranks")
        num_bytes = shape.num_bytes(self._kernels.num_ranks)
        offsets = memory.reserve_block(num_bytes)
        if not offsets:
            memory.grow(num_bytes)
            offsets = memory.reserve_block(num_bytes)
        if not offsets:
            raise PoolExhausted(
                f"low-latency region: no room in symmetric memory for {num_bytes} bytes on every rank, for {shape}: "
                f"{memory.usage()}. Raise max_pool_bytes, leave more of the GPU's memory, or pass smaller maxima"
            )
        addresses = [base + offset for base, offset in zip(memory.bases, offsets, strict=True)]
        peers = _C.LowLatencyPeers(
            self._kernels.domain,
            addresses,
            *shape,
            memory.carries_lines,
            self._masked.data_ptr(),
            self._waits.data_ptr(),
            self._mask_after_s,
        )
        peers.clear()
        memory.rendezvous("low-latency region is ready", None)
        self.retired = []
        for i, each in enumerate(old):
            if any(state[1][i] for state in states):
                self.retired.append(each)
            else:
                memory.heap.return_block(each.offset)
        self.current = Region(shape, peers, offsets[self._kernels.rank])
        return self.current

    def usage(self) -> dict[str, int]:
        """``low_latency_bytes``: of the region, and of those before it that hooks or captured graphs still need."""
        regions = [*self.retired, *([] if self.current is None else [self.current])]
        return {"low_latency_bytes": sum(each.shape.num_bytes(self._kernels.num_ranks) for each in regions)}

    def refuse(self) -> None:
        """Meet the peers, who are in the first operation and reserve the region, to tell them that this rank is not."""
        self._kernels.memory.rendezvous("low-latency region", None)

    def clear(self) -> None:
        """Forget all operations. No kernel of any rank may run."""
        for region in [*self.retired, *([] if self.current is None else [self.current])]:
            region.num_pending = 0
            region.peers.clear()
