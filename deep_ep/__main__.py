"""`python -m deep_ep COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import cast

from deep_ep.doctor.cli import add_parser as add_doctor
from deep_ep.train.cli import add_parser as add_train
from deep_ep.tune.cli import add_parser as add_tune

COMMANDS = (add_train, add_doctor, add_tune)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; without one, print the help."""
    parser = argparse.ArgumentParser(
        prog="python -m deep_ep", description="Expert-parallel communication for MoE models."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    return cast("Callable[[argparse.Namespace], int]", arguments.run)(arguments)


if __name__ == "__main__":
    sys.exit(main())
