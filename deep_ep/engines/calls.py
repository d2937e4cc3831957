"""What surrounds an operation: waiting for what came before, the stream it runs on, and the event it leaves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType

import torch

from ..event import EventHandle, EventOverlap, wait_previous


class Call:
    """An operation on the current stream. Enter it, run the operation, and take `event` after it."""

    def __init__(self, inputs: object, previous_event: EventOverlap | EventHandle | None, async_finish: bool) -> None:
        # Arguments are checked later; whatever is no tensor here is refused there.
        self.inputs = tuple(_tensors(inputs))
        self.previous_event = previous_event
        self.async_finish = async_finish
        self.event = EventOverlap()
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> Call:
        # What is entered is left again also if entering fails half-way.
        with contextlib.ExitStack() as entered:
            entered.enter_context(torch.no_grad())
            self._enter(entered)
            self._contexts = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._leave()
        self._contexts.__exit__(kind, error, traceback)

    def _enter(self, entered: contextlib.ExitStack) -> None:
        wait_previous(self.previous_event)

    def _leave(self) -> None:
        if self.async_finish:
            self.event = EventOverlap(EventHandle(), self.inputs)

    def keep(self, *outputs: torch.Tensor | None) -> None:
        """Name the tensors that the caller gets, so that their memory is not reused too early."""


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
