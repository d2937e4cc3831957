"""The doctor's conclusions from facts, and how a report is written."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import harness
import pytest
from doctor_cases import GPUS, HOST, NO_GPUS, SOFTWARE, a_gpu, a_report, all_pairs, problems

from deep_ep.doctor import advice, facts, report
from deep_ep.doctor.facts import Bandwidth, Unknown, to_json

# ----------------------------------------------------------------------------------------------------
# Conclusions


def test_a_good_machine_gives_no_findings():
    assert problems() == []
    assert problems(devices=NO_GPUS, cards=[]) == []


def with_pair(index: int, **changes) -> facts.Gpus:
    pairs = list(GPUS.pairs)
    pairs[index] = dataclasses.replace(pairs[index], **changes)
    return dataclasses.replace(GPUS, pairs=pairs)


def with_gpu(**changes) -> facts.Gpus:
    return dataclasses.replace(GPUS, devices=[GPUS.devices[0], dataclasses.replace(GPUS.devices[1], **changes)])


def with_host(**changes) -> facts.Host:
    return dataclasses.replace(HOST, **changes)


def with_variables(**variables: str) -> facts.Host:
    return with_host(environment=variables)


def with_shared_memory(free: int, usable: str = "") -> facts.Host:
    return with_host(shared_memory=facts.SharedMemory("/dev/shm", 64 << 20, free, usable))


def four_gpus(slow: float = 400.0, link: str = "NV18") -> facts.Gpus:
    pairs = all_pairs(4)
    pairs[1] = dataclasses.replace(pairs[1], bandwidth=Bandwidth(slow, 2 * slow, True), link=link)
    return dataclasses.replace(GPUS, pairs=pairs, present=4, devices=[a_gpu(i) for i in range(4)])


CUDA12 = dataclasses.replace(GPUS, driver_cuda=12080)
CONCLUSIONS: list[tuple[dict, str, str]] = [
    ({"software": dataclasses.replace(SOFTWARE, torch="2.9.1+cu130")}, "error", "torch 2.9.1+cu130 is older than 2.11"),
    ({"software": dataclasses.replace(SOFTWARE, distributed_backends=["nccl"])}, "error", "no gloo backend"),
    ({"software": dataclasses.replace(SOFTWARE, extension=Unknown("bad symbol"))}, "error", "_C does not answer: bad"),
    ({"tested": "it broke"}, "error", "a buffer of one rank on the CPU failed: it broke"),
    ({"software": dataclasses.replace(SOFTWARE, torch_cuda=None)}, "warning", "GPUs are not used"),
    (
        {"software": dataclasses.replace(SOFTWARE, extension=facts.Extension(False, 0, [], "generic", 1))},
        "warning", "deep_ep is built without CUDA",
    ),
    ({"devices": CUDA12}, "warning", "serves CUDA 12.8, torch is built for 13.0"),
    ({"devices": CUDA12}, "warning", "serves CUDA 12.8, deep_ep is built for 13.0"),
    (
        {"software": dataclasses.replace(SOFTWARE, torch_cuda="13.2")},
        "note", "serves CUDA 13.0, torch is built for 13.2",
    ),
    ({"devices": dataclasses.replace(NO_GPUS, driver="580.1.2")}, "warning", "CUDA does not start"),
    ({"devices": with_gpu(capability=80)}, "warning", "not for compute capability 8.0"),
    ({"devices": with_gpu(name="NVIDIA L4")}, "note", "different GPUs: NVIDIA H200, NVIDIA L4"),
    ({"devices": with_gpu(compute_mode="prohibited")}, "warning", "forbids CUDA"),
    ({"devices": with_gpu(compute_mode="exclusive process")}, "note", "ranks cannot share it"),
    ({"devices": with_gpu(mig=True)}, "warning", "MIG is on"),
    ({"devices": with_gpu(posix_fd=False)}, "warning", "cannot be exported"),
    ({"devices": with_pair(1, peer_access=False)}, "warning", "peer access: none for 0->1"),
    ({"devices": with_pair(2, bandwidth=Bandwidth(9.0, 9.0, False))}, "warning", "copies arrive damaged: 1->0"),
    ({"devices": with_pair(2, bandwidth=Unknown("out of memory"))}, "warning", "no bandwidth for 1->0: unknown ("),
    ({"devices": with_pair(2, link="SYS")}, "warning", "some pairs have NVLink, but not 1->0"),
    ({"devices": four_gpus(slow=100.0)}, "warning", "slower than other NV18 pairs (median 400 GB/s): 0->1"),
    ({"devices": four_gpus(link="NV12")}, "note", "fewest, 12: 0->1"),
    ({"devices": dataclasses.replace(GPUS, present=8), "machine": with_variables(CUDA_VISIBLE_DEVICES="0,1")},
     "note", "leaves 2 of 8 GPUs visible"),
    ({"machine": with_shared_memory(60 << 20)}, "warning", "/dev/shm has 63 MB free"),
    ({"machine": with_shared_memory(8 << 30, "Operation not permitted")}, "warning", "over sockets: Operation not"),
    ({"machine": with_host(shared_memory=Unknown("no folder"))}, "warning", "over sockets: no folder"),
    ({"machine": with_variables(DEEP_EP_SHARED_MEMORY="0")}, "note", "turned off by DEEP_EP_SHARED_MEMORY=0"),
    (
        {"machine": with_host(
            limits=[facts.Limit("memlock", 65536, None, "bytes")], container=Unknown("no /proc"))},
        "warning", "memlock is 64 KiB",
    ),
    ({"machine": with_host(limits=[facts.Limit("nofile", 256, 256, "files")])}, "warning", "nofile is 256"),
    ({"machine": with_host(mps=facts.Mps("/x", True, False, []))}, "warning", "/x has no daemon's pipe"),
    ({"machine": with_host(mps=facts.Mps("/x", False, False, [7]))}, "note", "a daemon runs"),
    ({"machine": with_variables(DEEP_EP_TIMEOUT="5")}, "warning", "DEEP_EP_TIMEOUT is not a variable of deep_ep"),
    ({"machine": with_variables(DEEP_EP_CPU_ISA="sse")}, "warning", "but the CPU loops use avx512"),
    ({"machine": with_variables(CUDA_LAUNCH_BLOCKING="1")}, "warning", "CUDA_LAUNCH_BLOCKING"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "level", "text"), CONCLUSIONS, ids=[text[:40] for _, _, text in CONCLUSIONS])
def test_findings(given, level, text):
    found = problems(**given)
    matching = [item for item in found if text in f"{item.about}: {item.message}" and item.level == level]
    assert matching, found
    assert all(item.advice for item in found)
    assert [item.level for item in found] == sorted(
        (item.level for item in found), key=["error", "warning", "note"].index
    )


def test_spelling_of_variables_is_suggested():
    (finding,) = problems(machine=with_variables(DEEP_EP_TIMEOUT="5"))
    assert finding.advice == "did you mean DEEP_EP_TIMEOUT_S?"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["90"], 90, True), (["90"], 80, False), (["90"], 100, False), (["90", "90-ptx"], 100, True),
        (["80"], 89, True), (["90a"], 90, True), (["90a"], 100, False), (["100f"], 103, True), ([], 90, False),
    ],
)  # fmt: skip
def test_can_run(archs, capability, runs):
    assert advice.can_run(archs, capability) is runs


@pytest.mark.parametrize(
    ("software_", "gpus_", "host_", "engine", "reasons"),
    [
        (SOFTWARE, GPUS, HOST, "cuda", ["reaches the memory", "CPU tensors"]),
        (SOFTWARE, NO_GPUS, HOST, "portable", ["no GPU (no NVIDIA driver)", "shared memory"]),
        (dataclasses.replace(SOFTWARE, torch_cuda=None), GPUS, HOST, "portable", ["without CUDA", "shared memory"]),
        (
            SOFTWARE, GPUS, with_variables(DEEP_EP_SHARED_MEMORY="0", DEEP_EP_ENGINE="portable"), "portable",
            ["nccl", "DEEP_EP_ENGINE=portable", "sockets: DEEP_EP_SHARED_MEMORY=0"],
        ),
    ],
)  # fmt: skip
def test_engine_and_its_reasons(software_, gpus_, host_, engine, reasons):
    choice = advice.choose_engine(software_, gpus_, host_)
    assert choice.name == engine
    assert all(any(part in reason for reason in choice.reasons) for part in reasons)


def test_memory_that_cannot_be_shared_leaves_no_kernels():
    refused = a_gpu(1, sharing={"fd": "no descriptors", "fabric": "", "ipc": "no IPC"})
    devices = dataclasses.replace(GPUS, devices=[a_gpu(0), refused])
    choice = advice.choose_engine(SOFTWARE, devices, HOST)
    assert choice.name == "portable"
    assert "GPUs [1] cannot share their memory" in choice.reasons[0]
    (finding,) = problems(devices=devices)
    assert (finding.level, finding.about) == ("warning", "GPU 1")
    assert "no descriptors" in finding.message
    assert "no IPC" in finding.message
    one_way = dataclasses.replace(GPUS, devices=[a_gpu(0, sharing={"fd": "", "ipc": "no IPC"}), a_gpu(1)])
    assert advice.choose_engine(SOFTWARE, one_way, HOST).name == "cuda"
    assert problems(devices=one_way) == []


def test_a_domain_that_splits_the_host_is_named():
    choice = advice.choose_engine(SOFTWARE, GPUS, with_variables(DEEP_EP_NVL_DOMAIN="2"))
    assert choice.name == "cuda"
    assert "DEEP_EP_NVL_DOMAIN=2" in choice.reasons[-1]


def test_every_variable_of_the_sources_is_known():
    read = re.compile(r"""(?:environ\.get\(|environ\[|getenv\(|\$\{?)["']?(DEEP_EP_[A-Z0-9_]+)""")
    files = [path for folder in ("deep_ep", "csrc") for path in (harness.REPO_ROOT / folder).rglob("*")]
    files += [harness.REPO_ROOT / name for name in ("setup.py", "install.sh")]
    names = set()
    for path in files:
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh", ".sh") and path.exists():
            names.update(read.findall(path.read_text()))
    assert names, "found no variable at all"
    assert names <= advice.VARIABLES, "add new variables to deep_ep/doctor/advice.py"


# ----------------------------------------------------------------------------------------------------
# Output

KEYS = """
schema self_test
software.deep_ep software.python software.platform software.torch software.torch_cuda
software.distributed_backends[] software.extension.has_cuda software.extension.cuda_runtime
software.extension.build_archs[] software.extension.cpu_isa software.extension.num_threads
software.nvshmem.version software.nvshmem.library
gpus.status gpus.driver gpus.driver_cuda gpus.present gpus.imex_channels[] gpus.link_source
gpus.devices[].index gpus.devices[].name gpus.devices[].pci gpus.devices[].numa_node gpus.devices[].memory_bytes
gpus.devices[].capability gpus.devices[].num_sms gpus.devices[].compute_mode gpus.devices[].mig
gpus.devices[].mps_client gpus.devices[].vmm gpus.devices[].posix_fd gpus.devices[].fabric gpus.devices[].multicast
gpus.devices[].gpudirect_rdma gpus.devices[].sharing.fd gpus.devices[].sharing.fabric gpus.devices[].sharing.ipc
gpus.pairs[].src gpus.pairs[].dst gpus.pairs[].peer_access gpus.pairs[].native_atomics gpus.pairs[].link
gpus.pairs[].bandwidth.gbytes_per_s gpus.pairs[].bandwidth.gbytes_per_s_both_ways gpus.pairs[].bandwidth.intact
gpus.pairs[].bandwidth.gbytes_per_s_kernel
nics[].name nics[].driver nics[].pci nics[].numa_node nics[].interfaces[] nics[].ports[].number
nics[].ports[].link_layer nics[].ports[].state nics[].ports[].rate nics[].verbs_device
nics[].distance.0 nics[].distance.1.unknown
host.name host.cpu host.usable_cores host.numa_nodes host.shared_memory.path host.shared_memory.total_bytes
host.shared_memory.free_bytes host.shared_memory.usable host.limits[].name host.limits[].soft host.limits[].hard
host.limits[].unit host.container.kind host.container.capabilities[] host.container.memory_limit_bytes
host.container.cpu_limit host.mps.pipe_directory host.mps.directory_from_environment host.mps.control_pipe
host.peermem_module host.environment.OMP_NUM_THREADS
engine.name engine.reasons[] findings[].level findings[].about findings[].message findings[].advice
"""


def keys_of(value, name: str = "") -> set[str]:
    if isinstance(value, dict):
        return {key for k, v in value.items() for key in keys_of(v, f"{name}.{k}" if name else k)}
    if isinstance(value, list):
        return {key for item in value for key in keys_of(item, f"{name}[]")}
    return {name}


def test_json_keys_are_stable():
    found = json.loads(json.dumps(to_json(a_report())))
    assert keys_of(found) == set(KEYS.split()), "a key that is renamed or removed needs another facts.SCHEMA"
    assert found["schema"] == 1
    assert found["nics"][0]["distance"]["1"] == {"unknown": "hidden"}


def test_plain_text_of_a_full_report():
    output = io.StringIO()
    report.print_plain(a_report(), output)
    text = output.getvalue()
    assert re.search(r"GPU0 +- +NV18", text)
    assert re.search(r"GPU0 +400 +400 / 780 / 650", text)
    assert "sharing tried on GPU 0, 1: fd yes; fabric no (no IMEX domain); ipc yes" in text
    assert "mlx5_0" in text
    assert "?: unknown (hidden)" in text
    assert "note  GPUs: a message\n        -> an advice" in text
    assert "3.4.5, /lib/libnvshmem_host.so.3" in text


@pytest.mark.parametrize("made", [a_report(), a_report(gpus=NO_GPUS, nics=[], findings=[])], ids=["full", "empty"])
def test_rich_says_the_same(made):
    pytest.importorskip("rich")
    plain, rich = io.StringIO(), io.StringIO()
    report.print_plain(made, plain)
    report.print_rich(made, rich)

    def words(text: str) -> list[str]:
        return sorted(set(re.findall(r"[A-Za-z0-9_]{4,}", text)))

    missing = set(words(plain.getvalue())) - set(words(rich.getvalue()))
    # Narrow columns break long words.
    assert all(word[:3] in rich.getvalue() for word in missing), missing
