"""`Buffer`: the public surface. Arguments are checked here; an engine moves the rows."""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from typing import Any

import torch
import torch.distributed as dist

from . import checks, fp8
from ._native import _C
from .checks import Rows
from .config import DEFAULT_NUM_SMS, Config
from .engines import PortableEngine
from .engines.cuda_engine import MIN_POOL_BYTES, CudaEngine, PoolRequest, open_peer_memory
from .engines.mesh import Mesh, MpiLikeComm, members_of, resolve_mask_timeout, resolve_timeout
from .engines.shared import SharedRows
from .errors import BufferDestroyed, ConfigError
from .event import EventHandle, EventOverlap, wait_previous
from .handles import Handle, check_handle_fields
from .low_latency import LowLatencyMixin
from .requests import (
    Returned,
    cached_request,
    check_quantizable,
    checked_config,
    fresh_request,
    returned,
    scale_format_of,
    try_dispatch,
)
from .topology import domain_from_environment, host_identity, resolve_topology, scratch_device
from .traffic import TrafficStats
from .tuning import config_for_call, config_for_group

_live_buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()
_shared_buffers: dict[Any, Buffer] = {}
PreviousEvent = EventOverlap | EventHandle | None


class Buffer(LowLatencyMixin):
    """Expert-parallel communication of one group: dispatch tokens to their experts' ranks, combine them back.

    Construction is collective over the group. Operations must be called in the same order on all ranks; a breach, a
    bad argument on one rank, or a dead rank becomes a typed error on every rank. Operations of one buffer run one at a
    time; several Python threads may share it.

    Args:
        group: process group of the expert-parallel ranks, of any backend; or None with ``comm``.
        num_nvl_bytes, num_rdma_bytes: sizes that callers compute with the hints of `Config`. They are kept as
            attributes and set the size of the scratch tensors of `get_local_buffer_tensor`; they never limit a call.
        low_latency_mode: the caller intends to use the low-latency operations.
        num_qps_per_rank: RDMA queue pairs for each peer (used between nodes only).
        allow_nvlink_for_low_latency_mode, allow_nvlink_for_normal_mode, allow_mnnvl, use_fabric: which links and memory
            handles the kernels may use. No effect on the portable engine.
        explicitly_destroy: the caller will call `destroy`; a warning says so if it was forgotten.
        enable_shrink: let low-latency operations go on without ranks that are lost (see the mask functions).
        mask_timeout_us: microseconds after which they leave out a rank that does not come, with ``enable_shrink``;
            default `DEEP_EP_MASK_TIMEOUT_US`, else 10 s. A rank that is merely late then loses its tokens as well.
        comm: mpi4py communicator in place of ``group``; `SoloComm()` for a single process.
        num_nvl_peers: ranks that share a node; default `DEEP_EP_NVL_DOMAIN`, else what the hosts say.
        device: where scratch memory lives; default the current CUDA device if the process uses one, else the CPU.
            Operations follow the device of their arguments.
        timeout_s: deadline of every wait in seconds; default `DEEP_EP_TIMEOUT_S`, else 300.
        max_pool_bytes: most symmetric memory that the kernels' outputs may take on a GPU; default
            `DEEP_EP_MAX_POOL_BYTES`, else what the device has. Beyond it rows come through staging memory and a copy.

    Attributes:
        rank, group, comm, group_size, num_nvl_bytes, num_rdma_bytes, low_latency_mode, explicitly_destroy,
        enable_shrink: as given. engine: its name, ``"cuda"`` (kernels) or ``"portable"``. runtime: the engine, None
        once destroyed.
        traffic: `TrafficStats`, what was moved so far.

    Raises:
        ConfigError: bad arguments. TopologyError: the ranks cannot reach each other, or disagree.
    """

    #: SMs of the default configurations where no tuned table has a budget, for all buffers; see `set_num_sms`.
    num_sms: int = DEFAULT_NUM_SMS
    _num_sms_was_set: bool = False

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: MpiLikeComm | None = None,
        *,
        use_fabric: bool = False,
        allow_nvlink_for_normal_mode: bool = True,
        num_nvl_peers: int | None = None,
        device: str | torch.device | None = None,
        timeout_s: float | None = None,
        max_pool_bytes: int | None = None,
        mask_timeout_us: float | None = None,
    ) -> None:
        self.runtime: PortableEngine | None = None
        for name, size in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            checks.check_count(size, name, "Buffer", minimum=0)
        checks.check_count(num_qps_per_rank, "num_qps_per_rank", "Buffer", minimum=1)
        if num_nvl_peers is not None:
            checks.check_count(num_nvl_peers, "num_nvl_peers", "Buffer", minimum=1)
        timeout, mask_timeout = resolve_timeout(timeout_s), resolve_mask_timeout(mask_timeout_us)
        members = self._members = members_of(group, comm)
        self.group = group
        self.comm = comm
        self.rank, self.group_size = members.rank, members.size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._masked: set[int] = set()
        self._mask_timeout_s = mask_timeout if enable_shrink else 0.0
        self._portable_waits: dict[str, list[int]] = {}

        # What a rank asks for is gathered before it is judged, so that all ranks judge the same.
        reports = members.gather((host_identity(), num_nvl_peers or domain_from_environment()))
        domains = [domain for _, domain in reports]
        if len(set(domains)) != 1:
            raise ConfigError(
                f"ranks disagree about the NVLink domain: {domains} by rank; set DEEP_EP_NVL_DOMAIN (or num_nvl_peers) "
                "to the same value on all ranks"
            )
        topology = resolve_topology(self.rank, [host for host, _ in reports], domains[0])
        mesh = Mesh(members, timeout)
        shared = SharedRows(members, enabled=os.environ.get("DEEP_EP_SHARED_MEMORY", "1") != "0")
        place = scratch_device(group, device)
        pool = PoolRequest(max(num_nvl_bytes, MIN_POOL_BYTES), max_pool_bytes, use_fabric)
        memory = open_peer_memory(members, topology, place, pool, timeout)
        parts: dict[str, Any] = {
            "mesh": mesh,
            "shared": shared,
            "topology": topology,
            "group": group,
            "device": place,
            "num_nvl_bytes": num_nvl_bytes,
            "num_rdma_bytes": num_rdma_bytes,
        }
        mask_s = self._mask_timeout_s
        self.runtime = PortableEngine(**parts) if memory is None else CudaEngine(parts, memory, timeout, mask_s)
        self.engine = self.runtime.name
        _live_buffers.add(self)

    # Lifetime.

    def destroy(self) -> None:
        """Free everything. Needs no peer, so it cannot hang; calling it again does nothing."""
        runtime, self.runtime = self.runtime, None
        if runtime is not None:
            runtime.destroy()
        for key in [key for key, buffer in _shared_buffers.items() if buffer is self]:
            del _shared_buffers[key]

    def __del__(self) -> None:
        runtime = getattr(self, "runtime", None)
        if runtime is None:
            return
        if self.explicitly_destroy:
            warnings.warn(
                "a Buffer made with explicitly_destroy=True was not destroyed; call destroy() before dropping it",
                ResourceWarning,
                stacklevel=1,
            )
        self.runtime = None
        runtime.destroy()

    @classmethod
    def get_or_grow(
        cls,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        **kwargs: Any,
    ) -> Buffer:
        """The process's shared buffer of a group, made on first use and made anew when it is too small.

        Collective when it constructs, so call it with the same sizes on all ranks. ``kwargs`` go to the constructor
        and count only there. The old buffer is destroyed; handles stay valid.
        """
        key = group if group is not None else ("comm", id(kwargs.get("comm")))
        old = _shared_buffers.get(key)
        if old is not None and old.runtime is not None:
            enough = old.num_nvl_bytes >= num_nvl_bytes and old.num_rdma_bytes >= num_rdma_bytes
            if enough and old.low_latency_mode >= low_latency_mode:
                return old
            num_nvl_bytes = max(num_nvl_bytes, old.num_nvl_bytes)
            num_rdma_bytes = max(num_rdma_bytes, old.num_rdma_bytes)
            low_latency_mode = low_latency_mode or old.low_latency_mode
            old.destroy()
        buffer = cls(group, num_nvl_bytes, num_rdma_bytes, low_latency_mode, **kwargs)
        _shared_buffers[key] = buffer
        return buffer

    # Facts and helpers.

    @property
    def traffic(self) -> TrafficStats:
        """Calls, rows and bytes moved so far."""
        return self._engine("traffic").traffic

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True when the extension holds CUDA code for compute capability 9.0 or later."""
        archs = [entry.partition("-")[0] for entry in _C.cuda_build_archs().split(";") if entry]
        return any(int(arch.rstrip("af")) >= 90 for arch in archs)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set the SM budget of the default configurations, for all buffers; it wins over tuned tables. Must be even."""
        checks.check_count(new_num_sms, "new_num_sms", "set_num_sms", minimum=0)
        if new_num_sms % 2 != 0:
            raise ConfigError(f"set_num_sms({new_num_sms}): expected an even number of SMs")
        Buffer.num_sms = new_num_sms
        Buffer._num_sms_was_set = True

    @staticmethod
    def _chosen_num_sms() -> int | None:
        """The budget that the caller set, also by assigning `num_sms`; None if none was."""
        return Buffer.num_sms if Buffer._num_sms_was_set or Buffer.num_sms != DEFAULT_NUM_SMS else None

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream, to pass as ``previous_event``."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int, *, table: str | os.PathLike[str] | None = None) -> Config:
        """Default dispatch configuration for any number of ranks.

        Its SM budget is the one given to `set_num_sms`; else that of a tuned table (see `deep_ep.tuning`), of which
        ``table`` is looked at first; else 20.

        Raises:
            ConfigError: ``table`` cannot be read, or ``num_ranks`` is not positive.
        """
        return config_for_group("dispatch", num_ranks, Buffer._chosen_num_sms(), table)

    @staticmethod
    def get_combine_config(num_ranks: int, *, table: str | os.PathLike[str] | None = None) -> Config:
        """Default combine configuration for any number of ranks; as `get_dispatch_config`."""
        return config_for_group("combine", num_ranks, Buffer._chosen_num_sms(), table)

    @staticmethod
    def _unpack_bias(
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if isinstance(bias, torch.Tensor):
            return bias, None
        if isinstance(bias, tuple):
            if len(bias) != 2:
                raise ConfigError(f"bias is a tuple of {len(bias)}; expected None, one tensor, or two")
            return bias
        return None, None

    def get_comm_stream(self) -> Any:
        """The communication stream: a `torch.cuda.Stream`, or what `torch.cuda.stream()` ignores without CUDA."""
        return self._engine("get_comm_stream").get_comm_stream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """A view of this rank's scratch memory, free for the caller to use; operations never touch it.

        Args:
            dtype: element type of the view.
            size: shape; None for all elements from ``offset`` on, flat.
            offset: in bytes, a multiple of the element size.
            use_rdma_buffer: the scratch of ``num_rdma_bytes`` instead of ``num_nvl_bytes``.

        Raises:
            ConfigError: the view does not fit.
        """
        scratch = self._engine("get_local_buffer_tensor").get_local_buffer_tensor(use_rdma_buffer)
        if offset < 0 or offset > scratch.numel() or offset % dtype.itemsize != 0:
            raise ConfigError(
                f"get_local_buffer_tensor: offset is {offset} bytes in a scratch of {scratch.numel()} bytes; expected "
                f"a multiple of {dtype.itemsize} within it"
            )
        usable = (scratch.numel() - offset) // dtype.itemsize
        flat = scratch[offset : offset + usable * dtype.itemsize].view(dtype)
        if size is None:
            return flat
        shape = torch.Size(size)
        if shape.numel() > usable:
            which = "num_rdma_bytes" if use_rdma_buffer else "num_nvl_bytes"
            raise ConfigError(
                f"get_local_buffer_tensor: {list(shape)} needs {shape.numel()} elements of {dtype}, the scratch has "
                f"room for {usable}; construct the buffer with a larger {which}"
            )
        return flat[: shape.numel()].view(shape)

    # Throughput operations.

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: PreviousEvent = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count where the tokens of this rank go. Local: no other rank is involved.

        Args:
            topk_idx: int32 or int64 [T, K] global expert indices, -1 for no selection.
            num_experts: E; experts that do not divide by the ranks are placed as in `deep_ep.layout`.

        Returns:
            num_tokens_per_rank int32 [R], num_tokens_per_rdma_rank int32 [N] or None with one node,
            num_tokens_per_expert int32 [E], is_token_in_rank bool [T, R], and the event.

        Raises:
            ConfigError: wrong dtype or shape, or an index outside [-1, E).
        """
        runtime = self._engine("get_dispatch_layout")
        quick = runtime.try_layout(topk_idx, num_experts, previous_event)
        if quick is not None:
            return quick[0], None, quick[1], quick[2], EventOverlap(EventHandle() if async_finish else None)
        with runtime.lock:
            wait_previous(previous_event)
            topk_idx = checks.check_topk_idx(topk_idx, "get_dispatch_layout")
            num_experts = checks.check_num_experts(num_experts, "get_dispatch_layout")
            layout = runtime.layout(topk_idx, num_experts)
        event = EventOverlap(EventHandle() if async_finish else None)
        per_rank, per_node = layout.num_tokens_per_rank, layout.num_tokens_per_rdma_rank
        return per_rank, per_node, layout.num_tokens_per_expert, layout.is_token_in_rank, event

    def dispatch(
        self,
        x: Rows,
        handle: Handle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: PreviousEvent = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        use_fp8: bool = False,
        round_scale: bool = False,
        use_ue8m0: bool = False,
    ) -> Returned:
        """Send each token once to every rank that owns one of its experts.

        Args:
            x: [T, H] of any dtype, moved as bytes; or (x of a 1-byte dtype, scales float32 or int32 [T, S] of any
                strides, such as tokens innermost: they are read where they lie).
            handle: of an earlier dispatch, to repeat its routing for another x (cached mode): the arguments about
                layout and top-k must then be left out.
            num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert: the results of
                `get_dispatch_layout`.
            topk_idx, topk_weights: both or neither; int32 or int64 [T, K], float32 [T, K].
            expert_alignment: the reported tokens per expert are rounded up to a multiple of this.
            num_worst_tokens: if positive, outputs have exactly this many rows and counts are not reported.
            use_fp8: quantise a bf16, fp16 or fp32 x to FP8 (E4M3, 1x128 tiles) on the way; the result is then
                (x, scales). ``round_scale``: scales are powers of two; ``use_ue8m0``: they come as exponents packed
                four to an int32 (see `deep_ep.fp8`).

        Returns:
            recv_x: like x, [num_recv, H]: ascending source rank, then source token. Scales are row-major.
            recv_topk_idx: [num_recv, K], local expert index or -1, in the dtype given; None without top-k.
            recv_topk_weights: float32 [num_recv, K], 0 where the index is -1; None without top-k.
            num_recv_tokens_per_expert_list: tokens of each local expert; [] with ``num_worst_tokens``.
            handle: tuple of tensors for `combine` and cached calls.
            event: its ``event`` is None unless ``async_finish``.
            In cached mode the middle four are None.

        Raises:
            ConfigError: bad arguments, here or on another rank. BufferOverflow: some rank would receive more than its
            ``num_worst_tokens``. PeerError, CommTimeout: a rank died, refused, or is late.
        """
        runtime = self._engine("dispatch")
        layout = (num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert)
        topk = (topk_idx, topk_weights)
        sizes = (num_worst_tokens, expert_alignment)
        formats, configs = (use_fp8, round_scale, use_ue8m0), (config, self._default_config)
        when = (previous_event, async_finish)
        quick = try_dispatch(runtime, x, handle, layout, topk, sizes, formats, configs, when)
        if quick is not None:
            return returned(quick[0], handle, *sizes, quick[1])
        inputs = (x, handle, layout, topk_idx, topk_weights)
        first = x[0] if isinstance(x, (tuple, list)) and x else x
        with runtime.call("dispatch", first, use_fp8, inputs, previous_event, async_finish) as call:
            rows, scales = checks.check_rows(x, "dispatch")
            if expert_alignment != 1 or num_worst_tokens != 0:
                checks.check_count(expert_alignment, "expert_alignment", "dispatch", minimum=1)
                checks.check_count(num_worst_tokens, "num_worst_tokens", "dispatch", minimum=0)
            config = checked_config(config, "dispatch") or self._default_config("dispatch", rows, use_fp8)
            scale_format = None
            if use_fp8 or round_scale or use_ue8m0:
                scale_format = scale_format_of("dispatch", use_fp8, round_scale, use_ue8m0)
                check_quantizable(rows, scales)
                if not call.on_device:
                    rows, scales = fp8.quantize_1x128(rows, scale_format=scale_format or "fp32")
                    scale_format = None
            if handle is not None:
                given = (topk_idx, topk_weights, num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
                request = cached_request(call, rows, scales, scale_format, handle, given, num_worst_tokens, config)
            else:
                request = fresh_request(call, rows, scales, scale_format, layout, topk, num_worst_tokens, config)
            call.start()
            result = runtime.dispatch(request)
            call.keep((result.rows, result.scales, result.topk_idx, result.topk_weights, result.handle))
        return returned(result, handle, *sizes, call.event)

    def combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: PreviousEvent = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Send rows back to where their tokens came from, and sum them there.

        Sums are FP32: bias first, then ranks in ascending order, one rounding to x's dtype. With several nodes each
        node's sum is rounded to x's dtype before it is added. A token that went nowhere gets the bias, or 0.

        Args:
            x: bf16, fp16 or fp32 [num_recv, H], rows as `dispatch` returned them (all of a worst-case dispatch's).
            handle: of that dispatch. It may be used any number of times.
            topk_weights: float32 [num_recv, K], summed over the ranks like x.
            bias: None, or one or two tensors [T, H] of x's dtype.

        Returns:
            combined x [T, H], combined weights float32 [T, K] or None, event.

        Raises:
            ConfigError: bad arguments or a handle of another dispatch. PeerError, CommTimeout: as for `dispatch`.
        """
        runtime = self._engine("combine")
        if bias is None and (config is None or isinstance(config, Config)):
            when = (previous_event, async_finish)
            quick = runtime.try_combine(x, handle, topk_weights, config, self._default_config, when)
            if quick is not None:
                return quick
        inputs = (x, handle, topk_weights, bias)
        with runtime.call("combine", x, False, inputs, previous_event, async_finish) as call:
            rows = checks.check_tensor(x, "x", "combine", dim=2, dtypes=checks.COMBINE_DTYPES)
            config = checked_config(config, "combine") or self._default_config("combine", rows)
            route = call.route(handle, rows)
            if rows.shape[0] != route.num_rows:
                raise ConfigError(
                    f"combine: x has {rows.shape[0]} rows but the handle's dispatch returned {route.num_rows}; "
                    "pass one row for each received token, in the order received"
                )
            if topk_weights is not None:
                topk_weights = checks.check_tensor(
                    topk_weights,
                    "topk_weights",
                    "combine",
                    dim=2,
                    dtypes=[torch.float32],
                    shape=(route.num_rows, None),
                    device=rows.device,
                )
            biases = checks.check_bias(bias, "combine", rows, route.num_tokens)
            call.start()
            combined, weights = runtime.combine(rows, topk_weights, biases, route, config.num_sms)
            call.keep((combined, weights))
        return combined, weights, call.event

    def empty_combine_input(self, handle: Handle, hidden: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """[num_recv, hidden] to compute the rows of a combine into, where peers can read them: it saves a copy.

        An ordinary tensor with any contents. On engines without such memory it is just that.

        Raises:
            ConfigError: the handle is not one of this group.
        """
        runtime = self._engine("empty_combine_input")
        with torch.no_grad(), runtime.lock:
            fields = check_handle_fields(handle, runtime.topology, "empty_combine_input")
            num_rows = fields["recv_src_idx" if runtime.topology.num_nodes == 1 else "recv_src_meta"].shape[0]
            return runtime.empty_combine_input(num_rows, hidden, dtype)

    def check(self) -> None:
        """Raise what failed since the last call: errors of kernels, and rows that did not fit a fixed capacity.

        The result is complete once the device has been synchronised.

        Raises:
            CommTimeout, PeerError, ConfigError: the buffer failed; see `recover`. BufferOverflow: rows of a worst-case
            dispatch were left out.
        """
        self._engine("check").check()

    def recover(self) -> None:
        """Make the buffer usable again after a `CommTimeout` or `PeerError`, on all ranks together.

        Every rank of the group has to be alive and to call it, whether or not it saw the failure. It waits for the
        device. What was under way is lost; handles of dispatches that had finished stay valid.

        Raises:
            CommTimeout, PeerError: a rank did not come. BufferDestroyed: some rank destroyed its buffer.
        """
        self._engine("recover").recover(self._members)

    def memory_usage(self) -> dict[str, int]:
        """Symmetric memory of this rank in bytes, by use; see `PeerMemory.usage`. Empty on the portable engine.

        ``low_latency_bytes`` of it are reserved for low-latency operations.
        """
        return self._engine("memory_usage").memory_usage()

    def internode_dispatch(
        self,
        x: Rows,
        handle: Handle | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: PreviousEvent = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Returned:
        """`dispatch` under the name that it has for groups of several nodes. Call `dispatch`: it serves both."""
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            num_worst_tokens,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        config: Config | None = None,
        previous_event: PreviousEvent = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """`combine` under the name that it has for groups of several nodes. Call `combine`: it serves both."""
        return self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )

    # Internals.

    def _default_config(self, operation: str, rows: torch.Tensor, use_fp8: bool = False) -> Config:
        sharing = self.runtime.ranks_per_gpu if self.runtime is not None else 1
        return config_for_call(operation, self.group_size, rows, Buffer._chosen_num_sms(), sharing, use_fp8)

    def _engine(self, operation: str) -> PortableEngine:
        if self.runtime is None:
            raise BufferDestroyed(f"{operation}: this buffer was destroyed; construct a new one on all ranks")
        return self.runtime


@atexit.register
def _close_all() -> None:
    """At interpreter exit connections are dropped without waiting for anybody."""
    for buffer in list(_live_buffers):
        if buffer.runtime is not None:
            buffer.runtime.destroy()
            buffer.runtime = None
