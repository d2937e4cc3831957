"""The tuning command: settings, the choice, reports, and the measurements themselves."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from harness import RankContext, spawn_fresh

from deep_ep import Config, tuning
from deep_ep.__main__ import main
from deep_ep.errors import ConfigError
from deep_ep.train.launch import World, launch
from deep_ep.train.report import Silent
from deep_ep.tune import choose, clocks, measure, report, session
from deep_ep.tune.measure import Sweep, Workload, WrongResult, total_rounds
from deep_ep.tune.settings import TuneConfig

TINY = TuneConfig(
    ranks=2, sms=(4, 8), tokens=16, hidden=128, topk=2, experts=6, rounds=2, iterations=3, seconds=2.0,
    gemm=(32, 32, 32), device="cpu", command="python -m deep_ep tune",
)  # fmt: skip
VARIANTS = [
    "fp8_dispatch_cached", "fp8_dispatch_uncached", "bf16_dispatch_cached", "bf16_dispatch_uncached",
    "combine_symmetric", "combine_ordinary",
]  # fmt: skip

# ----------------------------------------------------------------------------------------------------
# Settings


BAD_FLAGS = [
    (["--ranks=0"], "--ranks is 0: expected an integer of at least 1"),
    (["--sms=4,7"], "--sms is [4, 7]: expected even numbers from 2 to"),
    (["--sms=0"], "--sms is [0]"),
    (["--sms=300"], "--sms is [300]"),
    (["--hidden=100"], "--hidden is 100: expected a multiple of 128"),
    (["--hidden=100", "--dtype=bf16"], "--hidden is 100: expected a multiple of 8"),
    (["--topk=9", "--experts=8"], "--topk is 9: expected at most 32, and at most the experts (8)"),
    (["--experts=8", "--ranks=9"], "--experts is 8: expected at least one a rank (9)"),
    (["--tokens=0"], "--tokens is 0"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=lambda value: " ".join(value)[:30])
def test_bad_settings_end_with_a_message(flags, message, capsys):
    assert main(["tune", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--ranks=many"], ["--dtype=fp4"], ["--sms=8,x"], ["--sms="], ["--unknown"]])
def test_flags_that_argparse_refuses(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", *flags])
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_there_is_nothing_to_tune(capsys):
    assert main(["tune"]) == 2
    assert "nothing to tune: torch finds no usable GPU" in capsys.readouterr().err


def test_a_file_in_the_way_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / tuning.TABLE_NAME).write_text("my notes")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["tune", f"--out={tmp_path}"]) == 2
    assert f"{tmp_path / tuning.TABLE_NAME} cannot be read" in capsys.readouterr().err


def test_settings():
    config = TuneConfig(2, sms=(16, 8, 8)).validate()
    assert config.sms == (8, 16)
    assert config.reference_sms not in config.sms
    assert config.dtypes == ("fp8", "bf16")
    assert TuneConfig(2, dtype="bf16").dtypes == ("bf16",)


# ----------------------------------------------------------------------------------------------------
# The choice, and what is shown


def figure(key: str, operation: str, dtype: str, num_sms: int, step_us: float, calls: int = 10) -> dict[str, Any]:
    times = {"median_us": 100.0, "min_us": 99.0, "p25_us": 99.5, "p75_us": 101.0}
    return {
        "key": key, "name": f"{key} [x]", "operation": operation, "dtype": dtype, "num_sms": num_sms, "calls": calls,
        "bytes_over_link": 10**6, "gb_s": 10.0 * num_sms, "alone": times, "gemms": 3, "gemms_alone": times,
        "gemms_beside": times, "gemm_slowdown": 0.01 * num_sms, "step": {**times, "median_us": step_us * calls},
    }  # fmt: skip


def curve(key: str, operation: str, dtype: str, steps: dict[int, float]) -> list[dict[str, Any]]:
    return [figure(key, operation, dtype, num_sms, step_us) for num_sms, step_us in steps.items()]


@pytest.mark.parametrize(
    ("steps", "want", "best"),
    [
        ({4: 200.0, 8: 102.9, 12: 101.0, 16: 100.0, 24: 104.0}, 8, 16),
        ({4: 200.0, 8: 103.1, 12: 102.0, 16: 100.0, 24: 104.0}, 12, 16),
        ({4: 100.0, 8: 101.0}, 4, 4),
        ({4: 100.0, 8: 100.0}, 4, 4),
        ({8: 100.0, 16: 90.0}, 16, 16),
        ({6: 1.0}, 6, 6),
    ],
)
def test_the_smallest_budget_within_three_percent(steps, want, best):
    pick = choose.choose(curve("d", "dispatch", "fp8", steps), "dispatch", "fp8")
    assert (pick["num_sms"], pick["best_num_sms"]) == (want, best)
    assert (pick["step_us"], pick["best_step_us"]) == (steps[want], steps[best])


def test_variants_of_an_operation_are_judged_together():
    figures = curve("cached", "dispatch", "fp8", {4: 100.0, 8: 99.0}) + curve(
        "uncached", "dispatch", "fp8", {4: 140.0, 8: 101.0}
    )
    assert choose.choose(figures, "dispatch", "fp8")["num_sms"] == 8
    # Twice the calls in one measurement are the same step.
    doubled = [{**item, "calls": 20, "step": {"median_us": 2 * item["step"]["median_us"]}} for item in figures]
    assert choose.choose(doubled, "dispatch", "fp8") == choose.choose(figures, "dispatch", "fp8")
    with pytest.raises(ConfigError, match="nothing was measured of combine in fp8"):
        choose.choose(figures, "combine", "fp8")


def test_a_budget_that_is_slow_alone_is_passed_over():
    """Beside GEMMs the host may hide what a budget costs; a program that does not overlap would pay for it."""
    figures = curve("cached", "dispatch", "fp8", {4: 100.0, 8: 100.0, 12: 100.0})
    figures += curve("uncached", "dispatch", "fp8", {4: 100.0, 8: 100.0, 12: 100.0})
    for item, alone_us in zip(figures, (300.0, 120.0, 100.0, 400.0, 400.0, 400.0), strict=True):
        item["alone"] = {"median_us": alone_us}
    assert choose.choose(figures, "dispatch", "fp8")["num_sms"] == 8
    for item in figures[1:3]:
        item["step"] = {"median_us": 200.0 * item["calls"]}
    assert choose.choose(figures, "dispatch", "fp8")["num_sms"] == 4, "the step counts first"


def example_entries(shared: bool = False) -> list[dict[str, Any]]:
    figures = curve("fp8_dispatch", "dispatch", "fp8", {4: 100.0, 8: 90.0})
    figures += curve("bf16_dispatch", "dispatch", "bf16", {4: 100.0, 8: 99.0})
    figures += curve("combine_symmetric", "combine", "bf16", {4: 130.0, 8: 120.0})
    facts = {
        "gpu": "Stub 40", "capability": "9.0", "ranks": 2, "ranks_per_gpu": 2 if shared else 1, "shared": shared,
        "engine": "cuda", "shape": {"tokens": 8, "topk": 2, "experts": 4},
    }  # fmt: skip
    return choose.build_entries(figures, ("fp8", "bf16"), 256, facts)


def test_an_entry_for_each_dtype(tmp_path):
    entries = example_entries()
    path = tmp_path / "t.json"
    tuning.write_entries(path, entries)
    read = {entry.dtype: (entry.dispatch, entry.combine) for entry in tuning.read_entries(path)}
    assert read == {"fp8": (8, 8), "bf16": (4, 8)}
    assert [item["key"] for item in entries[0]["figures"]] == ["fp8_dispatch"] * 2 + ["combine_symmetric"] * 2


def test_the_table_shows_every_figure_once_and_marks_the_choice():
    head, *lines = report.rows(example_entries())
    assert head[:2] == ("call", "SMs")
    assert [(line[0].split(" ")[0], line[1]) for line in lines if line[-1] == "chosen"] == [
        ("bf16_dispatch", "4"), ("fp8_dispatch", "8"), ("combine_symmetric", "8"),
    ]  # fmt: skip
    assert len(lines) == 6
    assert lines[-1][2:7] == ("100.0 (99.5-101.0)", "80", "120.0", "+0.0%", "+8.0%")
    assert "fp8: dispatch 8 SMs" in report.budgets(example_entries())
    assert "2 ranks a GPU" in report.title(example_entries(shared=True)[0])


@pytest.mark.parametrize("rich", [True, False])
def test_show(rich, monkeypatch, capsys):
    if rich:
        pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: rich, raising=False)
    report.show(example_entries())
    shown = capsys.readouterr().out
    assert "Stub 40" in shown
    assert "bf16: dispatch 4 SMs" in shown


def test_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert report.draw(example_entries(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for missing in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, missing, None)
    assert report.draw(example_entries(), tmp_path / "b.png") is False
    assert not (tmp_path / "b.png").exists()


# ----------------------------------------------------------------------------------------------------
# Measurements, on the CPU


def test_clock_and_summary():
    clock = clocks.Clock(torch.device("cpu"))
    start = clock.mark()
    time.sleep(0.01)
    assert 10_000 <= clock.microseconds(start, clock.mark()) < 5_000_000
    assert clocks.summary([3.0, 1.0, 2.0]) == {"median_us": 2.0, "min_us": 1.0, "p25_us": 1.5, "p75_us": 2.5}
    assert clocks.summary([1.0])["p75_us"] == 1.0


def test_the_gemm_is_a_product_of_random_numbers():
    gemm = clocks.Gemm((8, 16, 32), torch.device("cpu"), 3)
    gemm.run(2)
    assert gemm._out.shape == (8, 16)
    assert torch.equal(gemm._out, gemm._lhs @ gemm._rhs)
    assert (gemm._out != 0).all()


def world_of(ctx: RankContext) -> World:
    return World(ctx.rank, ctx.num_ranks, torch.device("cpu"), ctx.group)


class Counting(Silent):
    """Counts how often it was told of progress."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def update(self, step: int, fields: dict[str, str]) -> None:
        self.steps.append(step)


