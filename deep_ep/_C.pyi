from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import Tensor

has_cuda: bool

def gather_rows(
    x: int,
    num_x_rows: int,
    x_stride: int,
    index: int,
    index_is_int64: bool,
    num_rows: int,
    row_bytes: int,
    out: int,
    out_stride: int,
) -> int: ...
def reduce_rows(
    columns: Sequence[tuple[int, int, int]],
    biases: Sequence[tuple[int, int, int]],
    slots: int,
    slots_stride: int,
    weights: int,
    weights_stride: int,
    num_tokens: int,
    hidden: int,
    in_type: int,
    out_type: int,
    round_every: int,
    out: int,
    out_stride: int,
) -> int: ...
def quantize_rows(
    x: int,
    x_stride: int,
    in_type: int,
    num_rows: int,
    channels: int,
    q: int,
    q_stride: int,
    scales: int,
    scales_row_stride: int,
    scales_column_stride: int,
    format: int,
) -> None: ...
def dequantize_rows(
    q: int,
    q_stride: int,
    num_rows: int,
    channels: int,
    scales: int,
    scales_row_stride: int,
    scales_column_stride: int,
    scales_packed: bool,
    scale_rows: int,
    out_type: int,
    out: int,
    out_stride: int,
) -> None: ...
def quantize_blocks(
    x: int, x_stride: int, in_type: int, num_rows: int, channels: int, pow2: bool, q: int, scales: int
) -> None: ...
def quantize_transposed(
    x: int,
    x_stride: int,
    in_type: int,
    num_tokens: int,
    channels: int,
    q: int,
    scales: int,
    scales_row_stride: int,
    scales_column_stride: int,
    format: int,
) -> None: ...
def logfmt_max_bytes(num_rows: int, hidden: int) -> int: ...
def logfmt_encode(x: int, num_rows: int, hidden: int, out: int) -> int: ...
def logfmt_count_rows(payload: int, bytes: int, hidden: int) -> int: ...
def logfmt_decode(payload: int, num_rows: int, hidden: int, out: int) -> None: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def cpu_isa() -> str: ...
def cuda_build_archs() -> str: ...
def cuda_runtime_version() -> int: ...
def device_count() -> int: ...

class BlockAllocator:
    def __init__(self) -> None: ...
    def add(self, offset: int, bytes: int) -> None: ...
    def allocate(self, bytes: int) -> int: ...
    def free(self, offset: int) -> bool: ...
    @property
    def bytes_used(self) -> int: ...
    @property
    def bytes_free(self) -> int: ...
    @property
    def largest_free(self) -> int: ...
    @property
    def num_used(self) -> int: ...

# Only in builds with CUDA (has_cuda).
def cuda_gather_rows(
    x: int,
    num_x_rows: int,
    x_stride: int,
    index: int,
    index_is_int64: bool,
    num_rows: int,
    row_bytes: int,
    out: int,
    out_stride: int,
    stream: int,
) -> None: ...
def cuda_reduce_rows(
    columns: Sequence[tuple[int, int, int]],
    biases: Sequence[tuple[int, int, int]],
    slots: int,
    slots_stride: int,
    weights: int,
    weights_stride: int,
    num_tokens: int,
    hidden: int,
    in_type: int,
    out_type: int,
    round_every: int,
    out: int,
    out_stride: int,
    stream: int,
) -> None: ...
def cuda_quantize_rows(
    x: int,
    x_stride: int,
    in_type: int,
    num_rows: int,
    channels: int,
    q: int,
    q_stride: int,
    scales: int,
    scales_row_stride: int,
    scales_column_stride: int,
    format: int,
    stream: int,
) -> None: ...
def cuda_dequantize_rows(
    q: int,
    q_stride: int,
    num_rows: int,
    channels: int,
    scales: int,
    scales_row_stride: int,
    scales_column_stride: int,
    scales_packed: bool,
    out_type: int,
    out: int,
    out_stride: int,
    stream: int,
) -> None: ...
def device_identity(device: int) -> tuple[bytes, str]: ...
def device_reach(device: int) -> dict[bytes, tuple[bool, bool]]: ...

