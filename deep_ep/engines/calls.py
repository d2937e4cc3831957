"""What surrounds an operation: the buffer's lock, what came before, the stream it runs on, and the event it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DeepEPError
from ..event import EventHandle, EventOverlap, wait_previous
from ..handles import Handle
from .aside import Aside, StreamKey

if TYPE_CHECKING:
    from .portable import PortableEngine


class Call:
    """An operation on the current stream.

    Enter it, check the arguments, `start`, run the operation, leave, and take `event`. What fails before `start` are
    this rank's arguments: the peers, which are or will be in the same operation, are told. What fails after it without
    being known to the peers (no memory, an interrupt) must not leave them waiting either.

    Attributes:
        on_device: kernels run the operation.
    """

    on_device = False

    def __init__(
        self,
        engine: PortableEngine,
        operation: str,
        inputs: object,
        previous_event: EventOverlap | EventHandle | None,
        async_finish: bool,
    ) -> None:
        self.engine = engine
        self.operation = operation
        self.inputs = inputs
        self.previous_event = previous_event
        self.async_finish = async_finish
        self.event = EventOverlap()
        self.started = False

    def __enter__(self) -> Call:
        self.engine.lock.acquire()
        self._had_grad = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            self._enter()
        except BaseException as error:
            try:
                self._fail(error)
            finally:
                self._unwind()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._leave()
            else:
                self._fail(error)
        finally:
            self._unwind()

    def start(self) -> None:
        """The arguments are good."""
        self.started = True

    def route(self, handle: Handle, rows: torch.Tensor) -> Any:
        """Read a handle, for this operation on ``rows``.

        Raises:
            ConfigError: the handle is not one of this group, or does not go with the rows.
        """
        return self.engine.route(handle, self.operation, rows)

    def keep(self, outputs: object) -> None:
        """Name the tensors that the caller gets, so that their memory is not reused too early."""

    def _enter(self) -> None:
        wait_previous(self.previous_event)

    def _leave(self) -> None:
        if self.async_finish:
            # Arguments are checked later than this object is made; whatever is no tensor here was refused there.
            self.event = EventOverlap(EventHandle(), tuple(tensors_in(self.inputs)))

    def _fail(self, error: BaseException) -> None:
        if not self.started:
            if isinstance(error, Exception):
                self.engine.refuse(self.operation, error)
        elif not isinstance(error, DeepEPError):
            self.engine.mesh.close(f"{self.operation} was interrupted on this rank")

    def _unwind(self) -> None:
        torch._C._set_grad_enabled(self._had_grad)
        self.engine.lock.release()


class KernelCall(Call):
    """A call that may launch kernels: on a device that is not the thread's current one, and beside its current stream.

    Where there is no event to wait for, what the caller enqueues next comes after an operation beside the current
    stream, failed or not.
    """

    _outputs: object = None
    _device: AbstractContextManager[Any] | None = None
    _aside: Aside | None = None
    _before: StreamKey | None = None  # the stream that was current before

    def keep(self, outputs: object) -> None:
        self._outputs = outputs

    def _use(self, device: torch.device) -> None:
        context = torch.cuda.device(device)
        context.__enter__()
        self._device = context

    def _go_aside(self, aside: Aside, event: EventHandle | None) -> None:
        self._before, self._aside = aside.enter(event), aside

    def _unwind(self) -> None:
        try:
            if self._aside is not None and self._before is not None:
                self._aside.leave(self._before, join=not self.async_finish)
        finally:
            if self._device is not None:
                self._device.__exit__(None, None, None)
            super()._unwind()


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
