"""The many small tensors of a call, cut from slabs: an allocation of torch costs more than all else that they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .pool import current_stream_of, is_capturing

if TYPE_CHECKING:
    from .peer_memory import PeerMemory

SLAB_BYTES = 2 << 20
ALIGNMENT = 128
#: Larger requests get a storage of their own, so that little of a slab stays unused.
LARGEST_PART = SLAB_BYTES // 4
_MAX_STREAMS = 4

#: Bytes, handle of the current stream, whether it is captured -> storage, or None when there is no room.
Source = Callable[[int, int, bool], torch.UntypedStorage | None]


class Arena:
    """Cuts parts from slabs, from the front to the back and never twice.

    Every part belongs to the stream that was current when it was taken; each stream has a slab of its own, in the way
    of torch's allocator. A slab lives as long as a tensor on it, and then goes back to its source as a whole, so what
    lives long is better not cut from the same arena as what is dropped soon. Not thread safe.

    Args:
        source: where slabs and large parts come from.
        device: the device of the memory; a CUDA device has an index.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self._source = source
        self._stream = current_stream_of(device)
        self._slabs: dict[int, torch.UntypedStorage] = {}
        self._used: dict[int, int] = {}

    @classmethod
    def ordinary(cls, device: torch.device) -> Arena:
        """On memory of torch's default pool; `take` never returns None."""

        def allocate(num_bytes: int, stream: int, capturing: bool) -> torch.UntypedStorage:
            return torch.UntypedStorage(num_bytes, device=device)

        return cls(allocate, device)

    @classmethod
    def symmetric(cls, memory: PeerMemory) -> Arena:
        """On memory that peers map; `take` returns None when the pool is full."""

        def allocate(num_bytes: int, stream: int, capturing: bool) -> torch.UntypedStorage | None:
            taken = memory.take(num_bytes, stream, capturing)
            return None if taken is None else taken[0]

        return cls(allocate, memory.device)

    def take(
        self, num_bytes: int, stream: int | None = None, capturing: bool | None = None
    ) -> tuple[torch.UntypedStorage, int] | None:
        """Memory for the current stream, with any contents.

        Args:
            num_bytes: size in bytes.
            stream: handle of the current stream, where the caller has it at hand.
            capturing: whether that stream is being captured into a graph, where the caller knows.

        Returns:
            a storage and the offset in bytes of the part in it, a multiple of 128; or None if the source has no room.
            While a graph is captured every part is a storage of its own: a replay writes again to what the capture
            took, where the rest of a slab would meanwhile belong to others.
        """
        if stream is None:
            stream = self._stream()
        if capturing is None:
            capturing = is_capturing()
        if capturing or num_bytes > LARGEST_PART:
            return self._apart(num_bytes, stream, capturing)
        start = self._used.get(stream, SLAB_BYTES)
        if start + num_bytes > SLAB_BYTES or stream not in self._slabs:
            slab = self._source(SLAB_BYTES, stream, False)
            if slab is None:
                return self._apart(num_bytes, stream, False)
            if len(self._slabs) >= _MAX_STREAMS and stream not in self._slabs:
                oldest = next(iter(self._slabs))
                del self._slabs[oldest], self._used[oldest]
            self._slabs[stream] = slab
            start = 0
        self._used[stream] = start + -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return self._slabs[stream], start

    def _apart(self, num_bytes: int, stream: int, capturing: bool) -> tuple[torch.UntypedStorage, int] | None:
        storage = self._source(max(num_bytes, 1), stream, capturing)
        return None if storage is None else (storage, 0)

    def clear(self) -> None:
        """Let go of the slabs; the parts taken stay valid."""
        self._slabs.clear()
        self._used.clear()
