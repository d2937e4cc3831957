"""`python -m deep_ep doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys

DESCRIPTION = """\
Show what this machine offers to deep_ep: versions, GPUs and how they are linked, network cards, shared memory and
limits, which engine a group on this host gets and why, and what is worth changing. Works without a GPU. Exits with 1
if something makes the library unusable.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `doctor` command."""
    parser = commands.add_parser(
        "doctor", help="show what this machine offers, and what to change", description=DESCRIPTION
    )
    parser.add_argument(
        "--no-probe", action="store_true",
        help="do not measure the bandwidth between GPUs (takes device memory and some seconds)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON for machines, and nothing else")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns the exit status: 0, or 1 if the library cannot be used."""
    # Imported here: the other commands need none of it.
    from .collect import diagnose
    from .facts import to_json
    from .report import print_plain, print_rich

    report = diagnose(probe=not arguments.no_probe)
    if arguments.json:
        print(json.dumps(to_json(report), indent=2))
    elif sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        print_rich(report, sys.stdout)
    else:
        print_plain(report, sys.stdout)
    return 0 if report.usable else 1
