"""The engine of a group whose GPUs reach each other: kernels where they serve, the portable engine elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._native import _C
from ..errors import ConfigError, TopologyError
from ..event import EventHandle, EventOverlap, wait_previous
from ..handles import Handle, check_intranode_handle
from ..layout import DispatchLayout
from ..topology import Topology
from .calls import Call
from .cuda import MAX_PEERS, CudaKernels
from .mesh import Members
from .peer_memory import PeerMemory, PoolExhausted
from .portable import DispatchRequest, DispatchResult, PortableEngine

logger = logging.getLogger("deep_ep")

ENGINES = ("auto", "cuda", "portable")
#: Symmetric memory for outputs at first; it grows when an uncached dispatch finds it too small.
MIN_POOL_BYTES = 256 << 20


@dataclass(frozen=True)
class DeviceRoute:
    """A handle whose values stay on the device; its shapes say all that the host needs."""

    handle: Handle
    num_tokens: int
    num_rows: int


class DeviceCall(Call):
    """An operation of kernels: on the current stream, or beside it on the communication stream."""

    def __init__(
        self,
        kernels: CudaKernels,
        inputs: object,
        previous_event: EventOverlap | EventHandle | None,
        async_finish: bool,
    ) -> None:
        super().__init__(inputs, previous_event, async_finish)
        self._kernels = kernels
        has_event = isinstance(previous_event, EventHandle) or (
            isinstance(previous_event, EventOverlap) and previous_event.event is not None
        )
        self._aside = async_finish or has_event
        self._has_event = has_event
        self._outputs: list[torch.Tensor] = []

    def _enter(self, entered: contextlib.ExitStack) -> None:
        self._current = torch.cuda.current_stream(self._kernels.device)
        if self._aside:
            comm = self._kernels.comm_stream()
            if not self._has_event:
                comm.wait_stream(self._current)
            entered.enter_context(torch.cuda.stream(comm))
            wait_previous(self.previous_event)
            entered.callback(self._rejoin)
        else:
            wait_previous(self.previous_event)
        entered.enter_context(self._kernels.ordered())

    def _leave(self) -> None:
        super()._leave()
        if self._aside:
            comm = self._kernels.comm_stream()
            for tensor in self.inputs:
                if tensor.is_cuda:
                    tensor.record_stream(comm)
            for tensor in self._outputs:
                tensor.record_stream(self._current)

    def _rejoin(self) -> None:
        """Without an event to wait for, what the caller enqueues next comes after the operation, failed or not."""
        if not self.async_finish:
            self._current.wait_stream(self._kernels.comm_stream())

    def keep(self, *outputs: torch.Tensor | None) -> None:
        self._outputs += [tensor for tensor in outputs if tensor is not None and tensor.is_cuda]


class CudaEngine(PortableEngine):
    """Kernels for rows on this group's GPUs; everything else as the portable engine does it."""

    name = "cuda"

    def __init__(self, portable: dict[str, Any], memory: PeerMemory, timeout_s: float) -> None:
        super().__init__(**portable)
        self.memory = memory
        self.kernels = CudaKernels(memory, timeout_s)

    def serves(self, tensor: torch.Tensor) -> bool:
        return self.kernels.serves(tensor)

    def get_comm_stream(self) -> Any:
        return self.kernels.comm_stream()

    def call(
        self,
        rows: torch.Tensor,
        inputs: object,
        previous_event: EventOverlap | EventHandle | None,
        async_finish: bool,
    ) -> Call:
        if not self.serves(rows):
            return super().call(rows, inputs, previous_event, async_finish)
        self.kernels.check()
        return DeviceCall(self.kernels, inputs, previous_event, async_finish)

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        if not self.kernels.serves_layout(topk_idx, num_experts):
            return super().layout(topk_idx, num_experts)
        self.kernels.check()
        per_rank, per_expert, in_rank = self.kernels.layout(topk_idx, num_experts)
        return DispatchLayout(per_rank, None, per_expert, in_rank)

    def route(self, handle: Handle, operation: str, rows: torch.Tensor) -> Any:
        if not self.serves(rows):
            return super().route(handle, operation, rows)
        fields = check_intranode_handle(handle, self.topology, operation)
        if fields["send_head"].device != rows.device:
            raise ConfigError(
                f"{operation}: the handle is on {fields['send_head'].device} but x is on {rows.device}; pass the "
                "handle that a dispatch of tensors on that device returned"
            )
        return DeviceRoute(tuple(handle), fields["send_head"].shape[0], fields["recv_src_idx"].shape[0])

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        if not self.serves(request.rows):
            return super().dispatch(request)
        rows, scales = request.rows, request.scales
        if rows.data_ptr() % 16 != 0:
            rows = rows.clone()
        row_bytes = rows.shape[1] * rows.element_size() + (0 if scales is None else 4 * scales.shape[1])
        dtype = str(rows.dtype).removeprefix("torch.")
        if isinstance(request.route, DeviceRoute):
            received = self.kernels.dispatch_cached(rows, scales, request.route.handle, request.num_sms)
            self.traffic.add_dispatch(received[0].shape[0], row_bytes, dtype)
            return DispatchResult(*received)
        topk = None
        if request.topk_idx is not None and request.topk_weights is not None:
            topk = (request.topk_idx, request.topk_weights)
        if request.num_tokens_per_rank is None or request.num_tokens_per_expert is None:
            raise ConfigError("dispatch: num_tokens_per_rank and num_tokens_per_expert are needed without a handle")
        result = self.kernels.dispatch(
            rows,
            scales,
            request.in_rank,
            request.num_tokens_per_rank,
            request.num_tokens_per_expert,
            topk,
            request.num_worst_tokens,
            request.num_channels,
            request.num_sms,
        )
        self.traffic.add_dispatch(result.rows.shape[0], row_bytes, dtype)
        return DispatchResult(
            result.rows,
            result.scales,
            result.topk_idx,
            result.topk_weights,
            result.num_recv_tokens_per_expert,
            result.handle,
        )

    def combine(
        self,
        rows: torch.Tensor,
        topk_weights: torch.Tensor | None,
        bias: Sequence[torch.Tensor],
        route: Any,
        num_sms: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(route, DeviceRoute):
            return super().combine(rows, topk_weights, bias, route, num_sms)
        aligned = [item if item.data_ptr() % 16 == 0 else item.clone() for item in bias]
        self.traffic.add_combine(rows.shape[0], rows.shape[1] * rows.element_size())
        return self.kernels.combine(rows, topk_weights, aligned, route.handle, num_sms)

    def empty_combine_input(self, num_rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        tensor = self.memory.try_empty((num_rows, hidden), dtype)
        return super().empty_combine_input(num_rows, hidden, dtype) if tensor is None else tensor

    def check(self) -> None:
        self.kernels.check()
        self.kernels.check_overflow()

    def destroy(self) -> None:
        with self.lock:
            self.kernels.close()
            self.memory.close()
            super().destroy()


def wished_engine() -> str:
    """`DEEP_EP_ENGINE`: auto, cuda or portable.

    Raises:
        ConfigError: anything else.
    """
    wish = os.environ.get("DEEP_EP_ENGINE", "").strip() or "auto"
    if wish not in ENGINES:
        raise ConfigError(f"DEEP_EP_ENGINE={wish!r}: expected one of {', '.join(ENGINES)}")
    return wish


def why_not_cuda(topology: Topology, device: torch.device) -> str:
    """Why this rank cannot use the kernels; empty if it can."""
    if device.type != "cuda":
        return "the buffer is not on a CUDA device"
    if not _C.has_cuda:
        return "deep_ep was built without nvcc"
    if topology.num_nodes != 1:
        return f"the group spans {topology.num_nodes} nodes"
    if topology.num_ranks > MAX_PEERS:
        return f"the group has {topology.num_ranks} ranks, more than {MAX_PEERS}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, below 9.0"
    return ""


def open_peer_memory(
    members: Members, topology: Topology, device: torch.device, pool_bytes: int, use_fabric: bool, timeout_s: float
) -> PeerMemory | None:
    """The peers' memory if all ranks can use the kernels, else None on all of them. Collective.

    Raises:
        TopologyError: `DEEP_EP_ENGINE=cuda` asks for kernels that the ranks cannot use.
        ConfigError: ranks wish for different engines.
    """
    reports = members.gather((wished_engine(), why_not_cuda(topology, device), pool_bytes))
    wishes = [wish for wish, _, _ in reports]
    if len(set(wishes)) != 1:
        raise ConfigError(f"DEEP_EP_ENGINE by rank is {wishes}; set it to the same value on all ranks")
    if wishes[0] == "portable":
        return None
    reasons = {rank: reason for rank, (_, reason, _) in enumerate(reports) if reason}
    failure = ""
    if reasons:
        rank, reason = next(iter(reasons.items()))
        failure = f"ranks {sorted(reasons)} cannot use the kernels; rank {rank} says: {reason}"
    else:
        size = max(pool for _, _, pool in reports)
        try:
            return PeerMemory(members, device, _C.CONTROL_BLOCK_BYTES, size, use_fabric=use_fabric, timeout_s=timeout_s)
        except (TopologyError, PoolExhausted) as error:  # the same on all ranks
            failure = str(error)
    if wishes[0] == "cuda":
        raise TopologyError(f"DEEP_EP_ENGINE=cuda, but {failure}")
    if device.type == "cuda" and members.rank == 0:
        logger.warning("deep_ep: the portable engine is used, since %s", failure)
    return None
