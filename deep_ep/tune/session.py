"""What every rank executes, and the files that rank 0 writes."""

from __future__ import annotations

import collections
import datetime
import platform
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import deep_ep
from deep_ep.train.launch import World
from deep_ep.train.report import make_progress
from deep_ep.tune import report
from deep_ep.tune.choose import TOLERANCE, build_entries
from deep_ep.tune.measure import measure, total_rounds
from deep_ep.tune.settings import TuneConfig
from deep_ep.tuning import TABLE_NAME, Gpu, gpu_of, read_table, user_folder, write_entries


def table_path(config: TuneConfig) -> Path:
    """The table to write: in the folder asked for, else in the user's cache, where lookups find it.

    Raises:
        ConfigError: it exists and is something else.
    """
    path = (Path(config.out) if config.out else user_folder()) / TABLE_NAME
    if path.exists():
        read_table(path)
    return path


def run_tuning(config: TuneConfig, world: World) -> None:
    """Measure and choose; rank 0 writes the table and the picture and prints both. Collective.

    Raises:
        ConfigError: the kernels are not used here, or the table's file is something else.
        WrongResult: an operation's result depends on its budget.
    """
    first = world.rank == 0
    progress = make_progress("tune", 0, total_rounds(config), shown=first)
    try:
        measured = measure(config, world, progress)
    finally:
        progress.close()
    entries = build_entries(measured["figures"], config.dtypes, config.hidden, facts(config, world, measured))
    if not first:
        return
    report.show(entries)
    path = table_path(config)
    write_entries(path, entries)
    print(f"\nwrote {path}", end="")
    picture = path.parent / f"tuned_{config.ranks}ranks_hidden{config.hidden}.png"
    print(f" and {picture}" if report.draw(entries, picture) else "; matplotlib is not installed, so no picture")
    if entries[0]["shared"]:
        print("ranks shared a GPU: only groups that share it likewise will use these budgets")
    elif not config.out:
        print("calls without a config use these budgets from now on")


def facts(config: TuneConfig, world: World, measured: dict[str, Any]) -> dict[str, Any]:
    """Key, machine and settings, the same for all entries of a run. Collective."""
    gpu = gpu_of(world.device) or Gpu("cpu", "0.0")
    places: list[Any] = [None] * world.size
    dist.all_gather_object(places, _place(world.device), group=world.group)
    sharing = max(collections.Counter(places).values())
    return {
        "gpu": gpu.name,
        "capability": gpu.capability,
        "ranks": world.size,
        "ranks_per_gpu": sharing,
        "shared": sharing > 1,
        "engine": measured["engine"],
        "shape": {"tokens": config.tokens, "topk": config.topk, "experts": config.experts},
        "rounds": config.rounds,
        "tolerance": TOLERANCE,
        "gemm": measured["gemm"],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": config.command,
        "versions": {
            "deep_ep": deep_ep.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "none",
            "python": platform.python_version(),
        },
    }


def _place(device: torch.device) -> tuple[str, str]:
    """Host and device of a rank; the UUID is the same whatever devices a process may see."""
    return platform.node(), str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
