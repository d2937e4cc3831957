"""What the link and the SMs can do, by SM count: the bytes of dispatch and combine without their bookkeeping.

Every rank sends to the next one and reads from it, all at the same time: both directions of every link are busy.
Each probe is tried in many shapes (warps, stages, pieces, ways of an instruction), and the fastest is the limit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from deep_ep._native import _C, current_stream
from deep_ep.engines.mesh import Members
from deep_ep.engines.peer_memory import PeerMemory

from .world import World, summary

SHARED_BYTES = 224 << 10  # kMaxSharedBytes of the probes
SEARCH_ITERATIONS = 8
FINALISTS = 3
FLAG_ROUNDS = 400
FLAG_TIMEOUT_S = 5.0
#: Bytes that travel before a flag.
FLAG_PAYLOADS = (0, 7168, 65536)
#: Tensors of a rig that other ranks read or write.
SHARED_NAMES = ("rows", "scales", "inbox", "scale_inbox", "payload", "payload_inbox", "flag")


@dataclasses.dataclass(frozen=True)
class Push:
    """ProbePushShape of csrc/kernels/probe_launch.h."""

    warps: int
    ahead: int
    behind: int
    piece_bytes: int
    scales_by_bulk: bool = False

    def __str__(self) -> str:
        scales = " scales by bulk copies" if self.scales_by_bulk else ""
        return f"{self.warps}w {self.ahead}+{self.behind}+1 stages of {self.piece_bytes}{scales}"


@dataclasses.dataclass(frozen=True)
class Pull:
    """ProbePullShape."""

    warps: int
    stages: int
    vectors: int
    own_by_bulk: bool
    out_by_bulk: bool
    producer: bool
    one_polls: bool

    def __str__(self) -> str:
        own, out = ("bulk" if by_bulk else "direct" for by_bulk in (self.own_by_bulk, self.out_by_bulk))
        more = (" producer" if self.producer else "") + (" one polls" if self.one_polls else "")
        return f"{self.warps}w {self.stages} stages of {512 * self.vectors}, own {own}, out {out}{more}"


@dataclasses.dataclass(frozen=True)
class Registers:
    """Warps of an SM that copy by 16-byte loads and stores."""

    warps: int

    def __str__(self) -> str:
        return f"{self.warps}w"


def push_shapes(row_bytes: int, scales: bool = False) -> Iterator[Push]:
    """The shapes that fit into shared memory."""
    pieces = [size for size in (3584, 7168, 14336) if size <= row_bytes] or [row_bytes]
    for piece, warps, (ahead, behind) in itertools.product(
        pieces, (2, 4, 7, 8, 14, 16), ((1, 0), (1, 1), (2, 1), (2, 2), (4, 3))
    ):
        for by_bulk in (False, True) if scales else (False,):
            if warps * (ahead + behind + 1) * (piece + (256 if by_bulk else 0)) <= SHARED_BYTES:
                yield Push(warps, ahead, behind, piece, by_bulk)


def pull_shapes() -> Iterator[Pull]:
    """For each size of a piece, what fills shared memory with more warps or with more stages."""
    booleans = list(itertools.product((True, False), repeat=4))
    for vectors, (own_by_bulk, out_by_bulk, producer, one_polls) in itertools.product((7, 14, 8, 4), booleans):
        stage_bytes = 512 * vectors * (2 if own_by_bulk else 1)
        for warps in (4, 7, 10, 14):
            stages = min(SHARED_BYTES // (warps * stage_bytes), 8)
            if stages >= 2 and (vectors != 14 or warps <= 7):
                yield Pull(warps, stages, vectors, own_by_bulk, out_by_bulk, producer, one_polls)


class Rig:
    """Rows of this rank that the next rank reads, and places that the rank before it writes to.

    Args:
        world: this rank.
        num_rows: rows that a probe moves.
        row_bytes: bytes of a bf16 row; probes of FP8 move half of it and ``scale_bytes``.

    Raises:
        TopologyError: the ranks cannot map each other's memory.
    """

    def __init__(self, world: World, num_rows: int, row_bytes: int, scale_bytes: int, seed: int = 0) -> None:
        self.world, self.num_rows, self.row_bytes, self.scale_bytes = world, num_rows, row_bytes, scale_bytes
        room = num_rows * (2 * row_bytes + 2 * scale_bytes) * 17 // 16 + (64 << 20)
        members = Members(world.rank, world.size, world.gather)
        self.memory = PeerMemory(members, world.device, 4096, room)
        generator = torch.Generator(device=world.device).manual_seed(seed * 1000 + world.rank)
        like = {"generator": generator, "device": world.device}
        self.rows = self.memory.empty((num_rows, row_bytes // 2), torch.bfloat16)
        self.rows.copy_(torch.randn(num_rows, row_bytes // 2, **like))
        self.scales = self.memory.empty((num_rows, scale_bytes), torch.uint8)
        self.scales.copy_(torch.randint(0, 256, self.scales.shape, dtype=torch.uint8, **like))
        self.inbox = self.memory.empty((num_rows, row_bytes), torch.uint8)
        self.scale_inbox = self.memory.empty((num_rows, scale_bytes), torch.uint8)
        self.payload = self.memory.empty((max(FLAG_PAYLOADS),), torch.uint8)
        self.payload.copy_(torch.randint(0, 256, self.payload.shape, dtype=torch.uint8, **like))
        self.payload_inbox = self.memory.empty((max(FLAG_PAYLOADS),), torch.uint8)
        self.flag = self.memory.empty((1,), torch.int64).zero_()
        # Places of this rank alone.
        self.own = torch.randn(num_rows, row_bytes // 2, **like).bfloat16()
        self.out = torch.empty_like(self.own)
        self.own_place, self.own_scale_place = torch.empty_like(self.inbox), torch.empty_like(self.scale_inbox)
        self.result = torch.zeros(2, dtype=torch.int64, device=world.device)
        self.first_flag = 1
        self.offsets = world.gather([self.memory.offset_of(getattr(self, name)) for name in SHARED_NAMES])
        self.next, self.before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        world.barrier()

    def at(self, rank: int, name: str) -> int:
        """The address of another rank's tensor in this process."""
        return int(self.memory.bases[rank] + self.offsets[rank][SHARED_NAMES.index(name)])

    def stream(self) -> int:
        return current_stream(self.world.device)

    def push(self, shape: Push, num_sms: int, row_bytes: int, own: bool, scales: bool) -> None:
        _C.probe_push(
            rows=self.rows.data_ptr(),
            peer_rows=self.at(self.next, "inbox"),
            own_rows=self.own_place.data_ptr() if own else 0,
            num_rows=self.num_rows,
            row_bytes=row_bytes,
            scales=self.scales.data_ptr() if scales else 0,
            peer_scales=self.at(self.next, "scale_inbox") if scales else 0,
            own_scales=self.own_scale_place.data_ptr() if scales and own else 0,
            scale_bytes=self.scale_bytes if scales else 0,
            scales_by_bulk=shape.scales_by_bulk,
            num_sms=num_sms,
            warps=shape.warps,
            ahead=shape.ahead,
            behind=shape.behind,
            piece_bytes=shape.piece_bytes,
            stream=self.stream(),
        )

    def pull(self, shape: Pull, num_sms: int) -> None:
        _C.probe_pull(
            peer_rows=self.at(self.next, "rows"),
            own_rows=self.own.data_ptr(),
            out=self.out.data_ptr(),
            num_rows=self.num_rows,
            row_bytes=self.row_bytes,
            num_sms=num_sms,
            **dataclasses.asdict(shape),
            stream=self.stream(),
        )

    def copy(self, shape: Registers, num_sms: int, to_peer: bool) -> None:
        source = self.rows.data_ptr() if to_peer else self.at(self.next, "rows")
        target = self.at(self.next, "inbox") if to_peer else self.out.data_ptr()
        num_bytes = self.num_rows * self.row_bytes
        _C.probe_registers(
            source=source, target=target, bytes=num_bytes, num_sms=num_sms, warps=shape.warps, stream=self.stream()
        )

    def flags(self, payload_bytes: int) -> float:
        """Microseconds one way between ranks 2i and 2i + 1, payload included; 0 on a rank without a partner.

        Raises:
            RuntimeError: the partner did not answer in time.
        """
        partner = self.world.rank ^ 1
        first, self.first_flag = self.first_flag, self.first_flag + FLAG_ROUNDS
        if partner >= self.world.size:
            return 0.0
        _C.probe_flags(
            own_flag=self.flag.data_ptr(),
            peer_flag=self.at(partner, "flag"),
            payload=self.payload.data_ptr(),
            peer_payload=self.at(partner, "payload_inbox"),
            payload_bytes=payload_bytes,
            first=first,
            rounds=FLAG_ROUNDS,
            starts=self.world.rank % 2 == 0,
            timeout_s=FLAG_TIMEOUT_S,
            result=self.result.data_ptr(),
            stream=self.stream(),
        )
        nanoseconds, rounds = self.result.tolist()
        if rounds != FLAG_ROUNDS:
            raise RuntimeError(f"rank {self.world.rank}: rank {partner} answered {rounds} of {FLAG_ROUNDS} flags")
        expected = self.theirs(partner, "payload", payload_bytes)
        _expect("the payload", self.payload_inbox, expected)
        return float(nanoseconds) / 1e3 / (FLAG_ROUNDS - 1) / 2

    def theirs(self, rank: int, name: str, num_bytes: int) -> torch.Tensor:
        """A copy of another rank's bytes, for comparison."""
        copy = torch.empty(num_bytes, dtype=torch.uint8, device=self.world.device)
        _C.probe_registers(
            source=self.at(rank, name),
            target=copy.data_ptr(),
            bytes=num_bytes,
            num_sms=16,
            warps=8,
            stream=self.stream(),
        )
        return copy

    def wipe(self) -> None:
        """Other bytes than the expected ones in every place that a probe writes."""
        for place in (self.inbox, self.scale_inbox, self.out, self.own_place, self.own_scale_place):
            place.view(torch.uint8).fill_(0xA5)
        self.world.barrier()

    def check_push(self, row_bytes: int, own: bool, scales: bool) -> None:
        self.world.barrier()
        size, scale_size = self.num_rows * row_bytes, self.num_rows * self.scale_bytes
        _expect("rows", self.inbox, self.theirs(self.before, "rows", size))
        if own:
            _expect("own rows", self.own_place, self.rows.view(torch.uint8).flatten()[:size])
        if scales:
            _expect("scales", self.scale_inbox, self.theirs(self.before, "scales", scale_size))
        if scales and own:
            _expect("own scales", self.own_scale_place, self.scales.flatten())

    def check_pull(self) -> None:
        self.world.barrier()
        theirs = self.theirs(self.next, "rows", self.num_rows * self.row_bytes).view(torch.bfloat16)
        total = (0.0 + theirs.view(self.own.shape).float() + self.own.float()).bfloat16()
        total.view(torch.int16)[total.isnan()] = 0x7FC0
        _expect("sums", self.out, total.view(torch.uint8).flatten())

    def check_copy(self, to_peer: bool) -> None:
        self.world.barrier()
        size = self.num_rows * self.row_bytes
        got, source = (self.inbox, self.before) if to_peer else (self.out, self.next)
        _expect("copied rows", got, self.theirs(source, "rows", size))

    def close(self) -> None:
        self.world.barrier()
        for name in SHARED_NAMES:
            delattr(self, name)
        self.memory.close()


