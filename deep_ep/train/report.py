"""What a run shows while it works: a progress bar on a terminal, plain lines anywhere else. Rank 0 only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from deep_ep.train.data import bits


class Progress(Protocol):
    """A bar or lines: `update` once a step, `message` for everything in between."""

    def update(self, step: int, fields: dict[str, str]) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """For ranks other than 0."""

    def update(self, step: int, fields: dict[str, str]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Lines:
    """A line for the first step, for the last and for about twenty in between."""

    def __init__(self, title: str, start: int, steps: int) -> None:
        self._title = title
        self._start = start
        self._steps = steps
        self._every = max(1, steps // 20)

    def update(self, step: int, fields: dict[str, str]) -> None:
        if step == self._start + 1 or step == self._steps or step % self._every == 0:
            shown = "  ".join(f"{name} {value}" for name, value in fields.items())
            self.message(f"[{self._title}] step {step}/{self._steps}  {shown}")

    def message(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


def _short(fields: dict[str, str]) -> str:
    """As many fields as stay readable beside a bar; lines show them all."""
    return "  ".join(f"{name} {value}" for name, value in list(fields.items())[:3])


class RichBar:
    """A bar of the `rich` package."""

    def __init__(self, title: str, start: int, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"), TimeRemainingColumn(),
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=steps, completed=start, shown="")
        self._bar.start()

    def update(self, step: int, fields: dict[str, str]) -> None:
        self._bar.update(self._task, completed=step, shown=_short(fields))

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


class TqdmBar:
    """A bar of the `tqdm` package."""

    def __init__(self, title: str, start: int, steps: int) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        self._bar: Any = tqdm(desc=title, total=steps, initial=start)

    def update(self, step: int, fields: dict[str, str]) -> None:
        self._bar.set_postfix_str(_short(fields), refresh=False)
        self._bar.update(step - self._bar.n)

    def message(self, text: str) -> None:
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()


def make_progress(title: str, start: int, steps: int, *, shown: bool = True) -> Progress:
    """A bar (`rich`, else `tqdm`) if standard output is a terminal, lines otherwise or without either."""
    if not shown:
        return Silent()
    if sys.stdout.isatty():
        for bar in (RichBar, TqdmBar):
            try:
                return bar(title, start, steps)
            except ImportError:
                continue
    return Lines(title, start, steps)


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def loss_text(nats: float) -> str:
    """A loss in both of its units."""
    return f"{nats:.4f} nats ({bits(nats):.4f} bits/byte)"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows of equal length as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


_SUMMARY: tuple[tuple[str, Callable[[dict[str, Any], float], str]], ...] = (
    ("train loss, nats (last tenth)", lambda run, _: f"{run['train_loss']:.4f}"),
    ("validation loss, nats", lambda run, _: f"{run['validation_loss']:.4f}"),
    ("validation loss, bits/byte", lambda run, _: f"{bits(run['validation_loss']):.4f}"),
    ("validation loss over the unigram's", lambda run, unigram: f"{run['validation_loss'] / unigram:.1%}"),
    ("tokens/s (median step)", lambda run, _: f"{run['tokens_per_s']:,.0f}"),
    ("seconds of training steps", lambda run, _: f"{run['seconds']:.1f}"),
    ("expert load, max / mean, worst layer", lambda run, _: f"{run['load_max']:.2f}"),
    ("expert load, min / mean, worst layer", lambda run, _: f"{run['load_min']:.2f}"),
    ("dispatched a step", lambda run, _: megabytes(run["dispatch_bytes"] / run["steps"])),
    ("  had it been bf16", lambda run, _: megabytes(run["dispatch_bytes_bf16"] / run["steps"])),
    ("combined a step", lambda run, _: megabytes(run["combine_bytes"] / run["steps"])),
    ("dispatched in all steps", lambda run, _: megabytes(run["dispatch_bytes"])),
    ("  had it been bf16", lambda run, _: megabytes(run["dispatch_bytes_bf16"])),
    ("combined in all steps", lambda run, _: megabytes(run["combine_bytes"])),
)


def summarize(result: dict[str, Any]) -> str:
    """The closing text of a run, from what stands in train.json."""
    unigram = result["unigram"]
    lines = [
        f"validation text   unigram cross-entropy under the training text's byte frequencies "
        f"{loss_text(unigram['cross_entropy'])}",
        f"                  its own byte entropy {loss_text(unigram['entropy'])}",
    ]
    runs = {name: run["summary"] for name, run in result["runs"].items()}
    rows: list[tuple[str, ...]] = [("", *runs)]
    for label, show in _SUMMARY:
        rows.append((label, *(show(final, unigram["cross_entropy"]) for final in runs.values())))
    lines += ["", table(rows)]
    for name, run in result["runs"].items():
        for buffer in run["buffers"]:
            launches = ", ".join(f"{kernel} {count}" for kernel, count in sorted(buffer["kernel_launches"].items()))
            lines += ["", f"{name} on rank 0, launches by kernel: {launches}"] if launches else []
    comparison = result["comparison"]
    if comparison is not None:
        lines += [
            "",
            f"fp8 against bf16: validation loss differs by {comparison['relative_difference']:+.3%}",
        ]
    if result["checks"]:
        rows = [("check", "measured", "limit", "verdict")]
        for check in result["checks"]:
            rows.append((check["name"], check["measured"], check["limit"], "ok" if check["passed"] else "FAILED"))
        lines += ["", table(rows)]
    return "\n".join(lines)
