"""Order between ranks: late waits are told, delays at every signal change nothing, and planted bugs do not pass."""

import gc
import logging
import threading
import time

import pytest
import torch
from cases import generator
from cuda_cases import (
    SHORT_SLEEP,
    dispatch_everywhere,
    expect_everywhere,
    fill_everywhere,
    finished,
    make_buffer,
    outcome,
)
from harness import RankContext, environ, run_ranks
from soak_cases import Mismatches

from deep_ep._native import _C
from deep_ep.engines import watch
from deep_ep.errors import ConfigError

#: Name -> bit, of the bugs that the kernels can be told to have.
PLANTED_BUGS: dict[str, int] = getattr(_C, "PLANTED_BUGS", {})


# ---------------------------------------------------------------------------------------------------------------
# Without a GPU


class Notes:
    """Stands in for `_C.PeerDomain`: late waits that a kernel would have noted."""

    def __init__(self, *notes: tuple[int, int, int, int, int]) -> None:
        self.notes = list(notes)
        self.warn_after_s = 10.0

    def take_late(self):
        return self.notes.pop(0) if self.notes else None


def test_late_waits_are_logged(caplog):
    looker = watch.DeviceWatch(interval_s=1000.0)
    first, second = Notes((1, 1, 3, 7, 6), (2, 2, 1, 9, 8)), Notes((77, 78, 0, 1, 0))
    second.warn_after_s = 0.5
    looker.add(first, 0)
    looker.add(second, 5)
    with caplog.at_level(logging.WARNING, logger="deep_ep"):
        texts = looker.look()
        assert looker.look() == []
    assert [record.getMessage() for record in caplog.records] == [f"deep_ep: {text}" for text in texts]
    assert texts == [
        "rank 0: dispatch has waited on the device for rank 3 (announcement, expected 7, seen 6) for more than 10 s",
        "rank 0: combine has waited on the device for rank 1 (end of the operation, expected 9, seen 8) for more than "
        "10 s",
        "rank 5: an operation has waited on the device for rank 0 (a phase, expected 1, seen 0) for more than 0.5 s",
    ]


def test_the_watch_lives_as_long_as_a_domain():
    looker = watch.DeviceWatch(interval_s=0.01)

    def watching() -> bool:
        return any(thread is mine for thread in threading.enumerate())

    for _ in range(2):
        notes = Notes((1, 1, 1, 2, 1))
        looker.add(notes, 0)
        mine = looker._thread
        assert mine is not None and mine.daemon
        deadline = time.monotonic() + 10
        while notes.notes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert notes.notes == []
        assert watching()
        del notes
        gc.collect()
        while watching() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not watching()
        assert looker._thread is None


@pytest.mark.parametrize(("value", "want"), [(None, 0), ("", 0), ("0", 0), (" 17 ", 17), (str(2**32 - 1), 2**32 - 1)])
def test_delay_seed(value, want):
    with environ(DEEP_EP_DEBUG_DELAYS=value):
        assert watch.debug_delay_seed() == want


@pytest.mark.parametrize("value", ["-1", "x", "1.5", str(2**32)])
def test_bad_delay_seed(value):
    with environ(DEEP_EP_DEBUG_DELAYS=value), pytest.raises(ConfigError, match="DEEP_EP_DEBUG_DELAYS"):
        watch.debug_delay_seed()


@pytest.mark.skipif(not _C.has_cuda, reason="built without nvcc")
def test_planted_bugs_have_bits_of_their_own():
    bits = list(PLANTED_BUGS.values())
    assert len(bits) >= 5
    assert all(bit & (bit - 1) == 0 and bit > 0 for bit in bits)
    assert len(set(bits)) == len(bits)


# ---------------------------------------------------------------------------------------------------------------
# On GPUs


def domain_of(buffer):
    return buffer.runtime.kernels._domain


def run_late_rank(ctx: RankContext) -> list[str]:
    buffer = make_buffer(ctx, timeout_s=30)
    dispatch_everywhere(buffer, fill_everywhere(ctx, 8, 256, 1))  # loads the kernels
    finished(buffer)
    domain_of(buffer).warn_after_s = 0.3
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    logging.getLogger("deep_ep").addHandler(handler)
    try:
        ctx.barrier()
        if ctx.rank == 1:
            time.sleep(1.5)
        recv = dispatch_everywhere(buffer, fill_everywhere(ctx, 8, 256, 3))[0]
        finished(buffer)
        expect_everywhere(ctx, recv, 8, 3, "after a long wait")
        watch.device_watch.look()  # what the thread has not yet seen
        time.sleep(0.1)  # what it is about to log
    finally:
        logging.getLogger("deep_ep").removeHandler(handler)
    ctx.barrier()
    return [text for text in texts if "waited on the device" in text]


@pytest.mark.gpu
def test_a_long_wait_is_told_once(on_gpus):
    on_gpus(2)
    waiting, late = run_ranks(2, run_late_rank)
    assert len(waiting) == 1, waiting
    assert "dispatch has waited on the device for rank 1 (announcement" in waiting[0]
    assert "more than 0.3 s" in waiting[0]
    assert late == []


