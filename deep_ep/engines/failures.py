"""What kernels reported, as typed errors that say what happened and what to do."""

from __future__ import annotations

from ..errors import BufferOverflow, CommTimeout, ConfigError, DeepEPError, PeerError
from .watch import OPERATIONS, PHASES

# DeviceError of csrc/layout/control_block.h.
_TIMEOUT, _SIGNATURE, _EXPERT_RANGE, _REFUSED = 1, 2, 4, 5


def failure(record: tuple[int, int, int, int, int, int], rank: int, timeout_s: float) -> DeepEPError:
    """The error of a record that a kernel of ``rank`` left: error, operation, phase, peer, expected, seen."""
    error, operation_code, phase_code, peer, expected, seen = record
    operation = OPERATIONS.get(operation_code, "an operation")
    phase = PHASES.get(phase_code, "a phase")
    if error == _TIMEOUT:
        return CommTimeout(
            f"{operation}: rank {rank} waited {timeout_s:g} s on the device for rank {peer} ({phase}, expected "
            f"{expected}, seen {seen}). Is rank {peer} alive and calling {operation}? A larger timeout_s (or "
            "DEEP_EP_TIMEOUT_S) gives slow ranks more time",
            operation=operation,
            phase=phase,
            peer=peer,
            waited_s=timeout_s,
        )
    if error == _SIGNATURE:
        return PeerError(
            f"{operation}: rank {peer} is in another operation than rank {rank}, or passes other shapes or dtypes "
            f"(signatures {expected:#x} and {seen:#x}); all ranks must make the same calls in the same order",
            operation=operation,
            peer=peer,
        )
    if error == _REFUSED:
        return refusal(peer, operation)
    if error == _EXPERT_RANGE:
        signed = seen - (1 << 64) if seen >> 63 else seen
        # Of a dispatch that is the layout's kernel.
        name = "get_dispatch_layout" if operation == "dispatch" else operation
        return ConfigError(
            f"{name}: topk_idx[{expected}, {peer}] is {signed}, outside the experts; mark a skipped selection with -1"
        )
    return PeerError(f"{operation}: the device reported error {error}", operation=operation)


def refusal(rank: int, operation: str = "dispatch") -> PeerError:
    """Of a rank that gave an operation up."""
    return PeerError(
        f"{operation}: rank {rank} gave the operation up because of its own arguments, so nothing was moved; its own "
        "error says why",
        operation=operation,
        peer=rank,
    )


def overflowed(rank: int, total: int, capacity: int) -> BufferOverflow:
    """Of rows that a worst-case dispatch left out."""
    return BufferOverflow(
        f"dispatch: rank {rank} was to receive {total} tokens but num_worst_tokens is {capacity}; the rows beyond it "
        f"were left out. Pass at least {total} (tokens of a rank x ranks is always enough)"
    )


def never_ran(operation: str, waited_s: float) -> CommTimeout:
    """Of kernels whose counts the host waited for."""
    return CommTimeout(
        f"{operation}: the kernels that exchange counts did not run for {waited_s:g} s; is the stream behind work that "
        "never ends?",
        operation=operation,
        waited_s=waited_s,
    )
