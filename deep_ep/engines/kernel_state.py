"""What the parts of `CudaKernels` share while an operation is put together."""

from __future__ import annotations

from typing import Any

import torch

from .._native import _C
from .arena import Arena
from .peer_memory import PeerMemory


class KernelState:
    """The operation under way: its stream, what it launched, and the memory that it found or missed."""

    memory: PeerMemory
    device: torch.device
    rank: int
    num_ranks: int
    launches: dict[str, int]
    _small: Arena  # ordinary memory
    _sources: Arena  # memory that peers write
    _int32: torch.Tensor  # see `outputs.template`
    _push: Any
    _stream: int
    _capturing: bool
    _launched: bool
    _missing: int  # bytes that the pool could not give
    _is_full: bool  # whether it cannot grow, the same on all ranks

    def note_missing(self, num_bytes: int) -> None:
        """The pool could not give these; the next call that can grows it."""
        self._missing = max(self._missing, num_bytes)

    def _count(self, kernel: str) -> None:
        self._launched = True
        self.launches[kernel] = self.launches.get(kernel, 0) + 1

    def _copy(self, copies: list[tuple[int, int, int]], sms: int) -> None:
        """(from, to, bytes) within this rank's memory, on the SMs of the call; from 0: fill with -1."""
        self._count("dispatch_combine_copy")
        _C.copy_segments(copies, sms, self._stream)
