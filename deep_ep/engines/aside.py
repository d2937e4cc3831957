"""Operations beside the current stream: on a buffer's communication stream, which forks off and joins by events."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..event import EventHandle, let_wait, new_event, record, stream_of

#: A stream as torch numbers it: its id, the index and the type of its device.
StreamKey = tuple[int, int, int]


def _make_current(stream_id: int, device_index: int, device_type: int) -> None:
    torch._C._cuda_setStream(stream_id=stream_id, device_index=device_index, device_type=device_type)


class Aside:
    """A stream for operations, by one thread at a time: `enter`, run one, `keep`, `leave`.

    The device of the stream is the current one meanwhile.

    Attributes:
        stream: it.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._key: StreamKey = (stream.stream_id, stream.device_index, stream.device_type)
        # One for all forks and joins. A wait is for the record before it, whatever is recorded later, and here each
        # record has its wait right behind it. So it is under capture: the wait makes an edge of the graph at once, and
        # the edge stays when the event is recorded again, in this capture, in another one, or in none.
        self._event = new_event()

    def enter(self, event: EventHandle | None) -> StreamKey:
        """Make the stream the current one; it waits for ``event``, or, where that is None, for the current stream.

        The wait is the first of all: one for a stream that is being captured takes this one into the capture.

        Returns:
            the stream that was current.
        """
        before: StreamKey = torch._C._cuda_getCurrentStream(self._key[1])
        if event is None:
            self._order(stream_of(*before), self.stream)
        _make_current(*self._key)
        if event is not None:
            try:
                event.current_stream_wait()
            except BaseException:
                _make_current(*before)
                raise
        return before

    def keep(self, before: StreamKey, read: Iterable[torch.Tensor | None], made: Iterable[torch.Tensor | None]) -> None:
        """Tell torch's allocator who uses the memory of an operation, so that it is not reused too early.

        Args:
            before: what `enter` returned.
            read: tensors that the operation reads, on whatever stream they were made; one of each storage will do.
            made: those that it made here, for use on the stream before.
        """
        this, other = self.stream, stream_of(*before)
        for tensor in read:
            if tensor is not None:
                tensor.record_stream(this)
        for tensor in made:
            if tensor is not None:
                tensor.record_stream(other)

    def leave(self, before: StreamKey, *, join: bool) -> None:
        """Make the stream before the current one again; with ``join`` it waits for this one."""
        _make_current(*before)
        if join:
            self._order(self.stream, stream_of(*before))

    def _order(self, first: torch.cuda.Stream, then: torch.cuda.Stream) -> None:
        record(self._event, first)
        let_wait(then, self._event)
