"""What follows from the facts: the engine of a group on this host, and what is worth changing."""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Iterator, Sequence

from .facts import (
    NOT_MEASURED,
    Bandwidth,
    EngineChoice,
    Finding,
    Gpu,
    Gpus,
    Host,
    Level,
    Maybe,
    Nic,
    Pair,
    Software,
    Unknown,
    cuda_version_number,
    cuda_version_text,
    known,
)

#: `Report.self_test` when all is well.
PASSED = "passed"

OLDEST_TORCH = (2, 11)
#: Variables that deep_ep reads, at run time or when it is built.
VARIABLES = frozenset(
    {
        "DEEP_EP_CPU_ISA",
        "DEEP_EP_CUDA",
        "DEEP_EP_CUDA_ARCHS",
        "DEEP_EP_DEBUG_DELAYS",
        "DEEP_EP_ENGINE",
        "DEEP_EP_LINES",
        "DEEP_EP_MASK_TIMEOUT_US",
        "DEEP_EP_MAX_POOL_BYTES",
        "DEEP_EP_NVL_DOMAIN",
        "DEEP_EP_PYTHON",
        "DEEP_EP_SHARED_MEMORY",
        "DEEP_EP_TEST_DEVICE",
        "DEEP_EP_TIMEOUT_S",
        "DEEP_EP_TORCH",
        "DEEP_EP_TUNING",
    }
)

# 4,096 tokens of 7,168 bf16 channels, each to 7 other ranks: 411 MB in a rank's file, which grows by half at a time.
_SHARED_MEMORY_A_RANK = 4096 * 7 * 7168 * 2 * 3 // 2
_SMALL_SHARED_MEMORY = 1 << 30
_LOW_MEMLOCK = 1 << 30
_LOW_NOFILE = 1024
_SLOW_LINK = 0.6
_CUDA_START_ADVICE = {
    "CUDA_ERROR_SYSTEM_NOT_READY": "start nvidia-fabricmanager on the host: NVSwitch systems have no CUDA without it",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "make the driver library fit the kernel module (reboot after an update; in a "
    "container, remove the compatibility libraries)",
    "CUDA_ERROR_NO_DEVICE": "check `nvidia-smi` and CUDA_VISIBLE_DEVICES; a container needs the NVIDIA runtime",
}


def choose_engine(software: Software, gpus: Gpus, host: Host) -> EngineChoice:
    """The engine that `Buffer` takes for a group whose ranks all run on this host, and why.

    This is the one place that turns facts into an engine.
    """
    obstacle = _kernel_obstacle(software, gpus, host)
    if not obstacle:
        reasons = [
            "every GPU here reaches the memory of every other, so kernels move rows between them directly",
            "CPU tensors and rows that are no multiple of 16 bytes take the portable engine",
        ]
        domain = host.environment.get("DEEP_EP_NVL_DOMAIN", "")
        if domain:
            reasons.append(f"DEEP_EP_NVL_DOMAIN={domain}: larger groups count as several nodes, and are portable")
        return EngineChoice("cuda", reasons)
    reasons = [f"the kernels cannot be used: {obstacle}"]
    if gpus.devices and software.torch_cuda is not None:
        reasons.append("rows on GPUs pass through host memory, unless the group's backend is nccl")
    obstacle = _shared_memory_obstacle(host)
    reasons.append(
        f"between ranks of this host, rows take sockets: {obstacle}"
        if obstacle
        else "between ranks of this host, rows take shared memory; between hosts, sockets"
    )
    return EngineChoice("portable", reasons)


def _kernel_obstacle(software: Software, gpus: Gpus, host: Host) -> str:
    """Why ranks on this host's GPUs would not use the kernels; empty if they would."""
    if host.environment.get("DEEP_EP_ENGINE", "") == "portable":
        return "DEEP_EP_ENGINE=portable"
    if not gpus.devices:
        return f"no GPU ({gpus.status}): rows are CPU tensors"
    if software.torch_cuda is None:
        return "this torch is built without CUDA: rows are CPU tensors"
    extension = known(software.extension)
    if extension is None or not extension.has_cuda:
        return "deep_ep was built without nvcc"
    old = [gpu.index for gpu in gpus.devices if gpu.capability < 90]
    if old:
        return f"GPUs {old} have a compute capability below 9.0"
    apart = [(pair.src, pair.dst) for pair in gpus.pairs if pair.src != pair.dst and known(pair.peer_access) is False]
    if apart:
        return f"no peer access between GPUs {apart}"
    private = _private(gpus)
    return f"GPUs {[gpu.index for gpu in private]} cannot share their memory" if private else ""


