"""The text (Python's own standard library) and the batches made of it.

Every machine that can run the package has this text, so training needs no download. Batches are a pure
function of (seed, step): a resumed run needs no other data position than its step, and any number of ranks
sees the same batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sysconfig
from pathlib import Path

import numpy as np
import torch

from deep_ep.errors import ConfigError

_SKIPPED_DIRS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_VALIDATION_SHARE = 10  # one file in ten, by hash


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes of the two splits. `train` and `validation` are uint8 arrays, files concatenated."""

    train: np.ndarray
    validation: np.ndarray
    train_files: int
    validation_files: int
    skipped_files: int

    @property
    def digest(self) -> str:
        """SHA-256 over both splits: two runs with the same digest read the same text."""
        total = hashlib.sha256(len(self.train).to_bytes(8, "little"))
        total.update(self.train.tobytes())
        total.update(self.validation.tobytes())
        return total.hexdigest()

    def describe(self) -> str:
        skipped = f", {self.skipped_files} unreadable files left out" if self.skipped_files else ""
        return (
            f"train {self.train_files} files / {len(self.train):,} bytes, "
            f"validation {self.validation_files} files / {len(self.validation):,} bytes{skipped}"
        )


def stdlib_path() -> Path:
    """The directory of Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def load_corpus(max_bytes: int, root: Path | None = None) -> Corpus:
    """Read `.py` files under `root` (the standard library), up to `max_bytes` in all.

    Files are taken in the order of the SHA-256 of their relative path, so a cap takes a fair sample of the
    library and not its first letters; the same hash decides the split. Third-party packages and tests are
    left out.

    Raises:
        ConfigError: no readable text for one of the splits.
    """
    base = stdlib_path() if root is None else root
    keyed = []
    for path in base.rglob("*.py"):
        relative = path.relative_to(base)
        if not _SKIPPED_DIRS.intersection(relative.parts[:-1]):
            keyed.append((hashlib.sha256(relative.as_posix().encode("utf-8", "surrogateescape")).digest(), path))
    keyed.sort()
    splits: tuple[list[bytes], list[bytes]] = ([], [])
    total = skipped = 0
    for key, path in keyed:
        try:
            text = path.read_bytes()
        except OSError:
            skipped += 1
            continue
        if not text or total + len(text) > max_bytes:
            continue
        total += len(text)
        splits[key[-1] % _VALIDATION_SHARE == 0].append(text)
    train, validation = (np.frombuffer(b"".join(files), dtype=np.uint8) for files in splits)
    if not len(train) or not len(validation):
        raise ConfigError(
            f"{base} gives {len(train)} bytes to train on and {len(validation)} to validate on, out "
            f"of {len(keyed)} .py files and at most {max_bytes} bytes: install Python's standard library "
            "as files or raise --corpus-bytes"
        )
    return Corpus(train, validation, len(splits[0]), len(splits[1]), skipped)


class Batches:
    """Training and validation batches of one rank.

    The global batch of a step is fixed by (seed, step) alone; rank r of R takes the contiguous slice r of it.

    Args:
        batch: global batch in sequences, a multiple of `num_ranks`.
        seq: tokens a sequence; each needs `seq + 1` bytes of text (inputs and the targets shifted by one).
        val_batches: number of global batches of the fixed validation set.

    Raises:
        ConfigError: the batch does not divide by the ranks, or the text is too short.
    """

    def __init__(
        self, corpus: Corpus, *, seed: int, batch: int, seq: int, val_batches: int, rank: int, num_ranks: int
    ) -> None:
        if batch % num_ranks:
            raise ConfigError(
                f"a global batch of {batch} sequences does not divide by {num_ranks} ranks: "
                f"use a multiple of {num_ranks}"
            )
        if len(corpus.train) < seq + 1:
            raise ConfigError(
                f"the training text has {len(corpus.train)} bytes, a sequence needs {seq + 1}: "
                "use a smaller --seq or a larger --corpus-bytes"
            )
        windows = len(corpus.validation) // (seq + 1)
        if windows < val_batches * batch:
            raise ConfigError(
                f"{val_batches} validation batches of {batch} sequences need {val_batches * batch} windows "
                f"of {seq + 1} bytes, the validation text holds {windows}: use fewer --val-batches, "
                "a smaller --batch or --seq, or a larger --corpus-bytes"
            )
        self._corpus = corpus
        self._seed = seed
        self._batch = batch
        self._seq = seq
        self._rows = slice(rank * (batch // num_ranks), (rank + 1) * (batch // num_ranks))
        self.val_batches = val_batches
        # Non-overlapping windows spread evenly over the validation text.
        picked = np.arange(val_batches * batch) * windows // (val_batches * batch)
        self._val_starts = picked * (seq + 1)

    def train(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's inputs and targets of `step`: two int64 tensors [batch / ranks, seq]."""
        random = np.random.default_rng([self._seed, step])
        starts = random.integers(0, len(self._corpus.train) - self._seq, size=self._batch)
        return self._cut(self._corpus.train, starts[self._rows])

    def validation(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's inputs and targets of validation batch `index`."""
        starts = self._val_starts[index * self._batch : (index + 1) * self._batch]
        return self._cut(self._corpus.validation, starts[self._rows])

    def validation_targets(self) -> np.ndarray:
        """All bytes that the validation loss is taken over: uint8 [val_batches * batch * seq]."""
        offsets = np.arange(1, self._seq + 1)
        targets: np.ndarray = self._corpus.validation[self._val_starts[:, None] + offsets]
        return targets.reshape(-1)

    def _cut(self, text: np.ndarray, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        rows = text[starts[:, None] + np.arange(self._seq + 1)].astype(np.int64)
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@dataclasses.dataclass(frozen=True)
class Unigram:
    """What a model that only knows byte frequencies reaches on the validation bytes, in nats a byte.

    `cross_entropy` uses the frequencies of the training split (plus one for each byte value, so that none is
    impossible); `entropy` those of the validation bytes themselves, the least any fixed distribution can
    reach.
    """

    cross_entropy: float
    entropy: float


def unigram(train: np.ndarray, validation: np.ndarray) -> Unigram:
    """Unigram entropies of `validation` (uint8 [n]) given `train` (uint8 [m])."""
    counts = np.bincount(train, minlength=256).astype(np.float64) + 1.0
    own = np.bincount(validation, minlength=256).astype(np.float64)
    share = own / own.sum()
    seen = share > 0
    cross = -float((share * np.log(counts / counts.sum())).sum())
    return Unigram(cross, -float((share[seen] * np.log(share[seen])).sum()))


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2.0)
