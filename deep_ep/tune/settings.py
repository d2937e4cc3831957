"""What is tuned: shape, budgets, repetitions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from deep_ep.engines.cuda import MAX_CHANNELS
from deep_ep.errors import ConfigError
from deep_ep.tuning import DTYPES

DTYPE_CHOICES = (*DTYPES, "both")
_FP8_TILE = 128
_MAX_TOPK = 32


@dataclass(frozen=True)
class TuneConfig:
    """Settings of one run. `command` is recorded with the results.

    Attributes:
        tokens: of one rank.
        gemm: m, n, k of the bf16 product that keeps the GPU busy. Its output has many more tiles than the GPU has SMs,
            so that giving up a few SMs costs their share and not a whole wave: 2,048 tiles of 128 x 256, 16 waves on
            132 SMs.
        iterations: most calls in one measurement; fewer where a call is slow.
        seconds: about how long all measurements may take together.
        device: "cuda"; "cpu" runs everything with nothing to find out, for tests.
    """

    ranks: int
    sms: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 32)
    tokens: int = 4096
    hidden: int = 7168
    topk: int = 8
    experts: int = 256
    dtype: str = "both"
    rounds: int = 9
    iterations: int = 20
    seconds: float = 40.0
    gemm: tuple[int, int, int] = (8192, 8192, 1024)
    seed: int = 0
    device: str = "cuda"
    out: str = ""
    command: str = ""

    @property
    def dtypes(self) -> tuple[str, ...]:
        return DTYPES if self.dtype == "both" else (self.dtype,)

    @property
    def reference_sms(self) -> int:
        """A budget outside the sweep; its results are what those of all others must equal."""
        return max(self.sms) + 2

    def validate(self) -> TuneConfig:
        """Return self.

        Raises:
            ConfigError: a setting is out of range, or two do not go together.
        """
        for name in ("ranks", "tokens", "hidden", "topk", "experts", "rounds", "iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}: expected an integer of at least 1")
        most = 2 * MAX_CHANNELS - 2
        if not self.sms or any(sms < 2 or sms > most or sms % 2 for sms in self.sms):
            raise ConfigError(f"--sms is {list(self.sms)}: expected even numbers from 2 to {most}")
        if self.dtype not in DTYPE_CHOICES:
            raise ConfigError(f"--dtype is {self.dtype!r}: expected one of {', '.join(DTYPE_CHOICES)}")
        unit = _FP8_TILE if "fp8" in self.dtypes else 8
        if self.hidden % unit:
            raise ConfigError(f"--hidden is {self.hidden}: expected a multiple of {unit} for --dtype {self.dtype}")
        if self.topk > min(self.experts, _MAX_TOPK):
            raise ConfigError(
                f"--topk is {self.topk}: expected at most {_MAX_TOPK}, and at most the experts ({self.experts})"
            )
        if self.experts < self.ranks:
            raise ConfigError(f"--experts is {self.experts}: expected at least one a rank ({self.ranks})")
        return dataclasses.replace(self, sms=tuple(sorted(set(self.sms))))
