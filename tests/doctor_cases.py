"""A machine with two GPUs and a network card, as facts: what the doctor's tests change one thing of."""

from __future__ import annotations

import dataclasses

from deep_ep.doctor import advice, facts
from deep_ep.doctor.facts import Bandwidth, Finding, Unknown


def a_gpu(index: int = 0, **changes) -> facts.Gpu:
    gpu = facts.Gpu(
        index=index, name="NVIDIA H200", pci=f"0000:{index + 1:02x}:00.0", numa_node=0, memory_bytes=141 << 30,
        capability=90, num_sms=132, compute_mode="default", mig=False, mps_client=False, vmm=True, posix_fd=True,
        fabric=False, multicast=True, gpudirect_rdma=True, sharing={"fd": "", "fabric": "no IMEX domain", "ipc": ""},
    )  # fmt: skip
    return dataclasses.replace(gpu, **changes)


def a_pair(src: int, dst: int, **changes) -> facts.Pair:
    link = "X" if src == dst else "NV18"
    return dataclasses.replace(facts.Pair(src, dst, True, True, link, Bandwidth(400.0, 780.0, True, 650.0)), **changes)


def all_pairs(count: int) -> list[facts.Pair]:
    return [a_pair(i, j) for i in range(count) for j in range(count)]


SOFTWARE = facts.Software(
    deep_ep="0.1.0", python="3.11.7", platform="Linux", torch="2.13.0+cu130", torch_cuda="13.0",
    distributed_backends=["gloo", "nccl"], extension=facts.Extension(True, 13000, ["90", "90-ptx"], "avx512", 8),
    nvshmem=facts.Nvshmem("3.4.5", "/lib/libnvshmem_host.so.3"),
)  # fmt: skip
GPUS = facts.Gpus("ok", "580.65.06", 13000, 2, ["channel0"], "nvidia-smi", [a_gpu(0), a_gpu(1)], all_pairs(2))
NO_GPUS = facts.Gpus("no NVIDIA driver", Unknown("none"), Unknown("none"), Unknown("none"), [], Unknown(""), [], [])
NIC = facts.Nic(
    name="mlx5_0", driver="mlx5_core", pci="0000:05:00.0", numa_node=0, interfaces=["ib0"],
    ports=[facts.NicPort(1, "InfiniBand", "ACTIVE", "400 Gb/sec (4X NDR)")], verbs_device=True,
    distance={0: "PIX", 1: Unknown("hidden")},
)  # fmt: skip
HOST = facts.Host(
    name="node", cpu="a processor", usable_cores=64, numa_nodes=2,
    shared_memory=facts.SharedMemory("/dev/shm", 64 << 30, 60 << 30, ""),
    limits=[facts.Limit("memlock", None, None, "bytes"), facts.Limit("nofile", 65536, 1 << 20, "files")],
    container=facts.Container("", ["IPC_LOCK"], 1 << 40, 8.0), mps=facts.Mps("/tmp/nvidia-mps", False, False, []),
    peermem_module=True, environment={"OMP_NUM_THREADS": "8"},
)  # fmt: skip


def a_report(**changes) -> facts.Report:
    engine = advice.choose_engine(SOFTWARE, GPUS, HOST)
    finding = Finding("note", "GPUs", "a message", "an advice")
    full = facts.Report(facts.SCHEMA, SOFTWARE, GPUS, [NIC], HOST, advice.PASSED, engine, [finding])
    return dataclasses.replace(full, **changes)


def problems(software=SOFTWARE, devices=GPUS, cards=(NIC,), machine=HOST, tested=advice.PASSED) -> list[Finding]:
    return advice.find_problems(software, devices, cards, machine, tested)
