"""The kernels' view of a buffer's ranks: how it is opened, and warnings about waits on the device that last long.

A kernel that waits cannot log. It leaves a note in host memory and goes on waiting; a thread reads the notes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Protocol

from .._native import _C
from ..errors import ConfigError

logger = logging.getLogger("deep_ep")

#: Names of Operation and Phase of csrc/layout/control_block.h.
OPERATIONS = {1: "dispatch", 2: "combine", 3: "low_latency_dispatch", 4: "low_latency_combine"}
PHASES = {
    1: "announcement",
    2: "end of the operation",
    3: "layout",
    4: "bulk copy",
    5: "pushed rows",
    6: "places of rows",
}


class LateNotes(Protocol):
    """What the watch uses of `_C.PeerDomain`."""

    warn_after_s: float

    def take_late(self) -> tuple[int, int, int, int, int] | None: ...


class DeviceWatch:
    """One daemon thread per process that looks for notes of all domains, and lives as long as one of them.

    Args:
        interval_s: seconds between two looks.
    """

    def __init__(self, interval_s: float = 1.0) -> None:
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._ranks: weakref.WeakKeyDictionary[LateNotes, int] = weakref.WeakKeyDictionary()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def add(self, domain: LateNotes, rank: int) -> None:
        """Look at this domain of this rank until it is freed."""
        with self._lock:
            self._ranks[domain] = rank
            if self._thread is None or self._pid != os.getpid():  # threads do not survive a fork
                self._pid = os.getpid()
                self._thread = threading.Thread(target=self._run, name="deep_ep-device-watch", daemon=True)
                self._thread.start()

    def look(self) -> list[str]:
        """Warn of every new note; the texts."""
        with self._lock:
            domains = list(self._ranks.items())
        texts = []
        for domain, rank in domains:
            while (note := domain.take_late()) is not None:
                operation, phase, peer, expected, seen = note
                what = OPERATIONS.get(operation, "an operation")
                texts.append(
                    f"rank {rank}: {what} has waited on the device for rank {peer} ({PHASES.get(phase, 'a phase')}, "
                    f"expected {expected}, seen {seen}) for more than {domain.warn_after_s:g} s"
                )
        for text in texts:
            logger.warning("deep_ep: %s", text)
        return texts

    def _run(self) -> None:
        while True:
            time.sleep(self._interval_s)
            self.look()
            with self._lock:
                if not self._ranks:
                    self._thread = None
                    return


device_watch = DeviceWatch()


def debug_delay_seed() -> int:
    """`DEEP_EP_DEBUG_DELAYS`: seed of random delays at every signal and wait of the kernels; 0 for none.

    Raises:
        ConfigError: not an integer from 0 to 2**32 - 1.
    """
    text = os.environ.get("DEEP_EP_DEBUG_DELAYS", "").strip() or "0"
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise ConfigError(f"DEEP_EP_DEBUG_DELAYS={text!r}: expected an integer from 0 (no delays) to {(1 << 32) - 1}")
    return int(text)


def open_domain(bases: Sequence[int], rank: int, timeout_s: float) -> _C.PeerDomain:
    """A domain over the heaps mapped at these addresses, by rank: watched, and with delays if the environment says so.

    Raises:
        ConfigError: a bad `DEEP_EP_DEBUG_DELAYS`.
    """
    seed = debug_delay_seed()
    domain = _C.PeerDomain(list(bases), rank, timeout_s)
    domain.set_debug(seed, 0)
    device_watch.add(domain, rank)
    return domain