def run_measure(ctx: RankContext) -> Any:
    progress = Counting()
    result = measure.measure(TINY, world_of(ctx), progress)
    assert progress.steps == list(range(1, total_rounds(TINY) + 1))
    return result


def test_every_variant_is_measured_at_every_budget(run_ranks):
    first, second = run_ranks(2, run_measure)
    assert first == second, "all ranks judge the same figures"
    assert first["engine"] == "portable"
    figures = first["figures"]
    assert [(item["key"], item["num_sms"]) for item in figures] == [(key, sms) for key in VARIANTS for sms in TINY.sms]
    for item in figures:
        assert 1 <= item["calls"] <= TINY.iterations
        assert item["gemms"] >= 1
        for key in ("alone", "step", "gemms_alone", "gemms_beside"):
            assert 0 < item[key]["min_us"] <= item[key]["p25_us"] <= item[key]["median_us"] <= item[key]["p75_us"]
        assert item["step"]["min_us"] >= item["gemms_beside"]["min_us"]
        assert item["gb_s"] == pytest.approx(item["bytes_over_link"] / item["alone"]["median_us"] / 1e3, abs=0.01)
    of = {item["key"]: item["bytes_over_link"] for item in figures}
    rows = of["bf16_dispatch_cached"] // 256
    assert 0 < rows <= TINY.tokens
    assert of["combine_ordinary"] == of["combine_symmetric"] == of["bf16_dispatch_cached"]
    assert of["fp8_dispatch_cached"] == rows * (128 + 4)
    assert of["fp8_dispatch_uncached"] == rows * (128 + 4 + TINY.topk * 12 + 4)


