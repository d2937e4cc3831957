"""The CUDA driver through ctypes: questions that need no CUDA context, so that asking takes no device memory.

Works with a torch built without CUDA, and numbers devices as torch does (`CUDA_VISIBLE_DEVICES` applies to both).
"""

from __future__ import annotations

import ctypes

from .facts import Gpu, Unknown, guard

LIBRARY = "libcuda.so.1"

# Names and numbers of cuda.h.
_MULTIPROCESSOR_COUNT = 16
_COMPUTE_MODE = 20
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_VIRTUAL_MEMORY_MANAGEMENT = 102
_POSIX_FILE_DESCRIPTOR = 103
_GPU_DIRECT_RDMA = 116
_FABRIC = 128
_MULTICAST = 132
_MPS_ENABLED = 133
_P2P_NATIVE_ATOMIC = 3
_COMPUTE_MODES = {0: "default", 2: "prohibited", 3: "exclusive process"}


class DriverError(Exception):
    """A driver call failed."""


class DriverMissing(Exception):
    """There is no driver library."""


def normalize_pci(text: str) -> str:
    """A PCI id as the kernel writes it, e.g. "00000000:3B:00.0" -> "0000:3b:00.0".

    Raises:
        ValueError: not a PCI id.
    """
    domain, bus, device = text.strip().lower().split(":")
    slot, _, function = device.partition(".")
    return f"{int(domain, 16):04x}:{int(bus, 16):02x}:{int(slot, 16):02x}.{int(function or '0', 16):x}"


class Driver:
    """An initialised driver.

    Raises:
        DriverMissing: the library cannot be loaded. DriverError: it finds no device, or does not start.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise DriverMissing(f"no NVIDIA driver: {error}") from error
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            label = text.value.decode() if text.value else f"error {code}"
            raise DriverError(f"{name}: {label}")

    def _integer(self, name: str, *arguments: int) -> int:
        value = ctypes.c_int()
        self._call(name, ctypes.byref(value), *arguments)
        return value.value

    def cuda_version(self) -> int:
        """The newest CUDA that this driver serves, 1000 * major + 10 * minor."""
        return self._integer("cuDriverGetVersion")

    def device_count(self) -> int:
        return self._integer("cuDeviceGetCount")

    def _handle(self, index: int) -> int:
        return self._integer("cuDeviceGet", index)

    def _attribute(self, attribute: int, index: int) -> int:
        return self._integer("cuDeviceGetAttribute", attribute, self._handle(index))

    def _flag(self, attribute: int, index: int) -> bool:
        return self._attribute(attribute, index) != 0

    def _text(self, name: str, index: int) -> str:
        buffer = ctypes.create_string_buffer(256)
        self._call(name, buffer, len(buffer), self._handle(index))
        return buffer.value.decode()

    def can_access_peer(self, index: int, peer: int) -> bool:
        return self._integer("cuDeviceCanAccessPeer", self._handle(index), self._handle(peer)) != 0

    def native_atomics(self, index: int, peer: int) -> bool:
        attribute = self._integer(
            "cuDeviceGetP2PAttribute", _P2P_NATIVE_ATOMIC, self._handle(index), self._handle(peer)
        )
        return attribute != 0

    def gpu(self, index: int) -> Gpu:
        """One device; `mig` and `numa_node` are for others to fill in.

        Raises:
            DriverError: a basic question is refused. Younger ones are `Unknown` where the driver is older.
        """
        memory = ctypes.c_size_t()
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), self._handle(index))
        mode = self._attribute(_COMPUTE_MODE, index)
        return Gpu(
            index=index,
            name=self._text("cuDeviceGetName", index),
            pci=normalize_pci(self._text("cuDeviceGetPCIBusId", index)),
            numa_node=Unknown("not asked"),
            memory_bytes=memory.value,
            capability=10 * self._attribute(_CAPABILITY_MAJOR, index) + self._attribute(_CAPABILITY_MINOR, index),
            num_sms=self._attribute(_MULTIPROCESSOR_COUNT, index),
            compute_mode=_COMPUTE_MODES.get(mode, str(mode)),
            mig=Unknown("not asked"),
            mps_client=guard(self._flag, _MPS_ENABLED, index),
            vmm=guard(self._flag, _VIRTUAL_MEMORY_MANAGEMENT, index),
            posix_fd=guard(self._flag, _POSIX_FILE_DESCRIPTOR, index),
            fabric=guard(self._flag, _FABRIC, index),
            multicast=guard(self._flag, _MULTICAST, index),
            gpudirect_rdma=guard(self._flag, _GPU_DIRECT_RDMA, index),
        )
