"""The portable engine's connections when one of them is broken: what the others still get."""

import pytest
import torch

from deep_ep.engines.mesh import Mesh, SoloComm, members_of
from deep_ep.errors import PeerError


class Work:
    def __init__(self, is_lost: bool = False):
        self.is_lost = is_lost

    def wait(self, timeout: object) -> None:
        if self.is_lost:
            raise RuntimeError("[pair.cc:2] Connection reset by peer")


class BrokenTo:
    """Connections of which that to one rank is closed, as gloo finds when it starts a message, or waits for it."""

    def __init__(self, closed: int, is_noticed: bool = True):
        self.closed, self.is_noticed = closed, is_noticed
        self.sent: list[int] = []

    def recv(self, messages: list[torch.Tensor], peer: int, tag: int) -> Work:
        self._check(peer)
        messages[0].fill_(peer)
        return Work(peer == self.closed)

    def send(self, messages: list[torch.Tensor], peer: int, tag: int) -> Work:
        self._check(peer)
        self.sent.append(peer)
        return Work()

    def _check(self, peer: int) -> None:
        if self.is_noticed and peer == self.closed:
            raise RuntimeError("[pair.cc:1] Connection closed by peer")


def mesh_of_four(closed: int, is_noticed: bool = True) -> tuple[Mesh, BrokenTo]:
    mesh = Mesh(members_of(None, SoloComm()), 5.0)
    connections = BrokenTo(closed, is_noticed)
    mesh.size, mesh._gloo, mesh.last_wait_ns = 4, connections, [0] * 4
    mesh.begin("dispatch")
    return mesh, connections


@pytest.mark.parametrize("closed", [1, 2, 3])
def test_others_get_their_message_before_a_loss_is_raised(closed):
    """Else they would wait for this rank until the deadline, and blame it."""
    mesh, connections = mesh_of_four(closed)
    with pytest.raises(PeerError, match=f"rank {closed}"):
        mesh.all_gather(0, "header", torch.zeros(3), [1, 2, 3], lambda message: False)
    assert connections.sent == [peer for peer in (1, 2, 3) if peer != closed]

    mesh, connections = mesh_of_four(closed)
    messages = [torch.zeros(2) for _ in range(4)]
    with pytest.raises(PeerError, match=f"rank {closed}"):
        mesh.exchange(1, "rows", [None, *messages[1:]], [None, *messages[1:]])
    assert sorted(connections.sent) == [peer for peer in (1, 2, 3) if peer != closed]


@pytest.mark.parametrize("closed", [1, 2, 3])
def test_messages_outlive_a_loss_found_later(closed):
    """gloo sends when the receiver comes, unless the message is gone by then."""
    mesh, connections = mesh_of_four(closed, is_noticed=False)
    message = torch.zeros(3)
    with pytest.raises(PeerError, match=f"rank {closed}"):
        mesh.all_gather(0, "header", message, [1, 2, 3], lambda message: False)
    assert sum(kept is message for _, kept in mesh._abandoned) == len(connections.sent) == 3

    mesh, connections = mesh_of_four(closed, is_noticed=False)
    messages = [torch.zeros(2) for _ in range(4)]
    with pytest.raises(PeerError, match=f"rank {closed}"):
        mesh.exchange(1, "rows", [None, *messages[1:]], [None, *messages[1:]])
    assert {id(kept) for _, kept in mesh._abandoned} >= {id(message) for message in messages[1:]}


@pytest.mark.parametrize("closed", [1, 3])
def test_a_tolerated_loss_is_told(closed):
    mesh, _ = mesh_of_four(closed)
    received, lost = mesh.all_gather(0, "header", torch.zeros(3), [1, 2, 3], lambda message: False, tolerate=True)
    assert lost == [closed]
    assert sorted(received) == [rank for rank in range(4) if rank != closed]
    assert all(bool((message == rank).all()) for rank, message in received.items())

    messages = [torch.zeros(2) for _ in range(4)]
    assert mesh.exchange(1, "rows", [None, *messages[1:]], [None, *messages[1:]], tolerate=True) == [closed]
