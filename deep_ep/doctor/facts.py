"""The facts, as plain data: gathered by the other modules of this package, printed by `report`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, Union

#: Changes whenever a key of `to_json` is renamed, removed or given another meaning; new keys may come without.
SCHEMA = 1
#: Why there are no bandwidths where none were asked for.
NOT_MEASURED = "not measured"

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True)
class Unknown:
    """Stands where a fact could not be had."""

    reason: str

    def __str__(self) -> str:
        return f"unknown ({self.reason})"


Maybe: TypeAlias = Union[T, Unknown]  # noqa: UP007 - `T | Unknown` is no alias to mypy


def known(value: Maybe[T]) -> T | None:
    """The value, or None where it is unknown."""
    return None if isinstance(value, Unknown) else value


def reason_of(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def guard(probe: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Maybe[T]:
    """What ``probe`` returns, or why it failed."""
    try:
        return probe(*args, **kwargs)
    except Exception as error:
        return Unknown(reason_of(error))


@dataclass(frozen=True)
class Extension:
    """`deep_ep._C`. CUDA versions are 1000 * major + 10 * minor, 0 for a build without CUDA."""

    has_cuda: bool
    cuda_runtime: int
    build_archs: list[str]
    cpu_isa: str
    num_threads: int


@dataclass(frozen=True)
class Nvshmem:
    version: str
    library: str


@dataclass(frozen=True)
class Software:
    deep_ep: str
    python: str
    platform: str
    torch: str
    torch_cuda: str | None
    distributed_backends: Maybe[list[str]]
    extension: Maybe[Extension]
    nvshmem: Maybe[Nvshmem | None]


@dataclass(frozen=True)
class Gpu:
    """One device, numbered as torch numbers it. ``capability`` is 10 * major + minor.

    ``sharing``: for each way of `deep_ep.engines.peer_memory`, "" where memory could be exported, else why not.
    """

    index: int
    name: str
    pci: str
    numa_node: Maybe[int]
    memory_bytes: int
    capability: int
    num_sms: int
    compute_mode: str
    mig: Maybe[bool]
    mps_client: Maybe[bool]
    vmm: Maybe[bool]
    posix_fd: Maybe[bool]
    fabric: Maybe[bool]
    multicast: Maybe[bool]
    gpudirect_rdma: Maybe[bool]
    sharing: Maybe[dict[str, str]] = Unknown(NOT_MEASURED)


@dataclass(frozen=True)
class Bandwidth:
    """GB/s (1e9 bytes a second) of one direction, and of both at once added up. ``intact``: the data arrived.

    ``gbytes_per_s_kernel``: the same as both at once, by a kernel on `bandwidth.KERNEL_SMS` SMs of each GPU, as
    dispatch moves rows; None where there are no kernels for it.
    """

    gbytes_per_s: float
    gbytes_per_s_both_ways: float
    intact: bool
    gbytes_per_s_kernel: float | None = None


@dataclass(frozen=True)
class Pair:
    """From GPU ``src`` to GPU ``dst``; ``src == dst`` is a copy within one GPU's memory.

    ``link`` is ``NV<number of links>``, PIX, PXB, PHB, NODE or SYS as in `nvidia-smi topo -m`, and X within one GPU.
    """

    src: int
    dst: int
    peer_access: Maybe[bool]
    native_atomics: Maybe[bool]
    link: Maybe[str]
    bandwidth: Maybe[Bandwidth]

    @property
    def num_nvlinks(self) -> int:
        """0 where the link is unknown or none."""
        link = known(self.link) or ""
        return int(link[2:]) if link.startswith("NV") and link[2:].isdigit() else 0


@dataclass(frozen=True)
class Gpus:
    """``status`` is "ok", or why there are no devices. ``present`` counts devices that may be hidden from CUDA."""

    status: str
    driver: Maybe[str]
    driver_cuda: Maybe[int]
    present: Maybe[int]
    imex_channels: list[str]
    link_source: Maybe[str]
    devices: list[Gpu]
    pairs: list[Pair]


@dataclass(frozen=True)
class NicPort:
    number: int
    link_layer: str
    state: str
    rate: str


@dataclass(frozen=True)
class Nic:
    """``distance[i]`` is the way to GPU i over PCIe: PIX, PXB, PHB, NODE or SYS, near to far."""

    name: str
    driver: str
    pci: str
    numa_node: Maybe[int]
    interfaces: list[str]
    ports: list[NicPort]
    verbs_device: bool
    distance: dict[int, Maybe[str]]


@dataclass(frozen=True)
class SharedMemory:
    """``usable`` is "" where the portable engine can exchange rows through it, else why not."""

    path: str
    total_bytes: int
    free_bytes: int
    usable: str


@dataclass(frozen=True)
class Limit:
    """Soft and hard limit of this process in ``unit``; None is unlimited."""

    name: str
    soft: int | None
    hard: int | None
    unit: str


@dataclass(frozen=True)
class Container:
    """``kind`` is "" on a bare host. ``capabilities``: those of interest that this process has."""

    kind: str
    capabilities: list[str]
    memory_limit_bytes: int | None
    cpu_limit: float | None


@dataclass(frozen=True)
class Mps:
    """CUDA's multi-process service. ``pipe_directory`` is where clients look for its daemon."""

    pipe_directory: str
    directory_from_environment: bool
    control_pipe: bool
    processes: list[int]


@dataclass(frozen=True)
class Host:
    name: str
    cpu: Maybe[str]
    usable_cores: int
    numa_nodes: Maybe[int]
    shared_memory: Maybe[SharedMemory]
    limits: Maybe[list[Limit]]
    container: Maybe[Container]
    mps: Maybe[Mps]
    peermem_module: bool
    environment: dict[str, str]


@dataclass(frozen=True)
class EngineChoice:
    """``Buffer.engine`` of a group on this host, and why."""

    name: str
    reasons: list[str]


Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """An ``error`` makes the library unusable; a ``warning`` costs speed or a feature; a ``note`` is good to know."""

    level: Level
    about: str
    message: str
    advice: str


@dataclass(frozen=True)
class Report:
    schema: int
    software: Software
    gpus: Gpus
    nics: Maybe[list[Nic]]
    host: Host
    self_test: str
    engine: EngineChoice
    findings: list[Finding]

    @property
    def usable(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)


def to_json(value: Any) -> Any:
    """Dataclasses as dicts; an unknown fact is ``{"unknown": reason}``; dict keys become strings."""
    if isinstance(value, Unknown):
        return {"unknown": value.reason}
    if dataclasses.is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [to_json(item) for item in value]
    return value


def cuda_version_text(version: int) -> str:
    """13000 -> "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"


def cuda_version_number(text: str) -> int:
    """ "13.0" -> 13000.

    Raises:
        ValueError: not two numbers.
    """
    major, minor = text.split(".")[:2]
    return int(major) * 1000 + int(minor) * 10
