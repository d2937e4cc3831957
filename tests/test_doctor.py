"""The doctor: what it finds on this machine, and on machines made of files and stubs."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import harness
import pytest
import torch
from doctor_cases import a_gpu, a_report, problems

from deep_ep.__main__ import main
from deep_ep._native import _C
from deep_ep.doctor import advice, bandwidth, facts, gpus, host, links, nics, report, software
from deep_ep.doctor.collect import diagnose
from deep_ep.doctor.driver import Driver, DriverError, DriverMissing, normalize_pci
from deep_ep.doctor.facts import Bandwidth, Unknown, to_json

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.REPO_ROOT)}
PCI = ["0000:19:00.0", "0000:3b:00.0"]

# ----------------------------------------------------------------------------------------------------
# As a program


def run_doctor(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deep_ep", "doctor", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**ENV, **env}, check=False)


def test_program_prints_every_section():
    result = run_doctor("--no-probe")
    assert result.returncode == 0, result.stderr
    for title in ("Software", "GPUs", "RDMA network cards", "Host", "Engine of a group on this host", "Findings"):
        assert re.search(f"^{title}$", result.stdout, re.M), title
    assert re.search("engine   (portable|cuda)$", result.stdout, re.M)
    assert "self-test  passed" in result.stdout


def test_program_without_visible_gpus():
    result = run_doctor("--json", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["schema"] == facts.SCHEMA
    assert found["gpus"]["devices"] == found["gpus"]["pairs"] == []
    assert found["engine"]["name"] == "portable"
    assert found["host"]["environment"]["CUDA_VISIBLE_DEVICES"] == ""
    assert found["software"]["extension"]["num_threads"] == 1


def test_program_fails_where_the_library_is_unusable():
    result = run_doctor("--no-probe", DEEP_EP_NVL_DOMAIN="many")
    assert result.returncode == 1
    assert re.search(r"error +self-test: .*DEEP_EP_NVL_DOMAIN='many' is not a positive integer", result.stdout)


@pytest.mark.parametrize("terminal", [False, True])
def test_rich_is_for_terminals(terminal, monkeypatch, capsys):
    if terminal:
        pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    used = []
    monkeypatch.setattr(report, "print_rich", lambda *_: used.append("rich"))
    monkeypatch.setattr(report, "print_plain", lambda *_: used.append("plain"))
    assert main(["doctor", "--no-probe"]) == 0
    assert used == ["rich" if terminal else "plain"]


def test_no_context_and_no_child_without_the_probe(monkeypatch):
    initialized = torch.cuda.is_initialized()
    monkeypatch.setattr(bandwidth.subprocess, "run", lambda *_, **__: pytest.fail("started a program"))
    monkeypatch.setattr(gpus, "query_links", lambda _: links.Links("nothing", {}, {}))
    assert diagnose(probe=False).usable
    assert torch.cuda.is_initialized() == initialized


# ----------------------------------------------------------------------------------------------------
# A CUDA driver made of stubs, which ends the process at the first attempt to make a context

STUB = r"""
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#ifndef INIT
#define INIT 0
#endif
int cuInit(unsigned flags) { (void)flags; return INIT; }
int cuGetErrorName(int code, const char **text) {
    *text = code == 802 ? "CUDA_ERROR_SYSTEM_NOT_READY" : code == 100 ? "CUDA_ERROR_NO_DEVICE" : NULL;
    return *text == NULL;
}
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index + 40; return index > 1; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)(device - 39) << 33; return 0; }
int cuDeviceGetName(char *name, int size, int device) { return snprintf(name, size, "Stub %d", device) < 0; }
int cuDeviceGetPCIBusId(char *text, int size, int device) {
    return snprintf(text, size, device == 40 ? "00000000:19:00.0" : "0000:3B:00.0") < 0;
}
int cuDeviceCanAccessPeer(int *answer, int device, int peer) { *answer = device < peer; return 0; }
int cuDeviceGetP2PAttribute(int *value, int attribute, int device, int peer) {
    (void)device; (void)peer; *value = 1; return attribute == 3 ? 0 : 1;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 75: *value = 9; return 0;
        case 76: *value = 0; return 0;
        case 16: *value = 132; return 0;
        case 20: *value = device == 40 ? 0 : 3; return 0;
        case 102: case 103: *value = 1; return 0;
        case 128: *value = 0; return 0;
        default: return 801;
    }
}
int cuCtxCreate_v2(void) { abort(); }
int cuDevicePrimaryCtxRetain(void) { abort(); }
"""


@pytest.fixture(scope="module")
def compile_stub(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")

    def compile_(init: int = 0) -> Path:
        folder = tmp_path_factory.mktemp("driver")
        (folder / "stub.c").write_text(STUB)
        library = folder / "libcuda.so.1"
        command = [compiler, "-shared", "-fPIC", f"-DINIT={init}", "-o", str(library), str(folder / "stub.c")]
        subprocess.run(command, check=True, timeout=60)
        return library

    return compile_


def test_driver_answers(compile_stub):
    driver = Driver(str(compile_stub()))
    assert driver.cuda_version() == 13010
    first, second = (driver.gpu(index) for index in range(driver.device_count()))
    assert (first.name, first.pci, first.capability, first.num_sms) == ("Stub 40", PCI[0], 90, 132)
    assert (second.pci, second.memory_bytes, second.compute_mode) == (PCI[1], 2 << 33, "exclusive process")
    assert (first.posix_fd, first.fabric) == (True, False)
    assert first.multicast == Unknown("cuDeviceGetAttribute: error 801")  # younger than this driver
    assert (driver.can_access_peer(0, 1), driver.can_access_peer(1, 0)) == (True, False)
    assert driver.native_atomics(0, 1)
    with pytest.raises(DriverError, match="cuDeviceGet: error 1"):
        driver.gpu(2)


def test_driver_that_does_not_start(compile_stub, tmp_path):
    with pytest.raises(DriverError, match="cuInit: CUDA_ERROR_SYSTEM_NOT_READY"):
        Driver(str(compile_stub(802)))
    with pytest.raises(DriverMissing, match="no NVIDIA driver"):
        Driver(str(tmp_path / "libcuda.so.1"))
    found = gpus.collect_gpus(True, tmp_path, str(compile_stub(802)))
    assert found.devices == []
    advices = [finding.advice for finding in problems(devices=found)]
    assert any("nvidia-fabricmanager" in text for text in advices)


def test_collect_gpus_puts_it_together(compile_stub, fake_root, monkeypatch):
    kinds = {(PCI[0], PCI[1]): "NV4", (PCI[1], PCI[0]): "NV4"}
    monkeypatch.setattr(gpus, "query_links", lambda ids: links.Links("fake", kinds, {ids[0]: True}))
    tried = {"fd": "", "ipc": "no"}
    measured = bandwidth.Measured({(0, 1): Bandwidth(1.0, 2.0, True)}, {1: tried})
    monkeypatch.setattr(gpus, "probe", lambda count: measured)
    found = gpus.collect_gpus(True, fake_root, str(compile_stub()))
    assert (found.driver, found.present, found.link_source) == ("580.65.06", 3, "fake")
    assert [gpu.mig for gpu in found.devices] == [True, Unknown("fake does not list this GPU")]
    assert [gpu.numa_node for gpu in found.devices] == [0, 1]
    assert [gpu.sharing for gpu in found.devices] == [Unknown(facts.NOT_MEASURED), tried]
    pairs = {(pair.src, pair.dst): pair for pair in found.pairs}
    assert pairs[0, 1].num_nvlinks == 4
    assert pairs[0, 0].link == "X"
    assert pairs[0, 1].bandwidth == Bandwidth(1.0, 2.0, True)
    assert pairs[1, 0].bandwidth == Unknown(facts.NOT_MEASURED)
    assert pairs[1, 0].peer_access is False


def test_collect_gpus_when_links_are_unknown(compile_stub, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "query_links", lambda _: 1 / 0)
    found = gpus.collect_gpus(False, tmp_path, str(compile_stub()))
    assert len(found.devices) == 2
    assert found.pairs[1].link == Unknown("division by zero")
    assert isinstance(found.driver, Unknown)
    assert all(isinstance(gpu.numa_node, Unknown) for gpu in found.devices)
    output = io.StringIO()
    report.print_plain(a_report(gpus=found), output)
    assert "unknown (division by zero)" in output.getvalue()


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch would load the stubs as its driver")
def test_program_on_stubs_makes_no_context(compile_stub):
    result = run_doctor("--json", LD_LIBRARY_PATH=str(compile_stub().parent))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [gpu["name"] for gpu in found["gpus"]["devices"]] == ["Stub 40", "Stub 41"]
    assert found["gpus"]["pairs"][1]["bandwidth"] == {"unknown": "this torch is built without CUDA"}
    messages = " ".join(finding["message"] for finding in found["findings"])
    assert "none for 1->0" in messages
    assert "is built without CUDA: GPUs are not used" in messages


# ----------------------------------------------------------------------------------------------------
# Links

TOPOLOGY = (
    "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tPHB\tNODE\t0-47\t0\t\tN/A\n"
    "GPU2\tSYS\tPHB\t X \tSYS\t48-95\t1\t\tN/A\n"
    "NIC0\tPIX\tNODE\tSYS\t X \t\t\t\t\n"
    "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing # NVLinks\n\nNIC Legend:\n\n  NIC0: mlx5_0\n"
)
LISTING = "0, 00000000:19:00.0, Disabled\n1, 00000000:3B:00.0, Enabled\n2, 00000000:4C:00.0, [N/A]\n"


def test_parse_topology():
    kinds = links.parse_topology(TOPOLOGY)
    assert kinds["GPU0", "GPU1"] == kinds["GPU1", "GPU0"] == "NV18"
    assert (kinds["GPU0", "GPU2"], kinds["GPU2", "GPU1"]) == ("SYS", "PHB")
    assert len(kinds) == 6
    assert links.parse_topology("\tGPU0\tCPU Affinity\nGPU0\t X \t0-7\n") == {}
    with pytest.raises(ValueError, match="no table of GPUs"):
        links.parse_topology("Failed to query\n")


def test_parse_listing():
    assert links.parse_listing(LISTING) == {0: (PCI[0], False), 1: (PCI[1], True), 2: ("0000:4c:00.0", False)}
    with pytest.raises(ValueError):
        links.parse_listing("No devices were found\n")


@pytest.mark.parametrize("text", ["00000000:3B:00.0", "0000:3b:00.0", " 0:3b:0.0\n", "00000000:3B:00"])
def test_normalize_pci(text):
    assert normalize_pci(text) == PCI[1]


def test_links_from_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    script = tmp_path / "nvidia-smi"
    (tmp_path / "topology").write_text(TOPOLOGY)
    (tmp_path / "listing").write_text(LISTING)
    script.write_text(f'#!/bin/sh\nif [ "$1" = topo ]; then cat {tmp_path}/topology; else cat {tmp_path}/listing; fi\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = links.query_links(PCI)
    assert found.source == "nvidia-smi"
    assert found.kinds == {(PCI[0], PCI[1]): "NV18", (PCI[1], PCI[0]): "NV18"}
    assert found.mig[PCI[1]]
    script.write_text("#!/bin/sh\necho driver is broken >&2\nexit 9\n")
    with pytest.raises(RuntimeError, match=r"pynvml: .*; nvidia-smi: exit status 9: driver is broken"):
        links.query_links(PCI)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(RuntimeError, match="nvidia-smi: No such file"):
        links.query_links(PCI)


def fake_nvml(remote: dict[str, list[str]], p2p: int = 0, ancestor: int = 50) -> types.SimpleNamespace:
    """``remote[pci]``: where each active link leads, "" for a switch and "?" for a far end that is hidden."""

    class NVMLError(Exception):
        pass

    def state(handle, link):
        if link >= len(remote[handle]):
            raise NVMLError("Invalid Argument")
        return 1

    def kind(handle, link):
        if remote[handle][link] == "?":
            raise NVMLError("Not Supported")
        return 2 if remote[handle][link] == "" else 0

    def mig_mode(handle):
        raise NVMLError("Not Supported")

    return types.SimpleNamespace(
        NVMLError=NVMLError, NVML_NVLINK_MAX_LINKS=18, NVML_NVLINK_DEVICE_TYPE_GPU=0, NVML_P2P_CAPS_INDEX_NVLINK=2,
        nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda pci: pci.decode(), nvmlDeviceGetNvLinkState=state,
        nvmlDeviceGetNvLinkRemoteDeviceType=kind, nvmlDeviceGetMigMode=mig_mode,
        nvmlDeviceGetNvLinkRemotePciInfo=lambda handle, link: types.SimpleNamespace(
            busId=f"0000{remote[handle][link]}".encode()
        ),
        nvmlDeviceGetP2PStatus=lambda *_: p2p, nvmlDeviceGetTopologyCommonAncestor=lambda *_: ancestor,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("nvml", "expected"),
    [
        (fake_nvml({PCI[0]: [""] * 18, PCI[1]: [""] * 17}), "NV17"),
        (fake_nvml({PCI[0]: ["?"] * 6, PCI[1]: ["?"] * 6}), "NV6"),
        (fake_nvml({PCI[0]: [PCI[1], PCI[1], "0000:aa:00.0"], PCI[1]: [PCI[0], PCI[0]]}), "NV2"),
        (fake_nvml({PCI[0]: ["0000:aa:00.0"], PCI[1]: ["0000:bb:00.0"]}, ancestor=20), "PXB"),
        (fake_nvml({PCI[0]: [""], PCI[1]: [""]}, p2p=5), "SYS"),
        (fake_nvml({PCI[0]: [], PCI[1]: []}, ancestor=30), "PHB"),
    ],
    ids=["switch", "hidden", "direct", "elsewhere", "no-p2p", "pcie"],
)
def test_links_from_nvml(nvml, expected, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    found = links.query_links(PCI)
    assert found.source == "pynvml"
    assert found.kinds[PCI[0], PCI[1]] == expected
    assert found.mig == {PCI[0]: False, PCI[1]: False}


# ----------------------------------------------------------------------------------------------------
# Files: network cards, limits, container, MPS, NVSHMEM


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def add_pci(root: Path, way: str, node: int) -> Path:
    device = root / "sys/devices" / way
    write(device / "numa_node", f"{node}\n")
    link = root / "sys/bus/pci/devices" / device.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(device)
    return device


def add_nic(root: Path, name: str, way: str, node: int, link_layer: str, state: str, verbs: str = "") -> None:
    device = add_pci(root, way, node)
    (device / "net" / f"net-{name}").mkdir(parents=True)
    if verbs:
        (device / "infiniband_verbs" / verbs).mkdir(parents=True)
        write(root / "dev/infiniband" / verbs)
    folder = root / "sys/class/infiniband" / name
    write(folder / "ports/1/link_layer", f"{link_layer}\n")
    write(folder / "ports/1/state", f"4: {state}\n")
    write(folder / "ports/1/rate", "400 Gb/sec (4X NDR)\n")
    (folder / "device").symlink_to(device)


@pytest.fixture
def fake_root(tmp_path) -> Path:
    """GPU 0 shares a switch with near0, GPU 1 hangs on the other processor."""
    root = tmp_path / "root"
    add_pci(root, "pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:00.0/0000:19:00.0", 0)
    add_pci(root, "pci0000:37/0000:37:01.0/0000:38:00.0/0000:39:00.0/0000:3b:00.0", 1)
    near, far = "pci0000:15/0000:15:01.0/0000:16:00.0", "pci0000:37/0000:37:01.0/0000:38:00.0"
    add_nic(root, "near0", f"{near}/0000:17:02.0/0000:1a:00.0", 0, "InfiniBand", "ACTIVE", "u0")
    add_nic(root, "deep0", f"{far}/0000:39:04.0/0000:3c:00.0/0000:3d:00.0/0000:3e:00.0", 1, "Ethernet", "ACTIVE")
    add_nic(root, "host0", "pci0000:15/0000:15:05.0/0000:20:00.0", 0, "Ethernet", "DOWN", "u1")
    add_nic(root, "node0", "pci0000:26/0000:26:01.0/0000:27:00.0", 0, "InfiniBand", "ACTIVE", "u2")
    write(
        root / "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: gcc 12.2.0\n",
    )
    for name in ("0000:19:00.0", "0000:3b:00.0", "0000:4c:00.0"):
        (root / "proc/driver/nvidia/gpus" / name).mkdir(parents=True)
    write(root / "dev/nvidia-caps-imex-channels/channel0")
    return root


def test_nics_and_their_distance(fake_root):
    found = {nic.name: nic for nic in nics.collect_nics([a_gpu(0, pci=PCI[0]), a_gpu(1, pci=PCI[1])], fake_root)}
    assert found["near0"].distance == {0: "PIX", 1: "SYS"}
    assert found["deep0"].distance == {0: "SYS", 1: "PXB"}
    assert found["host0"].distance == {0: "PHB", 1: "SYS"}
    assert found["node0"].distance == {0: "NODE", 1: "SYS"}
    near = found["near0"]
    assert near.ports == [facts.NicPort(1, "InfiniBand", "ACTIVE", "400 Gb/sec (4X NDR)")]
    assert (near.pci, near.numa_node, near.interfaces, near.verbs_device) == ("0000:1a:00.0", 0, ["net-near0"], True)
    assert not found["deep0"].verbs_device
    levels = {finding.about: finding.level for finding in problems(cards=list(found.values()))}
    assert levels == {"NIC deep0": "warning", "NIC host0": "note"}


def test_nics_without_what_is_expected(fake_root, tmp_path):
    assert nics.collect_nics([], tmp_path / "nothing") == []
    write(fake_root / "sys/class/infiniband/bare/node_type", "1: CA")
    bare = next(nic for nic in nics.collect_nics([a_gpu(0, pci="0000:ff:00.0")], fake_root) if nic.name == "bare")
    assert bare.ports == []
    assert bare.distance[0] == Unknown("0000:ff:00.0: no such PCI device")


def test_container_and_its_limits(tmp_path):
    write(tmp_path / "proc/self/status", f"Name:\tx\nCapEff:\t{1 << 14 | 1 << 19:016x}\n")
    assert host.container({}, tmp_path) == facts.Container("", ["IPC_LOCK", "SYS_PTRACE"], None, None)
    write(tmp_path / "sys/fs/cgroup/memory.max", "max\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", "max 100000\n")
    assert host.container({"container": "lxc"}, tmp_path).kind == "lxc"
    assert host.container({}, tmp_path).cpu_limit is None
    write(tmp_path / "sys/fs/cgroup/memory.max", "1073741824\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", "250000 100000\n")
    write(tmp_path / ".dockerenv")
    found = host.container({}, tmp_path)
    assert (found.kind, found.memory_limit_bytes, found.cpu_limit) == ("docker", 1 << 30, 2.5)
    assert host.container({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path).kind == "kubernetes"


def test_container_with_the_older_cgroups(tmp_path):
    write(tmp_path / "proc/self/status", "CapEff:\t0\n")
    write(tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert host.container({}, tmp_path) == facts.Container("", [], None, 0.5)


def test_mps(tmp_path):
    write(tmp_path / "proc/77/comm", "nvidia-cuda-mps\n")
    write(tmp_path / "proc/78/comm", "python\n")
    write(tmp_path / "proc/version", "x")
    assert host.mps({}, tmp_path) == facts.Mps("/tmp/nvidia-mps", False, False, [77])
    write(tmp_path / "run/pipes/control")
    found = host.mps({"CUDA_MPS_PIPE_DIRECTORY": "/run/pipes"}, tmp_path)
    assert found == facts.Mps("/run/pipes", True, True, [77])


def test_shared_memory_is_really_tried():
    found = host.shared_memory("/dev/shm")
    assert found.total_bytes >= found.free_bytes > 0
    assert found.usable == ""
    assert not [name for name in os.listdir("/dev/shm") if name.startswith(f"deep_ep-doctor-{os.getpid()}-")]
    assert host.shared_memory("/proc").usable != ""


def test_nvshmem_is_found_and_not_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(software, "_package_folders", list)
    home, root = tmp_path / "home", tmp_path / "root"
    root.mkdir()
    assert software.find_nvshmem({}, root) is None
    write(root / "usr/local/lib/libnvshmem_host.so.3")
    assert software.find_nvshmem({}, root).library == str(root / "usr/local/lib/libnvshmem_host.so.3")
    write(home / "lib/libnvshmem_host.so.2")
    assert software.find_nvshmem({"NVSHMEM_HOME": str(home)}, root).library == str(home / "lib/libnvshmem_host.so.2")
    found = software.find_nvshmem({"LD_LIBRARY_PATH": f":{home / 'lib'}"}, root)
    assert found.library == str(home / "lib/libnvshmem_host.so.2")


def test_environment_is_selected_by_name():
    given = {"PATH": "/bin", "NCCL_DEBUG": "INFO", "DEEP_EP_X": "1", "RANK": "0", "RANKS": "0", "MY_TOKEN": "secret"}
    assert host.relevant(given) == {"NCCL_DEBUG": "INFO", "DEEP_EP_X": "1", "RANK": "0"}


def test_one_failing_fact_leaves_the_others(monkeypatch, tmp_path):
    def fail(*_: object) -> None:
        raise RuntimeError("it\nbroke")

    for name in ("_cpu_model", "shared_memory", "_limits", "container", "mps"):
        monkeypatch.setattr(host, name, fail)
    monkeypatch.setattr(software, "_extension", fail)
    monkeypatch.setattr("deep_ep.doctor.collect.collect_nics", fail)
    found = diagnose(root=tmp_path)
    assert found.host.cpu == found.host.mps == found.nics == Unknown("it broke")
    assert found.self_test == advice.PASSED
    assert [finding.about for finding in found.findings if finding.level == "error"] == ["extension"]
    assert not found.usable
    output = io.StringIO()
    report.print_plain(found, output)
    assert output.getvalue().count("unknown (it broke)") >= 6
    json.dumps(to_json(found))


# ----------------------------------------------------------------------------------------------------
# Bandwidth


class FakeCopies:
    """Copies that take ``seconds`` each on a clock of their own."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        self.clock, self.seconds, self.runs = clock, seconds, 0

    def run(self) -> None:
        self.runs += 1
        self.clock[0] += self.seconds

    def wait(self) -> None:
        pass


