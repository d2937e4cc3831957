"""Checkpoints: one directory a step, written aside and renamed when complete.

    <dir>/step-00000120/meta.json         step, settings, corpus digest, curves so far
                        replicated.pt     weights, buffers and AdamW moments that every rank has
                        experts-00002.pt  what rank 2 owns: {weight name: {global expert: tensors}}

Experts are keyed by their global number, so any number of ranks can load what any other number wrote. Nothing
random is saved: batches follow from (seed, step) and the model draws no random numbers after its start.

On several hosts the directory must be on a file system that they share.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deep_ep.errors import ConfigError
from deep_ep.layout import first_local_expert
from deep_ep.train.launch import World
from deep_ep.train.optim import Optimizer, is_expert

KEEP = 2
_MOMENTS = ("exp_avg", "exp_avg_sq")


def completed(directory: Path) -> list[Path]:
    """Complete checkpoints under `directory`, oldest first."""
    return sorted(path.parent for path in directory.glob("step-*/meta.json"))


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = completed(directory)
    return found[-1] if found else None


def read_meta(path: Path) -> dict[str, Any]:
    """What `save` was given as `meta`, and the step.

    Raises:
        ConfigError: the file cannot be read as such.
    """
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the checkpoint {path} cannot be read ({error}): remove it to use an older one") from error
    if not isinstance(meta, dict):
        raise ConfigError(f"{path / 'meta.json'} is no checkpoint description: remove it to use an older one")
    return meta


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    world: World,
    experts: int,
    meta: dict[str, Any],
) -> Path:
    """Write the state after `step` steps, keep the last two checkpoints and return its path; collective."""
    final = directory / f"step-{step:08d}"
    aside = directory / f".step-{step:08d}.partial"
    if world.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    world.barrier()
    owned: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    replicated: dict[str, dict[str, torch.Tensor]] = {}
    first = first_local_expert(experts, world.size, world.rank)
    for name, parameter in optimizer.named.items():
        state = optimizer.adamw.state[parameter]
        tensors = {"weight": parameter.detach(), **{key: state[key] for key in _MOMENTS}}
        if is_expert(parameter):
            owned[name] = {
                first + local: {key: tensor[local].clone() for key, tensor in tensors.items()}
                for local in range(parameter.shape[0])
            }
        else:
            replicated[name] = tensors
    _write_tensors(aside / f"experts-{world.rank:05d}.pt", owned)
    if world.rank == 0:
        buffers = {name: model.state_dict()[name] for name in model.state_dict() if name not in optimizer.named}
        _write_tensors(aside / "replicated.pt", {"weights": replicated, "buffers": buffers})
        with open(aside / "meta.json", "w") as file:
            json.dump({**meta, "step": step, "ranks": world.size}, file)
            _flush(file)
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        # Later steps than this one are left over from an earlier run into the same directory.
        found = completed(directory)
        ours = found.index(final) + 1
        for old in found[: max(0, ours - KEEP)] + found[ours:]:
            shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return final


def load(path: Path, model: nn.Module, optimizer: Optimizer, world: World, experts: int) -> int:
    """Fill the model and the optimizer from a checkpoint of any rank count; returns the number of steps done.

    Raises:
        ConfigError: something the model has is not in the checkpoint, or has another shape.
    """
    meta = read_meta(path)
    step = int(meta["step"])
    saved = _read_tensors(path / "replicated.pt")
    shards: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for file in sorted(path.glob("experts-*.pt")):
        for name, by_expert in _read_tensors(file).items():
            shards.setdefault(name, {}).update(by_expert)
    first = first_local_expert(experts, world.size, world.rank)
    with torch.no_grad():
        for name, parameter in optimizer.named.items():
            state = {"step": torch.tensor(float(step))}
            state.update({key: torch.empty_like(parameter) for key in _MOMENTS})
            targets = {"weight": parameter, **{key: state[key] for key in _MOMENTS}}
            if is_expert(parameter):
                for local in range(parameter.shape[0]):
                    source = shards.get(name, {}).get(first + local)
                    _fill(
                        {key: t[local] for key, t in targets.items()},
                        source,
                        f"expert {first + local} of {name}",
                        path,
                    )
            else:
                _fill(targets, saved["weights"].get(name), name, path)
            optimizer.adamw.state[parameter] = state
        own = model.state_dict()
        for name, tensor in own.items():
            if name not in optimizer.named:
                _fill({"value": tensor}, {"value": saved["buffers"].get(name)}, name, path)
    return step


def _fill(targets: dict[str, torch.Tensor], source: dict[str, torch.Tensor] | None, what: str, path: Path) -> None:
    for key, target in targets.items():
        value = None if source is None else source.get(key)
        if value is None or value.shape != target.shape:
            have = "nothing" if value is None else f"shape {tuple(value.shape)}"
            raise ConfigError(
                f"the checkpoint {path} holds {have} for {what}, the model needs shape "
                f"{tuple(target.shape)}: resume with its own settings, or remove it to use an older"
            )
        target.copy_(value)


def _write_tensors(path: Path, value: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save(value, file)
        _flush(file)


def _read_tensors(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove its checkpoint to use an older one") from error
    return value


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