class SymmetricHeap:
    def __init__(self, device: int, rank: int, num_ranks: int, kind: int, reserve_bytes: int) -> None: ...
    def create_chunk(self, bytes: int, control_bytes: int) -> tuple[int, int, bytes]: ...
    def import_chunk(self, peer: int, bytes: int, fd: int, blob: bytes) -> None: ...
    def commit_chunk(self) -> None: ...
    def discard_chunk(self) -> None: ...
    def bases(self) -> list[int]: ...
    def offset_of(self, address: int) -> int: ...
    def usage(self) -> dict[str, int]: ...
    def granularity(self) -> int: ...
    def activate(self, stand_in_only: bool) -> None: ...
    @staticmethod
    def is_stand_in(address: int) -> bool: ...
    def reserve_block(self, bytes: int) -> int: ...
    def return_block(self, offset: int) -> None: ...
    def destroy(self) -> None: ...

CONTROL_BLOCK_BYTES: int
PLANTED_BUGS: dict[str, int]

def load_peer_kernels() -> None: ...
def copy_segments(segments: list[tuple[int, int, int]], num_sms: int, stream: int) -> None: ...

class StreamOrder:
    def begin(self, stream: int) -> bool: ...
    def end(self, stream: int) -> None: ...
    def close(self) -> None: ...

class PushCopies:
    def __init__(self, domain: PeerDomain) -> None: ...
    @staticmethod
    def available() -> bool: ...
    def push(self, number: int, rows: int, row_bytes: int, recv_counts: list[int], inbox_at: list[int]) -> None: ...
    def release(self) -> None: ...
    def close(self) -> None: ...

class PeerDomain:
    def __init__(self, bases: list[int], rank: int, timeout_s: float) -> None: ...
    def combine_rows(
        self,
        signature: int,
        rows: tuple[int, int],
        weights: tuple[int, int],
        push_number: int,
        inbox: int,
        rank_prefix: int,
        num_tokens: int,
        send_head: int,
        hidden: int,
        type: int,
        biases: list[int],
        out: int,
        num_topk: int,
        out_weights: int,
        num_sms: int,
        stream: int,
    ) -> None: ...
    def refuse(self, stream: int) -> None: ...
    def dispatch_plan(
        self,
        row_bytes: int,
        scales_per_token: int,
        num_topk: int,
        topk_is_int64: bool,
        element_type: int,
        scale_format: int,
    ) -> DispatchPlan: ...
    # Without counts: whether a peer gave the operation up, rather than a failure.
    def await_counts(self, num_experts: int) -> tuple[int, bool, list[int], list[list[int]], int, int] | bool: ...
    def error(self) -> tuple[int, int, int, int, int, int] | None: ...
    def take_overflow(self) -> tuple[int, int, int] | None: ...
    def take_refused(self) -> int | None: ...
    def give_up(self) -> None: ...
    def reset(self) -> None: ...
    warn_after_s: float
    def take_late(self) -> tuple[int, int, int, int, int] | None: ...
    def set_debug(self, delay_seed: int, planted: int) -> None: ...
    def close(self) -> None: ...

class DispatchPlan:
    # output: offsets of rows, scales, topk_idx, topk_weights and src_idx, and the capacity. sent: num_tokens, rows,
    # scales, their strides in elements, topk_idx, topk_weights.
    def route(
        self,
        signature: int,
        output: tuple[int, int, int, int, int, int],
        fixed_capacity: bool,
        num_experts: int,
        num_channels: int,
        layout: tuple[int, int],
        handle: tuple[int, int, int, int],
        sent: tuple[int, int, int, tuple[int, ...], int, int],
        num_sms: int,
        stream: int,
    ) -> None: ...
    def repeat(
        self,
        signature: int,
        output: tuple[int, int, int, int, int, int],
        num_experts: int,
        send_head: int,
        sent: tuple[int, int, int, tuple[int, ...], int, int],
        num_sms: int,
        stream: int,
    ) -> None: ...

