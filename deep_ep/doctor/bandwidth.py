"""Measured bandwidth between GPUs, and whether their memory can be shared.

Runs as a program of its own (`python -m deep_ep.doctor.bandwidth COUNT`, one line of JSON a fact), so that the CUDA
contexts, a broken pair that hangs, or one that leaves an error behind, stay out of the process that asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .._native import _C, current_stream
from ..engines.mesh import SoloComm, members_of
from ..engines.peer_memory import HANDLE_KINDS, PeerMemory
from .facts import Bandwidth, Maybe, Unknown, reason_of

COPY_BYTES = 64 << 20
PROBE_SECONDS = 0.01
_MAX_COPIES = 1000
_START_SECONDS = 90.0  # imports, and a context on each GPU
_PAIR_SECONDS = 2.0
KERNEL_SMS = 16
_ROW_BYTES = 8192
_SHARED_BYTES = 2 << 20


@dataclass(frozen=True)
class Measured:
    """``pairs``: by source and target. ``sharing``: by device, `Gpu.sharing`."""

    pairs: dict[tuple[int, int], Maybe[Bandwidth]]
    sharing: dict[int, Maybe[dict[str, str]]]


class Copies(Protocol):
    """Queues copies of `COPY_BYTES` from one device to another."""

    def run(self) -> None: ...

    def wait(self) -> None: ...


class DeviceCopies:
    """Copies through torch on streams of their own, so that the two directions of a pair do not wait for each other."""

    def __init__(self, source: int, target: int) -> None:
        self.source = _pattern(source)
        self.target = torch.zeros(COPY_BYTES // 4, dtype=torch.int32, device=torch.device("cuda", target))
        self.streams = [torch.cuda.Stream(device=device) for device in (source, target)]
        for device in (source, target):
            torch.cuda.synchronize(device)

    def run(self) -> None:
        # torch queues on the source's current stream and ties the target's to it.
        with torch.cuda.stream(self.streams[0]), torch.cuda.stream(self.streams[1]):
            self.target.copy_(self.source, non_blocking=True)

    def wait(self) -> None:
        for stream in self.streams:
            stream.synchronize()

    def intact(self) -> bool:
        return torch.equal(self.target, _pattern(self.target.device.index))


class KernelCopies(DeviceCopies):
    """The same by a kernel of the source's GPU that writes to the other's memory, which torch's copies have opened."""

    def run(self) -> None:
        with torch.cuda.device(self.source.device), torch.cuda.stream(self.streams[0]):
            _C.probe_push(
                rows=self.source.data_ptr(),
                peer_rows=self.target.data_ptr(),
                own_rows=0,
                num_rows=COPY_BYTES // _ROW_BYTES,
                row_bytes=_ROW_BYTES,
                scales=0,
                peer_scales=0,
                own_scales=0,
                scale_bytes=0,
                scales_by_bulk=False,
                num_sms=KERNEL_SMS,
                warps=8,
                ahead=1,
                behind=1,
                piece_bytes=_ROW_BYTES,
                stream=current_stream(self.source.device),
            )


def _has_kernels(device: int) -> bool:
    return bool(_C.has_cuda) and torch.cuda.get_device_capability(device) >= (9, 0)


