"""A report as text: with rich where it is asked for, else plain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from .bandwidth import KERNEL_SMS
from .facts import Finding, Gpus, Host, Limit, Maybe, Nic, Pair, Report, Software, Unknown, cuda_version_text, known

_LEVEL_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass
class Block:
    """A titled table. ``remarks`` follow it; ``unknowns`` are the reasons behind its "?" cells."""

    title: str
    headers: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    unknowns: dict[str, None] = field(default_factory=dict)

    def line(self, label: str, text: object) -> None:
        self.rows.append([label, str(text)])

    def cell(self, value: Maybe[Any]) -> str:
        """Text for a narrow column: the reason of an unknown fact goes below the table."""
        if isinstance(value, Unknown):
            self.unknowns[value.reason] = None
            return "?"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return str(value)

    def all_remarks(self) -> list[str]:
        return [*self.remarks, *(f"?: unknown ({reason})" for reason in self.unknowns)]


def blocks_of(report: Report) -> list[Block]:
    """What is printed, in order."""
    return [
        _software(report.software, report.self_test),
        *_gpus(report.gpus),
        _nics(report.nics),
        _host(report.host),
        _engine(report),
        _findings(report.findings),
    ]


def size_text(num_bytes: int) -> str:
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):.1f} GiB"
    return f"{num_bytes / (1 << 20):.0f} MiB" if num_bytes >= 1 << 20 else f"{num_bytes // 1024} KiB"


def _software(software: Software, self_test: str) -> Block:
    block = Block("Software")
    block.line("deep_ep", software.deep_ep)
    block.line("Python", f"{software.python} on {software.platform}")
    backends = software.distributed_backends
    names = backends if isinstance(backends, Unknown) else ", ".join(backends) or "none"
    block.line("torch", f"{software.torch}, CUDA {software.torch_cuda or 'none'}, backends {names}")
    extension = software.extension
    if isinstance(extension, Unknown):
        block.line("extension", extension)
    else:
        cuda = f"CUDA {cuda_version_text(extension.cuda_runtime)}" if extension.has_cuda else "without CUDA"
        archs = f", kernels for {', '.join(extension.build_archs)}" if extension.build_archs else ""
        block.line("extension", f"{cuda}{archs}")
        block.line("CPU loops", f"{extension.cpu_isa}, {extension.num_threads} thread(s)")
    nvshmem = software.nvshmem
    if nvshmem is None or isinstance(nvshmem, Unknown):
        block.line("NVSHMEM", nvshmem or "not found (needed by nothing so far)")
    else:
        block.line("NVSHMEM", f"{nvshmem.version or 'of unknown version'}, {nvshmem.library}")
    block.line("self-test", f"{self_test} (a buffer of one rank on the CPU)")
    return block


def _gpus(gpus: Gpus) -> list[Block]:
    block = Block("GPUs")
    cuda = gpus.driver_cuda
    serves = "CUDA version unknown" if isinstance(cuda, Unknown) else f"serves CUDA {cuda_version_text(cuda)}"
    if not gpus.devices:
        block.remarks.append(f"none: {gpus.status}")
        if not isinstance(gpus.driver, Unknown):
            block.remarks.append(f"driver {gpus.driver}, {serves}")
        return [block]
    block.headers = ["GPU", "name", "memory", "SMs", "cc", "PCI", "NUMA", "mode", "MIG", "fd", "fabric", "multicast"]
    for gpu in gpus.devices:
        block.rows.append(
            [
                str(gpu.index), gpu.name, size_text(gpu.memory_bytes), str(gpu.num_sms), f"{gpu.capability / 10:.1f}",
                gpu.pci, block.cell(gpu.numa_node), gpu.compute_mode, block.cell(gpu.mig), block.cell(gpu.posix_fd),
                block.cell(gpu.fabric), block.cell(gpu.multicast),
            ]
        )  # fmt: skip
    block.remarks.append(f"driver {gpus.driver}, {serves}")
    block.remarks.append(
        "fd, fabric: memory can be exported to other processes as a file descriptor, as a fabric handle"
    )
    block.remarks += _sharing(gpus)
    channels = ", ".join(gpus.imex_channels) or "none, so that fabric handles stay on this host at best"
    block.remarks.append(f"IMEX channels: {channels}")
    count = len(gpus.devices)
    blocks = [block]
    if count > 1:
        access = _matrix("Peer access (row to column)", gpus.pairs, count, lambda pair: pair.peer_access)
        links = _matrix("Links (NV18: 18 NVLinks)", gpus.pairs, count, lambda pair: pair.link)
        links.remarks.append(f"from {gpus.link_source}")
        blocks += [access, links]
    return [*blocks, _bandwidth(gpus.pairs, count)]


def _sharing(gpus: Gpus) -> list[str]:
    """What came of exporting memory of each GPU; GPUs that answer alike in one line."""
    answers: dict[str, list[str]] = {}
    for gpu in gpus.devices:
        if isinstance(gpu.sharing, Unknown):
            text = str(gpu.sharing)
        else:
            text = "; ".join(f"{kind} {f'no ({reason})' if reason else 'yes'}" for kind, reason in gpu.sharing.items())
        answers.setdefault(text, []).append(str(gpu.index))
    return [f"sharing tried on GPU {', '.join(devices)}: {text}" for text, devices in answers.items()]


def _matrix(title: str, pairs: Sequence[Pair], count: int, value: Callable[[Pair], Maybe[object]]) -> Block:
    block = Block(title, ["", *(f"GPU{i}" for i in range(count))])
    cells = {(pair.src, pair.dst): "-" if pair.src == pair.dst else block.cell(value(pair)) for pair in pairs}
    block.rows = [[f"GPU{i}", *(cells.get((i, j), "") for j in range(count))] for i in range(count)]
    return block


def _bandwidth(pairs: Sequence[Pair], count: int) -> Block:
    block = Block("Bandwidth in GB/s (row to column)", ["", *(f"GPU{i}" for i in range(count))])
    cells = {}
    for pair in pairs:
        if isinstance(pair.bandwidth, Unknown):
            text = block.cell(pair.bandwidth)
        else:
            figures = [pair.bandwidth.gbytes_per_s]
            if pair.src != pair.dst:
                figures.append(pair.bandwidth.gbytes_per_s_both_ways)
                if pair.bandwidth.gbytes_per_s_kernel is not None:
                    figures.append(pair.bandwidth.gbytes_per_s_kernel)
            text = " / ".join(f"{figure:.0f}" for figure in figures) + ("" if pair.bandwidth.intact else " DAMAGED")
        cells[pair.src, pair.dst] = text
    block.rows = [[f"GPU{i}", *(cells.get((i, j), "") for j in range(count))] for i in range(count)]
    if any(not isinstance(pair.bandwidth, Unknown) for pair in pairs):
        block.remarks.append(
            "copies in one direction alone / both at once added up / both at once by kernels on "
            f"{KERNEL_SMS} SMs; the diagonal copies within one GPU's memory"
        )
    return block


def _nics(nics: Maybe[list[Nic]]) -> Block:
    block = Block("RDMA network cards")
    if isinstance(nics, Unknown) or not nics:
        block.remarks.append(str(nics) if isinstance(nics, Unknown) else "none")
        return block
    gpus = sorted({index for nic in nics for index in nic.distance})
    block.headers = ["name", "driver", "port", "link", "state", "rate", "NUMA", "interfaces", "PCI"]
    block.headers += [f"GPU{index}" for index in gpus]
    for nic in nics:
        for port in nic.ports:
            block.rows.append(
                [
                    nic.name, nic.driver, str(port.number), port.link_layer, port.state, port.rate,
                    block.cell(nic.numa_node), " ".join(nic.interfaces), nic.pci,
                    *(block.cell(nic.distance.get(index, Unknown("no such GPU"))) for index in gpus),
                ]
            )  # fmt: skip
    if gpus:
        block.remarks.append("PIX, PXB, PHB, NODE, SYS: over PCIe from near (same switch) to far (other processor)")
    return block


def _host(host: Host) -> Block:
    block = Block("Host")
    nodes = known(host.numa_nodes)
    numa = f", {nodes} NUMA node(s)" if nodes else ""
    block.line("host", f"{host.name}: {host.cpu}, {host.usable_cores} usable core(s){numa}")
    memory = host.shared_memory
    if isinstance(memory, Unknown):
        block.line("shared memory", memory)
    else:
        sizes = f"{size_text(memory.total_bytes)}, {size_text(memory.free_bytes)} free"
        block.line("shared memory", f"{memory.path}: {sizes}, {memory.usable or 'usable by the portable engine'}")
    limits = host.limits
    texts = limits if isinstance(limits, Unknown) else "; ".join(_limit_text(limit) for limit in limits)
    block.line("limits", texts)
    container = host.container
    if isinstance(container, Unknown):
        block.line("container", container)
    else:
        details = [container.kind or "no sign of one"]
        if container.memory_limit_bytes is not None:
            details.append(f"memory limit {size_text(container.memory_limit_bytes)}")
        if container.cpu_limit is not None:
            details.append(f"CPU limit {container.cpu_limit:g}")
        details.append(f"capabilities {', '.join(container.capabilities) or 'none of interest'}")
        block.line("container", "; ".join(details))
    mps = host.mps
    if isinstance(mps, Unknown):
        block.line("MPS", mps)
    else:
        state = "its daemon's pipe is there" if mps.control_pipe else "no daemon's pipe"
        seen = f", processes {', '.join(map(str, mps.processes))}" if mps.processes else ", no process seen"
        block.line("MPS", f"{mps.pipe_directory}: {state}{seen}")
    block.line("GPUDirect", "peer memory module loaded" if host.peermem_module else "no peer memory module")
    for name, value in host.environment.items():
        block.line(name, value)
    return block


def _limit_text(limit: Limit) -> str:
    def text(value: int | None) -> str:
        if value is None:
            return "unlimited"
        return size_text(value) if limit.unit == "bytes" else str(value)

    hard = "" if limit.hard == limit.soft else f" (hard {text(limit.hard)})"
    return f"{limit.name} {text(limit.soft)}{hard}"


def _engine(report: Report) -> Block:
    block = Block("Engine of a group on this host")
    block.line("engine", report.engine.name)
    for reason in report.engine.reasons:
        block.line("because", reason)
    return block


def _findings(findings: Sequence[Finding]) -> Block:
    block = Block("Findings")
    for finding in findings:
        block.rows.append([finding.level, f"{finding.about}: {finding.message}"])
        block.rows.append(["", f"-> {finding.advice}"])
    if not findings:
        block.remarks.append("nothing to complain about")
    return block


def print_plain(report: Report, file: TextIO) -> None:
    """Columns of plain text, wide lines unbroken: made for logs and for pasting."""
    for block in blocks_of(report):
        rows = [block.headers, *block.rows] if block.headers else block.rows
        last = len(rows[0]) - 1 if rows else 0
        widths = [max(len(row[column]) for row in rows) for column in range(last + 1)] if rows else []
        print(block.title, file=file)
        for row in rows:
            line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
            print(f"  {line}".rstrip(), file=file)
        for remark in block.all_remarks():
            print(f"  {remark}", file=file)
        print(file=file)


def print_rich(report: Report, file: TextIO) -> None:
    """Coloured tables as wide as the terminal.

    Raises:
        ImportError: rich is not installed.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False)
    for block in blocks_of(report):
        console.print(Text(block.title, style="bold"))
        table = Table(box=box.SIMPLE_HEAD if block.headers else None, show_header=bool(block.headers), pad_edge=False)
        for index in range(len(block.rows[0]) if block.rows else 0):
            header = block.headers[index] if block.headers else None
            table.add_column(Text(header or ""), style="cyan" if index == 0 else None, overflow="fold")
        for row in block.rows:
            style = _LEVEL_STYLES.get(row[0], "") if block.title == "Findings" else ""
            table.add_row(*(Text(text, style=style if index == 0 else "") for index, text in enumerate(row)))
        if block.rows:
            console.print(table)
        for remark in block.all_remarks():
            console.print(Text(remark, style="dim"))
        console.print()
