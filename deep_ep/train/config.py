"""Settings of a training run. The defaults are those of the demo."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from deep_ep.errors import ConfigError

PRECISIONS = ("fp8", "bf16")
DEVICES = ("auto", "cpu", "cuda")

# A checkpoint can only be continued by a run that agrees on these: they fix the model and the text.
RESUME_MUST_MATCH = (
    "seq", "batch", "hidden", "layers", "dense_layers", "heads", "experts", "topk", "intermediate",
    "seed", "corpus_bytes", "val_batches",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Sizes are per model, `batch` is the global batch in sequences.

    The learning rate and the number of steps are moderate on purpose. Near 2.2 nats this model starts to use distant
    bytes; with twice the rate or more steps, rounding alone moves that moment by many steps, and two runs that differ
    in nothing else (fp8 and bf16 included) can end 2 % apart. Here they stay near 0.2 %, whatever the seed.
    """

    ranks: int = 4
    precision: str = "fp8"
    compare: bool = False
    demo: bool = False
    steps: int = 150
    seq: int = 256
    batch: int = 8
    hidden: int = 128
    layers: int = 3
    dense_layers: int = 0
    heads: int = 4
    experts: int = 8
    topk: int = 2
    intermediate: int = 256
    lr: float = 2e-3
    warmup: int = 20
    weight_decay: float = 0.05
    clip: float = 1.0
    bias_update_rate: float = 2e-3
    seed: int = 0
    device: str = "auto"
    corpus_bytes: int = 8_000_000
    val_every: int = 50
    val_batches: int = 16
    checkpoint_every: int = 0
    out: str = "train-out"
    resume: bool = False

    @property
    def precisions(self) -> tuple[str, ...]:
        """The runs to do, in order: FP8 and then bf16 when comparing."""
        return PRECISIONS if self.compare else (self.precision,)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq

    def validate(self) -> TrainConfig:
        """Return self.

        Raises:
            ConfigError: names the flag, the value given, what is expected and what to do.
        """
        for name in ("ranks", "steps", "seq", "batch", "hidden", "layers", "heads", "experts", "topk",
                     "intermediate", "val_batches", "val_every", "corpus_bytes"):  # fmt: skip
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        for name in ("seed", "checkpoint_every", "warmup", "dense_layers"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "an integer of at least 0")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")
        for name in ("weight_decay", "bias_update_rate"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "a finite number of at least 0")
        _require(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        _require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        _require(self.seed < 2**31, "seed", self.seed, "an integer below 2**31")
        _require(
            self.batch % self.ranks == 0, "batch", self.batch,
            f"a multiple of the number of ranks ({self.ranks}), since each rank takes an equal slice",
        )  # fmt: skip
        _require(
            self.hidden % self.heads == 0 and (self.hidden // self.heads) % 2 == 0, "hidden", self.hidden,
            f"a multiple of twice the heads ({self.heads}): rotary embeddings turn pairs in each head",
        )  # fmt: skip
        _require(
            self.hidden % 16 == 0,
            "hidden",
            self.hidden,
            "a multiple of 16, so that an FP8 row is a multiple of 16 bytes",
        )
        _require(
            self.topk <= min(self.experts, 32), "topk", self.topk,
            f"at most the number of experts ({self.experts}) and at most 32",
        )  # fmt: skip
        _require(
            self.experts >= self.ranks,
            "experts",
            self.experts,
            f"at least the number of ranks ({self.ranks})",
        )
        _require(
            self.dense_layers < self.layers, "dense_layers", self.dense_layers,
            f"fewer than the number of layers ({self.layers}), so that an MoE layer is left",
        )  # fmt: skip
        _require(bool(self.out), "out", self.out, "the name of a directory")
        return self

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def config_from_dict(values: dict[str, Any]) -> TrainConfig:
    """A config from saved values; missing ones take the default.

    Raises:
        ConfigError: a name that this version does not know.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"the saved settings name {', '.join(unknown)}, which this version does not know: "
            "resume with the version that wrote the checkpoint"
        )
    return TrainConfig(**values)


def check_resumable(saved: TrainConfig, wanted: TrainConfig) -> None:
    """A checkpoint made with `saved` may be continued as `wanted`.

    Raises:
        ConfigError: the first setting in which they must agree and do not.
    """
    for name in RESUME_MUST_MATCH:
        have, want = getattr(saved, name), getattr(wanted, name)
        if have != want:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {want}, but the checkpoint to resume was made with {have}: "
                "leave the flag out (the saved value is used) or train into another --out"
            )


def _require(holds: bool, name: str, given: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} is {given!r}: expected {expected}")
