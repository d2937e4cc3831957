"""Symmetric memory: the arithmetic of its pool, the sockets between ranks, and on GPUs the memory itself."""

import os
import random
import socket
import time
import uuid
from types import SimpleNamespace

import pytest
import torch
from harness import RankContext, run_ranks, spawn_fresh

from deep_ep._native import _C
from deep_ep.engines import nvml, peer_links, peer_reach
from deep_ep.engines.mesh import Members, SoloComm, members_of
from deep_ep.engines.peer_links import GroupLinks, SocketLinks, close_fds
from deep_ep.engines.peer_memory import PeerMemory
from deep_ep.engines.peer_reach import DeviceReport, carries_lines, check_reports, missing_pairs
from deep_ep.errors import CommTimeout, ConfigError, PeerError, TopologyError

MIB = 1 << 20
SOLO = members_of(None, SoloComm())


# ---------------------------------------------------------------------------------------------------------------
# The pool's arithmetic


def test_allocator_takes_the_best_fit_and_merges():
    pool = _C.BlockAllocator()
    assert pool.allocate(1) == -1
    pool.add(4096, 8192)
    a, b, c = pool.allocate(1), pool.allocate(513), pool.allocate(1024)
    assert (a, b, c) == (4096, 4096 + 512, 4096 + 1536)
    assert (pool.bytes_used, pool.bytes_free, pool.num_used) == (2560, 8192 - 2560, 3)
    assert pool.free(a) and not pool.free(a) and not pool.free(b + 512)
    assert pool.allocate(600) == c + 1024  # not the 512 bytes at the start
    assert pool.allocate(500) == a  # the smallest block that fits
    assert pool.free(a) and pool.free(b)
    assert pool.allocate(1536) == a  # merged
    pool.add(4096 + 8192, 4096)  # appended to the free block at the end
    assert pool.largest_free == pool.bytes_free == 8192 + 4096 - pool.bytes_used
    assert (
        pool.allocate(pool.largest_free + 1) == -1 and pool.allocate(1 << 62) == -1 and pool.allocate(2**63 - 1) == -1
    )


@pytest.mark.parametrize(
    ("offset", "size"), [(-512, 512), (0, 0), (0, -512), (100, 512), (0, 700), (512, 512), (0, 1024)]
)
def test_allocator_refuses_ranges(offset, size):
    pool = _C.BlockAllocator()
    pool.add(512, 1024)
    with pytest.raises(ValueError, match="pool range"):
        pool.add(offset, size)


