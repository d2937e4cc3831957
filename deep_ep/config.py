"""`Config`, its size hints, and the default configuration for any number of ranks.

The hints keep the interface's formulas, because callers allocate by them; neither engine is limited by them.
"""

from __future__ import annotations

import functools

import torch

from .errors import ConfigError
from .topology import DEFAULT_NVL_DOMAIN, domain_from_environment, num_nodes_for

#: dtype of `topk_idx` that callers build by default; int32 is accepted as well, at run time.
topk_idx_t = torch.int64
#: SMs of a call where nobody chose a budget and no tuned table has one.
DEFAULT_NUM_SMS = 20

_ALIGNMENT = 128
_TOPK_IDX_BYTES = 8
_MAX_TOPK = 128
_SOURCE_META_BYTES = 8
# Room for 128 FP32 scales and 128 FP32 weights a token.
_SCALE_BYTES = _WEIGHT_BYTES = 128 * 4


def align_up(value: int, alignment: int) -> int:
    """Round ``value`` up to a multiple of ``alignment``."""
    return -(-value // alignment) * alignment


class Config:
    """SM budget and chunk sizes of the throughput operations.

    Only ``num_sms`` has an effect; the chunk sizes are kept because callers set them and size buffers by them.

    Args:
        num_sms: SMs that a call may use.
        num_max_nvl_chunked_send_tokens: tokens of one NVLink send chunk.
        num_max_nvl_chunked_recv_tokens: tokens of an NVLink receive ring.
        num_max_rdma_chunked_send_tokens: tokens of one RDMA send chunk.
        num_max_rdma_chunked_recv_tokens: tokens of an RDMA receive ring; rounded up to a multiple of the send chunk.

    Raises:
        ConfigError: a value is out of range.
    """

    def __init__(
        self,
        num_sms: int = DEFAULT_NUM_SMS,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        if num_sms < 0:
            raise ConfigError(f"Config(num_sms={num_sms}): expected an even number of SMs, 0 or more")
        chunks = {
            "num_max_nvl_chunked_send_tokens": num_max_nvl_chunked_send_tokens,
            "num_max_nvl_chunked_recv_tokens": num_max_nvl_chunked_recv_tokens,
            "num_max_rdma_chunked_send_tokens": num_max_rdma_chunked_send_tokens,
            "num_max_rdma_chunked_recv_tokens": num_max_rdma_chunked_recv_tokens,
        }
        for name, value in chunks.items():
            if value <= 0:
                raise ConfigError(f"Config({name}={value}): expected a positive number of tokens")
        if num_max_nvl_chunked_send_tokens >= num_max_nvl_chunked_recv_tokens:
            raise ConfigError(
                f"Config: the NVLink send chunk ({num_max_nvl_chunked_send_tokens} tokens) must be smaller than the "
                f"receive ring ({num_max_nvl_chunked_recv_tokens}); lower num_max_nvl_chunked_send_tokens"
            )
        if num_max_rdma_chunked_send_tokens > num_max_rdma_chunked_recv_tokens // 2:
            raise ConfigError(
                f"Config: the RDMA send chunk ({num_max_rdma_chunked_send_tokens} tokens) must be at most half the "
                f"receive ring ({num_max_rdma_chunked_recv_tokens}); lower num_max_rdma_chunked_send_tokens"
            )
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = num_max_nvl_chunked_send_tokens
        self.num_max_nvl_chunked_recv_tokens = num_max_nvl_chunked_recv_tokens
        self.num_max_rdma_chunked_send_tokens = num_max_rdma_chunked_send_tokens
        self.num_max_rdma_chunked_recv_tokens = align_up(
            num_max_rdma_chunked_recv_tokens, num_max_rdma_chunked_send_tokens
        )

    @property
    def num_channels(self) -> int:
        """Channels of the handle matrices: half the SMs, at least one."""
        return max(self.num_sms // 2, 1)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that callers give as ``num_nvl_bytes`` for rows of ``hidden_bytes`` bytes in ``num_ranks`` ranks."""
        num_nodes = _checked_num_nodes(hidden_bytes, num_ranks)
        peers = min(num_ranks, domain_from_environment() or DEFAULT_NVL_DOMAIN)
        rings = self.num_channels * peers
        size = rings * (2 * num_nodes + 3) * 4
        size += rings * self.num_max_nvl_chunked_recv_tokens * (hidden_bytes + _metadata_bytes())
        return align_up(size, _ALIGNMENT)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes that callers give as ``num_rdma_bytes``; 0 when the ranks fit in one node."""
        num_nodes = _checked_num_nodes(hidden_bytes, num_ranks)
        if num_nodes == 1:
            return 0
        rings = self.num_channels * num_nodes
        size = rings * 36 * 4
        size += 2 * rings * self.num_max_rdma_chunked_recv_tokens * (hidden_bytes + _metadata_bytes() + 16)
        return align_up(size, _ALIGNMENT)

    def __repr__(self) -> str:
        return (
            f"Config(num_sms={self.num_sms}, nvl={self.num_max_nvl_chunked_send_tokens}/"
            f"{self.num_max_nvl_chunked_recv_tokens}, rdma={self.num_max_rdma_chunked_send_tokens}/"
            f"{self.num_max_rdma_chunked_recv_tokens})"
        )


def _metadata_bytes() -> int:
    return _SOURCE_META_BYTES + _MAX_TOPK * _TOPK_IDX_BYTES + _SCALE_BYTES + _WEIGHT_BYTES


def _checked_num_nodes(hidden_bytes: int, num_ranks: int) -> int:
    if hidden_bytes <= 0 or num_ranks <= 0:
        raise ConfigError(
            f"size hint asked for hidden_bytes={hidden_bytes}, num_ranks={num_ranks}; both must be positive"
        )
    return num_nodes_for(num_ranks)


# Published defaults of the interface: ranks -> (NVLink send, NVLink receive, RDMA send, RDMA receive) tokens.
_DISPATCH_CHUNKS = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    24: (32, 288, 8, 128),
    32: (32, 288, 8, 128),
    48: (32, 288, 8, 128),
    64: (32, 288, 8, 128),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE_CHUNKS = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    24: (1, 288, 8, 128),
    32: (1, 288, 8, 128),
    48: (1, 288, 8, 128),
    64: (1, 288, 8, 128),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    144: (2, 720, 8, 128),
    160: (2, 720, 8, 128),
}


def _nearest(table: dict[int, tuple[int, int, int, int]], num_ranks: int) -> tuple[int, int, int, int]:
    if num_ranks <= 0:
        raise ConfigError(f"a configuration for {num_ranks} ranks was asked for; the number of ranks must be positive")
    return table[next((ranks for ranks in sorted(table) if ranks >= num_ranks), max(table))]


@functools.lru_cache(maxsize=64)
def default_dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """Dispatch configuration for any number of ranks: that of the next listed size up."""
    return Config(num_sms, *_nearest(_DISPATCH_CHUNKS, num_ranks))


@functools.lru_cache(maxsize=64)
def default_combine_config(num_ranks: int, num_sms: int) -> Config:
    """Combine configuration for any number of ranks: that of the next listed size up."""
    return Config(num_sms, *_nearest(_COMBINE_CHUNKS, num_ranks))


def low_latency_size_hint(num_max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes that callers give as ``num_rdma_bytes`` for the low-latency mode: an upper bound of what any layout of
    per-expert slots can need (two sets of send, receive and signal areas).

    Raises:
        ConfigError: an argument is not positive.
    """
    if min(num_max_tokens, hidden, num_ranks, num_experts) <= 0:
        raise ConfigError(
            f"low-latency size hint asked for {num_max_tokens} tokens, hidden {hidden}, {num_ranks} ranks, "
            f"{num_experts} experts; all must be positive"
        )
    scales = hidden // 128
    dispatch_slot = 16 + max(2 * hidden, hidden + 4 * scales)
    combine_slot = 4 * scales + 2 * hidden
    send = max(num_max_tokens * dispatch_slot, num_experts * num_max_tokens * combine_slot)
    recv = num_experts * num_max_tokens * max(dispatch_slot, combine_slot)
    signals = align_up(4 * num_experts, _ALIGNMENT)
    total = 2 * (send + recv + signals)
    return (total + _ALIGNMENT) // _ALIGNMENT * _ALIGNMENT