@pytest.mark.parametrize(("seconds", "runs"), [(1e-4, 102), (1.0, 3), (1e-7, 1002)])
def test_rate_takes_about_ten_milliseconds(seconds, runs):
    clock = [0.0]
    copies = FakeCopies(clock, seconds)
    assert bandwidth.rate([copies], lambda: clock[0]) == pytest.approx(bandwidth.COPY_BYTES / seconds / 1e9)
    assert copies.runs == runs


def test_rate_adds_both_directions_up():
    clock = [0.0]
    both = [FakeCopies(clock, 1e-3), FakeCopies(clock, 1e-3)]
    assert bandwidth.rate(both, lambda: clock[0]) == pytest.approx(bandwidth.COPY_BYTES / 1e-3 / 1e9)


def test_probe_output_up_to_a_pair_that_hangs():
    lines = [
        '{"device": 0, "sharing": {"fd": "", "fabric": "no IMEX"}}',
        '{"source": 0, "target": 0, "gbytes_per_s": 2000.0, "gbytes_per_s_both_ways": 2000.0, "intact": true, '
        '"gbytes_per_s_kernel": null}',
        "some library says hello",
        '{"source": 0, "target": 1, "error": "out of memory"}',
        '{"source": 1, "target": 0, "gby',
    ]
    measured = bandwidth.parse("\n".join(lines), 2, "no answer within 98 s")
    assert measured.sharing == {0: {"fd": "", "fabric": "no IMEX"}, 1: Unknown("no answer within 98 s")}
    found = measured.pairs
    assert found[0, 0] == Bandwidth(2000.0, 2000.0, True)
    assert found[0, 1] == Unknown("out of memory")
    assert found[1, 0] == Unknown("no answer within 98 s")
    assert found[1, 1] == Unknown("not reached: the probe ended at (1, 0): no answer within 98 s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the probe succeeds here")
