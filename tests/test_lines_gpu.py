"""Lines of 128 bytes are seen whole or not at all: asked of the hardware, by what low-latency rows are sent with.

And rows where lines are not used.
"""

import os
from typing import Any

import pytest
import torch
from cuda_cases import make_buffer
from harness import MPS_VARIABLES, RankContext, environ, run_ranks
from low_latency_cases import LowLatencyCase, run_case, verify

from deep_ep._native import _C, current_stream
from deep_ep.engines.mesh import members_of
from deep_ep.engines.peer_memory import PeerMemory

NUM_SMS, CHANNELS = 8, 16
NUM_CHANNELS = NUM_SMS * CHANNELS
ROUNDS = 40_000  # 5.1 million steps a rank, each of 9 lines
FAULT_ROUNDS = 1_600
TIMEOUT_S = 20.0
#: The kinds of words of a step, which are also what a fault of the same name spoils.
KINDS = ("halves", "displaced", "scales")

needs_build = pytest.mark.skipif(not _C.has_cuda, reason="needs a CUDA build")


def ask(ctx: RankContext, distance: int, rounds: int, planted: int) -> dict[str, int]:
    """What this rank counts of the steps that rank ``rank ^ distance`` sends it.

    ``planted`` is the fault in the steps that this rank sends, 0 for none.
    """
    members = members_of(ctx.group, None)
    peer = ctx.rank ^ distance
    memory = PeerMemory(members, ctx.device, 4096, 4 << 20)
    inbox = memory.empty((_C.probe_lines_bytes(NUM_CHANNELS),), torch.uint8).zero_()
    counts = torch.zeros(len(_C.PROBE_LINES_COUNTS), dtype=torch.int64, device=ctx.device)
    offset = members.gather(memory.offset_of(inbox))[peer]
    torch.cuda.synchronize()
    ctx.barrier()
    _C.probe_lines(
        own=inbox.data_ptr(),
        peer=memory.bases[peer] + offset,
        rank=ctx.rank,
        peer_rank=peer,
        rounds=rounds,
        planted=planted,
        num_sms=NUM_SMS,
        channels=CHANNELS,
        timeout_s=TIMEOUT_S,
        counts=counts.data_ptr(),
        stream=current_stream(ctx.device),
    )
    found = dict(zip(_C.PROBE_LINES_COUNTS, counts.tolist(), strict=True))
    ctx.barrier()  # the peer's kernel has ended
    del inbox
    memory.close()
    return found


def ask_all(ctx: RankContext) -> dict[int, dict[str, int]]:
    """Each rank with each other one, at the same time; a single rank with itself. By distance."""
    distances = range(1, ctx.num_ranks) if ctx.num_ranks > 1 else [0]
    return {distance: ask(ctx, distance, ROUNDS, 0) for distance in distances}


def ask_with_fault(ctx: RankContext, planted: int) -> dict[str, int]:
    return ask(ctx, ctx.num_ranks - 1, FAULT_ROUNDS, planted if ctx.rank == 0 else 0)


def expect_whole(found: dict[str, int], rounds: int, what: str) -> None:
    assert found["late"] == 0, f"{what}: not done within {TIMEOUT_S} s: {found}"
    assert found["steps"] == NUM_CHANNELS * rounds, f"{what}: {found}"
    assert {name: found[name] for name in ("torn", *KINDS)} == dict.fromkeys(("torn", *KINDS), 0), f"{what}: {found}"


@pytest.mark.gpu
@needs_build
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_lines_are_seen_whole(on_gpus, num_ranks):
    """One rank sends to itself; of four on two GPUs each has a peer on its own GPU and two on the other."""
    on_gpus(num_ranks)
    if torch.cuda.device_count() < num_ranks and MPS_VARIABLES[0] not in os.environ:
        pytest.skip("ranks that take turns on a GPU answer each other too slowly")
    for rank, by_distance in enumerate(run_ranks(num_ranks, ask_all)):
        for distance, found in by_distance.items():
            expect_whole(found, ROUNDS, f"rank {rank} from rank {rank ^ distance}")


