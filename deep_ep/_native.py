"""The compiled extension, and the codes that its functions share with Python.

`_C` knows addresses and sizes only. Everything here is internal: use `deep_ep.ops`, `deep_ep.fp8`, `deep_ep.logfmt`.
"""

from __future__ import annotations

import torch

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        "deep_ep._C could not be loaded. In a source checkout, build it first: `bash install.sh`, or "
        f"`pip install --no-build-isolation -e .` ({error})"
    ) from error

__all__ = ["_C", "ELEMENT_TYPES", "SCALE_FORMATS", "current_stream", "num_threads", "set_num_threads"]

# ElementType and ScaleFormat of csrc/layout/fp8_format.h.
ELEMENT_TYPES: dict[torch.dtype, int] = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SCALE_FORMATS: dict[str, int] = {"fp32": 0, "pow2": 1, "ue8m0": 2}


def num_threads() -> int:
    """Threads that a CPU loop may use: OMP_NUM_THREADS at first, or else the cores this process may run on."""
    return _C.num_threads()


def set_num_threads(count: int) -> None:
    """Sets `num_threads()` for this process; at least 1."""
    _C.set_num_threads(count)


def current_stream(device: torch.device) -> int:
    """The address of torch's current stream on `device`, for a kernel launch."""
    return int(torch.cuda.current_stream(device).cuda_stream)
