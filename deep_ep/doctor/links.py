"""How GPUs are linked, from NVML (package nvidia-ml-py) or, without it, from the texts that nvidia-smi prints."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .driver import normalize_pci
from .facts import reason_of

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_GPU_NAME = re.compile(r"GPU\d+$")
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Links:
    """Keyed by PCI id. ``kinds``: as `Pair.link`. ``mig``: whether a GPU is in MIG mode."""

    source: str
    kinds: dict[tuple[str, str], str]
    mig: dict[str, bool]


def query_links(pci_ids: Sequence[str]) -> Links:
    """Ask NVML, else nvidia-smi.

    Raises:
        RuntimeError: neither answers; says why for both.
    """
    reasons = []
    for name, query in (("pynvml", _from_nvml), ("nvidia-smi", _from_nvidia_smi)):
        try:
            return query(pci_ids)
        except Exception as error:  # NVML's errors are a class of an optional package
            reasons.append(f"{name}: {reason_of(error)}")
    raise RuntimeError("; ".join(reasons))


def _from_nvml(pci_ids: Sequence[str]) -> Links:
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = {pci: pynvml.nvmlDeviceGetHandleByPciBusId(pci.encode()) for pci in pci_ids}
        reached = {pci: _nvlinks(pynvml, handle) for pci, handle in handles.items()}
        kinds = {
            (a, b): _nvml_kind(pynvml, handles[a], handles[b], _links_between(reached, a, b))
            for a in pci_ids for b in pci_ids if a != b
        }  # fmt: skip
        mig = {}
        for pci, handle in handles.items():
            try:
                mig[pci] = bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
            except pynvml.NVMLError:
                mig[pci] = False
        return Links("pynvml", kinds, mig)
    finally:
        pynvml.nvmlShutdown()


def _nvlinks(pynvml: Any, handle: Any) -> Counter[str]:
    """Active links by where they lead: a peer's PCI id, or "" for a switch that reaches all."""
    reached: Counter[str] = Counter()
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            if not pynvml.nvmlDeviceGetNvLinkState(handle, link):
                continue
        except pynvml.NVMLError:
            continue  # this GPU has fewer links
        try:
            if pynvml.nvmlDeviceGetNvLinkRemoteDeviceType(handle, link) == pynvml.NVML_NVLINK_DEVICE_TYPE_GPU:
                remote = pynvml.nvmlDeviceGetNvLinkRemotePciInfo(handle, link).busId
                reached[normalize_pci(remote.decode() if isinstance(remote, bytes) else remote)] += 1
                continue
        except pynvml.NVMLError:
            pass  # virtual machines hide the far end, which is a switch there
        reached[""] += 1
    return reached


def _links_between(reached: dict[str, Counter[str]], a: str, b: str) -> int:
    return reached[a][b] or min(reached[a][""], reached[b][""])


def _nvml_kind(pynvml: Any, a: Any, b: Any, links: int) -> str:
    if links > 0 and pynvml.nvmlDeviceGetP2PStatus(a, b, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == 0:
        return f"NV{links}"
    level = pynvml.nvmlDeviceGetTopologyCommonAncestor(a, b)
    for limit, name in ((10, "PIX"), (20, "PXB"), (30, "PHB"), (40, "NODE")):
        if level <= limit:
            return name
    return "SYS"


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise RuntimeError(f"exit status {result.returncode}{': ' + lines[-1] if lines else ''}")
    return result.stdout


def _from_nvidia_smi(pci_ids: Sequence[str]) -> Links:
    listing = parse_listing(
        _run("nvidia-smi", "--query-gpu=index,pci.bus_id,mig.mode.current", "--format=csv,noheader")
    )
    topology = parse_topology(_run("nvidia-smi", "topo", "-m"))
    names = {f"GPU{index}": pci for index, (pci, _) in listing.items()}
    kinds = {
        (names[a], names[b]): kind
        for (a, b), kind in topology.items()
        if a in names and b in names and names[a] in pci_ids and names[b] in pci_ids
    }
    return Links("nvidia-smi", kinds, dict(listing.values()))


def parse_listing(text: str) -> dict[int, tuple[str, bool]]:
    """Lines "index, PCI id, MIG mode" -> {index: (PCI id, MIG mode is on)}.

    Raises:
        ValueError: a line is something else.
    """
    listing = {}
    for line in text.strip().splitlines():
        index, pci, mig = (field.strip() for field in line.split(","))
        listing[int(index)] = (normalize_pci(pci), mig == "Enabled")
    return listing


def parse_topology(text: str) -> dict[tuple[str, str], str]:
    """The table of `nvidia-smi topo -m` -> {("GPU0", "GPU1"): "NV18", ...}, GPUs only.

    Raises:
        ValueError: there is no such table.
    """
    columns: list[str] = []
    kinds: dict[tuple[str, str], str] = {}
    for line in _ANSI.sub("", text).splitlines():
        cells = line.split()
        if not cells or not _GPU_NAME.match(cells[0]):
            if columns:
                break
            continue
        if not columns:
            # The GPUs are the first columns; NICs and affinities follow.
            columns = [cell for cell in cells if _GPU_NAME.match(cell)]
            continue
        for column, kind in zip(columns, cells[1:], strict=False):
            if column != cells[0]:
                kinds[cells[0], column] = kind
    if not columns:
        raise ValueError("`nvidia-smi topo -m` printed no table of GPUs")
    return kinds