def _private(gpus: Gpus) -> list[Gpu]:
    """GPUs whose memory was tried to be shared in the two ways of one host, in vain."""
    tried = [(gpu, known(gpu.sharing)) for gpu in gpus.devices]
    return [gpu for gpu, answers in tried if answers is not None and all(answers.get(kind) for kind in ("fd", "ipc"))]


def _shared_memory_obstacle(host: Host) -> str:
    if host.environment.get("DEEP_EP_SHARED_MEMORY") == "0":
        return "DEEP_EP_SHARED_MEMORY=0"
    memory = host.shared_memory
    return memory.reason if isinstance(memory, Unknown) else memory.usable


def find_problems(
    software: Software, gpus: Gpus, nics: Maybe[Sequence[Nic]], host: Host, self_test: str
) -> list[Finding]:
    """All findings, the worst first."""
    found = [
        *_software(software, self_test),
        *_driver(software, gpus),
        *_visibility(gpus, host),
        *_devices(software, gpus, host),
        *_links(gpus),
        *_shared_memory(host),
        *_limits(host, nics),
        *_nics(nics, host),
        *_mps(gpus, host),
        *_variables(software, host),
    ]
    order: list[Level] = ["error", "warning", "note"]
    return sorted(found, key=lambda finding: order.index(finding.level))


def _software(software: Software, self_test: str) -> Iterator[Finding]:
    numbers = software.torch.split("+")[0].split(".")[:2]
    version = tuple(int(number) for number in numbers if number.isdigit())
    oldest = ".".join(map(str, OLDEST_TORCH))
    if len(version) == 2 and version < OLDEST_TORCH:
        yield Finding(
            "error", "torch", f"torch {software.torch} is older than {oldest}", f"pip install 'torch>={oldest}'"
        )
    backends = known(software.distributed_backends)
    if backends is not None and "gloo" not in backends:
        yield Finding(
            "error", "torch", "torch.distributed has no gloo backend, which connects the ranks",
            "install a torch build with gloo (all official Linux wheels have it)",
        )  # fmt: skip
    if isinstance(software.extension, Unknown):
        yield Finding(
            "error", "extension", f"deep_ep._C does not answer: {software.extension.reason}",
            "build it again: `bash install.sh` in a checkout, or reinstall the wheel",
        )  # fmt: skip
    if self_test != PASSED:
        yield Finding(
            "error", "self-test", f"a buffer of one rank on the CPU failed: {self_test}",
            "correct what the message names, or reinstall deep_ep",
        )  # fmt: skip


def _driver(software: Software, gpus: Gpus) -> Iterator[Finding]:
    has_module = known(gpus.driver) is not None
    if gpus.status != "ok" and (has_module or "CUDA_ERROR" in gpus.status):
        advice = next((text for name, text in _CUDA_START_ADVICE.items() if name in gpus.status), None)
        yield Finding(
            "warning", "driver", f"CUDA does not start: {gpus.status}",
            advice or "check `nvidia-smi`, and that the container has the driver libraries (NVIDIA runtime)",
        )  # fmt: skip
    served = known(gpus.driver_cuda)
    if served is None:
        return
    extension = known(software.extension)
    runtimes = {
        "torch": cuda_version_number(software.torch_cuda) if software.torch_cuda else 0,
        "deep_ep": extension.cuda_runtime if extension is not None else 0,
    }
    for name, runtime in runtimes.items():
        if runtime // 1000 > served // 1000:
            yield Finding(
                "warning", "driver",
                f"the driver serves CUDA {cuda_version_text(served)}, {name} is built for {cuda_version_text(runtime)}",
                f"update the driver, or install a build of {name} for CUDA {served // 1000}",
            )  # fmt: skip
        elif runtime > served:
            yield Finding(
                "note", "driver",
                f"the driver serves CUDA {cuda_version_text(served)}, {name} is built for "
                f"{cuda_version_text(runtime)}: compiled kernels run, PTX for later GPUs does not",
                "update the driver if kernels are missing for this GPU",
            )  # fmt: skip


