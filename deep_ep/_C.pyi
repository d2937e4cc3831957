from collections.abc import Sequence

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
