"""SM budgets that `python -m deep_ep tune` found: their files, and which of them serves a call.

Tables are looked for in this order: the ``table`` argument, `DEEP_EP_TUNING` (a file; ``off`` for no tables at all),
``deep_ep/tuned.json`` in the user's cache folder, the tables that come with the package. The first that has an entry
for the GPU answers; if none has, the first with an entry for a GPU of the same compute capability. Within a table:

1. the number of ranks: the same, else the nearest by ratio (of two, the larger);
2. the dtype of the rows ("fp8" for 1-byte elements, "bf16" for wider ones): the same if there is one;
3. the hidden size: the same, else the nearest by ratio (of two, the larger);
4. where dtype or hidden size are not known, the largest budget of the entries that are left, which serves them all.

Entries count only where as many ranks share a GPU as did when they were measured, and only if kernels were measured.
Files are read once in a process.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .config import DEFAULT_NUM_SMS, Config, default_combine_config, default_dispatch_config
from .errors import ConfigError

logger = logging.getLogger("deep_ep")

FORMAT = 1
OPERATIONS = ("dispatch", "combine")
DTYPES = ("fp8", "bf16")
TABLE_NAME = "tuned.json"
_OFF = "off"
_SHIPPED = Path(__file__).resolve().parent / "tuned"
_CONFIGS = {"dispatch": default_dispatch_config, "combine": default_combine_config}


class Gpu(NamedTuple):
    """A GPU model: its name, and its compute capability as in "9.0"."""

    name: str
    capability: str


@dataclass(frozen=True)
class Entry:
    """What a lookup needs of one entry; `dispatch` and `combine` are SM budgets."""

    gpu: Gpu
    ranks: int
    ranks_per_gpu: int
    hidden: int
    dtype: str
    engine: str
    dispatch: int
    combine: int

    @property
    def key(self) -> str:
        """The entry's name in its file: an entry of the same name replaces it."""
        shared = f" | {self.ranks_per_gpu} ranks a GPU" if self.ranks_per_gpu > 1 else ""
        return f"{self.gpu.name} | {self.ranks} ranks | hidden {self.hidden} | {self.dtype}{shared}"


# Which budget serves.


def config_for_group(
    operation: str, num_ranks: int, num_sms: int | None, table: str | os.PathLike[str] | None = None
) -> Config:
    """Default configuration of an operation on the current GPU, hidden size and dtype unknown.

    Args:
        operation: "dispatch" or "combine".
        num_sms: the budget that the caller set, which wins over every table; None if none was set.
        table: a table to look at first.

    Raises:
        ConfigError: ``table`` cannot be read, or ``num_ranks`` is not positive.
    """
    if num_sms is None:
        named = None if table is None else os.fspath(table)
        num_sms = tuned_num_sms(operation, _current_gpu(), num_ranks, table=named)
    return _CONFIGS[operation](num_ranks, DEFAULT_NUM_SMS if num_sms is None else num_sms)


def config_for_call(
    operation: str,
    num_ranks: int,
    rows: torch.Tensor,
    num_sms: int | None,
    ranks_per_gpu: int = 1,
    use_fp8: bool = False,
) -> Config:
    """Default configuration of a call on ``rows`` ([tokens, hidden]), which with ``use_fp8`` travel as FP8.

    Takes well below a microsecond once a shape has been seen. ``num_sms`` is as for `config_for_group`;
    ``ranks_per_gpu`` has to be the same on all ranks.
    """
    dtype = torch.float8_e4m3fn if use_fp8 else rows.dtype
    return _config_for_call(operation, num_ranks, rows.device, rows.shape[-1], dtype, num_sms, ranks_per_gpu)


@functools.lru_cache(maxsize=4096)
def _config_for_call(
    operation: str,
    num_ranks: int,
    device: torch.device,
    hidden: int,
    dtype: torch.dtype,
    num_sms: int | None,
    ranks_per_gpu: int,
) -> Config:
    if num_sms is None:
        gpu, name = gpu_of(device), "fp8" if dtype.itemsize == 1 else "bf16"
        num_sms = tuned_num_sms(operation, gpu, num_ranks, hidden, name, ranks_per_gpu=ranks_per_gpu)
    return _CONFIGS[operation](num_ranks, DEFAULT_NUM_SMS if num_sms is None else num_sms)


@functools.lru_cache(maxsize=4096)
def tuned_num_sms(
    operation: str,
    gpu: Gpu | None,
    num_ranks: int,
    hidden: int | None = None,
    dtype: str | None = None,
    *,
    ranks_per_gpu: int = 1,
    table: str | None = None,
) -> int | None:
    """The tuned SM budget of an operation, by the rules of this module; None where no table has one.

    Args:
        operation: "dispatch" or "combine".
        gpu: None, the CPU, has no entries.
        hidden: elements of a row; None if not known.
        dtype: "fp8" or "bf16"; None if not known.
        ranks_per_gpu: ranks of the group that share a GPU.
        table: a file to look at first.

    Raises:
        ConfigError: ``table`` cannot be read.
    """
    tables = ([] if table is None else [read_entries(Path(table))]) + list(_tables())
    if gpu is None or num_ranks < 1:
        return None
    for same_name in (True, False):
        for entries in tables:
            usable = [
                entry
                for entry in entries
                if entry.engine == "cuda"
                and entry.ranks_per_gpu == ranks_per_gpu
                and (entry.gpu.name == gpu.name if same_name else entry.gpu.capability == gpu.capability)
            ]
            if usable:
                return _best(usable, operation, num_ranks, hidden, dtype)
    return None


