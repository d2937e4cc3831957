"""The engine of a group whose GPUs reach each other: kernels where they serve, the portable engine elsewhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .._native import _C
from ..config import Config
from ..errors import ConfigError, PoolExhausted, TopologyError
from ..event import EventHandle, EventOverlap, event_of, wait_previous
from ..fp8 import ScaleFormat
from ..handles import Handle, check_intranode_handle
from ..layout import DispatchLayout
from ..topology import Topology
from .calls import Call, KernelCall, tensors_in
from .cuda import MAX_PEERS, CudaKernels
from .cuda_ll import LowLatencyKernels
from .dispatch_outputs import memory_of
from .mesh import Members
from .peer_memory import PeerMemory
from .portable import DispatchRequest, DispatchResult, PortableEngine
from .short_cuts import ConfigOf, When

T = TypeVar("T")

logger = logging.getLogger("deep_ep")

ENGINES = ("auto", "cuda", "portable")
#: Symmetric memory for outputs at first; it grows when an uncached dispatch finds it too small.
MIN_POOL_BYTES = 256 << 20


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """It, or a copy of it, on an address that bulk copies and vector loads take."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@dataclass(slots=True)
class DeviceRoute:
    """A handle whose values stay on the device; its shapes say all that the host needs."""

    handle: Handle
    num_tokens: int
    num_rows: int


class DeviceCall(KernelCall):
    """An operation of kernels: on the current stream, or beside it on the communication stream."""

    engine: CudaEngine
    on_device = True
    _begun = False

    def _enter(self) -> None:
        kernels = self.engine.kernels
        if torch._C._cuda_getDevice() != kernels.device.index:  # the current device is that of the thread
            self._use(kernels.device)
        try:
            event = event_of(self.previous_event)
            if self.async_finish or event is not None:
                self._go_aside(kernels.aside, event)
        finally:
            kernels.begin()  # also where this rank can only refuse
            self._begun = True

    def _leave(self) -> None:
        if self._before is not None:
            super()._leave()
            read = [tensor for tensor in tensors_in(self.inputs) if tensor.is_cuda]
            self.engine.kernels.aside.keep(self._before, read, tensors_in(self._outputs))

    def _fail(self, error: BaseException) -> None:
        # Whatever came before the first launch has moved nothing; the peers are, or will be, in this operation.
        if self._begun and isinstance(error, Exception):
            self.engine.kernels.refuse(self.operation)

    def _unwind(self) -> None:
        try:
            if self._begun:
                self.engine.kernels.end()
        finally:
            super()._unwind()

    def route(self, handle: Handle, rows: torch.Tensor) -> DeviceRoute:
        engine = self.engine
        if not engine.is_plain(handle, rows.device):
            fields = check_intranode_handle(handle, engine.topology, self.operation)
            raise ConfigError(
                f"{self.operation}: the handle is on {fields['send_head'].device} but x is on {rows.device}; pass the "
                "handle that a dispatch of tensors on that device returned"
            )
        return DeviceRoute(handle, handle[5].shape[0], handle[3].shape[0])


