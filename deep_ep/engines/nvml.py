"""What NVML, the library behind `nvidia-smi`, knows of the links between GPUs.

It is asked because it shows all GPUs of the host, also those that CUDA_VISIBLE_DEVICES hides from CUDA.
"""

from __future__ import annotations

import ctypes
import uuid

_LIBRARY = "libnvidia-ml.so.1"
_P2P_NVLINK = 2  # NVML_P2P_CAPS_INDEX_NVLINK
_P2P_OK = 0
_UUID_CHARS = 96


def nvlink_to(own: bytes) -> dict[bytes, bool]:
    """By UUID (16 bytes) of the GPUs of the host: whether NVLink joins the GPU of UUID ``own`` to them.

    Empty where there is no NVML, or it does not know that GPU. A GPU that NVML cannot answer for is missing.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
        if library.nvmlInit_v2() != 0:
            return {}
    except (OSError, AttributeError):
        return {}
    try:
        handles = _handles(library)
        if own not in handles:
            return {}
        answers = {other: _over_nvlink(library, handles[own], handle) for other, handle in handles.items()}
    except AttributeError:  # an older library
        return {}
    finally:
        library.nvmlShutdown()
    return {other: answer for other, answer in answers.items() if answer is not None and other != own}


def _handles(library: ctypes.CDLL) -> dict[bytes, ctypes.c_void_p]:
    count = ctypes.c_uint()
    if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return {}
    handles = {}
    for index in range(count.value):
        handle, text = ctypes.c_void_p(), ctypes.create_string_buffer(_UUID_CHARS)
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:
            continue
        if library.nvmlDeviceGetUUID(handle, text, _UUID_CHARS) != 0:
            continue
        handles[uuid.UUID(text.value.decode().removeprefix("GPU-")).bytes] = handle
    return handles


def _over_nvlink(library: ctypes.CDLL, own: ctypes.c_void_p, other: ctypes.c_void_p) -> bool | None:
    status = ctypes.c_int()
    if library.nvmlDeviceGetP2PStatus(own, other, _P2P_NVLINK, ctypes.byref(status)) != 0:
        return None
    return status.value == _P2P_OK
