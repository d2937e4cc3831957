"""RDMA network cards, and how far each is from each GPU, from sysfs alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .facts import Gpu, Maybe, Nic, NicPort, Unknown, guard

_ROOT = Path("/")


def collect_nics(gpus: Sequence[Gpu], root: Path = _ROOT) -> list[Nic]:
    """All devices under /sys/class/infiniband; none where the folder is missing."""
    folder = root / "sys/class/infiniband"
    if not folder.is_dir():
        return []
    return [_nic(path, gpus, root) for path in sorted(folder.iterdir())]


def _nic(path: Path, gpus: Sequence[Gpu], root: Path) -> Nic:
    device = (path / "device").resolve()
    return Nic(
        name=path.name,
        driver=(device / "driver").resolve().name if (device / "driver").exists() else "",
        pci=device.name,
        numa_node=guard(numa_node, device),
        interfaces=sorted(item.name for item in (device / "net").iterdir()) if (device / "net").is_dir() else [],
        ports=[_port(port) for port in sorted((path / "ports").iterdir())] if (path / "ports").is_dir() else [],
        verbs_device=_has_verbs_device(device, root),
        distance={gpu.index: guard(pci_distance, root / "sys/bus/pci/devices" / gpu.pci, device) for gpu in gpus},
    )


def _port(path: Path) -> NicPort:
    return NicPort(
        number=int(path.name) if path.name.isdigit() else 0,
        link_layer=_text(path / "link_layer"),
        # The kernel writes "4: ACTIVE".
        state=_text(path / "state").rpartition(": ")[2],
        rate=_text(path / "rate"),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"


def _has_verbs_device(device: Path, root: Path) -> bool:
    folder = device / "infiniband_verbs"
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return any((root / "dev/infiniband" / name).exists() for name in names)


def numa_node(device: Path) -> int:
    """The node that a PCI device hangs on; -1 where the machine has only one.

    Raises:
        OSError: there is no such device.
    """
    return int((device / "numa_node").read_text())


def pci_distance(first: Path, second: Path) -> str:
    """How two PCI devices of sysfs reach each other, in the words of `nvidia-smi topo -m`.

    A device's real path names the bridges above it: devices/pci0000:00/0000:00:01.0/0000:01:00.0/... The longer the
    part that two devices share, the nearer they are.

    Raises:
        OSError: there is no such device.
    """
    for path in (first, second):
        if not path.exists():
            raise FileNotFoundError(2, "no such PCI device", path.name)
    ways = [_bridges(path.resolve()) for path in (first, second)]
    shared = 0
    for a, b in zip(*ways, strict=False):
        if a != b:
            break
        shared += 1
    if shared == 0:
        nodes: list[Maybe[int]] = [guard(numa_node, path) for path in (first, second)]
        same = not isinstance(nodes[0], Unknown) and nodes[0] == nodes[1]
        return "NODE" if same else "SYS"
    if shared == 1:
        return "PHB"  # only the host bridge itself
    # Below a shared bridge, a device of the same switch is at most one downstream port away.
    return "PIX" if all(len(way) - shared <= 2 for way in ways) else "PXB"


def _bridges(path: Path) -> list[str]:
    parts = list(path.parts)
    start = next((i for i, part in enumerate(parts) if part.startswith("pci") and ":" in part), None)
    if start is None:
        raise FileNotFoundError(2, "not below a PCI host bridge", path.name)
    return parts[start:]