class CudaEngine(PortableEngine):
    """Kernels for rows on this group's GPUs; everything else as the portable engine does it."""

    name = "cuda"

    def __init__(
        self, portable: dict[str, Any], memory: PeerMemory, timeout_s: float, mask_after_s: float = 0.0
    ) -> None:
        super().__init__(**portable)
        self.memory = memory
        self._prefix_shape = (memory.num_ranks, memory.num_ranks)
        self.ranks_per_gpu = memory.max_sharing  # the same on all ranks, since default budgets depend on it
        self.kernels = CudaKernels(memory, timeout_s, self.traffic)
        self.low_latency = LowLatencyKernels(self.kernels, self.lock, self.traffic, mask_after_s)

    def serves(self, x: object, use_fp8: bool = False) -> bool:
        return self.kernels.serves(x, use_fp8)

    def get_comm_stream(self) -> Any:
        return self.kernels.comm_stream()

    def call(
        self,
        operation: str,
        x: object,
        use_fp8: bool,
        inputs: object,
        previous_event: EventOverlap | EventHandle | None,
        async_finish: bool,
    ) -> Call:
        try:
            on_device = self.serves(x, use_fp8)
        except ConfigError:
            with self.lock:
                self.kernels.begin()
                self.kernels.refuse(operation)
                self.kernels.end()
            raise
        if not on_device:
            return super().call(operation, x, use_fp8, inputs, previous_event, async_finish)
        self.kernels.check()
        return DeviceCall(self, operation, inputs, previous_event, async_finish)

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        kernels = self.kernels
        if not kernels.serves_layout(topk_idx, num_experts):
            return super().layout(topk_idx, num_experts)
        if torch._C._cuda_getDevice() != kernels.device.index:  # the current device is that of the thread
            with torch.cuda.device(kernels.device):
                return self.layout(topk_idx, num_experts)
        kernels.check()
        per_rank, per_expert, in_rank = kernels.layout(topk_idx, num_experts)
        return DispatchLayout(per_rank, None, per_expert, in_rank)

    def try_layout(
        self, topk_idx: Any, num_experts: Any, previous_event: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        kernels = self.kernels
        with self.lock:
            if torch._C._cuda_getDevice() != kernels.device.index:  # the current device is that of the thread
                return None
            if previous_event is not None:
                try:
                    wait_previous(previous_event)  # where the long way is taken, once more
                except ConfigError:
                    return None
            return kernels.try_layout(topk_idx, num_experts)

    def try_dispatch(
        self,
        x: Any,
        handle: Any,
        layout: tuple[Any, Any, Any],
        topk: tuple[Any, Any],
        scale_format: ScaleFormat | None,
        config: Config | None,
        default_config: ConfigOf,
        when: When,
    ) -> tuple[DispatchResult, EventOverlap] | None:
        rows, scales = x if type(x) is tuple and len(x) == 2 else (x, None)
        kernels = self.kernels
        inputs = None
        for plan in kernels.alike(scale_format, scales, topk[0]):
            if handle is not None:
                inputs = plan.read_again(rows, scales, handle)
            else:
                inputs = plan.read(rows, scales, *layout, *topk)
            if inputs is not None:
                break
        if inputs is None:
            return None
        if config is None:
            config = default_config("dispatch", rows, scale_format is not None)
        if handle is not None:
            by_handle = ((rows, scales, handle[5]), handle[:5])
            return self._run("dispatch", when, by_handle, memory_of, kernels.run_cached, plan, *inputs, config.num_sms)
        per_rank, in_rank, per_expert = layout
        sent, addresses, num_experts = inputs
        given = ((rows, scales, in_rank, per_expert, *topk), (per_rank,))
        last = (in_rank, num_experts, 0, config.num_channels, config.num_sms)
        return self._run("dispatch", when, given, memory_of, kernels.run_dispatch, plan, sent, addresses, *last)

    def try_combine(
        self, x: Any, handle: Any, topk_weights: Any, config: Config | None, default_config: ConfigOf, when: When
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap] | None:
        kernels = self.kernels
        inputs = kernels.read_combine(x, handle, topk_weights)
        if inputs is None:
            return None
        if config is None:
            config = default_config("combine", x, False)
        given = ((x, topk_weights, handle[0], handle[5]), handle[1:5])
        biases: list[int] = []
        last = (x, topk_weights, biases, handle[0], inputs, config.num_sms)
        done = self._run("combine", when, given, tuple, kernels.run_combine, *last)
        return None if done is None else (*done[0], done[1])

    def _run(
        self,
        operation: str,
        when: When,
        given: tuple[tuple[torch.Tensor | None, ...], tuple[torch.Tensor, ...]],
        memory: Callable[[T], tuple[torch.Tensor | None, ...]],
        run: Callable[..., T],
        *arguments: object,
    ) -> tuple[T, EventOverlap] | None:
        """What `DeviceCall` does around an operation. None on another device, and where the event is none.

        Args:
            given: the tensors that kernels read, where None stands for one that was left out, and those of which only
                the shapes count. Of a handle a repeated dispatch reads send_head, and a combine rank_prefix_matrix as
                well. What is not read may be reused at once, so only the former are recorded on the communication
                stream (`Aside.keep`); the event keeps all of them, as it does on the long way.
            memory: gives one tensor on each storage of what ``run`` returned.
        """
        kernels, (previous, async_finish) = self.kernels, when
        event = None
        if previous is not None:
            try:
                event = event_of(previous)
            except ConfigError:
                return None
        with self.lock:
            if torch._C._cuda_getDevice() != kernels.device.index:  # the current device is that of the thread
                return None
            kernels.check()
            had_grad, before = torch.is_grad_enabled(), None
            torch._C._set_grad_enabled(False)
            try:
                if async_finish or event is not None:
                    before = kernels.aside.enter(event)
                kernels.begin()
                try:
                    result = run(*arguments)
                except Exception:
                    kernels.refuse(operation)
                    raise
                else:
                    if before is None:
                        return result, EventOverlap()
                    read, others = given
                    overlap = EventOverlap()
                    if async_finish:
                        kept = [tensor for tensor in (*read, *others) if tensor is not None]
                        overlap = EventOverlap(EventHandle(), tuple(kept))
                    kernels.aside.keep(before, read, memory(result))
                    return result, overlap
                finally:
                    kernels.end()
            finally:
                torch._C._set_grad_enabled(had_grad)
                if before is not None:
                    kernels.aside.leave(before, join=not async_finish)

    def is_plain(self, handle: Handle, device: torch.device) -> bool:
        """Whether a handle is as dispatch returns it, on this device."""
        if not isinstance(handle, (tuple, list)) or len(handle) != 6:
            return False
        prefix, _, _, src_idx, in_rank, head = handle
        try:
            return (
                head.device == device == prefix.device
                and head.dtype is torch.int32
                and head.shape == in_rank.shape
                and head.shape[1] == self.topology.num_ranks
                and prefix.shape == self._prefix_shape
                and prefix.dtype is torch.int32
                and src_idx.dim() == 1
                and head.is_contiguous()
                and prefix.is_contiguous()
            )
        except (AttributeError, IndexError):
            return False

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        if not request.on_device:
            return super().dispatch(request)
        request.rows = _aligned(request.rows)
        if request.route is not None:
            return self.kernels.dispatch_cached(request, request.route.handle, request.num_sms)
        if request.num_tokens_per_expert is None:
            raise ConfigError("dispatch: num_tokens_per_expert is needed without a handle")
        return self.kernels.dispatch(request, request.num_tokens_per_expert, request.num_sms)

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
        rows = _aligned(rows)
        if topk_weights is not None:
            topk_weights = _aligned(topk_weights)
        aligned = [_aligned(item) for item in bias]
        return self.kernels.combine(rows, topk_weights, aligned, route.handle, num_sms)

    def empty_combine_input(self, num_rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        self.kernels.check()  # after a failure, a late peer may still write to blocks that came back
        tensor = self.memory.try_empty((num_rows, hidden), dtype)
        if tensor is not None:
            return tensor
        self.kernels.note_missing(num_rows * hidden * dtype.itemsize)
        return super().empty_combine_input(num_rows, hidden, dtype)

    def check(self) -> None:
        self.kernels.check()
        self.kernels.check_results()

    def memory_usage(self) -> dict[str, int]:
        return {**self.memory.usage(), **self.low_latency.regions.usage()}

    def recover(self, members: Members) -> None:
        with self.lock:
            super().recover(members)
            self.memory.recover(members)
            self.kernels.recover(self.low_latency.recover)

    def destroy(self) -> None:
        with self.lock:
            self.low_latency.close()
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


@dataclass(frozen=True)
class PoolRequest:
    """Symmetric memory that a rank asks for: bytes at first, and at most; None for the environment's limit."""

    num_bytes: int
    max_bytes: int | None = None
    use_fabric: bool = False


def open_peer_memory(
    members: Members, topology: Topology, device: torch.device, pool: PoolRequest, timeout_s: float
) -> PeerMemory | None:
    """The peers' memory if all ranks can use the kernels, else None on all of them. Collective.

    Raises:
        TopologyError: `DEEP_EP_ENGINE=cuda` asks for kernels that the ranks cannot use.
        ConfigError: ranks wish for different engines.
    """
    reports = members.gather((wished_engine(), why_not_cuda(topology, device), pool.num_bytes))
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
        size = max(wanted for _, _, wanted in reports)
        try:
            return PeerMemory(
                members,
                device,
                _C.CONTROL_BLOCK_BYTES,
                size,
                use_fabric=pool.use_fabric,
                max_pool_bytes=pool.max_bytes,
                timeout_s=timeout_s,
            )
        except (TopologyError, PoolExhausted) as error:  # the same on all ranks
            failure = str(error)
    if wishes[0] == "cuda":
        raise TopologyError(f"DEEP_EP_ENGINE=cuda, but {failure}")
    if device.type == "cuda" and members.rank == 0:
        logger.warning("deep_ep: the portable engine is used, since %s", failure)
    return None