# What the link can do; addresses of this rank's range and of a peer's, sizes in bytes. See kernels/probe_launch.h.
def probe_push(
    *,
    rows: int,
    peer_rows: int,
    own_rows: int,
    num_rows: int,
    row_bytes: int,
    scales: int,
    peer_scales: int,
    own_scales: int,
    scale_bytes: int,
    scales_by_bulk: bool,
    num_sms: int,
    warps: int,
    ahead: int,
    behind: int,
    piece_bytes: int,
    stream: int,
) -> None: ...
def probe_pull(
    *,
    peer_rows: int,
    own_rows: int,
    out: int,
    num_rows: int,
    row_bytes: int,
    num_sms: int,
    warps: int,
    stages: int,
    vectors: int,
    own_by_bulk: bool,
    out_by_bulk: bool,
    producer: bool,
    one_polls: bool,
    stream: int,
) -> None: ...
def probe_registers(*, source: int, target: int, bytes: int, num_sms: int, warps: int, stream: int) -> None: ...
def probe_flags(
    *,
    own_flag: int,
    peer_flag: int,
    payload: int,
    peer_payload: int,
    payload_bytes: int,
    first: int,
    rounds: int,
    starts: bool,
    timeout_s: float,
    result: int,
    stream: int,
) -> None: ...

PROBE_LINES_COUNTS: tuple[str, ...]
PROBE_LINES_FAULTS: dict[str, int]

def probe_lines_bytes(num_channels: int) -> int: ...
def probe_lines(
    *,
    own: int,
    peer: int,
    rank: int,
    peer_rank: int,
    rounds: int,
    planted: int,
    num_sms: int,
    channels: int,
    timeout_s: float,
    counts: int,
    stream: int,
) -> None: ...

# Low-latency operations: see csrc/layout/low_latency_layout.h. L local experts, R ranks, M tokens a rank, K selections.
LOW_LATENCY_LIMITS: dict[str, int]

def small_quotient(n: int, divisor: int) -> int: ...
def expert_owner(expert: int, num_experts: int, num_ranks: int) -> tuple[int, int, int]: ...
def low_latency_layout(
    num_ranks: int, num_max_tokens: int, num_topk: int, num_experts: int, hidden: int
) -> dict[str, int]: ...
def low_latency_offsets(
    num_ranks: int,
    num_max_tokens: int,
    num_topk: int,
    num_experts: int,
    hidden: int,
    set: int,
    rank: int,
    token: int,
    part: int,
) -> dict[str, int]: ...
def low_latency_cut_row(row_bytes: int, wanted: int) -> tuple[int, int]: ...
def load_low_latency_kernels() -> None: ...

class LowLatencyOutputs:
    def __init__(
        self,
        num_local: int,
        num_ranks: int,
        num_max_tokens: int,
        num_topk: int,
        with_weights: bool,
        expert_major: bool,
    ) -> None: ...
    @property
    def ticket_at(self) -> int: ...
    @property
    def recv_count_at(self) -> int: ...
    @property
    def src_info_at(self) -> int: ...
    @property
    def source_tokens_at(self) -> int: ...
    @property
    def positions_at(self) -> int: ...
    @property
    def weights_at(self) -> int: ...
    @property
    def small_block_bytes(self) -> int: ...

# Addresses and sizes of tensors, for `launch` below, or None where something is not as the kernels need it.
# Types as DLPack names them: code and bits. Address of what is None: 0.
class DispatchInputs:
    def __init__(
        self,
        tensor_type: type,
        device_index: int,
        num_ranks: int,
        rows_type: tuple[int, int],
        hidden: int,
        scales_type: tuple[int, int],
        num_scales: int,
        num_topk: int,
        topk_is_int64: bool,
    ) -> None: ...
    # What `DispatchPlan.route` takes: sent, layout, num_experts.
    def read(
        self,
        x: object,
        scales: object,
        per_rank: object,
        in_rank: object,
        per_expert: object,
        topk_idx: object,
        topk_weights: object,
        /,
    ) -> tuple[tuple[int, int, int, tuple[int, ...], int, int], tuple[int, int], int] | None: ...
    # sent, number of rows, send_head
    def read_again(
        self, x: object, scales: object, handle: object, /
    ) -> tuple[tuple[int, int, int, tuple[int, ...], int, int], int, int] | None: ...

