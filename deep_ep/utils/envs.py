"""Process-group set-up, seeds, and what the hosts of a group look like."""

from __future__ import annotations

import os
import random
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from ..errors import ConfigError, TopologyError
from ..topology import domain_from_environment, host_identity, resolve_topology

_local_rank: int = 0
_global_seed: int = 0
_local_seed: int = 0


def init_dist(local_rank: int, num_local_ranks: int, seed: int = 0) -> tuple[int, int, dist.ProcessGroup]:
    """Join the default process group and return ``(rank, world size, group of all ranks)``.

    NCCL with one GPU a rank where CUDA is present (and the default device becomes ``cuda``), gloo elsewhere. The torch
    default dtype becomes bfloat16 and every random generator is seeded with ``seed + rank``.

    Environment: ``MASTER_ADDR`` (127.0.0.1), ``MASTER_PORT`` (8361). For processes that a script starts by itself,
    ``WORLD_SIZE`` is the number of nodes (1) and ``RANK`` this node's number (0). Under ``torchrun`` (``LOCAL_RANK`` is
    set) both count processes, as torch defines them.

    Raises:
        ConfigError: ``local_rank`` is not below ``num_local_ranks``, or CUDA has fewer devices than local ranks.
    """
    global _local_rank
    if not 0 <= local_rank < num_local_ranks:
        raise ConfigError(
            f"local_rank {local_rank} is not in 0..{num_local_ranks - 1} (num_local_ranks={num_local_ranks})"
        )
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "8361"))
    if "LOCAL_RANK" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    else:
        rank = int(os.environ.get("RANK", "0")) * num_local_ranks + local_rank
        world_size = int(os.environ.get("WORLD_SIZE", "1")) * num_local_ranks
    use_cuda = torch.cuda.is_available()
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} needs a CUDA device of its own, found {torch.cuda.device_count()}; start "
                "fewer ranks, or hide the devices (CUDA_VISIBLE_DEVICES=) to run on the CPU"
            )
        torch.cuda.set_device(local_rank)
        torch.set_default_device("cuda")
    dist.init_process_group(
        "nccl" if use_cuda else "gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=world_size
    )
    torch.set_default_dtype(torch.bfloat16)
    _local_rank = local_rank
    init_seed(seed)
    return rank, world_size, cast(dist.ProcessGroup, dist.new_group(list(range(world_size))))  # every rank is a member


def init_seed(global_seed: int) -> None:
    """Seed Python, numpy and torch with ``global_seed + rank``."""
    global _global_seed, _local_seed
    _global_seed = global_seed
    _local_seed = global_seed + (dist.get_rank() if dist.is_initialized() else 0)
    random.seed(_local_seed)
    np.random.seed(_local_seed % 2**32)
    torch.manual_seed(_local_seed)


def get_global_seed() -> int:
    """The seed given to `init_seed`."""
    return _global_seed


def get_local_seed() -> int:
    """The seed in use on this rank."""
    return _local_seed


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Print at once, with ``once_in_node`` only from the first rank of each node."""
    if not once_in_node or _local_rank == 0:
        print(s, flush=True)


def get_physical_domain_size(group: dist.ProcessGroup) -> tuple[int, int]:
    """``(number of nodes, ranks a node)`` of ``group``, from `DEEP_EP_NVL_DOMAIN` or the hosts. Collective."""
    hosts: list[str] = [""] * group.size()
    dist.all_gather_object(hosts, host_identity(), group)
    topology = resolve_topology(group.rank(), hosts, domain_from_environment())
    return topology.num_nodes, topology.domain


def get_logical_domain_size(group: dist.ProcessGroup, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """``(scale-out ranks, scale-up ranks)``: the physical domain, ``(1, all)`` without hybrid mode. Collective."""
    return get_physical_domain_size(group) if allow_hybrid_mode else (1, group.size())


def check_nvlink_connections(group: dist.ProcessGroup) -> None:
    """Check that PCIe cards which take part in ``group`` are bridged by NVLink.

    Does nothing for other devices or on CPU.

    Collective where such a card is found.

    Raises:
        TopologyError: more than two PCIe cards, or a pair without an NVLink bridge.
    """
    if not torch.cuda.is_available() or "PCIE" not in torch.cuda.get_device_name().upper():
        return
    if group.size() > 2:
        raise TopologyError(
            f"{torch.cuda.get_device_name()} cards are bridged in pairs, but the group has {group.size()} ranks; use "
            "groups of two"
        )
    name: str | None = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    names: list[str | None] = [None] * group.size()
    dist.all_gather_object(names, name, group)
    try:
        import pynvml
    except ImportError:
        return  # the links cannot be asked for; peer access is checked where memory is mapped
    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{n}".encode()) for n in names]
        for i, first in enumerate(handles):
            for j, second in enumerate(handles[:i]):
                status = pynvml.nvmlDeviceGetP2PStatus(first, second, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
                if status != pynvml.NVML_P2P_STATUS_OK:
                    raise TopologyError(
                        f"GPUs {j} and {i} of the group are not connected by NVLink (status {status}); place the "
                        "ranks on a bridged pair"
                    )
    finally:
        pynvml.nvmlShutdown()


def check_torch_deterministic() -> None:
    """Refuse torch's filling of uninitialised memory: it would write to outputs that peers are filling.

    Raises:
        ConfigError: deterministic algorithms and `torch.utils.deterministic.fill_uninitialized_memory` are both on.
    """
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if torch.are_deterministic_algorithms_enabled() and fills:
        raise ConfigError(
            "torch.use_deterministic_algorithms(True) with torch.utils.deterministic.fill_uninitialized_memory=True "
            "fills fresh outputs while peers write to them; set fill_uninitialized_memory = False (dispatch and "
            "combine are deterministic without it)"
        )
