"""Counters of what a buffer really moved, so that a test or a training loop can prove it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrafficStats:
    """Calls, rows and payload bytes since construction or the last :meth:`reset`.

    Bytes count payload rows and their scales, to every destination, the own rank included; routing metadata
    (indices, weights, counts) is left out. A row that goes to two ranks counts twice.

    Low-latency operations on kernels count the tokens of this rank once each, rows sent by a dispatch and results of a
    combine: how many ranks each went to is known on the device only.
    """

    dispatch_calls: int = 0
    combine_calls: int = 0
    dispatch_rows: int = 0
    combine_rows: int = 0
    dispatch_bytes: int = 0
    combine_bytes: int = 0
    dispatch_dtypes: dict[str, int] = field(default_factory=dict)

    def add_dispatch(self, rows: int, row_bytes: int, dtype: str) -> None:
        """Count one dispatch of ``rows`` rows of ``row_bytes`` bytes (scales included)."""
        self.dispatch_calls += 1
        self.dispatch_rows += rows
        self.dispatch_bytes += rows * row_bytes
        self.dispatch_dtypes[dtype] = self.dispatch_dtypes.get(dtype, 0) + 1

    def add_combine(self, rows: int, row_bytes: int) -> None:
        """Count one combine that sent ``rows`` rows of ``row_bytes`` bytes."""
        self.combine_calls += 1
        self.combine_rows += rows
        self.combine_bytes += rows * row_bytes

    def reset(self) -> None:
        """Set every counter to zero."""
        self.__init__()  # type: ignore[misc]
