"""A private full mesh between the ranks of one buffer, over gloo.

Why private: the caller's group may be NCCL, MPI or gloo, may be in use by another thread, and must survive a failure
of ours. Every message has one sender, one receiver and a tag made from the operation's number, so a wait always knows
whom it waits for, and an operation that was given up cannot be confused with the next.
"""

from __future__ import annotations

import collections
import datetime
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..errors import BufferDestroyed, CommTimeout, ConfigError, DeepEPError, PeerError, TopologyError
from ..topology import host_identity

logger = logging.getLogger("deep_ep")
# The type stubs know neither its options nor its messages.
_Gloo: Any = dist.ProcessGroupGloo
_TcpStore: Any = dist.TCPStore  # type: ignore[attr-defined]

DEFAULT_TIMEOUT_S = 300.0
#: Longer than ranks fall apart in a warmed-up service, shorter than its clients wait.
DEFAULT_MASK_TIMEOUT_S = 10.0
WARN_AFTER_S = 10.0
_NUM_PHASES = 4


class MpiLikeComm(Protocol):
    """What is used of an mpi4py communicator."""

    def Get_rank(self) -> int: ...

    def Get_size(self) -> int: ...

    def allgather(self, sendobj: Any) -> list[Any]: ...


class SoloComm:
    """A communicator of one rank, for programs that run without any process group."""

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 1

    def allgather(self, sendobj: Any) -> list[Any]:
        return [sendobj]


@dataclass(frozen=True)
class Members:
    """Rank, size and object gather of whatever the caller gave: a process group or a communicator."""

    rank: int
    size: int
    gather: Callable[[Any], list[Any]]


def members_of(group: dist.ProcessGroup | None, comm: MpiLikeComm | None) -> Members:
    """Adapt a process group or an mpi4py-like communicator.

    Raises:
        ConfigError: neither or both were given, or the process is not a member of the group.
    """
    if (group is None) == (comm is None):
        raise ConfigError(
            "Buffer needs exactly one of group= (a torch.distributed process group) and comm= (an mpi4py "
            f"communicator); got group={group!r}, comm={comm!r}. A single process can pass comm=deep_ep.SoloComm()"
        )
    if comm is not None:
        missing = [name for name in ("Get_rank", "Get_size", "allgather") if not hasattr(comm, name)]
        if missing:
            raise ConfigError(
                f"comm is a {type(comm).__name__} without {', '.join(missing)}; expected an mpi4py communicator"
            )
        return Members(int(comm.Get_rank()), int(comm.Get_size()), comm.allgather)
    if not isinstance(group, dist.ProcessGroup):
        raise ConfigError(
            f"group is a {type(group).__name__}; expected the torch.distributed.ProcessGroup of the expert-parallel "
            "ranks (this process may not be a member of it)"
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)

    def gather(obj: Any) -> list[Any]:
        if size == 1:
            return [obj]
        out: list[Any] = [None] * size
        dist.all_gather_object(out, obj, group=group)
        return out

    return Members(rank, size, gather)


def resolve_timeout(timeout_s: float | None) -> float:
    """Deadline of every wait in seconds: the argument, `DEEP_EP_TIMEOUT_S`, or 300.

    Raises:
        ConfigError: not a positive number.
    """
    return _positive(timeout_s, "timeout_s", "DEEP_EP_TIMEOUT_S", DEFAULT_TIMEOUT_S, "seconds")


def resolve_mask_timeout(mask_timeout_us: float | None) -> float:
    """Seconds until a rank that does not come is masked: the argument, `DEEP_EP_MASK_TIMEOUT_US`, or 10.

    Raises:
        ConfigError: not a positive number.
    """
    default_us = DEFAULT_MASK_TIMEOUT_S * 1e6
    name, variable = "mask_timeout_us", "DEEP_EP_MASK_TIMEOUT_US"
    return _positive(mask_timeout_us, name, variable, default_us, "microseconds") / 1e6


def _positive(given: float | None, name: str, variable: str, default: float, unit: str) -> float:
    text = os.environ.get(variable, "").strip()
    source = name if given is not None or not text else variable
    raw: object = given if given is not None else (text or default)
    try:
        value = float(raw)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise ConfigError(f"{source}={raw!r}: expected a positive number of {unit}")
    return value


