"""From figures to budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deep_ep.errors import ConfigError
from deep_ep.tuning import OPERATIONS

#: How much longer than the best a step may take.
TOLERANCE = 0.03
#: How much longer than the best budget's calls may take with nothing beside them: not every program overlaps.
ALONE_TOLERANCE = 0.25


def choose(figures: Sequence[dict[str, Any]], operation: str, dtype: str) -> dict[str, Any]:
    """The smallest budget whose steps take at most 3 % longer than those of the best budget.

    Of those where no variant alone takes 25 % longer than at its fastest; if there are none, of all.

    What is compared is the sum of the median steps of the operation's variants, since a layer uses them all: dispatch
    runs uncached forward and cached backward, combine takes what experts computed and, backward, gradients. Combine
    sums bf16 rows whatever dtype was dispatched.

    Returns:
        num_sms, step_us of one call with its share of GEMMs, and best_num_sms with best_step_us for comparison.

    Raises:
        ConfigError: no figure is about this operation and dtype.
    """
    wanted = "bf16" if operation == "combine" else dtype
    steps: dict[int, float] = {}
    alone: dict[str, dict[int, float]] = {}  # by variant
    for figure in figures:
        if (figure["operation"], figure["dtype"]) == (operation, wanted):
            step_us = figure["step"]["median_us"] / figure["calls"]
            steps[figure["num_sms"]] = steps.get(figure["num_sms"], 0.0) + step_us
            alone.setdefault(figure["key"], {})[figure["num_sms"]] = figure["alone"]["median_us"]
    if not steps:
        raise ConfigError(f"nothing was measured of {operation} in {dtype}")
    best = min(steps, key=lambda sms: (steps[sms], sms))
    good = [sms for sms, step_us in steps.items() if step_us <= steps[best] * (1 + TOLERANCE)]
    slow = {
        sms
        for times in alone.values()
        for sms, time_us in times.items()
        if time_us > min(times.values()) * (1 + ALONE_TOLERANCE)
    }
    quick = [sms for sms in good if sms not in slow]
    chosen = min(quick or good)
    return {
        "num_sms": chosen,
        "step_us": round(steps[chosen], 2),
        "best_num_sms": best,
        "best_step_us": round(steps[best], 2),
    }


def figures_of(figures: Sequence[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """The figures that the budgets of a dtype rest on: dispatch in it, and combine."""
    return [figure for figure in figures if figure["operation"] == "combine" or figure["dtype"] == dtype]


def build_entries(
    figures: Sequence[dict[str, Any]], dtypes: Sequence[str], hidden: int, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Entries of a table, one for each dtype: the key, the chosen budgets, and all that was measured.

    Args:
        facts: gpu, capability, ranks, ranks_per_gpu, shared, engine and whatever else is to be kept.
    """
    entries = []
    for dtype in dtypes:
        budgets = {operation: choose(figures, operation, dtype) for operation in OPERATIONS}
        entries.append({**facts, "hidden": hidden, "dtype": dtype, **budgets, "figures": figures_of(figures, dtype)})
    return entries
