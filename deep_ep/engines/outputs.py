"""Where the rows of a dispatch land: one block of memory for all tensors that peers fill, cut into them afterwards.

The peers need addresses before anyone knows how many rows come; tensors are made last, with their exact shapes. One
block and few objects, because the host's time for a call is as scarce as the link's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

#: Of the parts of a block, in bytes: what bulk copies and vector loads need.
ALIGNMENT = 128


def aligned(num_bytes: int) -> int:
    """Rounded up to the alignment of parts."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Field:
    """One tensor [rows, width] of a dispatch."""

    name: str
    dtype: torch.dtype
    width: int
    row_bytes: int

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, width: int) -> Field:
        return cls(name, dtype, width, width * dtype.itemsize)


#: Source token of each row; it belongs to the handle and lives longer than the rows.
SRC_IDX = Field.of("src_idx", torch.int32, 1)
_NAMES = ("rows", "scales", "topk_idx", "topk_weights")


class RowPlan:
    """Which tensors a dispatch brings.

    Args:
        fields: without `SRC_IDX`; the rows come first.
        signature: text that differs wherever ranks disagree.
    """

    def __init__(self, fields: Sequence[Field], signature: str) -> None:
        self.fields = tuple(fields)
        self._row_bytes = [field.row_bytes for field in fields]
        self.row_bytes = sum(self._row_bytes)
        self._text = signature
        self._signatures: dict[tuple[object, ...], int] = {}
        by_name = {field.name: i for i, field in enumerate(fields)}
        self._positions = tuple(by_name.get(name, -1) for name in _NAMES)

    def named(
        self, tensors: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """scales, topk_idx and topk_weights of tensors in the order of the fields."""
        _, scales, idx, weights = self._positions
        return (
            None if scales < 0 else tensors[scales],
            None if idx < 0 else tensors[idx],
            None if weights < 0 else tensors[weights],
        )

    def signature(self, *parts: object) -> int:
        """A number for an operation on these rows, never that of a refusal."""
        known = self._signatures.get(parts)
        if known is None:
            text = f"{self._text} {parts!r}".encode()
            known = self._signatures[parts] = zlib.crc32(text) << 16 | zlib.adler32(text) & 0xFFFF
        return known

    def starts(self, capacity: int) -> tuple[list[int], int]:
        """Where each field starts in a block of ``capacity`` rows, and the bytes of the block."""
        starts, total = [], 0
        for row_bytes in self._row_bytes:
            starts.append(total)
            total += (capacity * row_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        return starts, total

    def num_bytes(self, capacity: int, *, with_src_idx: bool) -> int:
        """Of a block, with the source tokens behind it."""
        return self.starts(capacity)[1] + (aligned(capacity * SRC_IDX.row_bytes) if with_src_idx else 0)

    def offsets(self, base: int, starts: Sequence[int]) -> tuple[int, int, int, int]:
        """Offsets in the heap of rows, scales, topk_idx and topk_weights; -1 for an absent one."""
        _, scales, idx, weights = self._positions
        return (
            base,
            -1 if scales < 0 else base + starts[scales],
            -1 if idx < 0 else base + starts[idx],
            -1 if weights < 0 else base + starts[weights],
        )


@dataclass(slots=True)
class Landing:
    """Memory announced to the peers for one operation.

    Attributes:
        capacity: rows.
        offsets: in the heap; see `RowPlan.offsets`, then src_idx (-1 without one) and the capacity.
        starts: of the fields in the block.
        block: storage of the fields, None in staging memory.
        src: storage and offset in bytes of src_idx; None in staging memory and without one.
        staged_at: offset in the heap of the block in staging memory, -1 outside it.
    """

    capacity: int
    offsets: tuple[int, int, int, int, int, int]
    starts: list[int]
    block: torch.UntypedStorage | None = None
    src: tuple[torch.UntypedStorage, int] | None = None
    staged_at: int = -1


class TensorMaker:
    """Makes tensors on parts of storages. Not views of one tensor: callers may give each other storage, ask it for
    gradients, or change it in place without autograd taking the others for changed."""

    def __init__(self, device: torch.device) -> None:
        self._new: dict[torch.dtype, Callable[[int], torch.Tensor]] = {}
        self._device = device

    def __call__(
        self, storage: torch.UntypedStorage, start: int, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """A contiguous tensor of one or two dimensions whose first byte is ``start`` bytes into the storage."""
        new = self._new.get(dtype)
        if new is None:
            new = self._new[dtype] = torch.empty(0, dtype=dtype, device=self._device).new_empty
        stride = (shape[1], 1) if len(shape) == 2 else (1,)
        return new(0).set_(storage, start // dtype.itemsize, shape, stride)
