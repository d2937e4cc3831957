"""Events, as the callers of this interface use them.

On CPU tensors every operation has finished when it returns, so an event is complete from the start. Once a CUDA
context exists, an event is a real CUDA event on the stream that is current where it is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType

import torch

from .errors import ConfigError

# Torch's own ways to the current stream and to events lead through layers of Python that cost the host more time than
# what they do; the calls below are those that they end in.


@functools.lru_cache(maxsize=64)
def stream_of(stream_id: int, device_index: int, device_type: int) -> torch.cuda.Stream:
    """The stream that torch knows by these numbers. They say all that the object holds, so one serves again."""
    return torch.cuda.Stream(stream_id=stream_id, device_index=device_index, device_type=device_type)


def current_stream() -> torch.cuda.Stream:
    """`torch.cuda.current_stream()`, once there is a CUDA context."""
    return stream_of(*torch._C._cuda_getCurrentStream(torch._C._cuda_getDevice()))


def new_event() -> torch.cuda.Event:
    """`torch.cuda.Event()`."""
    return torch._C._CudaEventBase.__new__(torch.cuda.Event)


def record(event: torch.cuda.Event, stream: torch.cuda.Stream) -> None:
    """`torch.cuda.Event.record`."""
    torch._C._CudaEventBase.record(event, stream)


def let_wait(stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
    """`torch.cuda.Stream.wait_event`: for what was recorded last, whatever is recorded later."""
    torch._C._CudaEventBase.wait(event, stream)


class EventHandle:
    """A point in a stream. Constructing one records it on the current stream.

    Without a CUDA context there is no queued work to wait for, and the event is complete.
    """

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        # Asking for no more keeps a CPU-only program from creating a CUDA context by accident.
        if torch.cuda.is_initialized():
            self._event = new_event()
            record(self._event, current_stream())

    def current_stream_wait(self) -> None:
        """Make the current stream wait for this event (no host wait). May be called any number of times."""
        if self._event is not None:
            let_wait(current_stream(), self._event)

    def query(self) -> bool:
        """True when the work before the event has finished."""
        return True if self._event is None else bool(self._event.query())


class EventOverlap:
    """An event plus what must stay alive until it has passed; a ``with`` block waits at its end.

    Attributes:
        event: the :class:`EventHandle`, or None for a call that already synchronised. May be assigned.
        extra_tensors: tensors kept alive with this object.
        hook_after_wait: function run once, after the first wait.
    """

    # What an object has that native code makes without `__init__`.
    event: EventHandle | None = None
    extra_tensors: tuple[torch.Tensor, ...] | None = None
    hook_after_wait: Callable[[], None] | None = None

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream wait for the event, then run and drop ``hook_after_wait``.

        Raises:
            ConfigError: there is no event (the call that returned this object was synchronous).
        """
        if self.event is None:
            raise ConfigError(
                "current_stream_wait() on an EventOverlap without an event: the call that returned it was synchronous "
                "(async_finish=False), so its results are ready. Wait only on events of async_finish=True calls."
            )
        self.event.current_stream_wait()
        if self.hook_after_wait is not None:
            hook, self.hook_after_wait = self.hook_after_wait, None
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook: Callable[[], None]) -> None:
        """Run ``hook`` after the next wait. Only one may be registered at a time.

        Raises:
            ConfigError: a hook is registered already.
        """
        if self.hook_after_wait is not None:
            raise ConfigError("a hook is registered on this event already; wait on the event before adding another")
        self.hook_after_wait = hook

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        self._release_on_exit = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.event is not None:
            self.current_stream_wait(getattr(self, "_release_on_exit", False))


def event_of(previous_event: EventHandle | EventOverlap | None) -> EventHandle | None:
    """What an operation waits for that is given ``previous_event``: None, EventHandle, or EventOverlap of either.

    Raises:
        ConfigError: something else was passed.
    """
    if previous_event is None or isinstance(previous_event, EventHandle):
        return previous_event
    if isinstance(previous_event, EventOverlap):
        return previous_event.event
    raise ConfigError(
        f"previous_event is a {type(previous_event).__name__}; expected None, EventOverlap or EventHandle "
        "(Buffer.capture() returns one)"
    )


def wait_previous(previous_event: EventHandle | EventOverlap | None) -> None:
    """Make the current stream wait for ``previous_event``.

    Raises:
        ConfigError: see `event_of`.
    """
    event = event_of(previous_event)
    if event is not None:
        event.current_stream_wait()
