"""What surrounds a low-latency operation: on kernels, or on the portable engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..event import EventHandle, EventOverlap
from .calls import Call, tensors_in

if TYPE_CHECKING:
    from .portable import PortableEngine

_KINDS = {"low_latency_dispatch": 0, "low_latency_combine": 1}


class LowLatencyCall(Call):
    """An operation on the current stream, or, asynchronous ones on kernels, on the communication stream.

    Args:
        kernels: `LowLatencyKernels` that serve the operation, or None.
        inputs: tensors that an asynchronous operation reads.
    """

    def __init__(
        self, engine: PortableEngine, operation: str, kernels: Any, inputs: object, async_finish: bool
    ) -> None:
        super().__init__(engine, operation, inputs, None, async_finish)
        self._kernels = kernels
        self._contexts: list[Any] = []
        self._outputs: object = None

    def keep(self, outputs: object) -> None:
        self._outputs = outputs

    def _enter(self) -> None:
        if self._kernels is None:
            return
        device = self._kernels.device
        if torch._C._cuda_getDevice() != device.index:  # the current device is that of the thread
            self._push(torch.cuda.device(device))
        if self.async_finish:
            comm = self.engine.get_comm_stream()
            comm.wait_stream(torch.cuda.current_stream(device))
            self._push(torch.cuda.stream(comm))

    def _push(self, context: Any) -> None:
        context.__enter__()
        self._contexts.append(context)

    def _leave(self) -> None:
        if self.async_finish:
            # The event keeps the tensors in place of `record_stream`, which graphs cannot take.
            self.event = EventOverlap(EventHandle(), tuple(tensors_in((self.inputs, self._outputs))))

    def _fail(self, error: BaseException) -> None:
        if self._kernels is None:
            super()._fail(error)
        elif not self.started and isinstance(error, Exception):
            self._kernels.refuse(_KINDS[self.operation])

    def _unwind(self) -> None:
        try:
            while self._contexts:
                self._contexts.pop().__exit__(None, None, None)
        finally:
            super()._unwind()
