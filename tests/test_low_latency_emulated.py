"""Low-latency kernels, bit for bit, without a GPU: their source runs on the CPU, all ranks in one process."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import emulated
import pytest
import reference as ref
import torch
from emulated import RECEIVE, SEND, WHOLE, Ranks
from harness import expect_bits
from low_latency_cases import LowLatencyCase, verify
from low_latency_soak import draw_cases

from deep_ep import logfmt

pytestmark = pytest.mark.skipif(emulated.unavailable() is not None, reason=str(emulated.unavailable()))

# DeviceError and Phase of csrc/layout/control_block.h.
TIMEOUT, SIGNATURE, EXPERT_RANGE, REFUSED = 1, 2, 4, 5
ANNOUNCEMENT = 1


def no_failures(ranks: Ranks) -> None:
    failures = [ranks.failure(rank) for rank in range(ranks.case.num_ranks)]
    assert all(record == [0, 0, 0, 0] for record in failures), f"error, phase, peer, refused: {failures}"


def in_parts(ranks: Ranks, operation: Any, order: list[int], inputs: list[torch.Tensor], waits: bool = True) -> None:
    """One operation of all ranks, in two launches with hooks; then inputs may be written once the first is over."""
    if ranks.case.finish != "hook":
        for rank in order:
            operation(rank, WHOLE)
        if waits:
            ranks.wait()
        return
    for rank in order:
        operation(rank, SEND)
    if waits:
        ranks.wait()
        for tensor in inputs:
            tensor.fill_(float("nan"))
    for rank in reversed(order):
        operation(rank, RECEIVE)
    if waits:
        ranks.wait()


def check(case: LowLatencyCase, seed: int = 0, knows_positions: bool = True, **options: Any) -> None:
    pick = random.Random(seed)
    with emulated.emulated(case, **options) as ranks:
        order = pick.sample(range(case.num_ranks), case.num_ranks)
        in_parts(ranks, ranks.dispatch, order, [x for x, _, _ in ranks.inputs])
        no_failures(ranks)

        def combine(rank: int, part: int) -> None:
            ranks.combine(rank, part, knows_positions=knows_positions or rank % 2 == 0)

        # Without positions rows are looked up, and leave in the receive part.
        in_parts(ranks, combine, order, ranks.rows if knows_positions else [])
        no_failures(ranks)
        for rank in range(case.num_ranks):
            verify_plain_or_coded(case, rank, ranks)


def verify_plain_or_coded(case: LowLatencyCase, rank: int, ranks: Ranks) -> None:
    got = ranks.result(rank)
    if case.use_logfmt and case.expert_major:
        inputs = [emulated.make_inputs(case, r) for r in range(case.num_ranks)]
        rows = [logfmt.simulate(emulated.make_expert_rows(case, r)) for r in range(case.num_ranks)]
        topk, weights = [i[1] for i in inputs], [i[2] for i in inputs]
        want = ref.low_latency_combine(rows, topk, weights, case.num_experts, rank, case.sum_at_home)
        expect_bits(got["combined"], want, f"rank {rank} of {case}: combined")
        return
    verify(case, rank, got)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("fp8", ["none", "fp32", "pow2", "ue8m0"])
def test_formats(num_ranks, fp8):
    case = LowLatencyCase(num_ranks, tuple(range(5, 5 + num_ranks)), 8, 640, 3, 7, fp8=fp8, mask="some")
    check(case)
    check(dataclasses.replace(case, finish="hook", idx_dtype=torch.int32))


@pytest.mark.parametrize("finish", ["sync", "hook"])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("with_lines", [False, True])
@pytest.mark.parametrize("sum_at_home", [False, True])
def test_ways_to_call(finish, early, with_lines, sum_at_home):
    """Rows in lines and in slots, summed by experts' ranks or at home."""
    case = LowLatencyCase(
        2, (9, 4), 9, 2560, 4, 6, finish=finish, weights_at_dispatch=early, sum_at_home=sum_at_home, mask="some"
    )
    check(case, with_lines=with_lines)
    if not early:
        check(case, knows_positions=False, with_lines=with_lines)


@pytest.mark.parametrize("finish", ["sync", "hook"])
@pytest.mark.parametrize("fp8", ["none", "fp32", "ue8m0"])
@pytest.mark.parametrize("use_logfmt", [False, True])
def test_rows_by_source(finish, fp8, use_logfmt):
    case = LowLatencyCase(3, (5, 0, 8), 8, 1024, 4, 7, expert_major=False, finish=finish, fp8=fp8, mask="some")
    for early in (False, True):
        check(dataclasses.replace(case, weights_at_dispatch=early, use_logfmt=use_logfmt))


@pytest.mark.parametrize("finish", ["sync", "hook"])
@pytest.mark.parametrize("sum_at_home", [False, True])
def test_logfmt(finish, sum_at_home):
    check(LowLatencyCase(2, (6, 3), 6, 2304, 4, 6, finish=finish, use_logfmt=True, sum_at_home=sum_at_home))