def _expect(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    raw = got.view(torch.uint8).flatten()[: expected.numel()]
    if not torch.equal(raw, expected):
        raise RuntimeError(f"probe: {int((raw != expected).sum())} of {expected.numel()} bytes of {what} are wrong")


@dataclasses.dataclass(frozen=True)
class Probe:
    """One limit.

    Attributes:
        link_bytes: of a row, over the link.
        shapes: what is tried.
        launch: (rig, shape, SMs).
        check: what the launch must have done.
    """

    key: str
    name: str
    link_bytes: int
    shapes: Sequence[Any]
    launch: Callable[[Rig, Any, int], None]
    check: Callable[[Rig], None]


def probes_of(row_bytes: int, scale_bytes: int) -> list[Probe]:
    """All probes for bf16 rows of ``row_bytes``, and FP8 rows of half of it with ``scale_bytes``."""
    narrow = row_bytes // 2

    def push(key: str, name: str, size: int, own: bool, scales: bool = False) -> Probe:
        return Probe(
            key,
            name,
            size + (scale_bytes if scales else 0),
            list(push_shapes(size, scales)),
            lambda rig, shape, num_sms: rig.push(shape, num_sms, size, own, scales),
            lambda rig: rig.check_push(size, own, scales),
        )

    def copy(key: str, name: str, to_peer: bool) -> Probe:
        return Probe(
            key,
            name,
            row_bytes,
            [Registers(warps) for warps in (8, 16, 32)],
            lambda rig, shape, num_sms: rig.copy(shape, num_sms, to_peer),
            lambda rig: rig.check_copy(to_peer),
        )

    return [
        push("push_fp8", "FP8 rows to the peer", narrow, False),
        push("push_bf16", "bf16 rows to the peer", row_bytes, False),
        push("place_fp8", "FP8 rows to the peer and to local memory", narrow, True),
        push("place_bf16", "bf16 rows to the peer and to local memory", row_bytes, True),
        push("place_fp8_scales", "FP8 rows and scales to the peer and to local memory", narrow, True, True),
        Probe(
            "pull_bf16",
            "bf16 rows from the peer, plus the own, written once",
            row_bytes,
            list(pull_shapes()),
            lambda rig, shape, num_sms: rig.pull(shape, num_sms),
            lambda rig: rig.check_pull(),
        ),
        copy("store_16b", "16-byte register stores to the peer", True),
        copy("load_16b", "16-byte register loads from the peer", False),
    ]


def times_of(rig: Rig, probe: Probe, num_sms: int, iterations: int = SEARCH_ITERATIONS) -> dict[Any, float]:
    """Microseconds by shape, slowest rank, one short round each."""
    world, mine = rig.world, []
    for shape in probe.shapes:
        world.barrier()
        mine.append(world.microseconds(lambda shape=shape: probe.launch(rig, shape, num_sms), iterations))
    slowest = [max(times) for times in zip(*world.gather(mine), strict=True)]
    return dict(zip(probe.shapes, slowest, strict=True))


def best_of(rig: Rig, probe: Probe, num_sms: int) -> dict[str, Any]:
    """The limit at ``num_sms``: the finalists of a short search, measured like the operations, and checked."""
    found = times_of(rig, probe, num_sms)
    rounds: dict[Any, list[float]] = {}
    for shape in sorted(found, key=lambda shape: found[shape])[:FINALISTS]:
        rig.wipe()
        probe.launch(rig, shape, num_sms)
        probe.check(rig)
        rounds[shape] = rig.world.slowest(lambda shape=shape: probe.launch(rig, shape, num_sms))
    best = min(rounds, key=lambda shape: summary(rounds[shape])["median_us"])
    figures = summary(rounds[best])
    num_bytes = rig.num_rows * probe.link_bytes
    return {
        "key": probe.key,
        "name": probe.name,
        "num_sms": num_sms,
        **figures,
        "bytes_over_link": num_bytes,
        "gb_s": round(num_bytes / figures["median_us"] / 1e3, 2),
        "shape": str(best),
    }
