"""Shared pytest set-up: the rank pool's lifetime, the `gpu` marker, the hypothesis profile."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness

try:
    import hypothesis
except ImportError:
    hypothesis = None

if hypothesis is not None:
    # The same examples in every run: a red test stays red, and the time is bounded by the number of examples.
    hypothesis.settings.register_profile(
        "deep_ep",
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("deep_ep")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu(count=1): needs that many CUDA devices; skipped elsewhere")


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    needed = marker.args[0] if marker.args else marker.kwargs.get("count", 1)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < needed:
        pytest.skip(f"needs {needed} CUDA device(s), found {found}")


@pytest.fixture(scope="session", autouse=True)
def _rank_pool_lifetime():
    yield
    harness.shutdown()


@pytest.fixture
def run_ranks():
    """`run_ranks(num_ranks, fn, *args)`: see harness.run_ranks."""
    return harness.run_ranks


@pytest.fixture
def spawn_fresh():
    """`spawn_fresh(num_ranks, fn, *args)`: see harness.spawn_fresh."""
    return harness.spawn_fresh