class LayoutQueue:
    entry: int
    def __init__(self, domain: PeerDomain, order: StreamOrder) -> None: ...

# queue: whose entry is the address of a LayoutEntry (csrc/bindings_layout.h). make_slab: a number of bytes -> their
# address, an int32 and a bool tensor that cover them. view: tensor, sizes, strides, offset in elements -> tensor.
class LayoutCalls:
    def __init__(
        self,
        tensor_type: type,
        device_index: int,
        queue: object,
        num_ranks: int,
        max_experts: int,
        make_slab: Callable[[int], tuple[int, Tensor, Tensor]],
        view: Callable[..., Tensor],
    ) -> None: ...
    # num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank. None where something is not as the kernel needs it,
    # or after a failure: then nothing has been done.
    def try_run(
        self, topk_idx: object, num_experts: object, stream: int, /
    ) -> tuple[Tensor, Tensor, Tensor] | None: ...
    # None after a failure
    def run(
        self, topk_idx: int, is_int64: bool, num_tokens: int, num_topk: int, num_experts: int, stream: int, /
    ) -> tuple[Tensor, Tensor, Tensor] | None: ...
    # Makes the tensors of a next call on this stream, the current one, ahead of it, once two calls were alike.
    def prepare(self, stream: int, /) -> None: ...
    def clear(self) -> None: ...

class CombineInputs:
    def __init__(self, tensor_type: type, device_index: int, num_ranks: int) -> None: ...
    # num_rows, hidden, num_tokens, num_topk, x, topk_weights, rank_prefix, send_head
    def read(self, x: object, handle: object, topk_weights: object, /) -> tuple[int, ...] | None: ...

class LowLatencyHandles:
    def __init__(
        self,
        make_slab: Callable[[int], tuple[Any, ...]],
        view: Callable[..., Tensor],
        num_parts: int,
        part_bytes: int,
        layouts: list[tuple[Any, ...]],
        shape: object,
        attribute: str,
        numbers: tuple[int, int, int],
    ) -> None: ...
    # recv_count, the handle, and the address of their part
    def take(self, stream: int, captured: bool) -> tuple[Tensor, tuple[Any, ...], int]: ...

class LowLatencyOperations:
    def __init__(
        self,
        lock: object,
        kernels: object,
        device_index: int,
        current_device: Callable[[], int],
        current_stream: Callable[[], int],
        traffic: object,
        event: type,
        use_device: Callable[[], Any],
        raise_failure: Callable[..., NoReturn],
        raise_closed: Callable[[str], NoReturn],
        places: str,
    ) -> None: ...
    def add_dispatch(
        self,
        num_max_tokens: int,
        num_experts: int,
        use_fp8: bool,
        round_scale: bool,
        use_ue8m0: bool,
        with_weights: bool,
        expert_major: bool,
        try_run: Callable[..., Any],
    ) -> None: ...
    def add_combine(self, shape: object, sum_at_home: bool, use_logfmt: bool, try_run: Callable[..., Any]) -> None: ...
    def forget_calls(self) -> None: ...
    def try_dispatch(
        self,
        x: object,
        topk_idx: object,
        topk_weights: object,
        num_max_tokens: object,
        num_experts: object,
        recv_stats: object,
        wait_stats: object,
        out: object,
        use_fp8: object,
        round_scale: object,
        use_ue8m0: object,
        expert_major: object,
        with_hook: object,
        /,
    ) -> Any: ...
    def try_combine(
        self,
        x: object,
        topk_idx: object,
        topk_weights: object,
        handle: object,
        out: object,
        wait_stats: object,
        sum_at_home: object,
        use_logfmt: object,
        with_hook: object,
        /,
    ) -> Any: ...
    @property
    def num_pending(self) -> int: ...
    # Kinds: 0 for dispatches, 1 for combines.
    def age(self, kind: int) -> int: ...
    def num_calls(self, kind: int) -> int: ...
    def note_call(self, kind: int) -> None: ...
    def forget_pending(self) -> None: ...
    def close(self) -> None: ...

