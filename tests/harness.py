"""Rank processes for the tests: a persistent pool, and throw-away groups for tests that break ranks.

Starting Python and importing torch once per rank costs seconds, a test case costs milliseconds, so the
workers are started once and fed functions. They are forked from a fork server that has imported torch,
which makes even a throw-away group cheap.

    results = run_ranks(4, fn, arg)         # fn(ctx, arg) on 4 ranks, list of results by rank
    results = spawn_fresh(4, fn, arg)       # own processes; a rank that dies yields `Died`

`fn` has to be importable (module level). Every job has a hard deadline: a rank that does not answer is shown
with its stack and killed, so a hang in the library is a failed test and never a hung run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import io
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TESTS_DIR = Path(__file__).resolve().parent
REPO_ROOT = TESTS_DIR.parent
DEFAULT_TIMEOUT_S = 120.0
POOL_SIZE = 8
# The library's own deadline lies below the harness's, so that a lost peer shows as the library's typed error.
LIBRARY_TIMEOUT_S = 45
# What says whether ranks reach their GPU through an MPS daemon.
MPS_VARIABLES = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")
WORKER_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the message carries its traceback or stack."""


@dataclasses.dataclass(frozen=True)
class Died:
    """Result of a rank that ended without answering (`spawn_fresh` only)."""

    exitcode: int | None


class RankContext:
    """What a test function sees of its rank."""

    def __init__(self, rank: int, num_ranks: int, group: dist.ProcessGroup, store: dist.Store, device: torch.device):
        self.rank = rank
        self.num_ranks = num_ranks
        self.group = group
        self.store = store
        self.device = device
        self._buffers: dict[tuple[Any, ...], Any] = {}

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def buffer(self, domain: int | None = None, **kwargs: Any) -> Any:
        """A `deep_ep.Buffer` of this group, kept for later cases with the same arguments (collective)."""
        key = (domain, *sorted(kwargs.items()))
        if key not in self._buffers:
            self._buffers[key] = self.fresh_buffer(domain, **kwargs)
        return self._buffers[key]

    def close(self) -> None:
        """Drop the kept buffers, before their group goes."""
        self._buffers.clear()

    def fresh_buffer(self, domain: int | None = None, **kwargs: Any) -> Any:
        import deep_ep

        with environ(DEEP_EP_NVL_DOMAIN=None if domain is None else str(domain)):
            return deep_ep.Buffer(self.group, **kwargs)


