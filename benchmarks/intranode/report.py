"""The JSON of a run, and its table."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import deep_ep

ROOT = Path(__file__).resolve().parents[2]


def environment(args: argparse.Namespace) -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    driver = ""
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "num_devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "driver": driver or "none",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": args.commit or git.stdout.strip() or "none",
        "command": "python benchmarks/bench_intranode.py " + shlex.join(args.command),
        "versions": {
            "deep_ep": deep_ep.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "none",
            "python": platform.python_version(),
        },
    }


def build_result(
    args: argparse.Namespace,
    engine: str,
    figures: list[dict[str, Any]],
    skipped: list[str],
    limits: dict[str, Any],
    layout: dict[str, Any] | None = None,
    host: list[dict[str, Any]] | None = None,
    mps: str = "",
) -> dict[str, Any]:
    """The JSON: figures with their limits and ratios.

    Args:
        layout: `workload.measure_layout`.
        host: `workload.measure_host`.
        mps: "on", or why the ranks do not run under MPS.

    ``timings_meaningful``: every rank had kernels and its own GPU. ``shared``: ranks shared GPUs. A row is held
    against the copy engines (``limit_us``, ``ratio_to_limit``) and against the probe that moves the same rows at the
    same SMs (``probe_us``, ``ratio_to_probe``); None where there is no such limit.
    """
    facts = environment(args)
    probes = {(probe["key"], probe["num_sms"]): probe["median_us"] for probe in limits["probes"]}
    for figure in figures:
        limit = limits["copy_engine"].get(str(figure["bytes_over_link"]), {}).get("median_us")
        at_sms = probes.get((figure["probe"], figure["num_sms"]))
        for us, ratio, value in (("limit_us", "ratio_to_limit", limit), ("probe_us", "ratio_to_probe", at_sms)):
            figure[us] = value
            figure[ratio] = round(figure["median_us"] / value, 3) if value else None
    arguments = {key: value for key, value in vars(args).items() if key not in ("json", "command", "commit")}
    return {
        "benchmark": "bench_intranode",
        "engine": engine,
        **facts,
        "timings_meaningful": engine == "cuda" and args.ranks <= facts["num_devices"],
        "shared": args.ranks > facts["num_devices"],
        "mps": mps,
        "arguments": arguments,
        "limits": limits,
        "rows": figures,
        "layout": layout,
        "host": host or [],
        "skipped": skipped,
    }


def _or_dash(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_table(title: str, head: list[str], lines: list[list[str]]) -> None:
    if importlib.util.find_spec("rich") and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(title=title)
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 else "right")
        for line in lines:
            table.add_row(*line)
        Console().print(table)
        return
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    print(f"\n{title}")
    for line in [head, *lines]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells))


def print_result(result: dict[str, Any]) -> None:
    arguments = result["arguments"]
    title = (
        f"{arguments['ranks']} ranks on {result['num_devices']} x {result['device']}, engine {result['engine']}, "
        f"{arguments['tokens']} tokens a rank, hidden {arguments['hidden']}, top-{arguments['topk']} of "
        f"{arguments['experts']} experts; {arguments['rounds']} rounds of {arguments['iterations']} calls"
    )
    head = ["call", "SMs", "median us", "p25-p75", "min us", "ahead us", "MB", "GB/s"]
    head += ["limit us", "ratio", "engines us", "ratio"]
    keys = [figure["key"] for figure in result["rows"]]
    lines = [
        [
            figure["name"],
            str(figure["num_sms"]),
            f"{figure['median_us']:.1f}",
            f"{figure['p25_us']:.1f}-{figure['p75_us']:.1f}",
            f"{figure['min_us']:.1f}",
            _or_dash(figure["queued_us"], 1),
            f"{figure['bytes_over_link'] / 1e6:.1f}",
            f"{figure['gb_s']:.1f}",
            _or_dash(figure["probe_us"], 1),
            _or_dash(figure["ratio_to_probe"], 2),
            _or_dash(figure["limit_us"], 1),
            _or_dash(figure["ratio_to_limit"], 2),
        ]
        for figure in sorted(result["rows"], key=lambda figure: keys.index(figure["key"]))
    ]
    _print_table(title, head, lines)
    _print_limits(result["limits"])
    if result["layout"]:
        layout = result["layout"]
        print(f"layout of {layout['tokens']} x {layout['topk']}: {layout['median_us']:.1f} us")
    for figure in result["host"]:
        print(f"host time of a call, {figure['tokens']} tokens: {figure['name']}: {figure['median_us']:.1f} us")
    for remark in [result["limits"]["note"], *result["skipped"]]:
        if remark:
            print(remark)
    if not result["timings_meaningful"]:
        print("These timings are not meaningful: they want the cuda engine and a GPU for every rank.")


def _print_limits(limits: dict[str, Any]) -> None:
    if limits["probes"]:
        lines = [
            [
                probe["name"],
                str(probe["num_sms"]),
                f"{probe['median_us']:.1f}",
                f"{probe['p25_us']:.1f}-{probe['p75_us']:.1f}",
                f"{probe['gb_s']:.0f}",
                probe["shape"],
            ]
            for probe in limits["probes"]
        ]
        _print_table("Limits, both directions at once", ["rows", "SMs", "us", "p25-p75", "GB/s", "how"], lines)
    for num_bytes, limit in limits["copy_engine"].items():
        print(
            f"limit: copy engines, both directions, {int(num_bytes) / 1e6:.1f} MB: {limit['median_us']:.1f} us "
            f"({limit['p25_us']:.1f}-{limit['p75_us']:.1f}), {limit['gb_s']:.0f} GB/s each"
        )
    for num_bytes, limit in limits["flags"].items():
        what = f"{num_bytes} bytes and a flag" if int(num_bytes) else "a flag"
        print(f"limit: {what}, one way: {limit['median_us']:.2f} us")
    local = limits["local_copy"]
    if local:
        print(f"limit: copy within one GPU, {local['bytes'] >> 20} MiB: {local['gb_s']:.0f} GB/s")