class LowLatencyDispatchCalls:
    # plan: has an attribute `entry`, the address of a LowLatencyEntry. region: has `lease()` and `num_pending`.
    def __init__(
        self,
        operations: LowLatencyOperations,
        tensor_type: type,
        device_index: int,
        num_max_tokens: int,
        hidden: int,
        num_topk: int,
        topk_is_int64: bool,
        with_weights: bool,
        num_local: int,
        num_ranks: int,
        plan: object,
        region: object,
        row_bytes: int,
        dtype: str,
        new_tensor: Callable[..., Tensor],
        handles: LowLatencyHandles,
        rows: tuple[Any, ...],
        scales: tuple[Any, ...] | None,
    ) -> None: ...
    # recv_x, recv_count, handle, event, hook
    def try_run(
        self,
        x: object,
        topk_idx: object,
        topk_weights: object,
        recv_stats: object,
        wait_stats: object,
        out: object,
        with_hook: bool,
        /,
    ) -> tuple[Any, ...] | None: ...
    # inputs: x, topk_idx, topk_weights, num_tokens, recv_stats, wait_stats, rows and scales of out
    def run(
        self, inputs: tuple[int, ...], out: object, with_hook: bool, recv_stats: object, wait_stats: object, /
    ) -> tuple[Any, ...] | None: ...

class LowLatencyCombineCalls:
    def __init__(
        self,
        operations: LowLatencyOperations,
        tensor_type: type,
        device_index: int,
        num_groups: int,
        capacity: int,
        hidden: int,
        num_max_tokens: int,
        num_topk: int,
        topk_is_int64: bool,
        expert_major: bool,
        num_ranks: int,
        places: tuple[int, int, int, int],
        plan: object,
        region: object,
        row_bytes: int,
        new_tensor: Callable[..., Tensor],
        out: tuple[Any, ...],
        ticket_dtype: object,
    ) -> None: ...
    # out, event, hook
    def try_run(
        self,
        x: object,
        src_info: object,
        layout_range: object,
        topk_idx: object,
        topk_weights: object,
        out: object,
        wait_stats: object,
        with_hook: bool,
        block: int,
        /,
    ) -> tuple[Any, ...] | None: ...
    # inputs: x, src_info, layout_range, source_tokens, positions, weights, topk_idx, topk_weights, num_tokens, out and
    # wait_stats
    def run(self, inputs: tuple[int, ...], out: object, with_hook: bool, kept: object, /) -> tuple[Any, ...] | None: ...

class LowLatencyPeers:
    def __init__(
        self,
        peers: PeerDomain,
        regions: list[int],
        num_max_tokens: int,
        num_topk: int,
        num_experts: int,
        hidden: int,
        carries_lines: bool,
        masked: int,
        last_waits_ns: int,
        mask_after_s: float,
    ) -> None: ...
    def clear(self) -> None: ...
    def refuse(self, kind: int, stream: int) -> None: ...

class LowLatencyQueue:
    def __init__(self, peers: PeerDomain, order: StreamOrder) -> None: ...
    def begin(self, stream: int) -> int: ...
    def end(self, stream: int) -> None: ...

class LowLatencyDispatchPlan:
    def __init__(
        self,
        peers: LowLatencyPeers,
        queue: LowLatencyQueue,
        signature: int,
        num_topk: int,
        topk_is_int64: bool,
        num_experts: int,
        num_max_tokens: int,
        hidden: int,
        format: int,
        with_weights: bool,
        expert_major: bool,
    ) -> None: ...
    @property
    def outputs(self) -> LowLatencyOutputs: ...
    @property
    def entry(self) -> int: ...

class LowLatencyCombinePlan:
    def __init__(
        self,
        peers: LowLatencyPeers,
        queue: LowLatencyQueue,
        signature: int,
        num_topk: int,
        topk_is_int64: bool,
        num_experts: int,
        num_max_tokens: int,
        hidden: int,
        sum_at_home: bool,
        use_logfmt: bool,
        expert_major: bool,
    ) -> None: ...
    @property
    def entry(self) -> int: ...
