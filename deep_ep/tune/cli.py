"""`python -m deep_ep tune`."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from typing import Any

import torch

from deep_ep.errors import ConfigError, DeepEPError
from deep_ep.train.launch import launch, torchrun_ranks, under_torchrun
from deep_ep.tune.settings import DTYPE_CHOICES, TuneConfig

DESCRIPTION = """\
Find out how many SMs dispatch and combine need on this machine. Measures both at every budget, alone and beside GEMMs
that keep the rest of the GPU busy, and takes the smallest budget whose step is within 3 % of the best and whose calls
alone take no 25 % longer than the fastest. Writes the table that calls without a config then use (tuned.json in the
user's cache folder, or under --out) and a picture.
"""

_NUMBERS = (
    ("tokens", "tokens of a rank"),
    ("hidden", "hidden size"),
    ("topk", "experts a token visits"),
    ("experts", "experts of all ranks"),
    ("rounds", "rounds, of which medians are taken"),
    ("iterations", "most calls in one measurement"),
    ("seed", "seed of the data"),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `tune` command."""
    parser = commands.add_parser(
        "tune", help="find the SM budget of dispatch and combine on this machine", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    defaults = TuneConfig(1)
    parser.add_argument(
        "--ranks", type=int, metavar="N",
        help="ranks, processes on this host; more than GPUs share them (default: the GPUs, or what torchrun started)",
    )  # fmt: skip
    sms = ",".join(map(str, defaults.sms))
    parser.add_argument("--sms", type=_numbers, metavar="N,N,..", help=f"budgets, even numbers (default: {sms})")
    parser.add_argument(
        "--dtype", choices=DTYPE_CHOICES, help=f"of the rows that dispatch moves (default: {defaults.dtype})"
    )
    for name, text in _NUMBERS:
        parser.add_argument(
            f"--{name}", type=int, metavar="N", help=f"{text} (default: {getattr(defaults, name)})"
        )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where results go (default: the user's cache, used by calls)")
    parser.set_defaults(run=functools.partial(run, parser))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 8,16,24") from None


def build_config(given: dict[str, Any]) -> TuneConfig:
    """Settings from the flags that were given.

    Raises:
        ConfigError: a value out of range, or no GPU to tune.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = torchrun_ranks() if under_torchrun() else max(gpus, 1)
    config = TuneConfig(**{"ranks": ranks, **given}).validate()
    if not gpus:
        raise ConfigError("nothing to tune: torch finds no usable GPU here, and SM budgets mean nothing to a CPU")
    return config


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Tune; returns the exit status: 0, 1 for a failed run, 2 for settings that cannot work or nothing to tune."""
    from deep_ep.tune.session import run_tuning, table_path  # the other commands need none of it

    given = {key: value for key, value in vars(arguments).items() if key not in ("run", "command")}
    flags = [f"--{key} {shlex.quote(_text(value))}" for key, value in given.items()]
    try:
        config = build_config({**given, "command": " ".join(["python -m deep_ep tune", *flags])})
        table_path(config)  # refused now, not after the measurements
        launch(functools.partial(run_tuning, config), config.ranks, config.device)
    except ConfigError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except (DeepEPError, OSError) as error:
        print(f"{parser.prog}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