@contextlib.contextmanager
def environ(**values: str | None) -> Iterator[None]:
    """Set (or with None: unset) environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}

    def apply(mapping: dict[str, str | None]) -> None:
        for name, value in mapping.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    apply(values)
    try:
        yield
    finally:
        apply(before)


def _group_timeout() -> datetime.timedelta:
    return datetime.timedelta(seconds=LIBRARY_TIMEOUT_S)


# ---------------------------------------------------------------------------------------------------------------
# Messages: plain bytes of a tensor, since torch's own pickling goes through files and lacks some dtypes


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor, row-major, as a flat uint8 tensor on the CPU."""
    # A copy: a last dimension of size 1 counts as contiguous with any stride, and then cannot be viewed as bytes.
    flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def _rebuild(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        return _rebuild, (raw_bytes(obj).numpy().tobytes(), obj.dtype, tuple(obj.shape))


def _dumps(obj: Any) -> bytes:
    out = io.BytesIO()
    _Pickler(out).dump(obj)
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Worker side


def _worker_main(
    rank: int, world: int, port: int, backend: str, conn: Any, trace_path: str, env: dict[str, str], sys_path: list[str]
) -> None:
    for name in MPS_VARIABLES:  # not those of when the fork server started
        os.environ.pop(name, None)
    os.environ.update(WORKER_ENV, DEEP_EP_TIMEOUT_S=str(LIBRARY_TIMEOUT_S))
    os.environ.update(env)
    sys.path[:] = sys_path
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trace_file = open(trace_path, "w")  # noqa: SIM115 (faulthandler writes to it until the process ends)
    faulthandler.enable(file=trace_file)
    faulthandler.register(signal.SIGUSR1, file=trace_file, all_threads=True)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size=None, is_master=False, timeout=_group_timeout())
    device = torch.device("cpu")
    if backend != "gloo" or os.environ.get("DEEP_EP_TEST_DEVICE") == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=dist.PrefixStore("world", store), rank=rank, world_size=world, timeout=_group_timeout()
    )
    contexts: dict[int, RankContext] = {}
    for size in range(1, world + 1):  # made together: torch names a group by how many its ranks have made before
        group = dist.new_group(list(range(size)), backend=backend, timeout=_group_timeout())
        if rank < size:
            contexts[size] = RankContext(rank, size, group, dist.PrefixStore(f"test{size}", store), device)
    while True:
        try:
            job = pickle.loads(conn.recv_bytes())
        except (EOFError, OSError):
            break
        if job is None:
            break
        job_id, num_ranks, fn, args, timeout = job
        # If the parent is gone, nobody kills a hung worker from outside: it ends itself.
        faulthandler.dump_traceback_later(timeout + 20, exit=True, file=trace_file)
        try:
            answer = (job_id, True, fn(contexts[num_ranks], *args))
        except BaseException:
            answer = (job_id, False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        try:
            data = _dumps(answer)
        except Exception:
            data = pickle.dumps((job_id, False, "result cannot be pickled\n" + traceback.format_exc()))
        conn.send_bytes(data)
    os._exit(0)


# ---------------------------------------------------------------------------------------------------------------
# Parent side


class RankPool:
    """`size` rank processes with one process group over them; jobs run on the first n of them."""

    def __init__(self, size: int, backend: str = "gloo", env: dict[str, str] | None = None):
        self.size = size
        self.backend = backend
        self._dir = tempfile.TemporaryDirectory(prefix="deep_ep_tests_")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "numpy", "deep_ep"])
        python_path = os.pathsep.join([str(REPO_ROOT), str(TESTS_DIR), os.environ.get("PYTHONPATH", "")])
        with environ(**WORKER_ENV, PYTHONPATH=python_path.rstrip(os.pathsep)):
            multiprocessing.forkserver.ensure_running()
        self._store = dist.TCPStore("127.0.0.1", 0, world_size=None, is_master=True, wait_for_workers=False)
        self._job_id = 0
        self._conns: list[Any] = []
        self._procs: list[Any] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            trace_path = str(Path(self._dir.name) / f"rank{rank}.txt")
            proc = context.Process(
                target=_worker_main,
                daemon=True,
                name=f"rank{rank}",
                args=(rank, size, self._store.port, backend, theirs, trace_path, env or {}, list(sys.path)),
            )
            proc.start()
            theirs.close()
            self._conns.append(ours)
            self._procs.append(proc)

    def run(
        self,
        num_ranks: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout: float = DEFAULT_TIMEOUT_S,
        allow_death: bool = False,
    ) -> list[Any]:
        self._job_id += 1
        payload = _dumps((self._job_id, num_ranks, fn, args, timeout))
        for conn in self._conns[:num_ranks]:
            with contextlib.suppress(BrokenPipeError):  # shows as a dead rank below
                conn.send_bytes(payload)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < num_ranks:
            waiting = {self._conns[r]: r for r in range(num_ranks) if r not in results and r not in failures}
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting.values():
                    if failures:
                        results[rank] = None  # it waits for the rank that failed: not the cause
                    else:
                        failures[rank] = f"no answer within {timeout:.0f} s; its threads:\n{self._stack(rank)}"
                break
            for conn in ready:
                rank = waiting[conn]
                try:
                    job_id, ok, value = pickle.loads(conn.recv_bytes())
                except (EOFError, ConnectionResetError, OSError):
                    self._procs[rank].join(5)
                    if allow_death:
                        results[rank] = Died(self._procs[rank].exitcode)
                    else:
                        failures[rank] = f"died with exit code {self._procs[rank].exitcode}:\n{self._trace(rank)}"
                    continue
                if job_id != self._job_id:
                    raise RankFailure(f"rank {rank} answered job {job_id} instead of {self._job_id}")
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
            if failures:  # the others may wait for the failed rank: a short grace, then they are killed
                deadline = min(deadline, time.monotonic() + 1.5)
        if failures:
            text = "\n".join(f"--- rank {r} of {num_ranks}: {failures[r]}" for r in sorted(failures))
            raise RankFailure(f"{getattr(fn, '__name__', fn)} failed on rank(s) {sorted(failures)}\n{text}")
        return [results[r] for r in range(num_ranks)]

    def _trace(self, rank: int) -> str:
        path = Path(self._dir.name) / f"rank{rank}.txt"
        return path.read_text()[-6000:] if path.exists() else ""

    def _stack(self, rank: int) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._procs[rank].pid, signal.SIGUSR1)
        time.sleep(0.3)
        return self._trace(rank)

    def close(self, graceful: bool = True) -> None:
        for conn in self._conns:
            if graceful:
                with contextlib.suppress(BrokenPipeError, OSError):
                    conn.send_bytes(pickle.dumps(None))
            conn.close()
        for proc in self._procs:
            if graceful:
                proc.join(5)
            if proc.is_alive():
                proc.kill()
                proc.join(5)
        self._dir.cleanup()


_pools: dict[tuple[str, ...], RankPool] = {}  # by backend, device and MPS daemon


def _mps_env() -> dict[str, str]:
    return {name: os.environ[name] for name in MPS_VARIABLES if name in os.environ}