def run_planted(ctx: RankContext, planted: int, seed: int, steps: int = 60):
    """Operations whose results are known beforehand; what differed, or the error that ended them.

    Only calls that need nothing of a peer but what its announcement says: a cached dispatch, and a combine of rows in
    symmetric memory. So a rank that works with an outdated announcement writes where it wrote two operations before.
    """
    tokens, hidden = 64, 256
    buffer = make_buffer(ctx, timeout_s=3.0)
    handle = dispatch_everywhere(buffer, fill_everywhere(ctx, tokens, hidden, 1))[4]
    base = [
        torch.randn(tokens, hidden, generator=generator(600, rank)).bfloat16().to(ctx.device)
        for rank in range(ctx.num_ranks)
    ]
    everything = torch.cat(base)
    mismatches = Mismatches(ctx.device)
    sent = [base[ctx.rank] + step for step in range(steps)]
    wanted = [everything + step for step in range(steps)]
    summed = []
    for x in sent:
        total = torch.zeros(tokens, hidden, device=ctx.device)
        for rank in range(ctx.num_ranks):
            total = total + (x + (rank + 1)).float()
        summed.append(total.bfloat16())
    # The first calls of each kind load kernels and fill the slots of both parities.
    for _ in range(2):
        buffer.dispatch(sent[0], handle=handle)
        shared = buffer.empty_combine_input(handle, hidden, torch.bfloat16)
        buffer.combine(shared.copy_(wanted[0]), handle)
        buffer.dispatch(sent[0], handle=handle)
    finished(buffer)
    ctx.barrier()
    domain_of(buffer).set_debug(seed, planted)

    def act() -> None:
        kept = []
        torch.cuda._sleep(SHORT_SLEEP)  # a full queue: what follows an operation looks at its results at once
        for step in range(steps):
            out = buffer.dispatch(sent[step], handle=handle)[0]
            mismatches.compare(out, wanted[step], f"dispatch {step}")
            kept.append((out, step))
            if step >= steps // 2:
                shared = buffer.empty_combine_input(handle, hidden, torch.bfloat16)
                shared.copy_(out + (ctx.rank + 1))
                mismatches.compare(buffer.combine(shared, handle)[0], summed[step], f"combine {step}")
            if len(kept) > 3:
                old, number = kept.pop(0)
                mismatches.compare(old, wanted[number], f"dispatch {number}, kept until {step}")
        finished(buffer)

    failure = outcome(act)
    torch.cuda.synchronize()
    ctx.barrier()  # nobody frees memory that a peer may still write to
    return mismatches.found(), failure


def run_planted_places(ctx: RankContext, planted: int, seed: int, steps: int = 60):
    """Like `run_planted`, by dispatches that route anew, each otherwise than the ones before.

    Of fixed capacity, so that the host waits for nothing. Whatever a place says, rows land in the output or nowhere.
    """
    tokens, hidden, ranks = 96, 256, ctx.num_ranks
    buffer = make_buffer(ctx, timeout_s=3.0)
    base = [
        torch.randn(tokens, hidden, generator=generator(700, rank)).bfloat16().to(ctx.device) for rank in range(ranks)
    ]
    sent, wanted = [], []
    for step in range(steps):
        # Of this run alone: places that an earlier one left in the handle's memory must not be right.
        keys = [(701, rank, step, planted, seed) for rank in range(ranks)]
        idx = [torch.randint(-1, ranks, (tokens, 2), generator=generator(*key)) for key in keys]
        mine = idx[ctx.rank].to(ctx.device)
        layout = buffer.get_dispatch_layout(mine, ranks)
        weights = torch.ones(tokens, 2, device=ctx.device)
        sent.append((base[ctx.rank] + step, None, layout[0], None, layout[3], layout[2], mine, weights))
        come = [base[rank][(idx[rank] == ctx.rank).any(1).to(ctx.device)] + step for rank in range(ranks)]
        wanted.append(torch.cat(come))
    mismatches = Mismatches(ctx.device)
    for arguments in sent[:2]:
        buffer.dispatch(*arguments, num_worst_tokens=tokens * ranks)
    finished(buffer)
    ctx.barrier()
    domain_of(buffer).set_debug(seed, planted)

    def act() -> None:
        torch.cuda._sleep(SHORT_SLEEP)
        for step, arguments in enumerate(sent):
            out = buffer.dispatch(*arguments, num_worst_tokens=tokens * ranks)[0]
            mismatches.compare(out[: len(wanted[step])], wanted[step], f"dispatch {step}")
        finished(buffer)

    failure = outcome(act)
    torch.cuda.synchronize()
    ctx.barrier()
    return mismatches.found(), failure


@pytest.mark.gpu
@pytest.mark.parametrize("run", [run_planted, run_planted_places])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_differs_without_a_bug(on_gpus, seed, run):
    on_gpus(2)
    assert run_ranks(2, run, 0, seed) == [([], None)] * 2


@pytest.mark.gpu
def test_nothing_differs_on_three_ranks(on_gpus):
    on_gpus(3)
    assert run_ranks(3, run_planted, 0, 4, 12) == [([], None)] * 3
    assert run_ranks(3, run_planted_places, 0, 4, 12) == [([], None)] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(PLANTED_BUGS))
def test_planted_bugs_are_caught(on_gpus, name):
    """Each must show as bits that differ or as a typed error, soon, and leave the processes alive."""
    on_gpus(2)
    start = time.monotonic()
    run = run_planted_places if "places" in name else run_planted
    seen = []
    for seed in (1, 2, 3):
        seen = run_ranks(2, run, PLANTED_BUGS[name], seed)
        for _, failure in seen:
            assert failure is None or failure[0] in ("PeerError", "CommTimeout"), failure
        if any(found or failure for found, failure in seen):
            break
    assert any(found or failure for found, failure in seen), f"{name!r} passed unnoticed"
    assert time.monotonic() - start < 45
    assert run_ranks(2, run, 0, 1) == [([], None)] * 2, "the processes must still work"