@pytest.mark.parametrize("seed", range(8))
def test_allocator_never_overlaps_or_loses_bytes(seed):
    rng = random.Random(seed)
    pool, total, used = _C.BlockAllocator(), 0, {}
    for _ in range(3000):
        choice = rng.random()
        if choice < 0.01 or total == 0:
            size = 512 * rng.randint(1, 400)
            pool.add(total, size)
            total += size
        elif choice < 0.55:
            size = rng.choice([1, 512, rng.randint(1, 60_000)])
            largest, offset = pool.largest_free, pool.allocate(size)
            rounded = -(-size // 512) * 512
            assert (offset < 0) == (rounded > largest)
            if offset >= 0:
                assert offset % 512 == 0 and offset + rounded <= total
                assert all(offset + rounded <= start or start + length <= offset for start, length in used.items())
                used[offset] = rounded
        elif used:
            offset = rng.choice(list(used))
            assert pool.free(offset)
            del used[offset]
        assert pool.bytes_used == sum(used.values()) and pool.bytes_free == total - pool.bytes_used
        assert pool.num_used == len(used)
    for offset in list(used):
        assert pool.free(offset)
    assert pool.largest_free == pool.bytes_free == total  # everything merged again


# ---------------------------------------------------------------------------------------------------------------
# Who reaches whom


def _report(name: str, reach: dict[str, bool], host: str = "h", error: str = "") -> DeviceReport:
    return DeviceReport(name.encode(), f"bus-{name}", host, {k.encode(): v for k, v in reach.items()}, error)


def test_missing_pairs_are_named():
    full = [_report("a", {"a": True, "b": True}), _report("b", {"a": True, "b": True})]
    assert missing_pairs(full) == [] and check_reports(full, False) is None
    one_way = [_report("a", {"a": True, "b": True}), _report("b", {"a": False, "b": True})]
    assert missing_pairs(one_way) == [(1, 0)]
    with pytest.raises(
        TopologyError, match=r"ranks 1->0: rank 1 has GPU bus-b, rank 0 has GPU bus-a.*DEEP_EP_NVL_DOMAIN"
    ):
        check_reports(one_way, False)
    # A GPU that the process does not see is left to the mapping, and one GPU always reaches itself.
    assert missing_pairs([_report("a", {"a": True}), _report("b", {"b": True}), _report("b", {"b": False})]) == []


def _linked(name: str, nvlink: dict[str, bool], host: str = "h") -> DeviceReport:
    return DeviceReport(name.encode(), "bus", host, {}, nvlink={k.encode(): v for k, v in nvlink.items()})


def test_lines_are_for_nvlink():
    """Between all pairs, within a GPU, and between hosts, which only NVLink joins; not where it is not known."""
    both = {"a": True, "b": True}
    assert carries_lines([_linked("a", both), _linked("b", both)])
    assert carries_lines([_linked("a", {"a": True}), _linked("a", {"a": True})])
    assert carries_lines([_linked("a", {"a": True}, "h1"), _linked("b", {"b": True}, "h2")])
    assert not carries_lines([_linked("a", {"a": True}), _linked("b", both)])
    assert not carries_lines([_linked("a", {"a": True, "b": False}), _linked("b", both)])
    assert not carries_lines([_linked("a", both), _linked("b", {})])


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_a_report_knows_the_links(monkeypatch, hidden, refused):
    own, other, far = b"a" * 16, b"b" * 16, b"c" * 16
    monkeypatch.setattr(peer_reach, "_C", SimpleNamespace(has_cuda=True))
    monkeypatch.setattr(peer_reach._C, "device_identity", lambda index: (own, "bus"), raising=False)
    reach = {own: (True, True), other: (True, False)}
    monkeypatch.setattr(peer_reach._C, "device_reach", lambda index: reach, raising=False)
    monkeypatch.setattr(peer_reach, "nvlink_to", lambda uuid: {other: True, far: True})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("DEEP_EP_LINES", "0" if refused else "")
    report = peer_reach.report_device(torch.device("cuda", 0))
    assert report.reach == {own: True, other: True} and not report.error
    # CUDA knows best; NVML adds what CUDA does not see.
    known = {own: True, other: False} | ({far: True} if hidden else {})
    assert report.nvlink == ({} if refused else known)


class FakeNvml:
    """Three GPUs, of which the first two are joined, and the third cannot be asked about."""

    def __init__(self, init: int = 0) -> None:
        self.init, self.ended = init, 0

    def nvmlInit_v2(self) -> int:
        return self.init

    def nvmlShutdown(self) -> int:
        self.ended += 1
        return 0

    def nvmlDeviceGetCount_v2(self, count) -> int:
        count._obj.value = 3
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle) -> int:
        handle._obj.value = 100 + index
        return 0

    def nvmlDeviceGetUUID(self, handle, text, size) -> int:
        text.value = f"GPU-{uuid.UUID(int=handle.value)}".encode()
        return 0

    def nvmlDeviceGetP2PStatus(self, own, other, what, status) -> int:
        assert what == 2
        status._obj.value = 0 if {own.value, other.value} == {100, 101} else 3
        return 999 if other.value == 102 and own.value == 101 else 0


def test_nvml_tells_of_hidden_gpus(monkeypatch):
    ids = [uuid.UUID(int=100 + index).bytes for index in range(3)]
    library = FakeNvml()
    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: library)
    assert nvml.nvlink_to(ids[0]) == {ids[1]: True, ids[2]: False}
    assert nvml.nvlink_to(ids[1]) == {ids[0]: True}
    assert nvml.nvlink_to(b"x" * 16) == {}
    assert library.ended == 3
    library.init = 9
    assert nvml.nvlink_to(ids[0]) == {}

    def missing(name: str):
        raise OSError(name)

    monkeypatch.setattr(nvml.ctypes, "CDLL", missing)
    assert nvml.nvlink_to(ids[0]) == {}


def test_hosts_and_broken_ranks_are_named():
    two_hosts = [_report("a", {}, "h1"), _report("b", {}, "h2")]
    with pytest.raises(TopologyError, match=r"2 hosts \(h1, h2\)"):
        check_reports(two_hosts, False)
    assert check_reports(two_hosts, True) is None
    with pytest.raises(TopologyError, match=r"ranks \[1\].*rank 1 says: no driver"):
        check_reports([_report("a", {}), _report("", {}, error="no driver")], False)


