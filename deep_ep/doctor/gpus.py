"""GPUs, what they can do, and how each pair is linked."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from .bandwidth import Measured, probe
from .driver import LIBRARY, Driver, DriverError, DriverMissing
from .facts import NOT_MEASURED, Gpu, Gpus, Maybe, Pair, Unknown, guard, reason_of
from .links import Links, query_links
from .nics import numa_node

_ROOT = Path("/")


def collect_gpus(run_probe: bool, root: Path = _ROOT, library: str = LIBRARY) -> Gpus:
    """Everything about GPUs. Creates no CUDA context in this process; with ``run_probe`` a child process does."""
    version = guard(driver_version, root)
    try:
        driver = Driver(library)
    except (DriverMissing, DriverError) as error:
        return _without_devices(reason_of(error), version, root)
    cuda = guard(driver.cuda_version)
    try:
        devices = [driver.gpu(index) for index in range(driver.device_count())]
    except (DriverError, AttributeError, ValueError) as error:
        return dataclasses.replace(_without_devices(reason_of(error), version, root), driver_cuda=cuda)
    if not devices:
        return dataclasses.replace(_without_devices("no CUDA device", version, root), driver_cuda=cuda)
    links = guard(query_links, sorted({gpu.pci for gpu in devices}))
    measured = probe(len(devices)) if run_probe else Measured({}, {})
    return Gpus(
        status="ok",
        driver=version,
        driver_cuda=cuda,
        present=guard(_present, root),
        imex_channels=_imex_channels(root),
        link_source=links if isinstance(links, Unknown) else links.source,
        devices=[_complete(gpu, links, measured, root) for gpu in devices],
        pairs=_pairs(driver, devices, links, measured),
    )


def _without_devices(status: str, version: Maybe[str], root: Path) -> Gpus:
    nothing = Unknown("no driver")
    return Gpus(status, version, nothing, guard(_present, root), _imex_channels(root), nothing, [], [])


def driver_version(root: Path) -> str:
    """Version of the loaded kernel module, e.g. "580.65.06".

    Raises:
        OSError: no such module is loaded. ValueError: it says no version.
    """
    text = (root / "proc/driver/nvidia/version").read_text()
    match = re.search(r"\b\d{3,4}\.\d+(\.\d+)?\b", text)
    if match is None:
        raise ValueError("/proc/driver/nvidia/version names no version")
    return match.group()


def _present(root: Path) -> int:
    return sum(1 for _ in (root / "proc/driver/nvidia/gpus").iterdir())


def _imex_channels(root: Path) -> list[str]:
    folder = root / "dev/nvidia-caps-imex-channels"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _complete(gpu: Gpu, links: Maybe[Links], measured: Measured, root: Path) -> Gpu:
    if isinstance(links, Unknown):
        # A slice of a GPU has it in its name; a whole GPU need not be what the name says.
        mig: Maybe[bool] = True if "MIG" in gpu.name.split() else links
    else:
        mig = links.mig.get(gpu.pci, Unknown(f"{links.source} does not list this GPU"))
    node = guard(numa_node, root / "sys/bus/pci/devices" / gpu.pci)
    sharing = measured.sharing.get(gpu.index, gpu.sharing)
    return dataclasses.replace(gpu, mig=mig, numa_node=node, sharing=sharing)


def _pairs(driver: Driver, devices: list[Gpu], links: Maybe[Links], measured: Measured) -> list[Pair]:
    pairs = []
    for source in devices:
        for target in devices:
            i, j = source.index, target.index
            pairs.append(
                Pair(
                    src=i,
                    dst=j,
                    peer_access=True if i == j else guard(driver.can_access_peer, i, j),
                    native_atomics=True if i == j else guard(driver.native_atomics, i, j),
                    link=_link(source, target, links),
                    bandwidth=measured.pairs.get((i, j), Unknown(NOT_MEASURED)),
                )
            )
    return pairs


def _link(source: Gpu, target: Gpu, links: Maybe[Links]) -> Maybe[str]:
    if source.pci == target.pci:
        return "X"
    if isinstance(links, Unknown):
        return links
    return links.kinds.get((source.pci, target.pci), Unknown(f"{links.source} does not name it"))