def test_probe_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    nothing = Unknown("this torch is built without CUDA")
    assert bandwidth.probe(1) == bandwidth.Measured({(0, 0): nothing}, {0: nothing})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (reason,) = bandwidth.probe(1).pairs.values()
    assert isinstance(reason, Unknown)
    assert "CUDA" in reason.reason or "NVIDIA" in reason.reason
    monkeypatch.setattr(bandwidth, "_START_SECONDS", 0.1 - 2 * bandwidth._PAIR_SECONDS)
    assert bandwidth.probe(1).pairs[0, 0] == Unknown("no answer within 0 s")
    monkeypatch.setattr(bandwidth.sys, "executable", "/nonexistent/python")
    assert "No such file" in str(bandwidth.probe(1).pairs[0, 0])


# ----------------------------------------------------------------------------------------------------
# On GPUs

CONTEXT_CHECK = """
import ctypes, json, torch
from deep_ep.doctor.collect import diagnose
from deep_ep.doctor.facts import to_json
found = diagnose(probe=True)
assert not torch.cuda.is_initialized()
driver = ctypes.CDLL("libcuda.so.1")
for gpu in found.gpus.devices:
    flags, active = ctypes.c_uint(), ctypes.c_int(1)
    assert driver.cuDevicePrimaryCtxGetState(gpu.index, ctypes.byref(flags), ctypes.byref(active)) == 0
    assert active.value == 0, "a context exists"
print(json.dumps(to_json(found)))
"""


@pytest.mark.gpu
def test_real_gpus_are_described_and_measured_without_a_context():
    command = [sys.executable, "-c", CONTEXT_CHECK]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])["gpus"]
    assert len(found["devices"]) == torch.cuda.device_count()
    for gpu in found["devices"]:
        properties = torch.cuda.get_device_properties(gpu["index"])
        assert gpu["name"] == properties.name
        assert gpu["capability"] == 10 * properties.major + properties.minor
        assert gpu["num_sms"] == properties.multi_processor_count
        assert int(gpu["pci"].split(":")[1], 16) == properties.pci_bus_id
        assert gpu["posix_fd"] is True
        assert gpu["sharing"]["fd"] == ""
    for pair in found["pairs"]:
        assert pair["bandwidth"]["intact"] is True
        assert pair["bandwidth"]["gbytes_per_s"] > 1
        if pair["src"] != pair["dst"]:
            assert pair["peer_access"] == torch.cuda.can_device_access_peer(pair["src"], pair["dst"])
            if pair["peer_access"] and _C.has_cuda and min(gpu["capability"] for gpu in found["devices"]) >= 90:
                assert pair["bandwidth"]["gbytes_per_s_kernel"] > 1
