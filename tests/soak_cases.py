"""Many operations of the kernels in a row without synchronisation, compared on the device with the dense reference."""

from __future__ import annotations

import collections
import random
from dataclasses import dataclass
from typing import Any

import reference as ref
import torch
from cases import (
    USE_FP8,
    Case,
    Plan,
    make_bias,
    make_cached_rows,
    make_expert_rows,
    make_weight_grads,
    to_device,
)
from harness import RankContext

from deep_ep import Buffer

PAYLOADS = ("bf16", "bf16_bits", "fp16", "fp8", "fp8_scales", "fp8_scales_colmajor", *USE_FP8, "fp32")
CACHED_PAYLOADS = ("bf16_bits", "fp32", "fp8_scales", "uint8")


class Mismatches:
    """Which of many comparisons failed, counted where the tensors are, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._flags: list[torch.Tensor] = []
        self._names: list[str] = []
        self._device = device

    def compare(self, got: torch.Tensor, want: torch.Tensor, what: str) -> None:
        """Note whether the bytes differ; another shape or dtype raises at once."""
        if got.shape != want.shape or got.dtype != want.dtype:
            raise AssertionError(f"{what}: {tuple(got.shape)} {got.dtype}, not {tuple(want.shape)} {want.dtype}")
        if got.numel():
            self._flags.append((got.view(torch.uint8) != want.view(torch.uint8)).any())
            self._names.append(what)

    def found(self) -> list[str]:
        """What differed, in the order of the comparisons. Waits for the device."""
        if not self._flags:
            return []
        bad = torch.stack(self._flags).cpu()
        return [name for name, flag in zip(self._names, bad.tolist(), strict=True) if flag]


def draw_cases(num_ranks: int, count: int, seed: int) -> list[Case]:
    """Small cases of all kinds that the kernels serve; equal on all ranks."""
    pick = random.Random(seed)
    return [
        Case(
            num_ranks,
            tokens=tuple(pick.choice((0, 1, 3, 17, 64, 150)) for _ in range(num_ranks)),
            hidden=pick.choice((256, 384, 512, 1024)),
            num_topk=pick.choice((1, 2, 4, 8)),
            num_experts=pick.choice((8, 13, 32)),
            payload=pick.choice(PAYLOADS),
            cached_payload=pick.choice(CACHED_PAYLOADS),
            combine_dtype=pick.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
            idx_dtype=pick.choice((torch.int64, torch.int32)),
            mask=pick.choice(("none", "some", "rows", "skew", "all")),
            num_bias=pick.choice((0, 1, 2)),
            worst_extra=pick.choice((0, 5, 40)),
            seed=1000 * seed + number,
        )
        for number in range(count)
    ]


@dataclass
class Prepared:
    """A case on this rank: arguments and expected results on the device, all made before the first call."""

    case: Case
    num_recv: int
    num_worst: int
    x: Any
    topk: tuple[torch.Tensor, torch.Tensor]
    cached_x: Any
    rows: torch.Tensor  # of the experts, for a worst-case handle; the first num_recv count
    grads: torch.Tensor
    bias: list[torch.Tensor]
    recv: tuple[torch.Tensor, ...]
    recv_topk: tuple[torch.Tensor, torch.Tensor]
    counts: list[int]
    cached: tuple[torch.Tensor, ...]
    combined: dict[bool, torch.Tensor]  # with bias or without
    combined_weights: torch.Tensor
    handle: Any = None


def _parts(values: list[Any]) -> list[list[torch.Tensor]]:
    return [[v[i] for v in values] for i in range(len(values[0]))] if isinstance(values[0], tuple) else [values]


def prepare(ctx: RankContext, case: Case) -> Prepared:
    plan = Plan.of(case)
    rank, route, everyone = ctx.rank, plan.route, range(case.num_ranks)
    own = plan.inputs[rank]
    cached_x = [make_cached_rows(case, r) for r in everyone]
    rows = [make_expert_rows(case, r, plan.num_worst) for r in everyone]
    grads = [make_weight_grads(case, r, plan.num_worst) for r in everyone]
    bias = make_bias(case, rank)
    idx, weights = ref.recv_topk(
        [i.topk_idx for i in plan.inputs], [i.topk_weights for i in plan.inputs], route, case.num_experts, rank
    )
    num_local = len(ref.experts_of_rank(case.num_experts, case.num_ranks)[rank])
    prepared = Prepared(
        case=case,
        num_recv=plan.num_recv[rank],
        num_worst=plan.num_worst,
        x=own.x,
        topk=(own.topk_idx, own.topk_weights),
        cached_x=cached_x[rank],
        rows=rows[rank],
        grads=grads[rank],
        bias=bias,
        recv=tuple(ref.gather(part, route, rank) for part in _parts(plan.sent())),
        recv_topk=(idx, weights),
        counts=ref.counts_list(idx, num_local),
        cached=tuple(ref.gather(part, route, rank) for part in _parts(cached_x)),
        combined={with_bias: ref.combine(rows, route, rank, bias if with_bias else []) for with_bias in (False, True)},
        combined_weights=ref.combine_weights(grads, route, rank),
    )
    for name, value in vars(prepared).items():
        if name == "combined":
            prepared.combined = {key: tensor.to(ctx.device) for key, tensor in value.items()}
        elif name not in ("case", "counts"):
            setattr(prepared, name, to_device(value, ctx.device))
    return prepared


def as_parts(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


class Soak:
    """Random operations on one buffer, the same kinds in the same order on all ranks."""

    def __init__(self, ctx: RankContext, buffer: Any, prepared: list[Prepared], seed: int) -> None:
        self.mismatches = Mismatches(ctx.device)
        self._buffer, self._prepared, self._pick = buffer, prepared, random.Random(seed)
        # Outputs that live on while later operations run; nothing may write to them.
        self._kept: collections.deque[tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], str]] = (
            collections.deque()
        )
        self.counts: collections.Counter[str] = collections.Counter()

    def run(self, count: int) -> None:
        default_sms = Buffer.num_sms
        try:
            for number in range(count):
                Buffer.set_num_sms(self._pick.choice((2, 4, 20, 32)))
                prepared = self._pick.choice(self._prepared)
                kind = self._pick.choice(("counted", "worst", "cached", "combine", "cached", "combine"))
                if prepared.handle is None and kind in ("cached", "combine"):
                    kind = "counted"
                options = {"async_finish": True} if self._pick.random() < 0.3 else {}
                self.counts[kind] += 1
                what = f"operation {number}, {kind} of {prepared.case}"
                if kind == "combine":
                    self._combine(prepared, options, what)
                elif kind == "cached":
                    out = self._buffer.dispatch(prepared.cached_x, handle=prepared.handle, **options)
                    self._ready(out[5])
                    self._keep(as_parts(out[0]), prepared.cached, what)
                else:
                    self._dispatch(prepared, kind == "worst", options, what)
                while len(self._kept) > 4:
                    self._drop()
        finally:
            Buffer.set_num_sms(default_sms)
        while self._kept:
            self._drop()

    def _ready(self, event: Any) -> None:
        if event.event is not None:
            event.current_stream_wait()

    def _compare(self, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], what: str) -> None:
        for i, (mine, expected) in enumerate(zip(got, want, strict=True)):
            self.mismatches.compare(mine[: expected.shape[0]], expected, f"{what} [{i}]")

    def _keep(self, got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], what: str) -> None:
        self._compare(got, want, what)
        if self._pick.random() < 0.5:
            self._kept.append((got, want, what))

    def _drop(self) -> None:
        got, want, what = self._kept.popleft()
        self._compare(got, want, f"kept since {what}")

    def _dispatch(self, prepared: Prepared, worst: bool, options: dict[str, Any], what: str) -> None:
        case = prepared.case
        layout = self._buffer.get_dispatch_layout(prepared.topk[0], case.num_experts)
        fp8 = {"use_fp8": True, **USE_FP8[case.payload]} if case.payload in USE_FP8 else {}
        recv, idx, weights, counts, prepared.handle, event = self._buffer.dispatch(
            prepared.x,
            None,
            layout[0],
            layout[1],
            layout[3],
            layout[2],
            *prepared.topk,
            num_worst_tokens=prepared.num_worst if worst else 0,
            **fp8,
            **options,
        )
        self._ready(event)
        rows = prepared.num_worst if worst else prepared.num_recv
        if as_parts(recv)[0].shape[0] != rows or counts != ([] if worst else prepared.counts):
            raise AssertionError(f"{what}: {as_parts(recv)[0].shape[0]} rows, counts {counts}")
        self._keep((*as_parts(recv), idx, weights), (*prepared.recv, *prepared.recv_topk), what)

    def _combine(self, prepared: Prepared, options: dict[str, Any], what: str) -> None:
        rows = prepared.rows[: prepared.handle[3].shape[0]]
        if self._pick.random() < 0.5:  # where the peers read it in place
            shared = self._buffer.empty_combine_input(prepared.handle, rows.shape[1], rows.dtype)
            rows = shared.copy_(rows)
        with_weights, with_bias = self._pick.random() < 0.5, self._pick.random() < 0.5
        bias = prepared.bias if with_bias else []
        out, out_weights, event = self._buffer.combine(
            rows,
            prepared.handle,
            topk_weights=prepared.grads[: rows.shape[0]] if with_weights else None,
            bias=None if not bias else bias[0] if len(bias) == 1 else tuple(bias),
            **options,
        )
        self._ready(event)
        got, want = (out,), (prepared.combined[with_bias],)
        if with_weights:
            got, want = (out, out_weights), (*want, prepared.combined_weights)
        self._keep(got, want, what)
