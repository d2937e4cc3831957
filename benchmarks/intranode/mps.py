"""CUDA's multi-process service for a while, so that the kernels of ranks that share a GPU run side by side."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

CONTROL = "nvidia-cuda-mps-control"
_TIMEOUT_S = 30


@contextlib.contextmanager
def shared_gpus(ranks_per_gpu: int) -> Iterator[str]:
    """Start the daemon and set this process's environment, which the ranks inherit; yields "" or why there is none.

    Its pipes and logs lie in a temporary folder, so that a daemon of someone else is left alone. A rank gets its
    share of the SMs: ranks that wait for each other must all have room.
    """
    reason = ""
    if ranks_per_gpu < 2:
        reason = "every rank has a GPU of its own"
    elif shutil.which(CONTROL) is None:
        reason = f"{CONTROL} is not installed"
    if reason:
        yield reason
        return
    with tempfile.TemporaryDirectory(prefix="deep_ep_mps_", ignore_cleanup_errors=True) as folder:
        settings = {
            "CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe",
            "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log",
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(max(1, 100 // ranks_per_gpu)),
        }
        before = {name: os.environ.get(name) for name in settings}
        os.makedirs(settings["CUDA_MPS_PIPE_DIRECTORY"])
        os.makedirs(settings["CUDA_MPS_LOG_DIRECTORY"])
        os.environ.update(settings)
        started = _control(["-d"], "")
        try:
            if started:
                _restore(before)  # clients of a daemon that is not there would find no GPU
            yield started
        finally:
            if not started:
                _control([], "quit\n")
                _restore(before)


def _control(flags: list[str], text: str) -> str:
    """Run the daemon's program; "" or what went wrong."""
    try:
        done = subprocess.run(
            [CONTROL, *flags],
            input=text,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{CONTROL}: {error}"
    return f"{CONTROL} ended with {done.returncode}" if done.returncode else ""


def _restore(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
