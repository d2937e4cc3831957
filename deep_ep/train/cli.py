"""`python -m deep_ep train`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

from deep_ep.errors import ConfigError, DeepEPError
from deep_ep.train import checkpoint
from deep_ep.train.config import DEVICES, PRECISIONS, TrainConfig, check_resumable, config_from_dict
from deep_ep.train.launch import launch, torchrun_ranks, under_torchrun
from deep_ep.train.report import summarize
from deep_ep.train.session import PLOT_NAME, RESULT_NAME, run_training

DESCRIPTION = """\
Train a byte-level transformer with mixture-of-experts layers on the source of Python's standard library.
Tokens travel between expert-parallel ranks through deep_ep.Buffer. Starts its own ranks, or joins those
that torchrun started. Writes train.json, curves.png and checkpoints under --out.
"""

_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("ranks", int, "expert-parallel ranks, processes on this host (under torchrun: as many as it started)"),
    ("steps", int, "optimizer steps"),
    ("seq", int, "bytes a sequence"),
    ("batch", int, "global batch in sequences, a multiple of the ranks"),
    ("hidden", int, "hidden size, a multiple of 16 and of twice the heads"),
    ("layers", int, "transformer layers"),
    ("dense-layers", int, "how many of the first layers are dense"),
    ("heads", int, "attention heads"),
    ("experts", int, "experts a layer, at least one a rank"),
    ("topk", int, "experts a token visits"),
    ("intermediate", int, "width of one expert"),
    ("lr", float, "peak learning rate"),
    ("warmup", int, "steps of linear warm-up, before a cosine down to a tenth"),
    ("weight-decay", float, "decay of matrices"),
    ("clip", float, "largest global gradient norm"),
    ("bias-update-rate", float, "how fast the router's balancing bias follows the expert load"),
    ("seed", int, "seed of the weights and of the batches"),
    ("corpus-bytes", int, "most bytes of text to read"),
    ("val-every", int, "steps between validations"),
    ("val-batches", int, "size of the fixed validation set, in global batches"),
    ("checkpoint-every", int, "steps between checkpoints, 0 for one at the end only"),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `train` command."""
    parser = commands.add_parser(
        "train", help="train an MoE language model through deep_ep", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    defaults = TrainConfig()
    parser.add_argument("--precision", choices=PRECISIONS, help=f"of the MoE layers (default: {defaults.precision})")
    for flag, kind, text in _NUMBERS:
        default = getattr(defaults, flag.replace("-", "_"))
        parser.add_argument(
            f"--{flag}", type=kind, metavar="N" if kind is int else "X", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--device", choices=DEVICES, help=f"where ranks compute (default: {defaults.device}, a GPU if any)"
    )
    parser.add_argument("--out", metavar="DIR", help=f"where results go (default: {defaults.out})")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint under --out")
    parser.add_argument("--compare", action="store_true", help="train in fp8, then in bf16 from the same seed")
    parser.add_argument(
        "--demo", action="store_true",
        help="--compare with the default settings, and exit with an error unless the demo's checks hold",
    )  # fmt: skip
    parser.set_defaults(run=functools.partial(run, parser))


def build_config(given: dict[str, Any]) -> TrainConfig:
    """Settings from the flags that were given: over a checkpoint's with `resume`, else over the defaults.

    Raises:
        ConfigError: a value out of range, or one that does not fit the checkpoint to resume.
    """
    base = TrainConfig()
    saved = _saved_config(Path(given.get("out", base.out))) if given.get("resume") else None
    if under_torchrun():
        given = {"ranks": torchrun_ranks(), **given}
    if given.get("demo"):
        given = {**given, "compare": True}
    config = dataclasses.replace(saved or base, **given).validate()
    if saved is not None:
        check_resumable(saved, config)
    return config


def _saved_config(out: Path) -> TrainConfig:
    newest = [path for path in (checkpoint.latest(out / "checkpoint" / name) for name in PRECISIONS) if path]
    if not newest:
        raise ConfigError(f"--resume: {out} holds no checkpoint: train without --resume first or name another --out")
    saved = config_from_dict(checkpoint.read_meta(newest[0])["config"])
    return dataclasses.replace(saved, out=str(out))


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Train; returns the exit status: 0, 1 for a failed run or check, 2 for settings that cannot work."""
    given = {key: value for key, value in vars(arguments).items() if key not in ("run", "command")}
    try:
        config = build_config(given)
        reports = launch(functools.partial(run_training, config), config.ranks, config.device)
    except ConfigError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except DeepEPError as error:
        print(f"{parser.prog}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return report(Path(config.out)) if reports else 0


def report(out: Path) -> int:
    """Print what train.json says; 1 if one of its checks failed."""
    result = json.loads((out / RESULT_NAME).read_text())
    print(f"\n{summarize(result)}\n\nwrote {out / RESULT_NAME}", end="")
    print(f" and {out / PLOT_NAME}" if (out / PLOT_NAME).exists() else "", flush=True)
    return 0 if all(check["passed"] for check in result["checks"]) else 1
