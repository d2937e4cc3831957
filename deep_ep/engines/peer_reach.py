"""Which ranks of an NVLink domain can map whose memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .._native import _C
from ..errors import TopologyError
from ..topology import host_identity


@dataclass(frozen=True)
class DeviceReport:
    """What a rank tells the others about its GPU.

    Attributes:
        uuid: 16 bytes, the same in every process whatever CUDA_VISIBLE_DEVICES says.
        pci_bus: e.g. ``"0000:1b:00.0"``, for messages.
        host: `deep_ep.topology.host_identity`.
        reach: for the GPUs that this process sees, by UUID, whether its own GPU can map their memory.
        error: why there is no report, else empty.
    """

    uuid: bytes
    pci_bus: str
    host: str
    reach: dict[bytes, bool]
    error: str = ""


def report_device(device: torch.device) -> DeviceReport:
    """The report of this process's rank. Never raises: the reason travels to the other ranks instead."""
    if not _C.has_cuda:
        return DeviceReport(b"", "", host_identity(), {}, "deep_ep was built without nvcc")
    try:
        index = device.index if device.index is not None else torch.cuda.current_device()
        uuid, pci_bus = _C.device_identity(index)
        return DeviceReport(uuid, pci_bus, host_identity(), _C.device_reach(index))
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