class _LateWatch:
    """One daemon thread per process that warns, once a wait, when a peer is awaited for more than ten seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: dict[int, tuple[float, str]] = {}
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def start(self, key: int, text: str) -> None:
        with self._lock:
            self._waits[key] = (time.monotonic(), text)
            if self._thread is None or self._pid != os.getpid():
                self._pid = os.getpid()
                self._thread = threading.Thread(target=self._run, name="deep_ep-late-watch", daemon=True)
                self._thread.start()

    def stop(self, key: int) -> None:
        with self._lock:
            self._waits.pop(key, None)

    def _run(self) -> None:
        while True:
            time.sleep(1.0)
            now = time.monotonic()
            with self._lock:
                late = [(key, text) for key, (since, text) in self._waits.items() if now - since > WARN_AFTER_S]
                for key, _ in late:
                    del self._waits[key]
            for _, text in late:
                logger.warning("deep_ep: %s for more than %.0f s", text, WARN_AFTER_S)


_late_watch = _LateWatch()


class Mesh:
    """Point-to-point messages between all pairs of ranks, with deadlines that name the peer.

    Args:
        members: ranks and object gather; construction is collective over them.
        timeout_s: deadline of each operation in seconds.
    """

    def __init__(self, members: Members, timeout_s: float) -> None:
        self.rank, self.size = members.rank, members.size
        self.timeout_s = timeout_s
        self._operation_number = 0
        self._operation = "construction"
        self._deadline = self._allowed_s = 0.0
        self._broken: DeepEPError | None = None
        #: Nanoseconds that the operation so far waited for messages of each rank.
        self.last_wait_ns = [0] * members.size
        # Messages of operations that were given up: the peer may still read them, so they stay alive for a while.
        self._abandoned: collections.deque[tuple[Any, torch.Tensor]] = collections.deque(maxlen=1024)
        self._store: Any = None
        self._gloo: Any = None
        if self.size > 1:
            self._connect(members)

    def _connect(self, members: Members) -> None:
        wait = datetime.timedelta(seconds=max(self.timeout_s, 1.0))
        hosts = members.gather(host_identity())
        same_host = len(set(hosts)) == 1
        # Rank 0 serves the rendezvous. A failure there must reach the others through the same gather.
        offer: object = None
        if members.rank == 0:
            name = "127.0.0.1" if same_host else socket.gethostname()
            try:
                self._store = _TcpStore(name, 0, self.size, True, wait, wait_for_workers=False)
                offer = (name, self._store.port)
            except RuntimeError as error:
                offer = str(error)
        offer = members.gather(offer)[0]
        if not isinstance(offer, tuple):
            raise TopologyError(f"rank 0 could not open a rendezvous port for the buffer's connections: {offer}")
        failure = ""
        try:
            if self._store is None:
                self._store = _TcpStore(offer[0], offer[1], self.size, False, wait, wait_for_workers=False)
            options = _Gloo._Options()
            device = _Gloo.create_device(hostname="127.0.0.1") if same_host else _Gloo.create_default_device()
            options._devices = [device]
            options._timeout = wait
            self._gloo = _Gloo(self._store, self.rank, self.size, options)
        except RuntimeError as error:
            failure = str(error)
        failures = {rank: text for rank, text in enumerate(members.gather(failure)) if text}
        if failures:
            rank, text = next(iter(failures.items()))
            raise TopologyError(
                f"ranks {sorted(failures)} could not connect to the others; rank {rank} says: {text}. Between hosts, "
                "set GLOO_SOCKET_IFNAME to the interface that reaches them"
            )

    def close(self, reason: str = "it was destroyed") -> None:
        """Drop the connections. Needs no peer, so it cannot hang; peers that wait for this rank fail at once."""
        self._broken = self._broken or BufferDestroyed(reason)
        self._abandoned.clear()
        self._gloo = None
        self._store = None

    def recover(self, members: Members) -> None:
        """Replace connections that a failed wait broke (collective over ``members``).

        Nothing happens where no rank's are broken. Messages of operations that were given up are dropped with the old
        connections, and all ranks count operations alike again.

        Raises:
            BufferDestroyed: some rank closed its mesh; on all ranks.
            TopologyError: some ranks could not connect; on all ranks, and the mesh stays broken.
        """
        is_destroyed = isinstance(self._broken, BufferDestroyed)
        if self._broken is not None:
            self._gloo = self._store = None  # a rank that is still in the operation learns at once
        states = members.gather((is_destroyed, self._broken is not None, self._operation_number))
        destroyed = [rank for rank, state in enumerate(states) if state[0]]
        if destroyed:
            raise BufferDestroyed(f"recover: the buffer of ranks {destroyed} was destroyed; construct a new one")
        # Ranks that differ in what they began would give one operation different tags.
        if not any(broken for _, broken, _ in states) and len({number for *_, number in states}) == 1:
            return
        self._broken = self._broken or PeerError("another rank's connections are broken", operation="recover")
        self._abandoned.clear()
        self._gloo = self._store = None
        if self.size > 1:
            self._connect(members)
        self._operation_number = 0
        self._broken = None

    def begin(self, operation: str, timeout_s: float = 0.0) -> None:
        """Start the next operation: a new range of tags and a new deadline, after ``timeout_s`` if that is above 0.

        Raises:
            BufferDestroyed: the mesh is closed or a failed wait left it unusable.
        """
        if self._broken is not None:
            raise BufferDestroyed(
                f"{operation}: this buffer cannot be used any more, because: {self._broken}. Call recover() on all "
                "ranks, or destroy it and construct a new one on all ranks"
            )
        self._operation_number += 1
        self._operation = operation
        self._allowed_s = timeout_s or self.timeout_s
        self._deadline = time.monotonic() + self._allowed_s
        self.last_wait_ns = [0] * self.size

    def post(self, phase: int, peer: int, message: torch.Tensor) -> None:
        """Send without waiting, ever: for the notice that this rank gave up the operation.

        A peer that has left waits for nothing, so its closed connection is no error.
        """
        if self._gloo is None:
            return
        try:
            work = self._gloo.send([message], peer, self._tag(phase))
        except RuntimeError:
            return
        self._abandoned.append((work, message))

    def all_gather(
        self,
        phase: int,
        what: str,
        mine: torch.Tensor,
        peers: Sequence[int],
        refused: Callable[[torch.Tensor], bool],
        *,
        tolerate: bool = False,
    ) -> tuple[dict[int, torch.Tensor], list[int]]:
        """Give ``mine`` to every peer and collect theirs, of the same size.

        A peer whose message says that it refused the operation does not take part any further, so nothing that was
        sent to it is waited for.

        Returns:
            messages by rank (the own one included), and the peers lost (only with ``tolerate``).

        Raises:
            CommTimeout, PeerError: as for `Batch.wait`.
        """
        received = {self.rank: mine}
        lost: list[int] = []
        if self._gloo is None:
            return received, lost
        tag = self._tag(phase)
        recvs: list[tuple[Any, int]] = []
        sends: list[tuple[Any, int]] = []
        broken: list[tuple[int, str]] = []
        for peer in peers:
            received[peer] = torch.empty_like(mine)
            try:
                recvs.append((self._gloo.recv([received[peer]], peer, tag), peer))
                sends.append((self._gloo.send([mine], peer, tag), peer))
            except RuntimeError as error:
                broken.append((peer, str(error)))
        try:
            # Only now, or the others would wait for this rank's message in place of noticing the same.
            for peer, text in broken:
                self._lose(peer, what, text, 0.0, tolerate)
                lost.append(peer)
            lost += [peer for work, peer in recvs if peer not in lost and not self._wait(work, peer, what, tolerate)]
            for peer in lost:
                del received[peer]
            gone = {peer for peer, message in received.items() if refused(message)}
            for work, peer in sends:
                if peer in lost:
                    continue
                if gone:
                    self._abandoned.append((work, mine))
                elif not self._wait(work, peer, what, tolerate):
                    lost.append(peer)
                    del received[peer]
        except DeepEPError:
            self._abandoned += [(work, mine) for work, _ in sends]  # they leave when their receivers come
            raise
        return received, lost

    def batch(self, phase: int, what: str, *, tolerate: bool = False) -> Batch:
        """An empty set of messages of one phase. With ``tolerate`` lost peers are reported instead of raised."""
        return Batch(self, phase, what, tolerate)

    def peers(self, step: int) -> list[int]:
        """The other ranks, starting at the next one (``step`` 1) or the previous one (-1), so that all are spread."""
        return [(self.rank + step * distance) % self.size for distance in range(1, self.size)]

    def exchange(
        self,
        phase: int,
        what: str,
        sends: Sequence[torch.Tensor | None],
        recvs: Sequence[torch.Tensor | None],
        *,
        tolerate: bool = False,
    ) -> list[int]:
        """Send ``sends[p]`` to each peer p and fill ``recvs[p]`` from it, as one `Batch`; None means no message."""
        batch = self.batch(phase, what, tolerate=tolerate)
        for peer in self.peers(-1):
            message = recvs[peer]
            if message is not None:
                batch.recv(peer, message)
        for peer in self.peers(1):
            message = sends[peer]
            if message is not None:
                batch.send(peer, message)
        return batch.wait()

    def _tag(self, phase: int) -> int:
        # Tags are 32-bit; an operation is long over when its number comes round again.
        return (self._operation_number * _NUM_PHASES + phase) % (1 << 31)

    def _wait(self, work: Any, peer: int, what: str, tolerate: bool) -> bool:
        started = time.monotonic()
        remaining = max(self._deadline - started, 0.001)
        _late_watch.start(id(work), f"rank {self.rank}: {self._operation} has waited for rank {peer} ({what})")
        try:
            if tolerate:
                error = _wait_in_thread(work, remaining)
            else:
                error = None
                try:
                    work.wait(datetime.timedelta(seconds=remaining))
                except RuntimeError as raised:
                    error = str(raised)
        finally:
            _late_watch.stop(id(work))
            self.last_wait_ns[peer] += int((time.monotonic() - started) * 1e9)
        if error is not None:
            self._lose(peer, what, error, time.monotonic() - started, tolerate)
        return error is None

    def _lose(self, peer: int, what: str, error: str, waited_s: float, tolerate: bool) -> None:
        """Report or raise the loss of a peer. ``error`` is gloo's text."""
        if tolerate:
            logger.warning("deep_ep: rank %d lost rank %d in %s (%s)", self.rank, peer, self._operation, what)
            # The time that this one took is not to be missing for those that come.
            self._deadline = time.monotonic() + self._allowed_s
            return
        # gloo puts its source position in front, and advice that does not fit here behind.
        first_line = re.sub(r"^\[[^\]]*\.cc:\d+\] ", "", error.splitlines()[0]) if error else "no reason given"
        first_line = first_line.partition(" This is typically")[0]
        failure: DeepEPError
        if "timed out" in error.lower() or "timeout" in error.lower():
            failure = CommTimeout(
                f"{self._operation}: rank {self.rank} waited {waited_s:.1f} s for rank {peer} ({what}); the deadline "
                f"of {self.timeout_s:g} s has passed. Is rank {peer} alive and calling {self._operation}? A larger "
                "timeout_s (or DEEP_EP_TIMEOUT_S) gives slow ranks more time",
                operation=self._operation,
                phase=what,
                peer=peer,
                waited_s=waited_s,
            )
        else:
            failure = PeerError(
                f"{self._operation}: rank {self.rank} lost its connection to rank {peer} ({what}); that rank has most "
                f"likely died, look at its output. Reported: {first_line}",
                operation=self._operation,
                peer=peer,
            )
        self._broken = failure
        raise failure


