"""The training command: settings, reports, and its behaviour as a program."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
import torch

from deep_ep.__main__ import main
from deep_ep.errors import ConfigError, PeerError
from deep_ep.train import report, session
from deep_ep.train.cli import build_config
from deep_ep.train.cli import report as report_result
from deep_ep.train.config import TrainConfig, check_resumable, config_from_dict
from deep_ep.train.data import load_corpus
from deep_ep.train.launch import World, launch
from deep_ep.train.loop import Trainer
from deep_ep.train.plots import draw

TINY = TrainConfig(
    ranks=2, steps=1000, seq=32, batch=4, hidden=64, layers=2, heads=2, experts=4, intermediate=64,
    val_batches=2, corpus_bytes=400_000, device="cpu",
)  # fmt: skip
TINY_FLAGS = [
    "--steps=3", "--seq=32", "--batch=4", "--hidden=64", "--layers=2", "--heads=2", "--experts=4",
    "--intermediate=64", "--val-batches=2", "--val-every=2", "--corpus-bytes=400000", "--device=cpu",
]  # fmt: skip
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.REPO_ROOT), "MPLBACKEND": "Agg"}

# ----------------------------------------------------------------------------------------------------
# Settings and reports


BAD_FLAGS = [
    (["--ranks=3", "--batch=16"], "--batch is 16: expected a multiple of the number of ranks (3)"),
    (["--ranks=0"], "--ranks is 0: expected an integer of at least 1"),
    (["--topk=9", "--experts=8"], "--topk is 9: expected at most the number of experts (8)"),
    (["--experts=2", "--ranks=4", "--topk=1"], "--experts is 2: expected at least the number of ranks (4)"),
    (["--hidden=100", "--heads=4"], "--hidden is 100: expected a multiple of"),
    (["--heads=3"], "--hidden is 128: expected a multiple of twice the heads (3)"),
    (["--lr=nan"], "--lr is nan: expected a finite number above 0"),
    (["--lr=0"], "--lr is 0.0: expected a finite number above 0"),
    (["--dense-layers=3", "--layers=3"], "--dense-layers is 3: expected fewer than"),
    (["--steps=-1"], "--steps is -1: expected an integer of at least 1"),
    (["--resume", "--out=/nonexistent-run"], "--resume: /nonexistent-run holds no checkpoint"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=lambda value: " ".join(value)[:30])
def test_bad_settings_end_with_a_message(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--ranks=many"], ["--precision=fp4"], ["--device=tpu"], ["--unknown"]])
def test_flags_that_argparse_refuses(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags])
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_missing_gpu_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--device", "cuda"]) == 2
    assert "no usable GPU" in capsys.readouterr().err


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "train" in capsys.readouterr().out


def test_demo_is_the_defaults_compared_and_flags_go_over_it() -> None:
    config = build_config({"demo": True, "steps": 7})
    assert config == dataclasses.replace(TrainConfig(), demo=True, compare=True, steps=7)
    assert config.precisions == ("fp8", "bf16")
    assert TrainConfig(precision="bf16").precisions == ("bf16",)


def test_saved_settings_round_trip_and_unknown_ones_are_refused() -> None:
    assert config_from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    with pytest.raises(ConfigError, match="colour"):
        config_from_dict({"colour": "red"})
    check_resumable(TINY, dataclasses.replace(TINY, ranks=4, steps=100))


def fake_result(fp8: float, bf16: float, sent: int) -> dict[str, object]:
    def run(loss: float, sent: int) -> dict[str, object]:
        summary = {
            "steps": 1, "train_loss": loss, "validation_loss": loss, "tokens_per_s": 1.0, "seconds": 1.0,
            "load_max": 1.0, "load_min": 1.0, "dispatch_bytes": sent, "dispatch_bytes_bf16": 256, "combine_bytes": 256,
        }  # fmt: skip
        return {"summary": summary, "buffers": [{"kernel_launches": {}}]}

    runs = {"fp8": run(fp8, sent), "bf16": run(bf16, 256)}
    unigram_values = {"cross_entropy": 3.0, "entropy": 3.0}
    result: dict[str, object] = {"runs": runs, "unigram": unigram_values, "comparison": session.compare(runs)}
    result["checks"] = session.demo_checks(TrainConfig(hidden=128, demo=True), result)
    return result


@pytest.mark.parametrize(
    ("fp8", "bf16", "sent", "failed"),
    [(2.0, 2.0, 132, 0), (2.0, 2.05, 132, 1), (2.2, 2.2, 132, 2), (2.0, 2.0, 256, 1)],
    ids=["passes", "too far apart", "too high", "not FP8"],
)
def test_demo_checks_decide_the_exit_status(
    fp8: float, bf16: float, sent: int, failed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / session.RESULT_NAME).write_text(json.dumps(fake_result(fp8, bf16, sent)))
    assert report_result(tmp_path) == (1 if failed else 0)
    assert capsys.readouterr().out.count("FAILED") == failed


def test_progress_without_a_terminal_or_packages_is_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(report.make_progress("run", 0, 100), report.Lines)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for missing in ("rich", "rich.progress", "tqdm"):
        monkeypatch.setitem(sys.modules, missing, None)
    lines = report.make_progress("run", 0, 100)
    assert isinstance(lines, report.Lines)
    for step in range(1, 101):
        lines.update(step, {"loss": "1.0"})
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 21
    assert shown[-1] == "[run] step 100/100  loss 1.0"


@pytest.mark.parametrize("package", ["rich", "tqdm"])
def test_progress_bars_show_every_step(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    bar = (report.RichBar if package == "rich" else report.TqdmBar)("run", 2, 4)
    for step in (3, 4):
        bar.update(step, {"loss": "[1.0]"})
    bar.message("a [line] in between")
    bar.close()


def test_a_missing_matplotlib_only_costs_the_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for missing in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, missing, None)
    assert draw(fake_result(2.0, 2.0, 132), tmp_path / "curves.png") is False
    assert not (tmp_path / "curves.png").exists()


# ----------------------------------------------------------------------------------------------------
# As a program


def killed_while_training(world: World) -> None:
    trainer = Trainer(TINY, "fp8", world, load_corpus(TINY.corpus_bytes))
    while True:
        trainer.train_step()
        if world.rank == 1 and trainer.done == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def fails_on_rank_one(world: World) -> None:
    if world.rank == 1:
        raise ValueError("the disk is full")
    world.barrier()


@pytest.mark.parametrize(
    ("worker", "message"),
    [(killed_while_training, "rank 1 was killed by SIGKILL"), (fails_on_rank_one, "the disk is full")],
    ids=["killed", "raises"],
)
def test_a_rank_that_ends_ends_the_run(worker: object, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(PeerError, match=message):
        launch(worker, 2, "cpu")  # type: ignore[arg-type]
    assert time.monotonic() - began < 60


def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    flags = ["--ranks=2", *TINY_FLAGS, "--steps=100000", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "deep_ep", "train", *flags]
    env = {**ENV, "TMPDIR": str(tmp_path)}  # it cannot clean up after itself
    launcher = subprocess.Popen(command, env=env, cwd=harness.REPO_ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert launcher.stdout is not None
        assert any("step 1/" in line for line in launcher.stdout)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    finally:
        launcher.kill()
        launcher.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.1)


def run_command(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, *command]
    return subprocess.run(
        program, env={**ENV, **env}, cwd=harness.REPO_ROOT, capture_output=True, text=True, timeout=150
    )


def test_command_line_compares_checks_and_resumes(tmp_path: Path) -> None:
    flags = ["-m", "deep_ep", "train", "--ranks=2", "--demo", *TINY_FLAGS, f"--out={tmp_path}"]
    done = run_command(*flags)
    # Three steps cannot reach the demo's loss: the run works and says so.
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    result = json.loads((tmp_path / "train.json").read_text())
    assert result["config"]["ranks"] == result["environment"]["ranks"] == 2
    assert set(result["runs"]) == {"fp8", "bf16"}
    assert result["unigram"]["cross_entropy"] > result["unigram"]["entropy"] > 1.0
    assert f"{result['unigram']['cross_entropy']:.4f} nats" in done.stdout
    assert f"{result['corpus']['train_bytes']:,} bytes" in done.stdout
    for run in result["runs"].values():
        assert run["curves"]["step"] == [1, 2, 3]
        assert run["validation"]["step"] == [0, 2, 3]
        assert all(len(values) == 3 for values in run["curves"].values())
        assert run["summary"]["tokens"] == 3 * 4 * 32
        (buffer,) = run["buffers"]
        assert buffer["engine"] == result["environment"]["engine"] == "portable"
        assert buffer["traffic"]["dispatch_calls"] == buffer["traffic"]["combine_calls"] > 0
        assert buffer["kernel_launches"] == buffer["memory"] == {}
    if (tmp_path / "curves.png").exists():
        assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    else:
        assert "matplotlib is not installed" in done.stdout

    again = run_command("-m", "deep_ep", "train", "--resume", "--ranks=1", "--steps=4", f"--out={tmp_path}")
    assert "resumed after step 3" in again.stdout, again.stdout + again.stderr
    more = json.loads((tmp_path / "train.json").read_text())
    assert more["runs"]["fp8"]["curves"]["step"] == [1, 2, 3, 4]
    assert more["runs"]["fp8"]["curves"]["train_loss"][:3] == result["runs"]["fp8"]["curves"]["train_loss"]


def test_command_line_under_torchrun(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = run_command(*torchrun, "-m", "deep_ep", "train", *TINY_FLAGS, f"--out={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "train.json").read_text())
    assert result["environment"]["ranks"] == 2
    assert list(result["runs"]) == ["fp8"]
    assert done.stdout.count("standard library text") == 1


@pytest.mark.gpu(2)
def test_command_line_on_gpus_proves_its_kernels(tmp_path: Path) -> None:
    flags = ["--ranks=2", "--compare", *TINY_FLAGS, "--device=cuda", f"--out={tmp_path}"]
    done = run_command("-m", "deep_ep", "train", *flags, DEEP_EP_ENGINE="cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "train.json").read_text())
    assert result["environment"]["engine"] == "cuda"
    for precision, rows in (("fp8", "dispatch_rows_fp8"), ("bf16", "dispatch_rows")):
        (buffer,) = result["runs"][precision]["buffers"]
        launches, traffic = buffer["kernel_launches"], buffer["traffic"]
        assert buffer["engine"] == "cuda"
        assert launches[rows] >= traffic["dispatch_calls"] > 0
        assert launches["combine_rows"] == traffic["combine_calls"] > 0
        assert buffer["memory"]["mapped_bytes"] > 0
        assert f"{rows} {launches[rows]}" in done.stdout
