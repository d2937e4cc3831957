"""What surrounds a low-latency operation: on kernels, or on the portable engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..event import EventHandle, EventOverlap
from .calls import KernelCall, tensors_in

if TYPE_CHECKING:
    from .portable import PortableEngine


#: Low-latency operations of a buffer whose receive hooks have not been called.
MAX_OUTSTANDING = 2


def check_num_outstanding(operation: str, num_pending: int) -> None:
    """Whether another operation may begin.

    Raises:
        ConfigError: there are `MAX_OUTSTANDING` already.
    """
    if num_pending >= MAX_OUTSTANDING:
        raise ConfigError(
            f"{operation}: {num_pending} low-latency operations are outstanding, which is the most that a buffer "
            "holds. Call their receive hooks first (one that was dropped without being called needs `recover`)"
        )


class ReceiveHook:
    """Finishes a low-latency operation when called; calling it again does nothing.

    Args:
        finish: called with ``arguments``.
        kept: what must live until then.
    """

    def __init__(self, finish: Callable[..., None], *arguments: object, kept: object = None) -> None:
        self._call: tuple[Callable[..., None], tuple[object, ...], object] | None = (finish, arguments, kept)

    @property
    def pending(self) -> bool:
        """True until the hook is called."""
        return self._call is not None

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call[0](*call[1])


class LowLatencyCall(KernelCall):
    """An operation on the current stream, or, asynchronous ones on kernels, on the communication stream.

    Args:
        kernels: `LowLatencyKernels` that serve the operation, or None.
        inputs: tensors that an asynchronous operation reads.
        check_room: called first, under the lock, with the operation and its kernels. What it raises keeps this rank out
            of the operation: the peers are not told, so that the call can be made again.
    """

    def __init__(
        self,
        engine: PortableEngine,
        operation: str,
        kernels: Any,
        inputs: object,
        async_finish: bool,
        check_room: Callable[[str, Any], None],
    ) -> None:
        super().__init__(engine, operation, inputs, None, async_finish)
        self._kernels = kernels
        self._check_room = check_room
        self._takes_part = False

    def _enter(self) -> None:
        self._check_room(self.operation, self._kernels)
        self._takes_part = True
        if self._kernels is None:
            return
        if self._kernels.current_device() != self._kernels.index:  # the current device is that of the thread
            self._use(self._kernels.device)
        if self.async_finish:
            self._go_aside(self._kernels.aside, None)

    def _leave(self) -> None:
        if self.async_finish:
            # The event keeps the tensors in place of `record_stream`, which graphs cannot take.
            self.event = EventOverlap(EventHandle(), tuple(tensors_in((self.inputs, self._outputs))))

    def _fail(self, error: BaseException) -> None:
        if not self._takes_part:
            return
        if self._kernels is None:
            super()._fail(error)
        elif not self.started and isinstance(error, Exception):
            self._kernels.refuse(self.operation)
