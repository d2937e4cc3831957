"""Small messages with file descriptors between the ranks of a buffer, for as long as its memory may grow."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import CommTimeout, ConfigError, PeerError, TopologyError
from .mesh import Members

_MAX_MESSAGE = 64 * 1024
_HELLO = struct.Struct("=i16s")  # the caller's rank and the listener's secret


class Links(Protocol):
    """Small messages between all ranks, in the order in which all ranks call.

    Attributes:
        closed: whether it was closed, by `close` or by an exchange that failed.
    """

    closed: bool

    def exchange(self, what: str, payload: Any, fds: Sequence[int] = ()) -> list[tuple[Any, list[int]]]: ...

    def close(self) -> None: ...


class GroupLinks:
    """Over the object gather of the caller's group: for ranks on several hosts, without file descriptors."""

    closed = False

    def __init__(self, members: Members) -> None:
        self._members = members

    def exchange(self, what: str, payload: Any, fds: Sequence[int] = ()) -> list[tuple[Any, list[int]]]:
        """What every rank gave, by rank, each with an empty list."""
        if fds:
            raise ConfigError(f"{what}: file descriptors do not travel between hosts")
        return [(item, []) for item in self._members.gather(payload)]

    def close(self) -> None:
        """Nothing to close."""


class SocketLinks:
    """Private Unix sockets between all ranks of a host, kept for as long as the memory may grow.

    Names are random and abstract (no file system), and a connection counts only with the receiver's secret, both of
    which travel over the caller's group once. Afterwards that group is not used any more.

    Args:
        members: ranks and object gather; construction is collective over them.
        timeout_s: deadline of the construction and of each exchange, in seconds.

    Raises:
        TopologyError: some ranks could not connect; on all ranks.
    """

    def __init__(self, members: Members, timeout_s: float) -> None:
        self.rank, self.size = members.rank, members.size
        self.timeout_s = timeout_s
        self.closed = False
        self._sockets: dict[int, socket.socket] = {}
        if self.size == 1:
            return
        secret, name = secrets.token_bytes(16), f"\0deep_ep-{secrets.token_hex(16)}"
        failure = ""
        with contextlib.ExitStack() as stack:
            try:
                listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                listener.bind(name)
                listener.listen(self.size)  # room for all, so that no connect has to wait for an accept
            except OSError as error:
                failure = str(error)
            offers = members.gather((name, secret, failure))
            if not any(offer[2] for offer in offers):
                try:
                    self._connect(listener, offers)
                except OSError as error:
                    failure = str(error) or "timed out"
            failures = {rank: text for rank, text in enumerate(members.gather(failure)) if text}
        if failures:
            self.close()
            rank, text = next(iter(failures.items()))
            raise TopologyError(
                f"ranks {sorted(failures)} could not reach the others over Unix sockets; rank {rank} says: {text}. "
                "Ranks that share GPU memory have to run in one network namespace (one container)"
            )

    def _connect(self, listener: socket.socket, offers: Sequence[tuple[str, bytes, str]]) -> None:
        deadline = time.monotonic() + self.timeout_s
        for peer in range(self.rank):
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._sockets[peer] = link
            link.settimeout(_remaining(deadline))
            link.connect(offers[peer][0])
            link.send(_HELLO.pack(self.rank, offers[peer][1]))
        while len(self._sockets) < self.size - 1:
            listener.settimeout(_remaining(deadline))
            link, _ = listener.accept()
            peer = -1
            try:
                link.settimeout(min(_remaining(deadline), 5.0))  # a stranger that says nothing is not waited for long
                peer, secret = _HELLO.unpack(link.recv(_HELLO.size))
                known = self.rank < peer < self.size and peer not in self._sockets
                if known and secrets.compare_digest(secret, offers[self.rank][1]):
                    self._sockets[peer] = link
                    continue
            except (OSError, struct.error):
                pass
            link.close()

    def exchange(self, what: str, payload: Any, fds: Sequence[int] = ()) -> list[tuple[Any, list[int]]]:
        """Give a small picklable object and file descriptors to every rank and take theirs.

        Returns:
            by rank: the object and the descriptors received, which the caller closes. The own entry has none.

        Raises:
            CommTimeout: a rank did not answer before the deadline.
            PeerError: the connection to a rank broke.
        """
        message = pickle.dumps((what, payload))
        if len(message) > _MAX_MESSAGE:
            raise ConfigError(f"{what}: a message of {len(message)} bytes, expected at most {_MAX_MESSAGE}")
        started = time.monotonic()
        deadline = started + self.timeout_s
        received: list[tuple[Any, list[int]]] = [(payload, []) for _ in range(self.size)]
        awaited = self.rank
        try:
            for awaited, link in self._sockets.items():  # noqa: B007 (named in the errors below)
                link.settimeout(_remaining(deadline))
                socket.send_fds(link, [message], list(fds))
            for awaited, link in self._sockets.items():
                link.settimeout(_remaining(deadline))
                data, got, flags, _ = socket.recv_fds(link, _MAX_MESSAGE, 8)
                received[awaited] = (None, got)
                for fd in got:
                    os.set_inheritable(fd, False)
                if not data or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
                    raise ConnectionError("the connection was closed" if not data else "a message was cut short")
                their_what, item = pickle.loads(data)
                if their_what != what:
                    raise ConnectionError(f"that rank is at another step ({their_what})")
                received[awaited] = (item, got)
        except OSError as error:
            for _, got in received:
                close_fds(got)
            self.close()  # the others learn of it at once instead of at their own deadline
            if isinstance(error, TimeoutError):
                raise CommTimeout(
                    f"peer memory: rank {self.rank} waited {time.monotonic() - started:.1f} s for rank {awaited} "
                    f"({what}); the deadline of {self.timeout_s:g} s has passed. Is rank {awaited} alive and making "
                    "the same call? A larger timeout_s (or DEEP_EP_TIMEOUT_S) gives slow ranks more time",
                    operation="peer memory",
                    phase=what,
                    peer=awaited,
                    waited_s=time.monotonic() - started,
                ) from None
            raise PeerError(
                f"peer memory: rank {self.rank} lost its connection to rank {awaited} ({what}); that rank has most "
                f"likely died or given up, look at its output. Reported: {error}",
                operation="peer memory",
                peer=awaited,
            ) from None
        return received

    def close(self) -> None:
        """Close the connections. Needs no peer; peers that wait for this rank fail at once."""
        self.closed = True
        for link in self._sockets.values():
            link.close()


def close_fds(fds: Sequence[int]) -> None:
    """Close file descriptors that this process owns."""
    for fd in fds:
        os.close(fd)


def _remaining(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)
