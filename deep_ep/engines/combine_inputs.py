"""How the rows of a combine come within reach of their tokens' homes.

Rows in symmetric memory are read where they lie. Rows of an ordinary tensor are brought to the homes by copy engines
where the host knows how many go where, or copied into the pool, on the SMs of the call, where it does not.
"""

from __future__ import annotations

import torch

from ..errors import PoolExhausted
from .kernel_state import KernelState
from .outputs import aligned

#: Name of the rows from each rank to each, which an uncached dispatch leaves on the first tensor of its handle.
COUNTS = "_deep_ep_send_counts"


class CombineInputs(KernelState):
    """A part of `CudaKernels`."""

    def _no_room(self, operation: str, name: str, tensor: torch.Tensor) -> PoolExhausted:
        return PoolExhausted(
            f"{operation}: no room in symmetric memory for a copy of {name} {list(tensor.shape)} {tensor.dtype}: "
            f"{self.memory.usage()}. Compute x into `buffer.empty_combine_input(handle, hidden)`, drop received "
            "tensors earlier, or construct the buffer with a larger num_nvl_bytes or max_pool_bytes"
        )

    def _to_heap(
        self, tensor: torch.Tensor, copies: list[tuple[int, int, int]], kept: list[torch.UntypedStorage]
    ) -> int:
        """A place in the pool for a copy of a tensor that peers read; -1 if it is full."""
        num_bytes = tensor.numel() * tensor.element_size()
        if num_bytes == 0:
            return 0
        taken = self.memory.take(num_bytes, self._stream, self._capturing)
        if taken is None:
            self.note_missing(num_bytes)
            return -1
        # Whole vectors: storage ends are further apart than that.
        copies.append((tensor.data_ptr(), taken[0].data_ptr(), -(-num_bytes // 16) * 16))
        kept.append(taken[0])
        return taken[1]

    def _behind_inbox(
        self, weights: torch.Tensor, num_tokens: int, row_bytes: int, copies: list[tuple[int, int, int]]
    ) -> int:
        """A place for weights at the end of the staging memory, whose front may take rows of this combine."""
        num_bytes = aligned(weights.numel() * weights.element_size())
        at = (self.memory.staging_bytes - num_bytes) // 16 * 16
        if at < num_tokens * (self.num_ranks - 1) * row_bytes:
            raise self._no_room("combine", "topk_weights", weights)
        if self._capturing:
            self.memory.lease_staging()
        at += self.memory.staging_offset
        copies.append((weights.data_ptr(), self.memory.bases[self.rank] + at, num_bytes // 16 * 16))
        return at

    def _offset(self, tensor: torch.Tensor) -> int:
        """In the heap, where peers can read it; -1 elsewhere."""
        if tensor.numel() == 0:
            return 0
        offset = self.memory.offset_of(tensor)
        return -1 if offset is None else offset

    def _pushable(self, sent: list[list[int]] | None, rows: torch.Tensor) -> list[list[int]] | None:
        """The counts, if copy engines can bring ``rows`` home: the host has to know them for that."""
        if self._push is None or sent is None or len(sent) != self.num_ranks:
            return None
        most = max(sum(row) - row[rank] for rank, row in enumerate(sent))
        fits = most * rows.shape[1] * rows.element_size() <= self.memory.staging_bytes
        # Rows beyond those that came are the padding of a worst-case dispatch.
        return sent if fits and sum(row[self.rank] for row in sent) <= rows.shape[0] else None

    def _push_rows(self, number: int, rows: torch.Tensor, sent: list[list[int]]) -> None:
        row_bytes = rows.shape[1] * rows.element_size()
        offsets = self.memory.staging_offsets
        inboxes = []
        for home in range(self.num_ranks):
            before = sum(count for source, count in enumerate(sent[home][: self.rank]) if source != home)
            inboxes.append(self.memory.bases[home] + offsets[home] + before * row_bytes)
        if self._push is not None:
            self._count("push")
            received = [row[self.rank] for row in sent]
            self._push.push(number, rows.data_ptr(), row_bytes, received, inboxes)


def counts_of(rank_prefix: torch.Tensor) -> list[list[int]]:
    """Rows from each rank to each, of a handle's first tensor. Waits for the device."""
    counts: list[list[int]] = rank_prefix.diff(dim=0, prepend=torch.zeros_like(rank_prefix[:1])).tolist()
    return counts
