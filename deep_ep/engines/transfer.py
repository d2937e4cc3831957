"""Moving packed rows between ranks, and the byte views that this takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .. import ops
from .mesh import Mesh
from .protocol import Header
from .shared import SharedRows


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor [n, ...] as uint8 [n, bytes of one row]; without rows, too, a row has its width."""
    if tensor.numel() == 0:
        width = tensor.shape[1:].numel() * tensor.element_size()
        return torch.empty((tensor.shape[0], width), dtype=torch.uint8, device=tensor.device)
    return ops.row_major(tensor).reshape(tensor.shape[0], -1).view(torch.uint8)


def split_records(table: torch.Tensor, like: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Take uint8 records [n, bytes] apart into [n, width] tensors with the widths and dtypes of ``like``."""
    columns, start = [], 0
    for field in like:
        width = field.shape[1] * field.element_size()
        # A copy in any case: a single row is contiguous as it lies, at an offset that may not suit the dtype.
        column = table[:, start : start + width].clone(memory_format=torch.contiguous_format)
        columns.append(column.view(field.dtype).view(table.shape[0], field.shape[1]))
        start += width
    return columns


class Staging:
    """Memory that every operation uses again: fresh pages cost more than the copy into them."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def rows(self, num_rows: int, row_bytes: int) -> torch.Tensor:
        """uint8 [num_rows, row_bytes], valid until the next call."""
        size = num_rows * row_bytes
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size].view(num_rows, row_bytes)

    def clear(self) -> None:
        """Give the memory back."""
        self._memory = torch.empty(0, dtype=torch.uint8)


class Transfer:
    """Rows under way between all pairs of ranks: through shared memory where a pair has it, else over the mesh.

    Args:
        headers: of the operation; empty for the mesh alone.
        staging: memory to pack rows into for ranks that do not share any.
        landing: uint8 [rows, row_bytes] for each source, to receive into where memory is not shared.
    """

    def __init__(
        self,
        mesh: Mesh,
        shared: SharedRows,
        staging: Staging,
        phase: int,
        headers: dict[int, Header],
        row_bytes: int,
        landing: list[torch.Tensor],
    ) -> None:
        self._rank, self._num_ranks = mesh.rank, mesh.size
        self._shared = shared
        self._staging = staging
        self._headers = headers
        self._row_bytes = row_bytes
        self._landing = landing
        self._batch = mesh.batch(phase, "rows" if headers else "weights")
        # What is sent in place of rows that lie in memory.
        self._notices = torch.zeros((mesh.size, 1), dtype=torch.uint8)
        for peer in mesh.peers(-1):
            if not self._from_memory(peer):
                self._batch.recv(peer, landing[peer].view(-1))
            elif landing[peer].numel() > 0:
                self._batch.recv(peer, self._notices[peer])

    def in_memory(self, peer: int) -> bool:
        """Whether rows for ``peer`` are to be written into `outgoing`."""
        mine = self._headers.get(self._rank)
        return mine is not None and mine.in_memory and peer in self._shared.peers

    def _from_memory(self, peer: int) -> bool:
        theirs = self._headers.get(peer)
        return theirs is not None and theirs.in_memory and peer in self._shared.peers

    def outgoing(self) -> list[torch.Tensor]:
        """Memory to pack the rows for each rank into."""
        rank = self._rank
        if not self._headers:
            return [torch.empty((0, self._row_bytes), dtype=torch.uint8)] * self._num_ranks
        counts = self._headers[rank].send_counts
        socket = [0 if self.in_memory(peer) or peer == rank else count for peer, count in enumerate(counts)]
        parts = list(self._staging.rows(sum(socket), self._row_bytes).split(socket))
        if self._headers[rank].in_memory:
            memory = self._shared.outgoing(counts, self._row_bytes)
            parts = [memory[peer] if self.in_memory(peer) else part for peer, part in enumerate(parts)]
        return parts

    def send(self, peer: int, rows: torch.Tensor) -> None:
        """Send rows, which are in `outgoing` already if `in_memory`."""
        if not self.in_memory(peer):
            self._batch.send(peer, rows.view(-1))
        elif rows.numel() > 0:
            self._batch.send(peer, torch.zeros(1, dtype=torch.uint8))

    def wait(self) -> list[torch.Tensor]:
        """Wait for all ranks. Returns uint8 [rows, row_bytes] by source."""
        self._batch.wait()
        rank = self._rank
        return [
            self._shared.incoming(source, self._headers[source].send_counts, self._row_bytes)
            if source != rank and self._from_memory(source)
            else part
            for source, part in enumerate(self._landing)
        ]
