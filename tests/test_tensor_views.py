"""Tensors on slabs by torch's C functions for compiled code, and by its Python functions where it has none of these."""

import pytest
import torch

from deep_ep._native import _C

PARTS, PART_BYTES, NAME = 3, 64, "_place"
#: sizes, strides, offset in the first part and elements of a part: five int32, four int32 across, two int64.
LAYOUTS = [((5,), (1,), 8, 16), ((2, 2), (1, 2), 4, 16), ((2, 1), (1, 1), 0, 8)]


class Handles:
    """`calls`: of the Python function that makes views; `wrong`: it gives other offsets."""

    def __init__(self, wrong: int = 0, base: type = torch.Tensor) -> None:
        self.calls, self.slabs = 0, []

        def make_slab(num_parts: int) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
            slab = torch.arange(num_parts * PART_BYTES // 4, dtype=torch.int32).as_subclass(base)
            self.slabs.append(slab)
            return slab.data_ptr(), slab, slab, slab.view(torch.int64)

        def view(tensor, sizes, strides, offset) -> torch.Tensor:
            self.calls += 1
            return tensor.as_strided(sizes, strides, offset + wrong)

        self.handles = _C.LowLatencyHandles(make_slab, view, PARTS, PART_BYTES, LAYOUTS, None, NAME, (1, 2, 3))

    def take(self) -> tuple[list[torch.Tensor], int]:
        count, handle, address = self.handles.take(7, False)
        assert handle[2:] == (1, 2, 3)
        assert getattr(handle[0], NAME) == (None, address)
        return [count, *handle[:2]], address


def expect(tensors: list[torch.Tensor], slab: torch.Tensor, part: int) -> None:
    for tensor, (sizes, strides, first, step) in zip(tensors, LAYOUTS, strict=True):
        whole = slab.view(torch.int64) if step == 8 else slab
        wanted = whole.as_strided(sizes, strides, first + part * step)
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert tensor.data_ptr() == wanted.data_ptr()
        assert tensor.untyped_storage().data_ptr() == slab.untyped_storage().data_ptr()
        assert not tensor.requires_grad
        tensor.fill_(-part)
        assert torch.equal(wanted, tensor)


def test_views_of_parts():
    handles = Handles()
    taken = [handles.take() for _ in range(2 * PARTS + 1)]
    assert len(handles.slabs) == 3
    for number, (tensors, address) in enumerate(taken):
        slab, part = handles.slabs[number // PARTS], number % PARTS
        assert address == slab.data_ptr() + part * PART_BYTES
        expect(tensors, slab, part)


def test_the_slab_lives_as_long_as_a_tensor_on_it():
    handles = Handles()
    count = handles.take()[0][0]
    storage = count.untyped_storage().data_ptr()
    del handles
    others = [torch.full((PARTS * PART_BYTES // 4,), -5, dtype=torch.int32) for _ in range(20)]
    assert count.tolist() == [8, 9, 10, 11, 12]
    assert storage not in {other.data_ptr() for other in others}


def test_python_is_asked_once_a_slab():
    if not hasattr(getattr(torch._C, "_aoti", None), "unsafe_alloc_void_ptr_from_tensor"):
        pytest.skip("this torch has no C functions for it")
    handles = Handles()
    for _ in range(PARTS):
        handles.take()
    assert handles.calls == len(LAYOUTS)


@pytest.mark.parametrize("what", [{"wrong": 1}, {"base": type("Derived", (torch.Tensor,), {})}])
def test_python_makes_what_differs(what):
    """What the caller's own function would make counts, here other places or other types."""
    handles = Handles(**what)
    tensors = handles.take()[0]
    assert handles.calls == 2 * len(LAYOUTS)
    assert type(tensors[0]) is what.get("base", torch.Tensor)
    assert tensors[0].storage_offset() == LAYOUTS[0][2] + what.get("wrong", 0)