def _visibility(gpus: Gpus, host: Host) -> Iterator[Finding]:
    present = known(gpus.present)
    visible = host.environment.get("CUDA_VISIBLE_DEVICES")
    if present is not None and visible is not None and len(gpus.devices) < present:
        yield Finding(
            "note", "GPUs", f"CUDA_VISIBLE_DEVICES={visible!r} leaves {len(gpus.devices)} of {present} GPUs visible",
            "unset it to see all; ranks that hide each other's GPUs are fine",
        )  # fmt: skip


def _devices(software: Software, gpus: Gpus, host: Host) -> Iterator[Finding]:
    if not gpus.devices:
        return
    if software.torch_cuda is None:
        yield Finding(
            "warning", "torch", f"torch {software.torch} is built without CUDA: GPUs are not used",
            "install a CUDA build of torch (https://pytorch.org/get-started)",
        )  # fmt: skip
    extension = known(software.extension)
    if extension is not None and not extension.has_cuda:
        yield Finding(
            "warning", "extension", "deep_ep is built without CUDA: GPU tensors are handled by torch operations",
            "build where nvcc is on the PATH or in CUDA_HOME, without DEEP_EP_CUDA=0",
        )  # fmt: skip
    if extension is not None and extension.has_cuda:
        for capability in sorted({gpu.capability for gpu in gpus.devices}):
            if not can_run(extension.build_archs, capability):
                yield Finding(
                    "warning", "extension",
                    f"kernels are built for {', '.join(extension.build_archs)}, not for compute capability "
                    f"{capability / 10:.1f}",
                    f'build with DEEP_EP_CUDA_ARCHS="{capability}"',
                )  # fmt: skip
    if len({(gpu.name, gpu.memory_bytes) for gpu in gpus.devices}) > 1:
        yield Finding(
            "note", "GPUs", f"different GPUs: {', '.join(sorted({gpu.name for gpu in gpus.devices}))}",
            "a group is as fast as its slowest GPU",
        )  # fmt: skip
    for gpu in _private(gpus):
        answers = known(gpu.sharing) or {}
        yield Finding(
            "warning", f"GPU {gpu.index}",
            f"its memory cannot be shared: {'; '.join(answer for answer in answers.values() if answer)}",
            "use a newer driver; virtual machines need a passed-through GPU, containers the NVIDIA runtime",
        )  # fmt: skip
    for gpu in gpus.devices:
        yield from _device(gpu)


def can_run(archs: Sequence[str], capability: int) -> bool:
    """Whether code for ``archs`` ("90", "90a", "100f", "90-ptx") runs on a GPU of ``capability`` 10 * major + minor."""
    for arch in archs:
        number, _, kind = arch.partition("-")
        built = int(number.rstrip("af"))
        if number.endswith("a"):
            runs = built == capability
        elif kind == "ptx":
            runs = built <= capability
        else:
            runs = built // 10 == capability // 10 and built <= capability
        if runs:
            return True
    return False


def _device(gpu: Gpu) -> Iterator[Finding]:
    if gpu.compute_mode == "prohibited":
        yield Finding("warning", f"GPU {gpu.index}", "its compute mode forbids CUDA", "nvidia-smi -c DEFAULT")
    if gpu.compute_mode == "exclusive process" and known(gpu.mps_client) is not True:
        yield Finding(
            "note", f"GPU {gpu.index}", "its compute mode lets one process in: ranks cannot share it",
            "start MPS, or nvidia-smi -c DEFAULT",
        )  # fmt: skip
    if known(gpu.mig) is True:
        yield Finding(
            "warning", f"GPU {gpu.index}", "MIG is on: slices of a GPU have no peer access, nor NVLink",
            "turn MIG off (nvidia-smi -mig 0) for ranks that are to share memory",
        )  # fmt: skip
    if known(gpu.posix_fd) is False or known(gpu.vmm) is False:
        yield Finding(
            "warning", f"GPU {gpu.index}", "its memory cannot be exported as a file descriptor",
            "use a newer driver; virtual machines need a passed-through GPU",
        )  # fmt: skip


