"""The machine around the GPUs: shared memory, limits, container, MPS, environment."""

from __future__ import annotations

import mmap
import os
import resource
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from ..engines import shared
from .facts import Container, Host, Limit, Mps, SharedMemory, guard

_ROOT = Path("/")
_PREFIXES = ("DEEP_EP_", "NCCL_", "NVSHMEM_", "CUDA_", "TORCH_NCCL_", "GLOO_", "NVIDIA_", "OMP_", "KMP_")
_NAMES = (
    "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF", "RANK", "WORLD_SIZE",
)  # fmt: skip
#: Bits of CapEff that matter to communication libraries.
_CAPABILITIES = {"IPC_LOCK": 14, "SYS_PTRACE": 19, "SYS_ADMIN": 21, "SYS_NICE": 23, "SYS_RESOURCE": 24}
_MPS_DIRECTORY = "/tmp/nvidia-mps"  # where CUDA looks when nothing else is said


def collect_host(environment: Mapping[str, str], root: Path = _ROOT) -> Host:
    """Facts of this host and process, and the variables that matter of ``environment``."""
    return Host(
        name=socket.gethostname(),
        cpu=guard(_cpu_model, root),
        usable_cores=len(os.sched_getaffinity(0)),
        numa_nodes=guard(_numa_nodes, root),
        shared_memory=guard(shared_memory),
        limits=guard(_limits),
        container=guard(container, environment, root),
        mps=guard(mps, environment, root),
        peermem_module=any((root / "sys/module" / name).is_dir() for name in ("nvidia_peermem", "nv_peer_mem")),
        environment=relevant(environment),
    )


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what deep_ep, torch or CUDA does."""
    return {name: value for name, value in sorted(environment.items()) if name.startswith(_PREFIXES) or name in _NAMES}


def _cpu_model(root: Path) -> str:
    names = []
    for line in (root / "proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Processor", "cpu model"):
            names.append(value.strip())
    return names[0] if names else os.uname().machine


def _numa_nodes(root: Path) -> int:
    return sum(1 for path in (root / "sys/devices/system/node").iterdir() if path.name[4:].isdigit())


def shared_memory(folder: str = shared._FOLDER) -> SharedMemory:
    """Size of the file system, and whether a file as the portable engine makes it can be had there.

    Raises:
        OSError: there is no such folder.
    """
    state = os.statvfs(folder)
    return SharedMemory(folder, state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize, _try_file(folder))


def _try_file(folder: str) -> str:
    """ "" if a sparse file can be made, grown and mapped as in `engines.shared`; else why not."""
    path = os.path.join(folder, f"deep_ep-doctor-{os.getpid()}-{secrets.token_hex(8)}")
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.unlink(path)
            os.ftruncate(file, shared._RESERVED_BYTES)
            os.posix_fallocate(file, 0, shared._GROWTH_BYTES)
            mmap.mmap(file, shared._RESERVED_BYTES, access=mmap.ACCESS_WRITE).close()
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _limits() -> list[Limit]:
    return [
        _limit("memlock", resource.RLIMIT_MEMLOCK, "bytes"),
        _limit("nofile", resource.RLIMIT_NOFILE, "files"),
        _limit("nproc", resource.RLIMIT_NPROC, "processes"),
        _limit("as", resource.RLIMIT_AS, "bytes"),
    ]


def _limit(name: str, number: int, unit: str) -> Limit:
    soft, hard = (None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(number))
    return Limit(name, soft, hard, unit)


def container(environment: Mapping[str, str], root: Path) -> Container:
    """What hints at a container, and the limits that it sets.

    Raises:
        OSError: /proc cannot be read.
    """
    mask = 0
    for line in (root / "proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            mask = int(line.split()[1], 16)
    return Container(
        kind=_container_kind(environment, root),
        capabilities=[name for name, bit in _CAPABILITIES.items() if mask >> bit & 1],
        memory_limit_bytes=_memory_limit(root),
        cpu_limit=_cpu_limit(root),
    )


def _container_kind(environment: Mapping[str, str], root: Path) -> str:
    if environment.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    if environment.get("APPTAINER_CONTAINER") or environment.get("SINGULARITY_CONTAINER"):
        return "apptainer"
    return environment.get("container", "")


def _first_line(*paths: Path) -> str:
    for path in paths:
        try:
            return path.read_text().strip().partition("\n")[0]
        except OSError:
            continue
    return ""


def _memory_limit(root: Path) -> int | None:
    groups = root / "sys/fs/cgroup"
    text = _first_line(groups / "memory.max", groups / "memory/memory.limit_in_bytes")
    # The older interface writes a huge number for "no limit".
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None


def _cpu_limit(root: Path) -> float | None:
    groups = root / "sys/fs/cgroup"
    quota, _, period = _first_line(groups / "cpu.max").partition(" ")
    if not quota:
        quota = _first_line(groups / "cpu/cpu.cfs_quota_us")
        period = _first_line(groups / "cpu/cpu.cfs_period_us")
    if not (quota.isdigit() and period.isdigit() and int(period) > 0):
        return None  # "max", or -1
    return int(quota) / int(period)


def mps(environment: Mapping[str, str], root: Path) -> Mps:
    """The MPS daemon's pipe and processes, as far as this process can see them.

    Raises:
        OSError: /proc cannot be read.
    """
    directory = environment.get("CUDA_MPS_PIPE_DIRECTORY") or _MPS_DIRECTORY
    processes = []
    for path in (root / "proc").iterdir():
        # The kernel keeps 15 characters of "nvidia-cuda-mps-control" and "nvidia-cuda-mps-server".
        if path.name.isdigit() and _first_line(path / "comm") == "nvidia-cuda-mps":
            processes.append(int(path.name))
    return Mps(
        pipe_directory=directory,
        directory_from_environment=bool(environment.get("CUDA_MPS_PIPE_DIRECTORY")),
        control_pipe=(root / directory.lstrip("/") / "control").exists(),
        processes=sorted(processes),
    )