class Batch:
    """Messages of one phase, started one by one and waited for together.

    Messages are contiguous CPU tensors whose sizes both sides know; empty ones are not sent. Start the receives first,
    so that the peers' data finds its place without another round trip.
    """

    def __init__(self, mesh: Mesh, phase: int, what: str, tolerate: bool) -> None:
        self._mesh = mesh
        self._phase = phase
        self._what = what
        self._tolerate = tolerate
        self._pending: list[tuple[Any, int, torch.Tensor]] = []
        self._lost: list[int] = []
        self._broken: list[tuple[int, str]] = []

    def recv(self, peer: int, message: torch.Tensor) -> None:
        """Start to fill ``message`` from ``peer``."""
        self._start("recv", peer, message)

    def send(self, peer: int, message: torch.Tensor) -> None:
        """Start to send ``message`` to ``peer``; it must not change before `wait` returns."""
        self._start("send", peer, message)

    def _start(self, method: str, peer: int, message: torch.Tensor) -> None:
        gloo = self._mesh._gloo
        if gloo is None or message.numel() == 0 or peer in self._lost:
            return
        try:
            work = getattr(gloo, method)([message], peer, self._mesh._tag(self._phase))
        except RuntimeError as error:
            # Raised by wait(): the messages to the others are to leave before.
            self._broken.append((peer, str(error)))
            self._lost.append(peer)
            return
        self._pending.append((work, peer, message))

    def wait(self) -> list[int]:
        """Wait for all messages. Returns the peers lost, whose messages did not arrive (only when tolerated).

        Raises:
            CommTimeout: a peer did not answer before the deadline.
            PeerError: the connection to a peer broke.
        """
        try:
            for peer, error in self._broken:
                self._mesh._lose(peer, self._what, error, 0.0, self._tolerate)
            for work, peer, _ in self._pending:
                if peer not in self._lost and not self._mesh._wait(work, peer, self._what, self._tolerate):
                    self._lost.append(peer)
        except DeepEPError:
            self._mesh._abandoned += [(work, message) for work, _, message in self._pending]
            raise
        self._broken.clear()
        self._pending.clear()
        return self._lost


def _wait_in_thread(work: Any, seconds: float) -> str | None:
    """Wait for ``work`` without gloo's own timeout, which would close the connections to every rank.

    Returns None when done, else the reason. A wait that is given up stays behind in its daemon thread.
    """
    result: list[str] = []

    def wait() -> None:
        try:
            work.wait(datetime.timedelta(days=7))
        except RuntimeError as error:
            result.append(str(error) or "connection lost")

    thread = threading.Thread(target=wait, name="deep_ep-wait", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"timed out after {seconds:.3f} s"
    return result[0] if result else None
