"""The training loop of one rank."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from deep_ep.buffer import Buffer
from deep_ep.errors import ConfigError, DeepEPError
from deep_ep.nn import fp8_gemm
from deep_ep.train import checkpoint
from deep_ep.train.config import TrainConfig, check_resumable, config_from_dict
from deep_ep.train.data import Batches, Corpus
from deep_ep.train.launch import World
from deep_ep.train.model import ByteTransformer
from deep_ep.train.optim import Optimizer, lr_at
from deep_ep.train.report import Progress, loss_text, megabytes

_PER_STEP = (
    "step", "train_loss", "lr", "grad_norm", "tokens_per_s", "load_max", "load_min",
    "dispatch_bytes", "dispatch_bytes_bf16", "combine_bytes",
)  # fmt: skip


def kernel_launches(buffer: Buffer) -> Counter[str]:
    """Launches by kernel since the buffer was made; empty on the portable engine, which has no kernels."""
    kernels = getattr(buffer.runtime, "kernels", None)
    return Counter() if kernels is None else Counter(kernels.launches)


class TrainingDiverged(DeepEPError, RuntimeError):
    """The loss stopped being a finite number."""


class Trainer:
    """One run in one precision on one rank. All methods are collective."""

    def __init__(self, config: TrainConfig, precision: str, world: World, corpus: Corpus) -> None:
        self.config = config
        self.precision = precision
        self.world = world
        self.model = ByteTransformer(config, precision, world)
        self.optimizer = Optimizer(self.model, world, weight_decay=config.weight_decay, clip=config.clip)
        self.batches = Batches(
            corpus, seed=config.seed, batch=config.batch, seq=config.seq, val_batches=config.val_batches,
            rank=world.rank, num_ranks=world.size,
        )  # fmt: skip
        self.digest = corpus.digest
        self.buffers = list({id(moe.buffer): moe.buffer for moe in self.model.moe_layers}.values())
        # Counted from here on: what this run alone sends and multiplies (on this rank).
        fp8_gemm.reset_counters()
        for buffer in self.buffers:
            buffer.traffic.reset()
        self._launched_before = [kernel_launches(buffer) for buffer in self.buffers]
        self.done = 0
        self.curves: dict[str, list[float]] = {name: [] for name in _PER_STEP}
        self.validation: dict[str, list[float]] = {"step": [], "loss": []}
        self.seconds = 0.0

    @property
    def checkpoints(self) -> Path:
        return Path(self.config.out) / "checkpoint" / self.precision

    def train_step(self) -> None:
        """One optimizer step; appends a row to `curves`."""
        config, step = self.config, self.done
        began = time.perf_counter()
        before = self._traffic()
        self.model.train()
        loss_sum = self._loss_sum(*self.batches.train(step))
        torch.autograd.backward(loss_sum)
        lr = lr_at(step, peak=config.lr, warmup=config.warmup, steps=config.steps)
        result = self.optimizer.step(loss_sum, config.tokens_per_step, lr)
        for moe in self.model.moe_layers:
            moe.update_bias()
        moved = self.world.sum_(self._traffic() - before).tolist()
        if not np.isfinite(result.loss) or not np.isfinite(result.grad_norm):
            raise TrainingDiverged(
                f"step {step + 1}: the loss is {result.loss} and the gradient norm {result.grad_norm}, "
                f"expected finite numbers: use a smaller --lr than {config.lr} "
                f"or a longer --warmup than {config.warmup}"
            )
        load_max, load_min = self._load()
        self.done += 1
        took = time.perf_counter() - began
        self.seconds += took
        row = (
            self.done,
            result.loss,
            lr,
            result.grad_norm,
            config.tokens_per_step / took,
            load_max,
            load_min,
            *moved,
        )
        for name, value in zip(_PER_STEP, row, strict=True):
            self.curves[name].append(value)

    def evaluate(self) -> float:
        """Mean loss in nats over the fixed validation set; appends it to `validation`."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for index in range(self.batches.val_batches):
                total += self._loss_sum(*self.batches.validation(index)).double().cpu()
        loss = float(self.world.sum_(total)) / (self.batches.val_batches * self.config.tokens_per_step)
        self.validation["step"].append(self.done)
        self.validation["loss"].append(loss)
        return loss

    def run(self, progress: Progress) -> None:
        """Train from where this run stands to the last step, with validation and checkpoints on the way."""
        config = self.config
        if not self.validation["step"]:
            progress.message(f"[{self.precision}] validation loss before training {loss_text(self.evaluate())}")
        while self.done < config.steps:
            self.train_step()
            progress.update(self.done, self._fields())
            last = self.done == config.steps
            if last or self.done % config.val_every == 0:
                loss = loss_text(self.evaluate())
                more = ", ".join(f"{name} {value}" for name, value in self._load_and_traffic().items())
                progress.message(f"[{self.precision}] step {self.done}: validation loss {loss}, {more}")
            if last or (config.checkpoint_every and self.done % config.checkpoint_every == 0):
                self.save()

    def save(self) -> None:
        meta = {
            "config": self.config.to_dict(), "precision": self.precision, "corpus": self.digest,
            "curves": self.curves, "validation": self.validation, "seconds": self.seconds,
        }  # fmt: skip
        checkpoint.save(self.checkpoints, self.done, self.model, self.optimizer, self.world, self.config.experts, meta)

    def resume(self) -> bool:
        """Continue from the newest checkpoint of this precision, if there is one.

        Raises:
            ConfigError: it was made with other settings, of another text, or has gone past the last step.
        """
        path = checkpoint.latest(self.checkpoints)
        if path is None:
            return False
        meta = checkpoint.read_meta(path)
        check_resumable(config_from_dict(meta["config"]), self.config)
        if meta["corpus"] != self.digest:
            raise ConfigError(
                f"the checkpoint {path} was trained on another text than this standard library holds: resume "
                "with the Python that it was started with, or train into another --out"
            )
        if meta["step"] > self.config.steps:
            raise ConfigError(f"--steps is {self.config.steps}, but the checkpoint {path} is past it: use more --steps")
        self.done = checkpoint.load(path, self.model, self.optimizer, self.world, self.config.experts)
        self.curves, self.validation, self.seconds = meta["curves"], meta["validation"], meta["seconds"]
        return True

    def result(self) -> dict[str, Any]:
        """This run's part of train.json."""
        curves, gemms = self.curves, fp8_gemm.counters()
        recent = slice(-max(1, len(curves["step"]) // 10), None)
        return {
            "precision": self.precision,
            "curves": curves,
            "validation": self.validation,
            "gemms": {**vars(gemms), "operands": dict(gemms.operands)},
            "buffers": self._describe_buffers(),
            "summary": {
                "steps": self.done,
                "seconds": self.seconds,
                "tokens": self.done * self.config.tokens_per_step,
                "tokens_per_s": float(np.median(curves["tokens_per_s"])),
                "train_loss": float(np.mean(curves["train_loss"][recent])),
                "validation_loss": self.validation["loss"][-1],
                "load_max": float(np.mean(curves["load_max"][recent])),
                "load_min": float(np.mean(curves["load_min"][recent])),
                **{name: int(sum(curves[name])) for name in ("dispatch_bytes", "dispatch_bytes_bf16", "combine_bytes")},
            },
        }

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.destroy()

    def _loss_sum(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(inputs.to(self.world.device))
        return F.cross_entropy(logits.flatten(0, 1), targets.to(self.world.device).flatten(), reduction="sum")

    def _traffic(self) -> torch.Tensor:
        """Bytes this rank has sent: dispatched, the same rows had they been bf16, combined; int64 [3]."""
        stats = [buffer.traffic for buffer in self.buffers]
        return torch.tensor([
            sum(s.dispatch_bytes for s in stats),
            sum(s.dispatch_rows for s in stats) * self.config.hidden * 2,
            sum(s.combine_bytes for s in stats),
        ])  # fmt: skip

    def _describe_buffers(self) -> list[dict[str, Any]]:
        """What this rank moved in this process, by which kernels, and what memory they hold (none: portable engine)."""
        return [
            {
                "engine": buffer.engine,
                "traffic": dataclasses.asdict(buffer.traffic),
                "kernel_launches": dict(kernel_launches(buffer) - before),
                "memory": buffer.memory_usage(),
            }
            for buffer, before in zip(self.buffers, self._launched_before, strict=True)
        ]

    def _load(self) -> tuple[float, float]:
        """Largest and smallest expert load over the mean, of the worst layer."""
        loads = torch.stack([moe.load() for moe in self.model.moe_layers]).double()
        relative = loads / loads.mean(dim=1, keepdim=True).clamp_min(1e-9)
        return float(relative.max()), float(relative.min())

    def _fields(self) -> dict[str, str]:
        """What to show of the last step."""
        loss, speed = self.curves["train_loss"][-1], self.curves["tokens_per_s"][-1]
        return {"loss": f"{loss:.4f}", "tok/s": f"{speed:,.0f}", **self._load_and_traffic()}

    def _load_and_traffic(self) -> dict[str, str]:
        last = {name: values[-1] for name, values in self.curves.items()}
        sent, plain = megabytes(last["dispatch_bytes"]), megabytes(last["dispatch_bytes_bf16"])
        return {
            "load max/min": f"{last['load_max']:.2f}/{last['load_min']:.2f}",
            "dispatched": f"{sent} (bf16 {plain})",
            "combined": megabytes(last["combine_bytes"]),
        }
