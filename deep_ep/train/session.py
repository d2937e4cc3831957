"""What every rank executes: the text, one or two runs, and the files that rank 0 writes."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deep_ep
from deep_ep.train.config import TrainConfig
from deep_ep.train.data import Batches, Corpus, load_corpus, unigram
from deep_ep.train.launch import World, cpu_count
from deep_ep.train.loop import Trainer
from deep_ep.train.optim import is_expert
from deep_ep.train.plots import draw
from deep_ep.train.report import Progress, make_progress, megabytes

RESULT_NAME = "train.json"
PLOT_NAME = "curves.png"

UNIGRAM_SHARE = 0.70  # the demo's validation loss must lie below this share of the unigram cross-entropy
PRECISION_LIMIT = 0.01  # and FP8 this close to bf16


def run_training(config: TrainConfig, world: World) -> None:
    """Train as `config` says; a collective call. Rank 0 writes train.json and curves.png under `config.out`.

    Raises:
        ConfigError: the text, the batch and the checkpoint do not fit the settings.
        TrainingDiverged: the loss stopped being finite.
    """
    first = world.rank == 0
    corpus = share_corpus(load_corpus(config.corpus_bytes) if first else None, world)
    if first:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        print(f"standard library text: {corpus.describe()}", flush=True)
    runs: dict[str, dict[str, Any]] = {}
    engine = ""
    for number, precision in enumerate(config.precisions):
        trainer = Trainer(config, precision, world, corpus)
        engine = trainer.buffers[0].engine
        try:
            resumed = config.resume and trainer.resume()
            if first and number == 0:
                print(describe(config, trainer, world), flush=True)
            progress = make_progress(precision, trainer.done, config.steps, shown=first)
            try:
                _announce(trainer, progress, resumed)
                trainer.run(progress)
            finally:
                progress.close()
            runs[precision] = trainer.result()
        finally:
            trainer.close()
    if first:
        write_result(config, environment(world, engine), corpus, runs)


def share_corpus(corpus: Corpus | None, world: World) -> Corpus:
    """Rank 0's corpus on every rank, so that hosts with different Python versions train on one text."""
    counts = ("train_files", "validation_files", "skipped_files")
    about = b"" if corpus is None else json.dumps({name: getattr(corpus, name) for name in counts}).encode()
    about = world.broadcast_bytes(about if corpus is not None else None)
    train, validation = (
        np.frombuffer(world.broadcast_bytes(split), dtype=np.uint8)
        for split in ((None, None) if corpus is None else (corpus.train.tobytes(), corpus.validation.tobytes()))
    )
    return Corpus(train, validation, **json.loads(about))


def describe(config: TrainConfig, trainer: Trainer, world: World) -> str:
    """The model and the run in a few lines."""
    replicated = sum(p.numel() for p in trainer.optimizer.named.values() if not is_expert(p))
    moe_layers = config.layers - config.dense_layers
    expert = 3 * config.hidden * config.intermediate
    total = replicated + moe_layers * config.experts * expert
    active = replicated + moe_layers * config.topk * expert
    return (
        f"model: {config.layers} layers ({moe_layers} MoE), hidden {config.hidden}, {config.experts} experts "
        f"of {config.intermediate}, top-{config.topk}, {total:,} weights ({active:,} active a token)\n"
        f"run: {world.size} ranks on {world.device.type} ({torch.get_num_threads()} threads each), engine "
        f"{trainer.buffers[0].engine}, {config.steps} steps of {config.batch} x {config.seq} bytes, "
        f"seed {config.seed}"
    )


def _announce(trainer: Trainer, progress: Progress, resumed: bool) -> None:
    if resumed:
        progress.message(f"[{trainer.precision}] resumed after step {trainer.done}")
    elif trainer.config.resume:
        progress.message(f"[{trainer.precision}] no checkpoint under {trainer.checkpoints}: starting anew")


def environment(world: World, engine: str) -> dict[str, Any]:
    """Versions and machine, for train.json."""
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return {
        "deep_ep": deep_ep.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": cpu_count(),
        "device": world.device.type,
        "gpu": gpu,
        "ranks": world.size,
        "engine": engine,
    }


def write_result(config: TrainConfig, machine: dict[str, Any], corpus: Corpus, runs: dict[str, dict[str, Any]]) -> None:
    """Write train.json and curves.png."""
    batches = Batches(
        corpus,
        seed=config.seed,
        batch=config.batch,
        seq=config.seq,
        val_batches=config.val_batches,
        rank=0,
        num_ranks=1,
    )
    result: dict[str, Any] = {
        "config": config.to_dict(),
        "environment": machine,
        "corpus": {
            "train_files": corpus.train_files, "train_bytes": len(corpus.train),
            "validation_files": corpus.validation_files, "validation_bytes": len(corpus.validation),
            "skipped_files": corpus.skipped_files, "sha256": corpus.digest,
        },
        "unigram": dataclasses.asdict(unigram(corpus.train, batches.validation_targets())),
        "runs": runs,
    }  # fmt: skip
    result["comparison"] = compare(runs)
    result["checks"] = demo_checks(config, result) if config.demo else []
    out = Path(config.out)
    aside = out / f".{RESULT_NAME}.partial"
    aside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(aside, out / RESULT_NAME)
    if not draw(result, out / PLOT_NAME):
        print(f"no {PLOT_NAME}: matplotlib is not installed (pip install matplotlib draws it)", flush=True)


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, float] | None:
    """How far FP8 ended from bf16, relative to bf16; None unless both ran."""
    if not {"fp8", "bf16"} <= set(runs):
        return None
    fp8, bf16 = (runs[name]["summary"]["validation_loss"] for name in ("fp8", "bf16"))
    return {"fp8": fp8, "bf16": bf16, "relative_difference": (fp8 - bf16) / bf16}


def demo_checks(config: TrainConfig, result: dict[str, Any]) -> list[dict[str, Any]]:
    """What the demo promises, each with what was measured."""
    checks = []
    reference = result["unigram"]["cross_entropy"]
    for name, run in result["runs"].items():
        loss = run["summary"]["validation_loss"]
        checks.append({
            "name": f"{name} validation loss against the unigram's", "measured": f"{loss / reference:.1%}",
            "limit": f"below {UNIGRAM_SHARE:.0%}", "passed": loss < UNIGRAM_SHARE * reference,
        })  # fmt: skip
    if result["comparison"] is not None:
        difference = result["comparison"]["relative_difference"]
        checks.append({
            "name": "fp8 against bf16, validation loss", "measured": f"{difference:+.3%}",
            "limit": f"within {PRECISION_LIMIT:.0%}",
            "passed": abs(difference) <= PRECISION_LIMIT,
        })  # fmt: skip
    if "fp8" in result["runs"]:
        summary = result["runs"]["fp8"]["summary"]
        sent, plain = summary["dispatch_bytes"], summary["dispatch_bytes_bf16"]
        row, bf16_row = fp8_row_bytes(config.hidden), 2 * config.hidden
        checks.append({
            "name": "fp8 dispatch, bytes sent", "measured": f"{megabytes(sent)} = {sent / plain:.2%} of bf16",
            "limit": f"{row}/{bf16_row} bytes a row", "passed": sent * bf16_row == plain * row,
        })  # fmt: skip
    return checks


def fp8_row_bytes(hidden: int) -> int:
    """Bytes of one dispatched FP8 row: its values and an FP32 scale for each 128 of them."""
    return hidden + 4 * -(-hidden // 128)