@pytest.mark.parametrize(
    ("hidden", "fp8"), [(8, "none"), (136, "none"), (128, "fp32"), (1160, "none"), (7168, "ue8m0")]
)
def test_hidden_sizes(hidden, fp8):
    for finish in ("sync", "hook"):
        check(LowLatencyCase(2, (3, 2), 3, hidden, 4, 6, fp8=fp8, finish=finish))


@pytest.mark.parametrize("mask", ["none", "some", "rows", "all", "skew"])
@pytest.mark.parametrize("tokens", [(0, 0), (1, 0), (7, 6)])
def test_tokens_and_masks(mask, tokens):
    check(LowLatencyCase(2, tokens, 7, 256, 4, 6, mask=mask, finish="hook" if sum(tokens) % 2 else "sync"))


@pytest.mark.parametrize("finish", ["sync", "hook"])
@pytest.mark.parametrize("with_lines", [False, True])
def test_many_tokens(finish, with_lines):
    """Above `kShortTokens`, where roles are divided."""
    case = LowLatencyCase(2, (150, 131), 150, 1280, 4, 6, finish=finish, mask="some")
    check(case, num_sms=5, with_lines=with_lines)
    check(dataclasses.replace(case, weights_at_dispatch=True, fp8="none"), num_sms=5, with_lines=with_lines)


@pytest.mark.parametrize("num_topk", [1, 9, 32])
def test_top_k(num_topk):
    for finish in ("sync", "hook"):
        check(LowLatencyCase(2, (5, 3), 5, 256, num_topk, 40, finish=finish, idx_dtype=torch.int32))


@pytest.mark.parametrize("seed", range(8))
def test_random_cases(seed):
    """Delays at every signal and wait, launches of other sizes, ranks in another order; nothing of it changes a bit."""
    pick = random.Random(seed)
    for case in draw_cases(pick.choice((2, 2, 3, 4)), 3, 200 + seed):
        case = dataclasses.replace(
            case,
            tokens=tuple(min(tokens, 24) for tokens in case.tokens),
            max_tokens=min(case.max_tokens, 24),
            hidden=min(case.hidden, 1536),
            finish=pick.choice(("sync", "hook")),
            sum_at_home=case.expert_major and pick.random() < 0.3,
            zero_copy=False,
        )
        options = {"num_sms": pick.choice((1, 2, 4)), "with_lines": pick.random() < 0.7}
        check(case, seed, delay_seed=pick.choice((0, seed + 1)), **options)


@pytest.mark.parametrize("finish", ["sync", "hook"])
@pytest.mark.parametrize("early", [False, True])
def test_back_to_back(finish, early):
    """Operations behind one another on each rank's stream, each beginning before those ahead have ended."""
    case = LowLatencyCase(2, (6, 5), 6, 512, 3, 6, finish=finish, weights_at_dispatch=early, mask="some")
    with emulated.emulated(case) as ranks:
        rounds = []
        for _ in range(4):
            ranks.new_outputs()
            rounds.append((ranks.outputs, ranks.combined))
            for operation in (ranks.dispatch, ranks.combine):
                in_parts(ranks, operation, [0, 1], [], waits=False)
        ranks.wait()
        no_failures(ranks)
        for ranks.outputs, ranks.combined in rounds:
            for rank in range(2):
                verify(case, rank, ranks.result(rank))


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("leaves_out", [False, True])
def test_hooked_combines_send_sums_of_what_they_know(num_ranks, leaves_out):
    """Ranks send in turn, so each knows what the homes before it and itself want, and of the others nothing.

    What travels as a sum has its weights already: weights that are doubled after the sends tell which rows do.
    """
    case = LowLatencyCase(num_ranks, (5,) * num_ranks, 5, 1024, 4, 3 * num_ranks, fp8="none", finish="hook")
    owner_of = torch.tensor(ref.rank_of_expert(case.num_experts, num_ranks))
    for last in range(num_ranks):
        turns = [(turn + last + 1) % num_ranks for turn in range(num_ranks)]
        with emulated.emulated(case) as ranks:
            in_parts(ranks, ranks.dispatch, turns, [])
            topk, want_weights = [], []
            for rank, (x, dispatched, weights) in enumerate(ranks.inputs):
                idx = dispatched
                if leaves_out:  # some of what was dispatched is no longer wanted
                    idx = torch.where(torch.arange(idx.numel()).view(idx.shape) % 5 == 1, -1, idx)
                    ranks.inputs[rank] = (x, idx, weights)
                place = torch.tensor([turns.index(owner) for owner in range(num_ranks)])
                unknown = (idx >= 0) & (place[owner_of[idx.clamp(min=0)]] < place[rank])
                assert bool(unknown.any()) == (turns[0] != rank), "the case tells nothing"
                topk.append(dispatched)
                # Without a weight it has the same place among the rows, and adds nothing.
                want_weights.append(torch.where(idx < 0, 0.0, torch.where(unknown, 2 * weights, weights)))
            given = [rows.clone() for rows in ranks.rows]
            for rank in turns:
                ranks.combine(rank, SEND)
                ranks.wait(rank)
            for (_, _, weights), rows in zip(ranks.inputs, ranks.rows, strict=True):
                weights *= 2
                rows.fill_(float("nan"))
            for rank in turns:
                ranks.combine(rank, RECEIVE)
            ranks.wait()
            no_failures(ranks)
            for rank in range(num_ranks):
                want = ref.low_latency_combine(given, topk, want_weights, case.num_experts, rank)
                expect_bits(ranks.combined[rank], want, f"rank {rank}, sent in the order {turns}")