def run_budget_that_changes_bits(ctx: RankContext) -> str:
    workload = Workload(TINY, world_of(ctx))
    try:
        sweep = Sweep(workload, world_of(ctx))
        variant = workload.variants()[0]

        def call(config: Config) -> Any:
            rows, *rest = variant.call(config)
            if config.num_sms == 8:
                rows = rows.clone()
                rows.view(torch.uint8)[-1, -1] ^= 1
            return [rows, *rest]

        sweep.check(variant)
        with pytest.raises(WrongResult) as failure:
            sweep.check(measure.Variant(variant.key, variant.name, "dispatch", "fp8", 1, call))
        return str(failure.value)
    finally:
        workload.buffer.destroy()


def test_a_budget_that_changes_bits_is_an_error(run_ranks):
    for rank, message in enumerate(run_ranks(2, run_budget_that_changes_bits)):
        assert message == f"FP8 dispatch, cached: the result on 8 SMs differs from that on 10 (rank {rank})"


def run_slowest(ctx: RankContext) -> list[float]:
    return clocks.slowest(world_of(ctx), [float(ctx.rank), 10.0 - ctx.rank])


def test_the_slowest_rank_counts(run_ranks):
    assert run_ranks(3, run_slowest) == [[2.0, 10.0]] * 3