def _links(gpus: Gpus) -> Iterator[Finding]:
    between = [pair for pair in gpus.pairs if pair.src != pair.dst]
    blocked = [pair for pair in between if known(pair.peer_access) is False]
    if blocked:
        yield Finding(
            "warning", "peer access", f"none for {_name(blocked)}",
            "place ranks on GPUs that reach each other; for PCIe cards, turn IOMMU and ACS off on the host (some cards "
            "have no peer access at all)",
        )  # fmt: skip
    corrupt = [pair for pair in gpus.pairs if isinstance(pair.bandwidth, Bandwidth) and not pair.bandwidth.intact]
    if corrupt:
        yield Finding(
            "warning", "links", f"copies arrive damaged: {_name(corrupt)}",
            "do not train on these GPUs: turn IOMMU and ACS off on the host, and check `dmesg` for Xid errors",
        )  # fmt: skip
    bridged = [pair for pair in between if pair.num_nvlinks > 0]
    unbridged = [pair for pair in between if known(pair.link) is not None and pair.num_nvlinks == 0]
    if bridged and unbridged:
        yield Finding(
            "warning", "links", f"some pairs have NVLink, but not {_name(unbridged)}",
            "form groups of GPUs that are all linked (DEEP_EP_NVL_DOMAIN)",
        )  # fmt: skip
    if len({pair.num_nvlinks for pair in bridged}) > 1:
        fewest = min(pair.num_nvlinks for pair in bridged)
        few = [pair for pair in bridged if pair.num_nvlinks == fewest]
        yield Finding(
            "note", "links", f"pairs have different numbers of NVLinks; fewest, {fewest}: {_name(few)}",
            "normal for GPUs without a switch; with one, a link is down: `nvidia-smi nvlink -s`",
        )  # fmt: skip
    for kind in sorted({pair.link for pair in between if isinstance(pair.link, str)}):
        yield from _slow(kind, [pair for pair in between if pair.link == kind])
    failed = [pair for pair in gpus.pairs if isinstance(pair.bandwidth, Unknown)]
    if failed and failed[0].bandwidth != Unknown(NOT_MEASURED):
        yield Finding(
            "warning", "links", f"no bandwidth for {_name(failed)}: {failed[0].bandwidth}",
            "free device memory, or look at `dmesg` for what the driver says; --no-probe skips this",
        )  # fmt: skip


def _slow(kind: str, pairs: Sequence[Pair]) -> Iterator[Finding]:
    rates = {
        (pair.src, pair.dst): pair.bandwidth.gbytes_per_s for pair in pairs if isinstance(pair.bandwidth, Bandwidth)
    }
    if len(rates) < 3:
        return
    usual = statistics.median(rates.values())
    slow = [pair for pair in pairs if rates.get((pair.src, pair.dst), usual) < _SLOW_LINK * usual]
    if slow:
        yield Finding(
            "warning", "links", f"slower than other {kind} pairs (median {usual:.0f} GB/s): {_name(slow)}",
            "see whether another program uses these GPUs, and `nvidia-smi nvlink -s` for links that are down",
        )  # fmt: skip


def _name(pairs: Sequence[Pair]) -> str:
    """At most four pairs by name."""
    names = [f"{pair.src}->{pair.dst}" for pair in pairs]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more pairs" if len(names) > 4 else "")


def _shared_memory(host: Host) -> Iterator[Finding]:
    obstacle = _shared_memory_obstacle(host)
    memory = known(host.shared_memory)
    advice = "docker run --shm-size=16g (or --ipc=host); in Kubernetes, an emptyDir of medium Memory at /dev/shm"
    if host.environment.get("DEEP_EP_SHARED_MEMORY") == "0":
        yield Finding("note", "shared memory", "turned off by DEEP_EP_SHARED_MEMORY=0", "unset it for speed")
    elif obstacle or memory is None:
        yield Finding(
            "warning", "shared memory", f"cannot be used, so that ranks of this host talk over sockets: {obstacle}",
            advice,
        )  # fmt: skip
    elif memory.free_bytes < _SMALL_SHARED_MEMORY:
        yield Finding(
            "warning", "shared memory",
            f"{memory.path} has {memory.free_bytes / 1e6:.0f} MB free; a rank that sends 4,096 tokens of 7,168 "
            f"channels to 7 others wants {_SHARED_MEMORY_A_RANK / 1e6:.0f} MB, and falls back to slower sockets",
            advice,
        )  # fmt: skip


