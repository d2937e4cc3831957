"""Ranks as processes: started here, or found in the environment that torchrun sets."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from deep_ep.errors import ConfigError, PeerError

_GROUP_TIMEOUT = datetime.timedelta(minutes=10)


@dataclasses.dataclass(frozen=True)
class World:
    """This process among the ranks of `group`; None is the default process group."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the ranks in place; every rank gets the same bits."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def barrier(self) -> None:
        self.sum_(torch.zeros(1))

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """Rank 0's bytes on every rank; the others pass None."""
        if self.size == 1:
            return payload or b""
        length = torch.tensor([len(payload or b"")])
        dist.broadcast(length, group=self.group, group_src=0)
        data = torch.empty(int(length), dtype=torch.uint8)
        if payload is not None:
            data = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        dist.broadcast(data, group=self.group, group_src=0)
        return data.numpy().tobytes()


Worker = Callable[[World], None]


def cpu_count() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def torchrun_ranks() -> int:
    """WORLD_SIZE as a number.

    Raises:
        ConfigError: it is not a positive number.
    """
    given = os.environ["WORLD_SIZE"]
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"WORLD_SIZE is {given!r}: expected the number of ranks, as torchrun sets it")
    return int(given)


def resolve_device(name: str) -> str:
    """The device named: "auto" is "cuda" where a GPU is usable and "cpu" elsewhere.

    Raises:
        ConfigError: "cuda" asked for and no GPU is usable.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but torch finds no usable GPU here: use --device cpu")
    return name


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Makes a run on a GPU repeat bit for bit, as it does on a CPU: torch then sums in a fixed order.

    The backward of fused attention is what needs it; `deep_ep.nn` sums in a fixed order anyway. Operations that torch
    has no such variant of only warn.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings.fill_uninitialized_memory = False  # costs time, and nothing here reads what it has not written
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fills


def launch(worker: Worker, ranks: int, device: str) -> bool:
    """Run `worker(world)` on every rank and return whether this process is the one to report afterwards.

    Under torchrun this process is one rank already; otherwise one rank runs here and more are started as
    processes. `worker` must be picklable.

    Raises:
        ConfigError: `ranks` is not what torchrun started, or the device does not exist.
        PeerError: a rank ended with an error or was killed; the others have been ended too.
    """
    device = resolve_device(device)
    if under_torchrun():
        if ranks != torchrun_ranks():
            raise ConfigError(f"--ranks is {ranks}, but torchrun started {torchrun_ranks()}: leave --ranks out")
        rank = int(os.environ["RANK"])
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        _run_rank(worker, rank, ranks, int(os.environ.get("LOCAL_RANK", rank)), local_ranks, device, "env://")
        return rank == 0
    with tempfile.TemporaryDirectory(prefix="deep_ep-") as folder:
        # A file, not a port: nothing to collide with.
        if ranks == 1:
            _run_rank(worker, 0, 1, 0, 1, device, _meeting(Path(folder)))
        else:
            _start_ranks(worker, ranks, device, Path(folder))
    return True


def _meeting(folder: Path) -> str:
    return (folder / "store").as_uri()


def _start_ranks(worker: Worker, ranks: int, device: str, folder: Path) -> None:
    threads = str(max(1, cpu_count() // ranks))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads  # read by each child's thread pools when they load
    sys.stdout.flush()
    try:
        start: Any = start_processes
        context = start(_child, args=(worker, ranks, device, folder), nprocs=ranks, join=False, start_method="spawn")
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    processes = context.processes
    try:
        while not context.join(timeout=1.0):
            pass
    except (ProcessRaisedException, ProcessExitedException) as error:
        raise PeerError(_first_failure(processes, error, folder)) from None
    finally:
        # An interrupt lands here too: no rank may outlive the run.
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _first_failure(processes: Sequence[BaseProcess], error: Any, folder: Path) -> str:
    """What went wrong first: when one rank dies the others fail too, and their errors only repeat it."""
    noticed = error.error_index
    # SIGTERM is how the survivors are ended, so it only counts for the rank that was noticed.
    for rank, process in enumerate(processes):
        code = process.exitcode or 0
        if code < 0 and (code != -signal.SIGTERM or rank == noticed):
            name = signal.Signals(-code).name
            return f"rank {rank} was killed by {name}, the others were ended; SIGKILL may mean out of memory"
    reports = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if reports:
        rank_name = reports[0].name.removeprefix("error-")
        return f"rank {rank_name} failed, the other ranks were ended:\n{reports[0].read_text()}"
    return f"rank {noticed} ended with exit code {processes[noticed].exitcode}, the others were ended: {error}"


def _child(index: int, worker: Worker, ranks: int, device: str, folder: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _run_rank(worker, index, ranks, index, ranks, device, _meeting(folder), folder)


def _end_with_parent() -> None:
    """A launcher that is killed cannot end its ranks: each ends itself, even inside a wait for a peer."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _run_rank(
    worker: Worker,
    rank: int,
    ranks: int,
    local_rank: int,
    local_ranks: int,
    device: str,
    meeting: str,
    errors: Path | None = None,
) -> None:
    torch.set_num_threads(max(1, cpu_count() // local_ranks))
    backend, place = "gloo", torch.device("cpu")
    if device == "cuda":
        gpus = torch.cuda.device_count()
        place = torch.device("cuda", local_rank % gpus)
        torch.cuda.set_device(place)
        # NCCL refuses two ranks on one GPU; gloo serves those.
        backend = "cpu:gloo,cuda:nccl" if gpus >= local_ranks else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=ranks, timeout=_GROUP_TIMEOUT)
    world = World(rank, ranks, place)
    try:
        with repeatable(place):
            worker(world)
        world.barrier()  # no rank leaves while another still talks to it
    except Exception:
        # Told before the connections close: that makes the other ranks fail too, with less to say.
        if errors is not None:
            (errors / f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()