@pytest.mark.gpu
@needs_build
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("fault", sorted(getattr(_C, "PROBE_LINES_FAULTS", {})))
def test_planted_faults_are_counted(on_gpus, num_ranks, fault):
    on_gpus(num_ranks)
    *others, found = run_ranks(num_ranks, ask_with_fault, _C.PROBE_LINES_FAULTS[fault])
    for other in others:  # rank 0 alone sends wrong steps
        expect_whole(other, FAULT_ROUNDS, "the rank that sends them")
    assert found["late"] == 0 and found["steps"] == NUM_CHANNELS * FAULT_ROUNDS, found
    spoiled = KINDS if fault == "tags first" else (fault,)
    assert {kind for kind in KINDS if found[kind]} == set(spoiled), found
    assert 0 < max(found[kind] for kind in spoiled) <= found["torn"] < found["steps"] // 8, found


ORDERLY: dict[str, Any] = dict(
    own=128,
    peer=256,
    rank=0,
    peer_rank=1,
    rounds=1,
    planted=0,
    num_sms=1,
    channels=1,
    timeout_s=1.0,
    counts=8,
    stream=0,
)


@needs_build
@pytest.mark.parametrize(
    "change",
    [
        {"own": 64},
        {"peer": 136},
        {"rounds": 0},
        {"rounds": (1 << 24) + 1},
        {"planted": -1},
        {"planted": 5},
        {"num_sms": 0},
        {"channels": 0},
        {"channels": 17},
        {"timeout_s": 0.0},
        {"timeout_s": -1.0},
        {"timeout_s": float("nan")},
        {"timeout_s": 601.0},
    ],
    ids=str,
)
def test_arguments_that_no_kernel_takes(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is .*, expected"):
        _C.probe_lines(**(ORDERLY | change))


@needs_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="these addresses are no memory, which a device would notice")
def test_a_launch_without_a_device_says_so():
    with pytest.raises(RuntimeError, match="probe_lines"):
        _C.probe_lines(**ORDERLY)


@needs_build
def test_names_and_sizes():
    assert list(_C.PROBE_LINES_COUNTS) == ["steps", "torn", *KINDS, "caught", "late"]
    faults = _C.PROBE_LINES_FAULTS
    assert sorted(faults) == sorted([*KINDS, "tags first"]) and sorted(faults.values()) == [1, 2, 3, 4]
    # Two sets of nine lines, and a word for each.
    assert _C.probe_lines_bytes(1) == 2 * (9 * 128 + 8) and _C.probe_lines_bytes(128) == 128 * _C.probe_lines_bytes(1)


def run_without_lines(ctx: RankContext, cases: list[LowLatencyCase]) -> list[dict[str, Any]]:
    with environ(DEEP_EP_LINES="0"):
        buffer = make_buffer(ctx)
    assert not buffer.runtime.kernels.memory.carries_lines
    return [run_case(ctx, case, buffer) for case in cases]


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rows_go_by_slots_where_lines_do_not(on_gpus, num_ranks):
    on_gpus(num_ranks)
    tokens, many = (8, 3, 0, 5)[:num_ranks], (200, 131, 7, 64)[:num_ranks]
    cases = [
        LowLatencyCase(num_ranks, *sizes, mask="some", weights_at_dispatch=early, expert_major=packed, finish=finish)
        for sizes in ((tokens, 8, 1024, 4, 9), (many, 200, 2560, 8, 32))
        for early in (False, True)
        for packed in (False, True)
        for finish in ("sync", "hook")
    ]
    for rank, results in enumerate(run_ranks(num_ranks, run_without_lines, cases)):
        for case, result in zip(cases, results, strict=True):
            verify(case, rank, result)