def _limits(host: Host, nics: Maybe[Sequence[Nic]]) -> Iterator[Finding]:
    limits = {limit.name: limit for limit in known(host.limits) or []}
    memlock, nofile = limits.get("memlock"), limits.get("nofile")
    lockable = memlock.soft if memlock is not None else None
    files = nofile.soft if nofile is not None else None
    container = known(host.container)
    may_lock = container is not None and "IPC_LOCK" in container.capabilities
    has_nics = not isinstance(nics, Unknown) and len(nics) > 0
    if lockable is not None and lockable < _LOW_MEMLOCK and has_nics and not may_lock:
        yield Finding(
            "warning", "limits", f"memlock is {lockable // 1024} KiB: network cards cannot register buffers",
            "ulimit -l unlimited (docker: --ulimit memlock=-1, or --cap-add IPC_LOCK)",
        )  # fmt: skip
    if files is not None and files < _LOW_NOFILE:
        yield Finding(
            "warning", "limits",
            f"nofile is {files}: each buffer holds a socket and a mapped file for each peer",
            "ulimit -n 65536 (docker: --ulimit nofile=65536)",
        )  # fmt: skip


def _nics(nics: Maybe[Sequence[Nic]], host: Host) -> Iterator[Finding]:
    for nic in known(nics) or []:
        down = [str(port.number) for port in nic.ports if port.state != "ACTIVE"]
        if down and len(down) == len(nic.ports):
            yield Finding("note", f"NIC {nic.name}", "no port is active", "check the cable, and `ibstat` or `ip link`")
        elif not nic.verbs_device:
            yield Finding(
                "warning", f"NIC {nic.name}", "it is listed, but has no device file under /dev/infiniband",
                "docker: --device=/dev/infiniband; Kubernetes: the RDMA device plugin",
            )  # fmt: skip


def _mps(gpus: Gpus, host: Host) -> Iterator[Finding]:
    mps = known(host.mps)
    if mps is None or not gpus.devices:
        return
    if mps.directory_from_environment and not mps.control_pipe:
        yield Finding(
            "warning", "MPS", f"CUDA_MPS_PIPE_DIRECTORY={mps.pipe_directory} has no daemon's pipe",
            "start it (nvidia-cuda-mps-control -d) with the same variable, or unset the variable",
        )  # fmt: skip
    elif mps.processes and not mps.control_pipe:
        yield Finding(
            "note", "MPS", f"a daemon runs, but not with the pipe that this process looks for ({mps.pipe_directory})",
            "set CUDA_MPS_PIPE_DIRECTORY to the daemon's to use it",
        )  # fmt: skip


def _variables(software: Software, host: Host) -> Iterator[Finding]:
    for name in host.environment:
        if name.startswith("DEEP_EP_") and name not in VARIABLES:
            close = difflib.get_close_matches(name, sorted(VARIABLES), n=1)
            yield Finding(
                "warning", "environment", f"{name} is not a variable of deep_ep",
                f"did you mean {close[0]}?" if close else f"it knows {', '.join(sorted(VARIABLES))}",
            )  # fmt: skip
    asked = host.environment.get("DEEP_EP_CPU_ISA")
    extension = known(software.extension)
    if asked and extension is not None and asked != extension.cpu_isa:
        yield Finding(
            "warning", "environment", f"DEEP_EP_CPU_ISA={asked!r}, but the CPU loops use {extension.cpu_isa}",
            "name generic, avx2 or avx512, one that this processor has",
        )  # fmt: skip
    if host.environment.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        yield Finding(
            "warning", "environment", "CUDA_LAUNCH_BLOCKING makes the host wait for every kernel", "unset it for speed"
        )
