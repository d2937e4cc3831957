"""What a run prints and draws."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deep_ep.train.report import table
from deep_ep.tuning import OPERATIONS

_HEAD = ("call", "SMs", "alone, us", "GB/s", "step, us", "to best", "GEMM slowdown", "")


def title(entry: dict[str, Any]) -> str:
    """One line about what was measured, and where."""
    shape = entry["shape"]
    shared = f" ({entry['ranks_per_gpu']} ranks a GPU)" if entry["shared"] else ""
    return (
        f"{entry['gpu']}, {entry['ranks']} ranks{shared}, {shape['tokens']} tokens a rank, hidden {entry['hidden']}, "
        f"top-{shape['topk']} of {shape['experts']} experts"
    )


def unique_figures(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of all entries, each once: combine stands in every entry."""
    found = {(figure["key"], figure["num_sms"]): figure for entry in entries for figure in entry["figures"]}
    return [found[key] for key in sorted(found, key=lambda key: (key[0].startswith("combine"), key))]


def rows(entries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table, its head first. The last cell marks budgets that were chosen."""
    figures = unique_figures(entries)
    best: dict[str, float] = {}
    for figure in figures:
        step_us = figure["step"]["median_us"]
        best[figure["key"]] = min(step_us, best.get(figure["key"], step_us))
    lines: list[tuple[str, ...]] = [_HEAD]
    for figure in figures:
        alone, step_us, calls = figure["alone"], figure["step"]["median_us"], figure["calls"]
        lines.append(
            (
                figure["name"],
                str(figure["num_sms"]),
                f"{alone['median_us']:.1f} ({alone['p25_us']:.1f}-{alone['p75_us']:.1f})",
                f"{figure['gb_s']:.0f}",
                f"{step_us / calls:.1f}",
                f"{step_us / best[figure['key']] - 1:+.1%}",
                f"{figure['gemm_slowdown']:+.1%}",
                "chosen" if figure["num_sms"] == _chosen(entries, figure) else "",
            )
        )
    return lines


def _chosen(entries: Sequence[dict[str, Any]], figure: dict[str, Any]) -> int:
    """The budget chosen for a figure's operation and dtype."""
    own = [entry for entry in entries if entry["dtype"] == figure["dtype"]] or entries
    return int(own[0][figure["operation"]]["num_sms"])


def budgets(entries: Sequence[dict[str, Any]]) -> str:
    """The result in a few words for each dtype."""
    lines = []
    for entry in entries:
        parts = []
        for operation in OPERATIONS:
            pick = entry[operation]
            parts.append(
                f"{operation} {pick['num_sms']} SMs (step {pick['step_us']:.1f} us; best {pick['best_step_us']:.1f} us "
                f"on {pick['best_num_sms']})"
            )
        lines.append(f"{entry['dtype']}: {', '.join(parts)}")
    return "\n".join(lines)


def show(entries: Sequence[dict[str, Any]]) -> None:
    """Print the table and the result: by `rich` on a terminal, as plain text elsewhere or without it."""
    lines = rows(entries)
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        shown = Table(title=title(entries[0]))
        for number, name in enumerate(_HEAD):
            shown.add_column(name, justify="left" if number in (0, len(_HEAD) - 1) else "right")
        for line in lines[1:]:
            shown.add_row(*line, style="bold green" if line[-1] else None)
        Console().print(shown)
    else:
        print(f"\n{title(entries[0])}\n\n{table(lines)}")
    print(f"\n{budgets(entries)}", flush=True)


def draw(entries: Sequence[dict[str, Any]], path: Path) -> bool:
    """Write a PNG of bandwidth and GEMM slowdown against SMs; False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    picture = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(picture)
    bandwidth, slowdown = picture.subplots(1, 2)
    figures = unique_figures(entries)
    for number, key in enumerate(dict.fromkeys(figure["key"] for figure in figures)):
        line = [figure for figure in figures if figure["key"] == key]
        sms = [figure["num_sms"] for figure in line]
        style: dict[str, Any] = {"color": f"C{number}", "label": line[0]["name"], "marker": "o", "markersize": 3}
        mark = next(index for index, figure in enumerate(line) if figure["num_sms"] == _chosen(entries, figure))
        for axes, values in (
            (bandwidth, [figure["gb_s"] for figure in line]),
            (slowdown, [100 * figure["gemm_slowdown"] for figure in line]),
        ):
            axes.plot(sms, values, **style)
            axes.plot(sms[mark], values[mark], color=f"C{number}", marker="o", markersize=11, fillstyle="none")
    bandwidth.set(title="Bandwidth, operation alone", xlabel="SMs", ylabel="GB/s of a rank")
    bandwidth.set_ylim(bottom=0)
    slowdown.set(title="GEMMs beside the operation (circles: chosen)", xlabel="SMs", ylabel="slowdown, %")
    for axes in (bandwidth, slowdown):
        axes.grid(alpha=0.3)
    bandwidth.legend(fontsize=8, loc="lower right")
    picture.suptitle(title(entries[0]), fontsize=10)
    picture.savefig(path, dpi=110)
    return True
