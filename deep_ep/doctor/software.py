"""Versions and builds: Python, torch, the extension, NVSHMEM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from ..version import __version__
from .facts import Extension, Nvshmem, Software, guard

_ROOT = Path("/")
_NVSHMEM_PACKAGES = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")
_NVSHMEM_PATTERN = "libnvshmem_host.so*"
_SYSTEM_FOLDERS = (
    "usr/local/nvshmem/lib", "usr/local/lib", "usr/lib64", "usr/lib", "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
)  # fmt: skip


def collect_software(environment: Mapping[str, str], root: Path = _ROOT) -> Software:
    return Software(
        deep_ep=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        distributed_backends=guard(_backends),
        extension=guard(_extension),
        nvshmem=guard(find_nvshmem, environment, root),
    )


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    present = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    return [name for name, available in present.items() if available()]


def _extension() -> Extension:
    from .._native import _C

    return Extension(
        has_cuda=_C.has_cuda,
        cuda_runtime=_C.cuda_runtime_version(),
        build_archs=[arch for arch in _C.cuda_build_archs().split(";") if arch],
        cpu_isa=_C.cpu_isa(),
        num_threads=_C.num_threads(),
    )


def find_nvshmem(environment: Mapping[str, str], root: Path) -> Nvshmem | None:
    """The NVSHMEM host library: of the installed package, else of the system. It is found, not loaded."""
    for folder in [*_package_folders(), *_system_folders(environment, root)]:
        libraries = sorted(folder.glob(_NVSHMEM_PATTERN))
        if libraries:
            return Nvshmem(_package_version(), str(libraries[0]))
    return None


def _package_folders() -> list[Path]:
    if importlib.util.find_spec("nvidia") is None:
        return []
    spec = importlib.util.find_spec("nvidia.nvshmem")
    locations = spec.submodule_search_locations if spec is not None else None
    return [Path(location) / "lib" for location in locations or ()]


def _system_folders(environment: Mapping[str, str], root: Path) -> list[Path]:
    named = [environment[name] for name in ("NVSHMEM_HOME", "NVSHMEM_DIR", "NVSHMEM_PREFIX") if environment.get(name)]
    searched = [entry for entry in environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]
    return [
        *(Path(home) / "lib" for home in named),
        *(Path(entry) for entry in searched),
        *(root / folder for folder in _SYSTEM_FOLDERS),
    ]


def _package_version() -> str:
    for name in _NVSHMEM_PACKAGES:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
