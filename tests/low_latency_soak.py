"""Many low-latency operations in a row without synchronisation, compared on the device with the portable engine."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import RankContext
from low_latency_cases import FP8_ARGS, LowLatencyCase, make_expert_rows, make_inputs
from soak_cases import Mismatches, as_parts

WAYS = ("sync", "async", "hook")


def draw_cases(num_ranks: int, count: int, seed: int) -> list[LowLatencyCase]:
    """Small cases of all kinds that the kernels serve; equal on all ranks. Token counts from 0 to the maximum."""
    pick = random.Random(seed)
    cases = []
    for number in range(count):
        max_tokens = pick.choice((1, 2, 8, 16, 33, 64, 150))
        fp8 = pick.choice(sorted(FP8_ARGS))
        cases.append(
            LowLatencyCase(
                num_ranks,
                tuple(pick.choice((0, 1, max_tokens, pick.randint(0, max_tokens))) for _ in range(num_ranks)),
                max_tokens,
                hidden=pick.choice((128, 384, 512, 1024, 1920) if fp8 != "none" else (8, 24, 136, 512, 1024, 2056)),
                num_topk=pick.choice((1, 2, 3, 6, 8, 16)),
                num_experts=pick.choice((num_ranks, 13, 16, 32)),
                mask=pick.choice(("none", "none", "some", "rows", "skew", "all")),
                idx_dtype=pick.choice((torch.int64, torch.int32)),
                fp8=fp8,
                weights_at_dispatch=pick.random() < 0.5,
                seed=1000 * seed + number,
            )
        )
    return cases


@dataclass
class Prepared:
    """A case on this rank: arguments and expected results on the device, all made before the first call."""

    case: LowLatencyCase
    x: torch.Tensor
    idx: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor  # of the experts [L, R * M, H]
    dropped: torch.Tensor  # idx with more entries left out
    used: torch.Tensor  # which of the L * R * M packed rows hold tokens
    recv: tuple[torch.Tensor, ...]  # these rows, and their scales
    src_info: torch.Tensor  # of these rows
    layout_range: torch.Tensor
    count: torch.Tensor
    combined: dict[tuple[bool, bool], torch.Tensor]  # by (sum_at_home, with `dropped`)
    handle: Any = None
    has_weights: bool = False  # the handle: they went with its dispatch
    spare: Any = None  # recv_x of a dispatch, which another may write to

    def significant(self, packed: torch.Tensor) -> torch.Tensor:
        """The used rows of [L, R * M, ...], without a wait for the device."""
        return packed.reshape(-1, *packed.shape[2:])[self.used]

    def topk(self, with_dropped: bool) -> torch.Tensor:
        return self.dropped if with_dropped else self.idx


def used_rows(count: torch.Tensor, slots: int) -> torch.Tensor:
    """Numbers of the rows that hold tokens, expert by expert: int64. Waits for the device."""
    return (torch.arange(slots)[None, :] < count.cpu()[:, None]).reshape(-1).nonzero()[:, 0]


def prepare(ctx: RankContext, portable: Any, case: LowLatencyCase) -> Prepared:
    """Arguments of a case, and what the portable engine returns for them on CPU tensors (collective)."""
    x, idx, weights = make_inputs(case, ctx.rank)
    rows = make_expert_rows(case, ctx.rank)
    recv, count, handle, _, _ = portable.low_latency_dispatch(
        x, idx, case.max_tokens, case.num_experts, **FP8_ARGS[case.fp8]
    )
    pick = torch.Generator().manual_seed(case.seed + 17 * ctx.rank)
    dropped = torch.where(torch.rand(idx.shape, generator=pick) < 0.3, torch.full_like(idx, -1), idx)
    combined = {}
    for sum_at_home in (False, True):
        for with_dropped, topk in ((False, idx), (True, dropped)):
            out = portable.low_latency_combine(rows, topk, weights, handle, sum_at_home=sum_at_home)[0]
            combined[sum_at_home, with_dropped] = out.to(ctx.device)
    used = used_rows(count, rows.shape[1])

    def at_used(packed: torch.Tensor) -> torch.Tensor:
        return packed.reshape(-1, *packed.shape[2:])[used].to(ctx.device)

    return Prepared(
        case,
        x.to(ctx.device),
        idx.to(ctx.device),
        weights.to(ctx.device),
        rows.to(ctx.device),
        dropped.to(ctx.device),
        used.to(ctx.device),
        tuple(at_used(part) for part in as_parts(recv)),
        at_used(handle[0]),
        handle[1].to(ctx.device),
        count.to(ctx.device),
        combined,
    )


class Soak:
    """Random operations on one buffer, the same kinds in the same order on all ranks; at most two are outstanding."""

    def __init__(self, ctx: RankContext, buffer: Any, prepared: list[Prepared], seed: int) -> None:
        self.mismatches = Mismatches(ctx.device)
        self.counts: collections.Counter[str] = collections.Counter()
        self._buffer, self._prepared, self._pick = buffer, prepared, random.Random(seed)
        self._pending: collections.deque[Callable[[], None]] = collections.deque()

    def run(self, count: int) -> None:
        for number in range(count):
            which = self._pick.choice(self._prepared)
            way = self._pick.choice(WAYS)
            options = {"async_finish": way == "async", "return_recv_hook": way == "hook"}
            # A handle can be used while its dispatch is not outstanding.
            if which.handle is None or self._pick.random() < 0.4:
                kind, check = "dispatch", self._dispatch(number, which, options)
            else:
                kind, check = "combine", self._combine(number, which, options)
            self.counts[f"{kind}, {way}"] += 1
            if way == "hook":
                self._pending.append(check)
                # Sometimes the next operation begins before this one has ended.
                while len(self._pending) > self._pick.randint(0, 1):
                    self._pending.popleft()()
            else:
                check()
                # A set is used by every second operation of a kind: what is open from before must not stay so for long.
                self._drain()
        self._drain()

    def _drain(self) -> None:
        while self._pending:
            self._pending.popleft()()

    def _dispatch(self, number: int, which: Prepared, options: dict[str, bool]) -> Callable[[], None]:
        case, with_weights = which.case, self._pick.random() < 0.5
        out, which.spare = (which.spare, None) if self._pick.random() < 0.5 else (None, which.spare)
        what = f"operation {number}, dispatch of {case}, with_weights={with_weights}, out={out is not None}"
        stats = torch.zeros_like(which.count)
        recv, count, handle, event, hook = self._buffer.low_latency_dispatch(
            which.x,
            which.idx,
            case.max_tokens,
            case.num_experts,
            stats,
            topk_weights=which.weights if with_weights else None,
            out=out,
            **FP8_ARGS[case.fp8],
            **options,
        )
        # Combines of this case use the old handle as long as the new one is outstanding.
        if hook is None:
            which.handle, which.has_weights = handle, with_weights

        def check() -> None:
            if hook is not None:
                hook()
                which.handle, which.has_weights = handle, with_weights
            elif event.event is not None:
                event.current_stream_wait()
            for i, (got, want) in enumerate(zip(as_parts(recv), which.recv, strict=True)):
                self.mismatches.compare(which.significant(got), want, f"{what}: part {i}")
            self.mismatches.compare(which.significant(handle[0]), which.src_info, f"{what}: src_info")
            # Where a block is empty, its begin is of no use to anyone.
            empty = (which.layout_range & 0xFFFFFFFF) == 0
            got_range = torch.where(empty, handle[1] & 0xFFFFFFFF, handle[1])
            want_range = torch.where(empty, 0, which.layout_range)
            self.mismatches.compare(got_range, want_range, f"{what}: layout_range")
            self.mismatches.compare(count, which.count, f"{what}: recv_count")
            self.mismatches.compare(stats, which.count, f"{what}: cumulative statistics")
            which.spare = recv

        return check

    def _combine(self, number: int, which: Prepared, options: dict[str, bool]) -> Callable[[], None]:
        pick = self._pick
        sum_at_home, with_dropped, zero_copy = pick.random() < 0.3, pick.random() < 0.3, pick.random() < 0.3
        handle, rows, has_weights = which.handle, which.rows, which.has_weights
        if pick.random() < 0.3:  # as a caller rebuilds it: only the values are left
            handle, has_weights = (handle[0].clone(), handle[1].clone(), *handle[2:]), False
        if has_weights and not sum_at_home:  # the sums are of what was dispatched
            with_dropped = False
        if zero_copy:
            self._buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
        combined, event, hook = self._buffer.low_latency_combine(
            rows,
            which.topk(with_dropped),
            which.weights,
            handle,
            zero_copy=zero_copy,
            sum_at_home=sum_at_home,
            **options,
        )

        def check() -> None:
            if hook is not None:
                hook()
            elif event.event is not None:
                event.current_stream_wait()
            how = f"sum_at_home={sum_at_home}, weights at dispatch={has_weights}"
            what = f"operation {number}, combine of {which.case}, {how}"
            self.mismatches.compare(combined, which.combined[sum_at_home, with_dropped], what)

        return check
