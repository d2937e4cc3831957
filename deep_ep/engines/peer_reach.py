"""Which ranks of an NVLink domain can map whose memory, and what lies between them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .._native import _C
from ..errors import TopologyError
from ..topology import host_identity
from .nvml import nvlink_to


@dataclass(frozen=True)
class DeviceReport:
    """What a rank tells the others about its GPU.

    Attributes:
        uuid: 16 bytes, the same in every process whatever CUDA_VISIBLE_DEVICES says.
        pci_bus: e.g. ``"0000:1b:00.0"``, for messages.
        host: `deep_ep.topology.host_identity`.
        reach: for the GPUs that this process sees, by UUID, whether its own GPU can map their memory.
        error: why there is no report, else empty.
        nvlink: for GPUs of the host, by UUID, whether NVLink joins its own GPU to them. What is not known is missing.
    """

    uuid: bytes
    pci_bus: str
    host: str
    reach: dict[bytes, bool]
    error: str = ""
    nvlink: dict[bytes, bool] = field(default_factory=dict)


def report_device(device: torch.device) -> DeviceReport:
    """The report of this process's rank. Never raises: the reason travels to the other ranks instead."""
    if not _C.has_cuda:
        return DeviceReport(b"", "", host_identity(), {}, "deep_ep was built without nvcc")
    try:
        index = device.index if device.index is not None else torch.cuda.current_device()
        uuid, pci_bus = _C.device_identity(index)
        reach = _C.device_reach(index)
        # NVML shows GPUs that are hidden from CUDA as well.
        nvlink = nvlink_to(uuid) if "CUDA_VISIBLE_DEVICES" in os.environ else {}
        nvlink |= {other: over_nvlink for other, (_, over_nvlink) in reach.items()}
        if os.environ.get("DEEP_EP_LINES", "").strip() == "0":
            nvlink.clear()
        can_map = {other: can for other, (can, _) in reach.items()}
        return DeviceReport(uuid, pci_bus, host_identity(), can_map, nvlink=nvlink)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        return DeviceReport(b"", "", host_identity(), {}, str(error))


def missing_pairs(reports: Sequence[DeviceReport]) -> list[tuple[int, int]]:
    """Pairs (rank, peer) where the rank's GPU is known not to reach the peer's.

    A GPU that the process does not see cannot be asked about; the mapping itself will tell. Two ranks on one GPU
    always reach each other.
    """
    return [
        (rank, peer)
        for rank, mine in enumerate(reports)
        for peer, theirs in enumerate(reports)
        if mine.uuid != theirs.uuid and not mine.reach.get(theirs.uuid, True)
    ]


def carries_lines(reports: Sequence[DeviceReport]) -> bool:
    """Whether 128 bytes that a GPU stores at once arrive at once at that of every other rank.

    They do over NVLink and within a GPU. False where a pair is joined otherwise, or it is not known how, or a rank sets
    `DEEP_EP_LINES=0`.
    """

    def joined(mine: DeviceReport, theirs: DeviceReport) -> bool:
        # Hosts are joined by an NVLink fabric or not at all.
        return mine.uuid == theirs.uuid or mine.host != theirs.host or mine.nvlink.get(theirs.uuid, False)

    return all(mine.nvlink and joined(mine, theirs) for mine in reports for theirs in reports)


def check_reports(reports: Sequence[DeviceReport], use_fabric: bool) -> None:
    """The same verdict on every rank.

    Raises:
        TopologyError: a rank has no usable GPU, hosts differ without fabric handles, or a pair cannot share memory.
    """
    broken = {rank: report.error for rank, report in enumerate(reports) if report.error}
    if broken:
        rank, text = next(iter(broken.items()))
        raise TopologyError(f"ranks {sorted(broken)} cannot share GPU memory; rank {rank} says: {text}")
    hosts = sorted({report.host for report in reports})
    if len(hosts) > 1 and not use_fabric:
        raise TopologyError(
            f"the ranks of one NVLink domain run on {len(hosts)} hosts ({', '.join(hosts)}), expected one. Set "
            "DEEP_EP_NVL_DOMAIN to the ranks of a host, or pass use_fabric=True where the hosts share an NVLink fabric"
        )
    pairs = missing_pairs(reports)
    if pairs:
        rank, peer = pairs[0]
        names = ", ".join(f"{a}->{b}" for a, b in pairs[:16]) + (", ..." if len(pairs) > 16 else "")
        raise TopologyError(
            f"no peer access between the GPUs of ranks {names}: rank {rank} has GPU {reports[rank].pci_bus}, rank "
            f"{peer} has GPU {reports[peer].pci_bus}. Use GPUs that `nvidia-smi topo -p2p r` shows as connected, set "
            "DEEP_EP_NVL_DOMAIN to a number of ranks whose GPUs are, or run on the portable engine"
        )