def _best(entries: Sequence[Entry], operation: str, num_ranks: int, hidden: int | None, dtype: str | None) -> int:
    ranks = _nearest({entry.ranks for entry in entries}, num_ranks)
    entries = [entry for entry in entries if entry.ranks == ranks]
    entries = [entry for entry in entries if entry.dtype == dtype] or entries
    if hidden is not None:
        size = _nearest({entry.hidden for entry in entries}, hidden)
        entries = [entry for entry in entries if entry.hidden == size]
    return max(entry.dispatch if operation == "dispatch" else entry.combine for entry in entries)


def _nearest(values: Iterable[int], wanted: int) -> int:
    return min(values, key=lambda value: (abs(math.log(value) - math.log(max(wanted, 1))), -value))


@functools.lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU model of a device; None for the CPU. Starts CUDA for a GPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return Gpu(torch.cuda.get_device_name(device), f"{major}.{minor}")


def _current_gpu() -> Gpu | None:
    # A question about defaults must not start CUDA in a program that has not: it could not fork any more.
    return gpu_of(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_initialized() else None


# Files.


def user_folder() -> Path:
    """Where `tune` writes by default: ``deep_ep`` in XDG_CACHE_HOME, else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "deep_ep"


def forget() -> None:
    """Read the tables anew at the next lookup."""
    for cached in (_tables, tuned_num_sms, _config_for_call):
        cached.cache_clear()


@functools.lru_cache(maxsize=1)
def _tables() -> tuple[tuple[Entry, ...], ...]:
    """Entries of the files on the search path that can be read; a warning for each that cannot."""
    tables = []
    for path in _search_path():
        try:
            tables.append(read_entries(path))
        except ConfigError as error:
            logger.warning("deep_ep: tuned SM budgets are ignored: %s", error)
    return tuple(tables)


def _search_path() -> Iterator[Path]:
    named = os.environ.get("DEEP_EP_TUNING", "").strip()
    if named.lower() == _OFF:
        return
    if named:
        yield Path(named)
    try:
        if (user_folder() / TABLE_NAME).exists():
            yield user_folder() / TABLE_NAME
    except OSError:
        pass  # a home that cannot be looked into holds no table of this user
    yield from sorted(_SHIPPED.glob("*.json"))


def read_entries(path: Path) -> tuple[Entry, ...]:
    """The entries of a file.

    Raises:
        ConfigError: it cannot be read, or is not such a table.
    """
    return tuple(_entry(path, raw) for raw in read_table(path)["entries"].values())


def read_table(path: Path) -> dict[str, Any]:
    """A file as `write_entries` wrote it: {"format": 1, "entries": {key: entry}}.

    Raises:
        ConfigError: it cannot be read, or is not such a table.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a table of SM budgets: {error}") from None
    if not isinstance(table, dict) or table.get("format") != FORMAT or not isinstance(table.get("entries"), dict):
        raise ConfigError(
            f'{path} is not a table of SM budgets: expected an object with "format": {FORMAT} and "entries"; write it '
            "with `python -m deep_ep tune --out FOLDER`"
        )
    for raw in table["entries"].values():
        _entry(path, raw)
    return table


def _entry(path: Path, raw: Any) -> Entry:
    try:
        entry = Entry(
            gpu=Gpu(raw["gpu"], raw["capability"]),
            ranks=raw["ranks"],
            ranks_per_gpu=raw["ranks_per_gpu"],
            hidden=raw["hidden"],
            dtype=raw["dtype"],
            engine=raw["engine"],
            dispatch=raw["dispatch"]["num_sms"],
            combine=raw["combine"]["num_sms"],
        )
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: an entry lacks a field: {error!r}") from None
    numbers = (entry.ranks, entry.ranks_per_gpu, entry.hidden, entry.dispatch, entry.combine)
    if not all(type(number) is int and number > 0 for number in numbers) or (entry.dispatch | entry.combine) % 2:
        raise ConfigError(f"{path}: {entry} has a number that is not positive, or an odd SM budget")
    if not all(isinstance(text, str) for text in (*entry.gpu, entry.engine)) or entry.dtype not in DTYPES:
        raise ConfigError(f"{path}: {entry} has a field of the wrong type, or an unknown dtype")
    return entry


def write_entries(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Add entries to a file, in place of those with the same key; others stay. Readers see the old file or the new.

    Raises:
        ConfigError: the file exists and is something else, or an entry is malformed.
        OSError: it cannot be written.
    """
    table: dict[str, Any] = read_table(path) if path.exists() else {"format": FORMAT, "entries": {}}
    for raw in entries:
        table["entries"][_entry(path, raw).key] = raw
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1)
            file.write("\n")
        os.chmod(name, 0o644)  # temporary files are private, a table is not
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    forget()