def _pattern(device: int) -> torch.Tensor:
    return torch.arange(COPY_BYTES // 4, dtype=torch.int32, device=torch.device("cuda", device))


def rate(copies: Sequence[Copies], clock: Callable[[], float] = time.perf_counter) -> float:
    """GB/s of all ``copies`` together, over about `PROBE_SECONDS`."""

    def timed(count: int) -> float:
        start = clock()
        for _ in range(count):
            for copy in copies:
                copy.run()
        for copy in copies:
            copy.wait()
        return max(clock() - start, 1e-9)

    timed(1)  # maps the peer
    count = min(max(round(PROBE_SECONDS / timed(1)), 1), _MAX_COPIES)
    return len(copies) * count * COPY_BYTES / timed(count) / 1e9


def measure(source: int, target: int) -> Bandwidth:
    """One pair of GPUs; a GPU with itself copies within its memory."""
    there = DeviceCopies(source, target)
    one_way = rate([there])
    if source == target:
        return Bandwidth(round(one_way, 1), round(one_way, 1), there.intact())
    both_ways = rate([there, DeviceCopies(target, source)])
    intact, by_kernel = there.intact(), None
    if _has_kernels(source) and _has_kernels(target) and torch.cuda.can_device_access_peer(source, target):
        there, back = KernelCopies(source, target), KernelCopies(target, source)
        by_kernel = round(rate([there, back]), 1)
        intact = intact and there.intact() and back.intact()
    return Bandwidth(round(one_way, 1), round(both_ways, 1), intact, by_kernel)


def try_sharing(device: int, kind: str) -> str:
    """Export a little memory of a GPU as the cuda engine does: "" if that works, else why not."""
    try:
        torch.cuda.set_device(device)
        solo = members_of(None, SoloComm())
        PeerMemory(solo, torch.device("cuda", device), 4096, _SHARED_BYTES, kind=kind).close()
    except Exception as error:
        return reason_of(error)
    return ""


def pairs_of(count: int) -> list[tuple[int, int]]:
    return [(source, target) for source in range(count) for target in range(count)]


def probe(count: int) -> Measured:
    """Measure all pairs of ``count`` GPUs in a child process. Never raises: what has no figure says why."""
    if torch.version.cuda is None:
        nothing = Unknown("this torch is built without CUDA")
        return Measured(dict.fromkeys(pairs_of(count), nothing), dict.fromkeys(range(count), nothing))
    limit = _START_SECONDS + _PAIR_SECONDS * count * (count + 1)
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(entry for entry in (package_parent, os.environ.get("PYTHONPATH")) if entry)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "deep_ep.doctor.bandwidth", str(count)],
            capture_output=True, timeout=limit, check=False, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        output = result.stdout
        failure = f"exit status {result.returncode} {_last_line(result.stderr)}".rstrip()
    except subprocess.TimeoutExpired as error:
        output, failure = error.stdout or b"", f"no answer within {limit:.0f} s"
    except OSError as error:
        output, failure = b"", reason_of(error)
    return parse(output.decode(errors="replace"), count, failure)


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""


def parse(output: str, count: int, failure: str) -> Measured:
    """What the child printed. The first pair that it did not come to is the one that broke it: ``failure``."""
    found: dict[tuple[int, int], Maybe[Bandwidth]] = {}
    sharing: dict[int, dict[str, str]] = {}
    for line in output.splitlines():
        try:
            item: dict[str, Any] = json.loads(line)
            if "device" in item:
                sharing[int(item["device"])] = {str(kind): str(reason) for kind, reason in item["sharing"].items()}
                continue
            pair = (int(item["source"]), int(item["target"]))
            found[pair] = Unknown(str(item["error"])) if "error" in item else _bandwidth(item)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a line that some library printed, or one that was cut off
    pairs = pairs_of(count)
    broken = next((pair for pair in pairs if pair not in found), None)
    for pair in pairs:
        if pair not in found:
            reason = failure if pair == broken else f"not reached: the probe ended at {broken}: {failure}"
            found[pair] = Unknown(reason)
    return Measured(found, {device: sharing.get(device, Unknown(failure)) for device in range(count)})


def _bandwidth(item: dict[str, Any]) -> Bandwidth:
    by_kernel = item["gbytes_per_s_kernel"]
    return Bandwidth(
        float(item["gbytes_per_s"]),
        float(item["gbytes_per_s_both_ways"]),
        bool(item["intact"]),
        None if by_kernel is None else float(by_kernel),
    )


def main(count: int) -> None:
    # Sharing first: what a broken pair leaves behind would spoil it.
    for device in range(count):
        answers = {kind: try_sharing(device, kind) for kind in HANDLE_KINDS}
        print(json.dumps({"device": device, "sharing": answers}), flush=True)
    for source, target in pairs_of(count):
        line: dict[str, Any] = {"source": source, "target": target}
        try:
            line.update(vars(measure(source, target)))
        except Exception as error:
            line["error"] = reason_of(error)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
