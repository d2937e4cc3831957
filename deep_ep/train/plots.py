"""Curves of train.json as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(result: dict[str, Any], path: Path) -> bool:
    """Write a PNG of the loss, expert load and traffic curves; False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, load, traffic = figure.subplots(1, 3)
    for number, (name, run) in enumerate(result["runs"].items()):
        color = f"C{number}"
        curves, validation = run["curves"], run["validation"]
        steps = curves["step"]
        loss.plot(steps, curves["train_loss"], color=color, alpha=0.4, linewidth=1, label=f"{name} train")
        loss.plot(validation["step"], validation["loss"], color=color, marker="o", label=f"{name} validation")
        load.plot(steps, curves["load_max"], color=color, label=f"{name} max / mean")
        load.plot(steps, curves["load_min"], color=color, linestyle=":", label=f"{name} min / mean")
        for key, style in (("dispatch_bytes", "-"), ("combine_bytes", ":")):
            megabytes = [count / 1e6 for count in curves[key]]
            traffic.plot(steps, megabytes, style, color=color, label=f"{name} {key.split('_')[0]}")
        if name == "fp8":
            megabytes = [count / 1e6 for count in curves["dispatch_bytes_bf16"]]
            traffic.plot(steps, megabytes, "--", color="gray", label="fp8 dispatch, had it been bf16")
    loss.axhline(result["unigram"]["cross_entropy"], color="black", linestyle="--", linewidth=1, label="unigram")
    loss.set(title="Loss", xlabel="step", ylabel="nats a byte")
    load.axhline(1.0, color="black", linestyle="--", linewidth=1)
    load.set(title="Expert load, worst layer", xlabel="step", ylabel="tokens over the mean of all experts")
    traffic.set(title="Bytes sent by all ranks", xlabel="step", ylabel="MB a step")
    traffic.set_ylim(bottom=0)
    for axes in (loss, load, traffic):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    return True