@pytest.mark.parametrize("finish", ["sync", "hook"])
def test_a_rank_that_does_not_come_is_masked(finish):
    """The others go on: without its tokens, and without what its experts would have made."""
    case = LowLatencyCase(3, (4, 6, 5), 6, 512, 4, 9, finish=finish, fp8="none")
    missing = 1
    with emulated.emulated(case, mask_after_s=0.2) as ranks:
        present = [rank for rank in range(3) if rank != missing]
        in_parts(ranks, ranks.dispatch, present, [])
        in_parts(ranks, ranks.combine, present, [])
        no_failures(ranks)
        gone = ref.experts_of_rank(case.num_experts, 3)[missing]
        topk = [torch.where((idx >= gone.start) & (idx < gone.stop), -1, idx) for _, idx, _ in ranks.inputs]
        topk[missing] = topk[missing][:0]
        for rank in present:
            assert ranks.masks(rank) == [int(peer == missing) for peer in range(3)]
            packed = ref.low_latency_rows(topk, case.num_experts, rank)
            assert ranks.outputs[rank].count.tolist() == [len(expert.sources) for expert in packed]
            weights = [weights[: len(idx)] for idx, (_, _, weights) in zip(topk, ranks.inputs, strict=True)]
            want = ref.low_latency_combine(ranks.rows, topk, weights, case.num_experts, rank)
            expect_bits(ranks.combined[rank], want, f"rank {rank} without rank {missing}")


def test_failures_are_reported():
    """What is wrong, and with whom; nothing hangs."""
    case = LowLatencyCase(2, (4, 3), 4, 256, 2, 4)
    with emulated.emulated(case, timeout_s=0.3) as ranks:
        ranks.dispatch(0)
        ranks.wait()
        assert ranks.failure(0)[:3] == [TIMEOUT, ANNOUNCEMENT, 1]
        assert ranks.failure(1)[0] == 0
    with emulated.emulated(case) as ranks:
        ranks.dispatch(0)
        ranks.dispatch(1, signature=99)
        ranks.wait()
        assert {ranks.failure(rank)[0] for rank in range(2)} == {SIGNATURE}
    with emulated.emulated(case) as ranks:
        ranks.dispatch(0)
        ranks.refuse(1, 0)
        ranks.wait()
        assert ranks.failure(0) == [0, 0, 0, 2], "rank 1 refused"
        layout_range = ranks.outputs[0].handle[1]
        assert bool((layout_range[:, 1] & 0xFFFFFFFF == 0).all()), "so no rows are its own"
    with emulated.emulated(case) as ranks:
        ranks.inputs[1][1][2, 0] = 4
        for rank in range(2):
            ranks.dispatch(rank)
        ranks.wait()
        assert ranks.failure(1)[0] == EXPERT_RANGE
    too_many = dataclasses.replace(case, tokens=(5, 3))
    with emulated.emulated(too_many) as ranks, pytest.raises(RuntimeError, match="the number of tokens"):
        ranks.dispatch(0)


def test_the_comparison_can_fail():
    """It does when kernels take rows that have not come, and when a bit of a result is another."""
    found = 0
    for seed in range(1, 9):
        case = LowLatencyCase(2, (40, 24), 40, 1024, 4, 6, seed=seed)
        planted = emulated.library().world_takes_unawaited()
        with emulated.emulated(case, planted=planted, delay_seed=seed) as ranks:
            for operation in (ranks.dispatch, ranks.combine):
                in_parts(ranks, operation, [0, 1], [])
            for rank in range(2):
                try:
                    verify(case, rank, ranks.result(rank))
                except AssertionError:
                    found += 1
    assert found > 0
    case = LowLatencyCase()
    with emulated.emulated(case) as ranks:
        for operation in (ranks.dispatch, ranks.combine):
            in_parts(ranks, operation, [0, 1], [])
        ranks.combined[0].view(torch.int16)[3, 100] ^= 1
        verify(case, 1, ranks.result(1))
        with pytest.raises(AssertionError, match="combined"):
            verify(case, 0, ranks.result(0))
