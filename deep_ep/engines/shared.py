"""Rows between ranks of one host through shared memory files, so that they need not pass a socket.

Each rank owns a file in memory that all ranks of its host map. A sender lays its rows down in its own file and sends a
message over the mesh; the receiver reads them there. A file may be written again as soon as the next operation has
begun: that takes a header from every rank, and a rank sends its header only after it has read what was meant for it.

Files are made sparse and grown in place. Memory is reserved before it is used, so that a full file system is an answer
(rows then take the socket) and not a crash. The files lose their names once all ranks have opened them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import warnings
from collections.abc import Sequence

import torch

from ..topology import host_identity
from .mesh import Members

_FOLDER = "/dev/shm"
# Address space, not memory: pages exist from the first reservation on.
_RESERVED_BYTES = 1 << 34
_GROWTH_BYTES = 1 << 20


class SharedRows:
    """The shared memory files of a group. Construction is collective; ranks that cannot take part use sockets.

    Args:
        members: ranks and object gather.
        enabled: False to leave this rank out; the others then reach it by sockets.
    """

    def __init__(self, members: Members, enabled: bool = True) -> None:
        self.rank = members.rank
        self._capacity = 0
        self._file = -1
        self._maps: dict[int, mmap.mmap] = {}
        self._views: dict[int, torch.Tensor] = {}
        if members.size == 1:
            return
        path = self._create() if enabled else ""
        offers: list[tuple[str, str]] = members.gather((host_identity(), path))
        if path:
            for rank, (host, peer_path) in enumerate(offers):
                if peer_path and host == offers[self.rank][0]:
                    self._map(rank, peer_path)
        mapped_by: list[list[int]] = members.gather(sorted(self._views))
        if path:
            os.unlink(path)
        # Both directions or none, so that both sides of a pair come to the same answer.
        self.peers = frozenset(r for r in self._views if r != self.rank and self.rank in mapped_by[r])

    #: Ranks with which rows can be exchanged through memory.
    peers: frozenset[int] = frozenset()

    def _create(self) -> str:
        path = os.path.join(_FOLDER, f"deep_ep-{os.getpid()}-{secrets.token_hex(8)}")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            return ""
        try:
            os.ftruncate(self._file, _RESERVED_BYTES)
        except OSError:
            os.unlink(path)
            return ""
        return path

    def _map(self, rank: int, path: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            file = os.dup(self._file) if rank == self.rank else os.open(path, os.O_RDONLY)
            try:
                access = mmap.ACCESS_WRITE if rank == self.rank else mmap.ACCESS_READ
                self._maps[rank] = mmap.mmap(file, _RESERVED_BYTES, access=access)
            finally:
                os.close(file)
            self._views[rank] = _as_tensor(self._maps[rank])

    def reserve(self, num_bytes: int) -> bool:
        """Make sure that the own file can hold ``num_bytes``; False if it cannot, or if no peer shares memory."""
        if not self.peers or num_bytes > _RESERVED_BYTES:
            return False
        if num_bytes > self._capacity:
            # Half as much again, so that slowly growing sizes do not end in a system call each.
            wanted = min(-(-num_bytes * 3 // 2 // _GROWTH_BYTES) * _GROWTH_BYTES, _RESERVED_BYTES)
            try:
                os.posix_fallocate(self._file, 0, wanted)
            except OSError:
                return False
            self._capacity = wanted
        return True

    def table(self, owner: int, num_rows: int, row_bytes: int) -> torch.Tensor:
        """The rows uint8 [num_rows, row_bytes] that ``owner`` lays down for everybody; `reserve` came before."""
        return self._views[owner][: num_rows * row_bytes].view(num_rows, row_bytes)

    def outgoing(self, counts: Sequence[int], row_bytes: int) -> list[torch.Tensor]:
        """Views uint8 [counts[r], row_bytes] into the own file, one for each rank; `reserve` came before."""
        return self._parts(self.rank, counts, row_bytes)

    def incoming(self, source: int, counts: Sequence[int], row_bytes: int) -> torch.Tensor:
        """What `outgoing` of rank ``source`` with these arguments holds for this rank."""
        return self._parts(source, counts, row_bytes)[self.rank]

    def _parts(self, owner: int, counts: Sequence[int], row_bytes: int) -> list[torch.Tensor]:
        parts, start = [], 0
        for rank, count in enumerate(counts):
            # A rank's rows for itself never leave its own tensors.
            size = 0 if rank == owner else count * row_bytes
            parts.append(self._views[owner][start : start + size].view(size // max(row_bytes, 1), row_bytes))
            start += size
        return parts

    def close(self) -> None:
        """Give the memory back once no tensor refers to it any more."""
        self.peers = frozenset()
        self._views.clear()
        for region in self._maps.values():
            # A row that is still being read keeps its mapping.
            with contextlib.suppress(BufferError):
                region.close()
        self._maps.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _as_tensor(region: mmap.mmap) -> torch.Tensor:
    with warnings.catch_warnings():
        # Peers' files are mapped read-only, and are only read.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(region, dtype=torch.uint8)
