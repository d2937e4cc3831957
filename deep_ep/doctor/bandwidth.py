"""Measured bandwidth between GPUs.

Runs as a program of its own (`python -m deep_ep.doctor.bandwidth COUNT`, one line of JSON a pair), so that the CUDA
contexts, a broken pair that hangs, or one that leaves an error behind, stay out of the process that asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from .facts import Bandwidth, Maybe, Unknown, reason_of

COPY_BYTES = 64 << 20
PROBE_SECONDS = 0.01
_MAX_COPIES = 1000
_START_SECONDS = 90.0  # imports, and a context on each GPU
_PAIR_SECONDS = 2.0


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
    both_ways = rate([there, DeviceCopies(target, source)]) if source != target else one_way
    return Bandwidth(round(one_way, 1), round(both_ways, 1), there.intact())


def pairs_of(count: int) -> list[tuple[int, int]]:
    return [(source, target) for source in range(count) for target in range(count)]


def probe(count: int) -> dict[tuple[int, int], Maybe[Bandwidth]]:
    """Measure all pairs of ``count`` GPUs in a child process. Never raises: a pair without a figure says why."""
    pairs = pairs_of(count)
    if torch.version.cuda is None:
        return dict.fromkeys(pairs, Unknown("this torch is built without CUDA"))
    limit = _START_SECONDS + _PAIR_SECONDS * len(pairs)
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
    return parse(output.decode(errors="replace"), pairs, failure)


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""


def parse(output: str, pairs: Sequence[tuple[int, int]], failure: str) -> dict[tuple[int, int], Maybe[Bandwidth]]:
    """What the child printed. The first pair that it did not come to is the one that broke it: ``failure``."""
    found: dict[tuple[int, int], Maybe[Bandwidth]] = {}
    for line in output.splitlines():
        try:
            item: dict[str, Any] = json.loads(line)
            pair = (int(item["source"]), int(item["target"]))
            found[pair] = (
                Unknown(str(item["error"]))
                if "error" in item
                else Bandwidth(float(item["gbytes_per_s"]), float(item["gbytes_per_s_both_ways"]), bool(item["intact"]))
            )
        except (ValueError, KeyError, TypeError):
            continue  # a line that some library printed, or one that was cut off
    broken = next((pair for pair in pairs if pair not in found), None)
    for pair in pairs:
        if pair not in found:
            reason = failure if pair == broken else f"not reached: the probe ended at {broken}: {failure}"
            found[pair] = Unknown(reason)
    return found


def main(count: int) -> None:
    for source, target in pairs_of(count):
        line: dict[str, Any] = {"source": source, "target": target}
        try:
            line.update(vars(measure(source, target)))
        except Exception as error:
            line["error"] = reason_of(error)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
