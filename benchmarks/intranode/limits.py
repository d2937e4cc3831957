"""What the hardware can do, measured in the run that the limits are used in."""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from deep_ep.errors import TopologyError

from .probes import FLAG_PAYLOADS, Rig, best_of, probes_of
from .world import WARMUPS, World, summary

LOCAL_COPY_BYTES = 256 << 20


def copy_engines(num_bytes: int, args: argparse.Namespace) -> list[float]:
    """Microseconds by round of copies GPU 0 -> 1 and 1 -> 0 at once, of the slower direction.

    Straight from the driver: torch's copy between devices adds two waits between streams to each copy.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    lanes = []
    for source, target in ((0, 1), (1, 0)):
        src = torch.randint(1, 256, (num_bytes,), dtype=torch.uint8, device=f"cuda:{source}")
        dst = torch.ones(num_bytes, dtype=torch.uint8, device=f"cuda:{target}")
        dst.copy_(src)  # torch opens the access to the peer on its first copy
        lanes.append((source, src, dst.fill_(0), torch.cuda.Stream(device=source)))
    for device in (0, 1):
        torch.cuda.synchronize(device)

    def enqueue(src: torch.Tensor, dst: torch.Tensor, stream: torch.cuda.Stream) -> None:
        status = driver.cuMemcpyDtoDAsync_v2(
            ctypes.c_uint64(dst.data_ptr()),
            ctypes.c_uint64(src.data_ptr()),
            ctypes.c_size_t(num_bytes),
            ctypes.c_void_p(stream.cuda_stream),
        )
        if status:
            raise RuntimeError(f"the driver's copy between GPUs failed with status {status}")

    rounds = []
    for _ in range(args.rounds):
        events = []
        # Both GPUs sleep first, so that all copies are enqueued when the first one starts.
        for device, _, _, stream in lanes:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)
        for device, src, dst, stream in lanes:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                for _ in range(WARMUPS):
                    enqueue(src, dst, stream)
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record(stream)
                for _ in range(args.iterations):
                    enqueue(src, dst, stream)
                end.record(stream)
                events.append((start, end))
        for device in (0, 1):
            torch.cuda.synchronize(device)
        rounds.append(max(start.elapsed_time(end) for start, end in events) * 1e3 / args.iterations)
    for _, src, dst, _ in lanes:
        if not torch.equal(dst.to(src.device), src):
            raise RuntimeError("the copy engine's limit: the copied bytes differ")
    return rounds


def figure(num_bytes: int, times: Sequence[float]) -> dict[str, float]:
    result = summary(times)
    return {**result, "gb_s": round(num_bytes / result["median_us"] / 1e3, 2)}


def local_copy(world: World, args: argparse.Namespace) -> dict[str, float]:
    """A copy within one GPU; its rate counts the bytes of one side."""
    src = torch.randint(1, 256, (LOCAL_COPY_BYTES,), dtype=torch.uint8, device=world.device)
    dst = torch.ones_like(src)
    times = [world.microseconds(lambda: dst.copy_(src), args.iterations) for _ in range(args.rounds)]
    return {"bytes": LOCAL_COPY_BYTES, **figure(LOCAL_COPY_BYTES, times)}


def measure_limits(world: World, sizes: Sequence[int], num_rows: int, args: argparse.Namespace) -> dict[str, Any]:
    """The limits of this host.

    Args:
        sizes: bytes in one direction that the copy engines move.
        num_rows: rows that the probes move.

    Returns:
        ``copy_engine``: figures by bytes, measured by rank 0 alone; ``local_copy``; ``probes``: a list of figures, see
        `probes.best_of`; ``flags``: one way, by bytes that travel before the flag; ``note``: what is missing and why.
    """
    limits: dict[str, Any] = {"copy_engine": {}, "local_copy": None, "probes": [], "flags": {}, "note": ""}
    if not world.num_devices:
        return limits
    world.barrier()
    if world.rank == 0:
        limits["local_copy"] = local_copy(world, args)
        if world.num_devices < 2 or not torch.cuda.can_device_access_peer(0, 1):
            limits["note"] = "no two GPUs that reach each other: the link's limits were not measured"
        elif world.size > 1:
            for num_bytes in sizes:
                limits["copy_engine"][str(num_bytes)] = figure(num_bytes, copy_engines(num_bytes, args))
        torch.cuda.empty_cache()
    dist.barrier(world.group)
    if 1 < world.size <= world.num_devices:
        measure_probes(world, num_rows, args, limits)
    return limits


def measure_probes(world: World, num_rows: int, args: argparse.Namespace, limits: dict[str, Any]) -> None:
    """By all ranks together, each on a GPU of its own."""
    try:
        # Scales of an FP8 row: a float for 128 columns.
        rig = Rig(world, num_rows, 2 * args.hidden, -(-args.hidden // 128 * 4 // 16) * 16, args.seed)
    except TopologyError as error:  # on all ranks alike
        limits["note"] = f"no probes of the link: {error}"
        return
    for num_bytes in FLAG_PAYLOADS:
        limits["flags"][str(num_bytes)] = figure(num_bytes, world.rounds(lambda size=num_bytes: rig.flags(size)))
    for probe in probes_of(rig.row_bytes, rig.scale_bytes):
        for num_sms in args.sms:
            limits["probes"].append(best_of(rig, probe, num_sms))
            if world.rank == 0:
                best = limits["probes"][-1]
                print(
                    f"{num_sms:>4} SMs  limit: {probe.name:<51}{best['median_us']:>10.1f} us  {best['shape']}",
                    flush=True,
                )
    rig.close()
