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


@pytest.fixture(scope="session")
def mps_environment(_rank_pool_lifetime):
    """What ranks need to share GPUs through an MPS daemon of this test run, or why there is none."""
    with harness.mps_daemon(-(-harness.POOL_SIZE // torch.cuda.device_count())) as env:
        yield env


@pytest.fixture
def on_gpus(monkeypatch, request):
    """Call with the number of ranks: from then on the rank pool's processes use GPUs, through MPS where they crowd.

    One rank more than GPUs also works in time slices; beyond that the test is skipped without MPS.
    """

    def use(num_ranks: int) -> None:
        monkeypatch.setenv("DEEP_EP_TEST_DEVICE", "cuda")
        gpus = torch.cuda.device_count()
        if num_ranks <= gpus:
            return
        env = request.getfixturevalue("mps_environment")
        if isinstance(env, dict):
            for name, value in env.items():
                monkeypatch.setenv(name, value)
        elif not 2 <= gpus == num_ranks - 1:
            pytest.skip(f"{num_ranks} ranks on {gpus} GPU(s) need MPS: {env}")

    return use


@pytest.fixture
def run_ranks():
    """`run_ranks(num_ranks, fn, *args)`: see harness.run_ranks."""
    return harness.run_ranks


@pytest.fixture
def spawn_fresh():
    """`spawn_fresh(num_ranks, fn, *args)`: see harness.spawn_fresh."""
    return harness.spawn_fresh
