"""Where the rows of a dispatch land: one block of memory for all tensors that peers fill, cut into them afterwards.

The peers need addresses before anyone knows how many rows come; tensors are made last, with their exact shapes. One
block and few objects, because the host's time for a call is as scarce as the link's.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Of the parts of a block, in bytes: what bulk copies and vector loads need.
ALIGNMENT = 128


def aligned(num_bytes: int) -> int:
    """Rounded up to the alignment of parts."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def template(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An empty tensor, to make others of: ``template.data.set_(storage, first element, shape, strides)``.

    Nothing makes a tensor on given memory faster. And such tensors are no views of one tensor: callers may give each
    other storage, ask it for gradients, or change it in place without autograd taking the others for changed.
    """
    with torch.inference_mode(False):  # those made of an inference tensor could not be saved for backward
        return torch.empty(0, dtype=dtype, device=device)


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
        device: where the tensors live, if any are made.
        native: `_C.DispatchPlan`, which launches dispatches of such rows.
        inputs: `_C.DispatchInputs`, which looks at what such dispatches are given; None where it cannot.
        kernel: that places the rows.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        signature: str,
        device: torch.device | None = None,
        native: Any = None,
        inputs: Any = None,
        kernel: str = "",
    ) -> None:
        self.fields = tuple(fields)
        self.kernel = kernel
        # Methods of both; looked up once, since each time makes an object.
        self.route: Any = None
        self.repeat: Any = None
        self.read: Any = None
        self.read_again: Any = None
        if native is not None:
            self.route, self.repeat = native.route, native.repeat
        if inputs is not None:
            self.read, self.read_again = inputs.read, inputs.read_again
        self.hidden = fields[0].width if fields else 0
        self._widths = [field.width for field in fields]
        self._row_bytes = [field.row_bytes for field in fields]
        self.row_bytes = sum(self._row_bytes)
        #: Of a row and its scales, and the name of what travels: for `TrafficStats`.
        self.payload_bytes = sum(field.row_bytes for field in fields if field.name in ("rows", "scales"))
        self.dtype_name = str(self.fields[0].dtype).removeprefix("torch.") if fields else ""
        self._device = device
        self._empty: list[torch.Tensor] = []
        self._text = signature
        self._signatures: dict[tuple[object, ...], int] = {}
        self._last = (0, [0] * len(self.fields), 0)
        self._shapes: tuple[tuple[int, int], list[tuple[Any, ...]]] = ((-1, -1), [])
        by_name = {field.name: i for i, field in enumerate(fields)}
        self._positions = tuple(by_name.get(name, -1) for name in _NAMES)

    def tensors(self, block: torch.UntypedStorage, capacity: int, num_rows: int) -> list[torch.Tensor]:
        """The tensors of the first ``num_rows`` rows of a block of ``capacity`` rows."""
        if self._shapes[0] != (capacity, num_rows):
            starts, _ = self.starts(capacity)
            if not self._empty and self._device is not None:
                self._empty = [template(field.dtype, self._device) for field in self.fields]
            shapes = [
                (empty, start // field.dtype.itemsize, (num_rows, field.width), (field.width, 1))
                for empty, field, start in zip(self._empty, self.fields, starts, strict=True)
            ]
            self._shapes = ((capacity, num_rows), shapes)
        return [empty.data.set_(block, first, shape, strides) for empty, first, shape, strides in self._shapes[1]]

    def cut(self, tensors: Sequence[torch.Tensor], num_rows: int) -> None:
        """Give these tensors ``num_rows`` rows, for which their block has room."""
        for tensor, width in zip(tensors, self._widths, strict=True):
            tensor.resize_(num_rows, width)

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
        if capacity != self._last[0]:  # most calls are as large as the one before
            starts, total = [], 0
            for row_bytes in self._row_bytes:
                starts.append(total)
                total += aligned(capacity * row_bytes)
            self._last = (capacity, starts, total)
        return self._last[1], self._last[2]

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


@dataclass(slots=True, eq=False)
class HandleMemory:
    """The tensors of a handle that are this rank's own, with any contents.

    Attributes:
        key: number of tokens, number of channels, and the handle of the stream.
        addresses: of rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix and send_head.
        tensors: these.
    """

    key: tuple[int, int, int]
    addresses: tuple[int, int, int, int]
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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