def test_a_group_without_kernels_has_nothing_to_tune(run_ranks):
    for message in run_ranks(2, run_portable):
        assert "the portable engine serves this group" in message


def run_portable(ctx: RankContext) -> str:
    with pytest.raises(ConfigError) as failure:
        measure.measure(dataclasses.replace(TINY, device="cuda"), world_of(ctx), Silent())
    return str(failure.value)


def test_a_whole_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(harness.REPO_ROOT), str(harness.TESTS_DIR)]))
    config = dataclasses.replace(TINY, rounds=1, iterations=2, out=str(tmp_path / "out"))
    launch(functools.partial(session.run_tuning, config), 2, "cpu")
    shown = capfd.readouterr().out
    assert "ranks shared a GPU" in shown
    assert "combine" in shown
    table = json.loads((tmp_path / "out" / tuning.TABLE_NAME).read_text())
    assert list(table["entries"]) == [
        f"cpu | 2 ranks | hidden 128 | {dtype} | 2 ranks a GPU" for dtype in ("fp8", "bf16")
    ]
    for entry in table["entries"].values():
        assert entry["versions"]["torch"] == torch.__version__
        assert entry["command"] == TINY.command
        assert entry["shared"] is True
        assert {item["num_sms"] for item in entry["figures"]} == set(TINY.sms)
        assert entry["dispatch"]["num_sms"] in TINY.sms
    path = str(tmp_path / "out" / tuning.TABLE_NAME)
    cpu = tuning.Gpu("cpu", "0.0")
    assert tuning.tuned_num_sms("dispatch", cpu, 2, ranks_per_gpu=2, table=path) is None, "no kernels were measured"


# ----------------------------------------------------------------------------------------------------
# On GPUs


def run_on_gpu(ctx: RankContext, out: str) -> Any:
    config = TuneConfig(
        ranks=ctx.num_ranks, sms=(4, 16), tokens=256, hidden=1024, topk=4, experts=16, rounds=2, iterations=5,
        seconds=5.0, gemm=(1024, 1024, 512), out=out,
    ).validate()  # fmt: skip
    session.run_tuning(config, World(ctx.rank, ctx.num_ranks, ctx.device, ctx.group))
    gpu = tuning.gpu_of(ctx.device)
    assert gpu is not None
    path = str(Path(out) / tuning.TABLE_NAME)
    found = tuning.read_table(Path(path)) if ctx.rank == 0 else None
    picked = [
        tuning.tuned_num_sms(operation, gpu, ctx.num_ranks, 1024, dtype, table=path)
        for operation in ("dispatch", "combine")
        for dtype in ("fp8", "bf16")
    ] if ctx.rank == 0 else []  # fmt: skip
    return found, picked


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.gpu(2))]
)
def test_tuning_on_gpus(num_ranks, tmp_path):
    env = {"DEEP_EP_TEST_DEVICE": "cuda", "DEEP_EP_ENGINE": "cuda"}
    table, picked = spawn_fresh(num_ranks, run_on_gpu, str(tmp_path), timeout=120, env=env)[0]
    assert len(table["entries"]) == 2
    for entry in table["entries"].values():
        assert (entry["engine"], entry["shared"], entry["ranks"]) == ("cuda", False, num_ranks)
        assert len(entry["figures"]) == 2 * 4
    assert all(sms in (4, 16) for sms in picked)