def run_ranks(
    num_ranks: int, fn: Callable[..., Any], *args: Any, backend: str = "gloo", timeout: float = DEFAULT_TIMEOUT_S
) -> list[Any]:
    """Run `fn(ctx, *args)` on `num_ranks` ranks of the shared pool; results by rank.

    Raises RankFailure with the ranks' tracebacks. After a failure the pool is rebuilt, since its groups may be in the
    middle of an operation.
    """
    device = os.environ.get("DEEP_EP_TEST_DEVICE", "cpu")
    env = {"DEEP_EP_TEST_DEVICE": device, **_mps_env()}
    key = (backend, *env.values())
    pool = _pools.get(key)
    if pool is None or pool.size < num_ranks:
        if pool is not None:
            pool.close()
        pool = _pools[key] = RankPool(max(POOL_SIZE, num_ranks), backend, env)
    try:
        return pool.run(num_ranks, fn, *args, timeout=timeout)
    except BaseException:
        _pools.pop(key).close(graceful=False)
        raise


def spawn_fresh(
    num_ranks: int,
    fn: Callable[..., Any],
    *args: Any,
    backend: str = "gloo",
    timeout: float = 60.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Run `fn(ctx, *args)` in processes of its own; a rank that ends without answering yields `Died`."""
    pool = RankPool(num_ranks, backend, {**_mps_env(), **(env or {})})
    graceful = False
    try:
        results = pool.run(num_ranks, fn, *args, timeout=timeout, allow_death=True)
        graceful = not any(isinstance(r, Died) for r in results)
        return results
    finally:
        pool.close(graceful=graceful)


def shutdown() -> None:
    """End the shared pools."""
    while _pools:
        _pools.popitem()[1].close()


@contextlib.contextmanager
def mps_daemon(ranks_per_gpu: int) -> Iterator[dict[str, str] | str]:
    """An MPS daemon of our own, under which ranks that share a GPU run side by side, not in time slices.

    Yields the environment that ranks need, or why there is no daemon.
    """
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        yield "nvidia-cuda-mps-control is not installed"
        return
    with tempfile.TemporaryDirectory(prefix="deep_ep_mps_", ignore_cleanup_errors=True) as folder:
        env = {}
        for name in MPS_VARIABLES[:2]:
            env[name] = str(Path(folder) / name.split("_")[2].lower())
            Path(env[name]).mkdir()
        errors = Path(folder) / "errors.txt"
        with errors.open("w") as stream:  # a pipe would stay open as long as the daemon lives
            code = subprocess.run(
                [control, "-d"], env={**os.environ, **env}, stdout=stream, stderr=stream, timeout=30, check=False
            ).returncode
        if code != 0:
            yield f"nvidia-cuda-mps-control -d ended with {code}: {errors.read_text().strip()}"
            return
        try:
            yield {**env, MPS_VARIABLES[2]: str(max(1, 100 // ranks_per_gpu))}
        finally:
            shutdown()  # the daemon waits for its clients
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [control], input="quit -t 5\n", env={**os.environ, **env}, text=True, timeout=30, check=False,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Comparing


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Same shape, dtype and bytes (NaN patterns and signed zeros included)."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if got.numel() == 0:
        return True
    return torch.equal(raw_bytes(got), raw_bytes(want))


def expect_bits(got: Any, want: Any, what: str) -> None:
    """Raise AssertionError that shows the first difference unless `got` and `want` are bit-identical."""
    if isinstance(want, (tuple, list)) and any(isinstance(w, torch.Tensor) for w in want):
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            raise AssertionError(f"{what}: got {type(got).__name__}, expected {len(want)} tensors")
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            expect_bits(g, w, f"{what}[{i}]")
        return
    if not isinstance(want, torch.Tensor):
        if got != want or type(got) is not type(want):
            raise AssertionError(f"{what}: got {got!r}, expected {want!r}")
        return
    if not isinstance(got, torch.Tensor):
        raise AssertionError(f"{what}: got {got!r}, expected a tensor {tuple(want.shape)} {want.dtype}")
    if got.shape != want.shape or got.dtype != want.dtype:
        raise AssertionError(f"{what}: got {tuple(got.shape)} {got.dtype}, expected {tuple(want.shape)} {want.dtype}")
    if same_bits(got, want):
        return
    size = want.element_size()
    got_bytes, want_bytes = raw_bytes(got).view(-1, size), raw_bytes(want).view(-1, size)
    bad = (got_bytes != want_bytes).any(dim=1).nonzero().flatten()
    first = int(bad[0])
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), want.shape)) if want.dim() else ()
    raise AssertionError(
        f"{what}: {bad.numel()} of {want.numel()} elements differ; first at {where}: "
        f"got {got.detach().cpu().reshape(-1)[first].item()!r} (bytes {got_bytes[first].tolist()}), "
        f"expected {want.reshape(-1)[first].item()!r} (bytes {want_bytes[first].tolist()})"
    )
