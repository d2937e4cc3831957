"""Typed errors. Every message says what was given, what is expected, and what to do about it."""

from __future__ import annotations


class DeepEPError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(DeepEPError, ValueError):
    """An argument has the wrong dtype, shape, device, stride or value. Nothing was sent."""


class TopologyError(DeepEPError, RuntimeError):
    """The group, the hosts or the links between ranks do not fit what was asked for."""


class CommTimeout(DeepEPError, RuntimeError):
    """A wait passed its deadline.

    Attributes:
        operation: name of the call that waited, e.g. ``"dispatch"``.
        phase: what it waited for, e.g. ``"header"`` or ``"rows"``.
        peer: rank that was awaited, or None where no single peer can be named.
        waited_s: seconds waited.
    """

    def __init__(
        self,
        message: str,
        *,
        operation: str = "",
        phase: str = "",
        peer: int | None = None,
        waited_s: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.operation = operation
        self.phase = phase
        self.peer = peer
        self.waited_s = waited_s


class PeerError(DeepEPError, RuntimeError):
    """A peer died, or refused its own arguments, or called another operation than this rank.

    Attributes:
        operation: name of the call that failed.
        peer: rank of the peer, or None where no single peer can be named.
    """

    def __init__(self, message: str, *, operation: str = "", peer: int | None = None) -> None:
        super().__init__(message)
        self.operation = operation
        self.peer = peer


class BufferOverflow(DeepEPError, RuntimeError):
    """More tokens arrived than the fixed capacity that the caller gave (``num_worst_tokens``)."""


class BufferDestroyed(DeepEPError, RuntimeError):
    """The buffer was destroyed, or an earlier failure left its connections unusable."""


class PoolExhausted(DeepEPError, MemoryError):
    """The pool of symmetric memory, or the device, has no room for what was asked."""