def _construct_on_cpu(ctx: RankContext) -> str:
    with pytest.raises(TopologyError) as caught:
        PeerMemory(members_of(ctx.group, None), torch.device("cuda"), 4096, MIB)
    return str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_every_rank_learns_why():
    first, second = run_ranks(2, _construct_on_cpu)
    assert first == second and "ranks [0, 1] cannot share GPU memory" in first


# ---------------------------------------------------------------------------------------------------------------
# Sockets


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _exchange_files(ctx: RankContext, rounds: int) -> None:
    before = open_fds()
    links = SocketLinks(members_of(ctx.group, None), 30.0)
    for number in range(rounds):
        fds = []
        if (ctx.rank + number) % 3 != 2:  # a rank may have nothing to send
            fd = os.memfd_create("exchanged")
            os.write(fd, f"{ctx.rank}/{number}".encode())
            fds = [fd]
        got = links.exchange(f"round {number}", (ctx.rank, number), fds)
        close_fds(fds)
        for rank, (payload, received) in enumerate(got):
            assert payload == (rank, number)
            assert len(received) == (rank != ctx.rank and (rank + number) % 3 != 2)
            for fd in received:
                assert os.pread(fd, 100, 0) == f"{rank}/{number}".encode()
                assert not os.get_inheritable(fd)
            close_fds(received)
    links.close()
    assert open_fds() == before


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_files_travel_between_ranks(num_ranks):
    run_ranks(num_ranks, _exchange_files, 20)


def _lose_a_rank(ctx: RankContext, how: str) -> tuple[str, int | None, float]:
    links = SocketLinks(members_of(ctx.group, None), 1.0)
    fd = os.memfd_create("exchanged")
    before = open_fds()
    if ctx.rank == 1:
        if how == "closes":
            links.close()
        elif how == "silent":
            time.sleep(2.5)
        if how != "elsewhere":
            return "", None, 0.0
    started = time.monotonic()
    try:
        links.exchange("one step" if ctx.rank != 1 else "another step", None, [fd])
    except (CommTimeout, PeerError) as error:
        assert open_fds() == before - ctx.num_ranks + 1  # the sockets are closed, and nothing received stays open
        return f"{type(error).__name__}: {error}", error.peer, time.monotonic() - started
    return "", None, 0.0


def test_a_lost_rank_is_named():
    results = spawn_fresh(3, _lose_a_rank, "closes")
    for rank, (text, peer, waited) in enumerate(results):
        assert rank == 1 or (text.startswith("PeerError") and peer != rank and waited < 0.9)
    assert any(peer == 1 for _, peer, _ in results)  # the others may see first that the rank that saw it gave up
    results = spawn_fresh(3, _lose_a_rank, "silent")
    assert [text.partition(":")[0] for text, _, _ in results].count("CommTimeout") >= 1
    assert any(peer == 1 and "waited" in text and "rank 1" in text for text, peer, _ in results)
    results = spawn_fresh(2, _lose_a_rank, "elsewhere")
    assert all("that rank is at another step" in text or "closed" in text for text, _, _ in results)


def test_strangers_are_turned_away():
    """Somebody who finds the name but does not know the secret takes no rank's place."""
    gathered: list[tuple[str, bytes, str]] = []

    def gather(obj):
        if isinstance(obj, str):
            return [obj, "", ""]
        name, secret, _ = obj
        gathered.append(obj)
        for hello in (b"", b"short", peer_links._HELLO.pack(1, b"x" * 16), peer_links._HELLO.pack(7, secret)):
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.connect(name)
            if hello:
                stranger.send(hello)
            stranger.close()
        for rank in (2, 1):
            friend = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            friend.connect(name)
            friend.send(peer_links._HELLO.pack(rank, secret))
            friends[rank] = friend
        return [obj, ("", b"", ""), ("", b"", "")]

    friends: dict[int, socket.socket] = {}
    # Rank 0 connects to nobody; the backlog has room for its peers only, so the strangers come in one by one.
    listen = socket.socket.listen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "listen", lambda self, backlog: listen(self, backlog + 8))
        links = SocketLinks(Members(0, 3, gather), 10.0)
    assert sorted(links._sockets) == [1, 2]
    for rank, friend in friends.items():
        links._sockets[rank].send(b"%d" % rank)
        assert friend.recv(10) == b"%d" % rank
        friend.close()
    links.close()


def test_group_links_carry_no_files():
    links = GroupLinks(SOLO)
    assert links.exchange("x", 5) == [(5, [])]
    with pytest.raises(ConfigError, match="between hosts"):
        links.exchange("x", 5, [0])
