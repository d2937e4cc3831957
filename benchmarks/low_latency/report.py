"""The JSON of a run, and its table."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from intranode.report import environment


def floor_us(figure: dict[str, Any], floors: dict[str, Any]) -> float | None:
    """Flags, one for each trip, and the bytes at the rate of the link; None where these were not measured."""
    if floors["link"] is None:
        return None
    flags = figure["trips"] * floors["flags"]["0"]["median_us"]
    return round(flags + figure["bytes_over_link"] / floors["link"]["gb_s"] / 1e3, 2)


def build_result(
    args: argparse.Namespace,
    engine: str,
    figures: list[dict[str, Any]],
    host: list[dict[str, Any]],
    floors: dict[str, Any],
    memory: dict[str, int],
    mps: str = "",
) -> dict[str, Any]:
    """The JSON: figures with their floors and ratios.

    ``timings_meaningful``: every rank had kernels and its own GPU. ``memory``: bytes of symmetric memory of rank 0.
    """
    facts = environment(args)
    facts["command"] = "python benchmarks/bench_low_latency.py " + shlex.join(args.command)
    for figure in figures:
        floor = floor_us(figure, floors)
        figure["floor_us"] = floor
        figure["ratio_to_floor"] = round(figure["median_us"] / floor, 3) if floor else None
    arguments = {key: value for key, value in vars(args).items() if key not in ("json", "command", "commit")}
    return {
        "benchmark": "bench_low_latency",
        "engine": engine,
        **facts,
        "timings_meaningful": engine == "cuda" and args.ranks <= facts["num_devices"],
        "shared": args.ranks > facts["num_devices"],
        "mps": mps,
        "arguments": arguments,
        "floors": floors,
        "rows": figures,
        "host": host,
        "memory": memory,
    }


def _or_dash(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    print(f"\n{title}")
    for line in [head, *lines]:
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells))


def print_result(result: dict[str, Any]) -> None:
    arguments = result["arguments"]
    title = (
        f"{arguments['ranks']} ranks on {result['num_devices']} x {result['device']}, engine {result['engine']}, "
        f"hidden {arguments['hidden']}, top-{arguments['topk']} of {arguments['experts']} experts; "
        f"{arguments['rounds']} rounds of {arguments['iterations']} calls, {arguments['samples']} calls a rank for p50"
    )
    head = [
        "call",
        "rows",
        "tokens",
        "median us",
        "p25-p75",
        "p50 us",
        "p99 us",
        "called us",
        "KB",
        "floor us",
        "ratio",
    ]
    lines = [
        [
            figure["name"],
            figure["format"],
            str(figure["tokens"]),
            f"{figure['median_us']:.1f}",
            f"{figure['p25_us']:.1f}-{figure['p75_us']:.1f}",
            f"{figure['p50_us']:.1f}",
            f"{figure['p99_us']:.1f}",
            f"{figure['called_us']:.1f}",
            f"{figure['bytes_over_link'] / 1e3:.0f}",
            _or_dash(figure["floor_us"], 1),
            _or_dash(figure["ratio_to_floor"], 2),
        ]
        for figure in result["rows"]
    ]
    _print_table(title, head, lines)
    floors = result["floors"]
    for num_bytes, figure in floors["flags"].items():
        what = f"{num_bytes} bytes and a flag" if int(num_bytes) else "a flag"
        print(f"floor: {what}, one way: {figure['median_us']:.2f} us")
    if floors["link"]:
        print(f"floor: stores of 16 bytes to the peer, both directions: {floors['link']['gb_s']:.0f} GB/s each")
    for figure in result["host"]:
        print(f"host time of a call, {figure['format']}: {figure['name']}: {figure['median_us']:.1f} us")
    for name, size in result["memory"].items():
        print(f"symmetric memory: {name}: {size}")
    if floors["note"]:
        print(floors["note"])
    if not result["timings_meaningful"]:
        print("These timings are not meaningful: they want the cuda engine and a GPU for every rank.")
