"""Which ranks share a node, decided the same way on every rank.

An NVLink domain of D ranks makes R / D nodes of contiguous ranks. D is, in this order: the constructor's
`num_nvl_peers`, the environment variable `DEEP_EP_NVL_DOMAIN`, what the hosts say.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .errors import TopologyError

#: GPUs of one host where nothing else is known: sizes are asked for before any group exists.
DEFAULT_NVL_DOMAIN = 8


@dataclass(frozen=True)
class Topology:
    """Ranks and nodes. ``domain`` ranks form a node; rank = node * domain + index in the node."""

    num_ranks: int
    rank: int
    domain: int

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.domain

    @property
    def node(self) -> int:
        return self.rank // self.domain

    @property
    def index_in_node(self) -> int:
        return self.rank % self.domain


def host_identity() -> str:
    """A string equal on two processes exactly when they run on the same booted host."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"


def domain_from_environment() -> int | None:
    """`DEEP_EP_NVL_DOMAIN`, or None when unset.

    Raises:
        TopologyError: the variable is not a positive integer.
    """
    text = os.environ.get("DEEP_EP_NVL_DOMAIN", "").strip()
    if not text:
        return None
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise TopologyError(
            f"DEEP_EP_NVL_DOMAIN={text!r} is not a positive integer; it is the number of ranks that share a node, "
            "e.g. 8. Unset it to let the hosts decide"
        )
    return value


def num_nodes_for(num_ranks: int) -> int:
    """Nodes that a group of ``num_ranks`` ranks is taken to span when no group exists yet (size hints)."""
    domain = min(domain_from_environment() or DEFAULT_NVL_DOMAIN, num_ranks)
    return -(-num_ranks // domain) if domain > 0 else 1


def _domain_from_hosts(hosts: Sequence[str]) -> int:
    """Ranks per host where all hosts hold equally many contiguous ranks, else the whole group.

    Uneven hosts have no same-index partner on every node, so the two-level route cannot serve them.
    """
    num_ranks = len(hosts)
    first = next((i for i, host in enumerate(hosts) if host != hosts[0]), num_ranks)
    if num_ranks % first != 0:
        return num_ranks
    blocks = [hosts[i : i + first] for i in range(0, num_ranks, first)]
    contiguous = all(len(set(block)) == 1 for block in blocks)
    distinct = len({block[0] for block in blocks}) == len(blocks)
    return first if contiguous and distinct else num_ranks


def resolve_topology(rank: int, hosts: Sequence[str], requested: int | None) -> Topology:
    """Build the topology from what every rank reported.

    Args:
        rank: this rank.
        hosts: `host_identity()` of each rank.
        requested: domain asked for by argument or environment, or None.

    Raises:
        TopologyError: the requested domain does not divide the group.
    """
    num_ranks = len(hosts)
    if requested is None:
        return Topology(num_ranks, rank, _domain_from_hosts(hosts))
    domain = min(requested, num_ranks)
    if num_ranks % domain != 0:
        raise TopologyError(
            f"an NVLink domain of {requested} ranks does not divide a group of {num_ranks} ranks; set "
            f"DEEP_EP_NVL_DOMAIN (or num_nvl_peers) to a divisor of {num_ranks}, or leave it unset"
        )
    return Topology(num_ranks, rank, domain)


def scratch_device(group: dist.ProcessGroup | None, device: str | torch.device | None) -> torch.device:
    """Where a buffer's scratch memory lies: as asked for, else the current CUDA device if the process uses one."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        on_cuda = group is not None and "nccl" in dist.get_backend(group)
        if on_cuda or torch.cuda.is_initialized():
            return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
