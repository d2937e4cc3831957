"""What ranks do in the tests of the kernels: inputs on the GPU, and calls whose results two engines must agree on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from cases import generator, make_rows, make_topk, to_device
from harness import RankContext, environ, expect_bits

from deep_ep import Buffer, Config
from deep_ep.engines.cuda import CudaKernels
from deep_ep.engines.low_latency_plans import maker_of, view_maker
from deep_ep.engines.outputs import RowPlan
from deep_ep.errors import DeepEPError
from deep_ep.traffic import TrafficStats

NUM_EXPERTS, NUM_TOPK = 10, 3
LONG_SLEEP = 2_000_000_000  # cycles, about a second
SHORT_SLEEP = 100_000_000
MIB = 1 << 20
#: Dispatch options by the format of the scales.
FP8_OPTIONS: dict[str, dict[str, bool]] = {
    "fp32": {"use_fp8": True},
    "pow2": {"use_fp8": True, "round_scale": True},
    "ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


def make_buffer(ctx: RankContext, engine: str = "cuda", **kwargs: Any) -> Any:
    """A new buffer on the rank's GPU that uses this engine (collective)."""
    with environ(DEEP_EP_ENGINE=engine):
        buffer = ctx.fresh_buffer(device=ctx.device, **kwargs)
    assert buffer.engine == engine
    return buffer


@dataclass
class Routing:
    """A rank's tokens and where they go."""

    x: torch.Tensor
    idx: torch.Tensor
    weights: torch.Tensor


def make_routing(ctx: RankContext, seed: int, tokens: int = 24, hidden: int = 256, mask: str = "some") -> Routing:
    idx, weights = make_topk(generator(200, ctx.rank, seed), tokens, NUM_TOPK, NUM_EXPERTS, mask)
    x = make_rows(generator(201, ctx.rank, seed), "bf16", tokens, hidden)
    return Routing(*to_device((x, idx, weights), ctx.device))


def dispatch(buffer: Any, routing: Routing, x: Any = None, **kwargs: Any) -> Any:
    """Layout and uncached dispatch; results as `Buffer.dispatch` returns them."""
    layout = buffer.get_dispatch_layout(routing.idx, NUM_EXPERTS)
    return buffer.dispatch(
        routing.x if x is None else x,
        None,
        layout[0],
        layout[1],
        layout[3],
        layout[2],
        routing.idx,
        routing.weights,
        **kwargs,
    )


def round_trip(
    buffer: Any, routing: Routing, num_worst_tokens: int = 0, config: Config | None = None
) -> tuple[torch.Tensor, ...]:
    """Dispatch, cached dispatch, combine; what a caller may look at. Never waits for the device by itself."""
    recv, idx, weights, _, handle, _ = dispatch(buffer, routing, num_worst_tokens=num_worst_tokens, config=config)
    cached = buffer.dispatch(routing.x, handle=handle, config=config)[0]
    combined, combined_weights, _ = buffer.combine(recv * 2, handle, topk_weights=weights, config=config)
    return recv, cached, idx, weights, combined, combined_weights


def received(handle: Any, rank: int) -> int:
    """Rows that this rank received by the handle of a worst-case dispatch. Waits for the device."""
    return int(handle[0][-1, rank])


def outcome(call: Callable[[], Any]) -> tuple[str, int | None, str] | None:
    """(error class name, peer, message) of what the call raised, or None."""
    try:
        call()
    except DeepEPError as error:
        return type(error).__name__, getattr(error, "peer", None), str(error)
    return None


def finished(buffer: Any) -> None:
    """Everything queued has run, and nothing failed."""
    torch.cuda.synchronize()
    buffer.check()


def fill_everywhere(ctx: RankContext, tokens: int, hidden: int, value: int) -> Routing:
    """Every token goes to every rank; row i of rank r holds ``value + r`` (exact in bf16)."""
    idx = torch.arange(ctx.num_ranks, device=ctx.device).expand(tokens, -1).contiguous()
    x = torch.full((tokens, hidden), value + ctx.rank, dtype=torch.bfloat16, device=ctx.device)
    return Routing(x, idx, torch.ones(idx.shape, device=ctx.device))


def dispatch_everywhere(buffer: Any, routing: Routing, **kwargs: Any) -> Any:
    layout = buffer.get_dispatch_layout(routing.idx, routing.idx.shape[1])
    args = (layout[0], layout[1], layout[3], layout[2], routing.idx, routing.weights)
    return buffer.dispatch(routing.x, None, *args, **kwargs)


def expect_everywhere(ctx: RankContext, recv: torch.Tensor, tokens: int, value: int, what: str) -> None:
    assert recv.shape[0] == tokens * ctx.num_ranks, f"{what}: {recv.shape[0]} rows"
    for source in range(ctx.num_ranks):
        rows = recv[source * tokens : (source + 1) * tokens]
        assert bool((rows == value + source).all()), f"{what}: rows of rank {source}"


# ---------------------------------------------------------------------------------------------------------------
# Without a GPU


class MemoryWithoutGpu:
    """Stands in for `PeerMemory`: a pool of `room` bytes, and staging."""

    def __init__(self) -> None:
        self.block, self.room = torch.UntypedStorage(1 << 16), 1 << 16
        self.bases, self.num_sharing = [self.block.data_ptr(), 1 << 20, 1 << 21, 1 << 22], 1
        self.staging_bytes, self.staging_offset, self.leases = 0, -1, 0
        self.asked: list[int] = []

    def take(self, num_bytes: int, stream: int, capturing: bool) -> tuple[torch.UntypedStorage, int] | None:
        self.asked.append(num_bytes)
        return (self.block, 8192) if num_bytes <= self.room else None

    def lease_staging(self) -> None:
        self.leases += 1

    def usage(self) -> dict[str, int]:
        return {}


def make_bare_kernels() -> CudaKernels:
    """The kernels' host side on such memory, rank 0 of 4, without a device: for what needs none."""
    kernels = CudaKernels.__new__(CudaKernels)
    kernels.memory = MemoryWithoutGpu()
    kernels._sources = SimpleNamespace(take=lambda *_: (kernels.memory.block, 256))
    kernels.rank, kernels.num_ranks, kernels.timeout_s = 0, 4, 2.0
    kernels.device, kernels._plans, kernels.launches = torch.device("cuda", 0), {}, {}
    kernels._last_handle, kernels._next_handle, kernels._view = None, None, view_maker()
    kernels._alike, kernels._last_rows, kernels._new = {}, 0, maker_of(torch.device("cpu"))
    kernels._stream, kernels._capturing, kernels._launched, kernels.failure = 0, False, False, None
    kernels._missing, kernels._push, kernels._push_number, kernels.max_blocks = 0, None, 0, 132
    kernels._num_sms = 132
    kernels._domain = SimpleNamespace(dispatch_plan=lambda *_: None)
    kernels._combines, kernels.traffic = RowPlan((), "combine"), TrafficStats()
    return kernels


# ---------------------------------------------------------------------------------------------------------------
# One call against the portable engine, which gets CPU tensors: nothing of it runs on the GPU


def on_cpu(routing: Routing) -> Routing:
    return Routing(routing.x.cpu(), routing.idx.cpu(), routing.weights.cpu())


def make_hard_rows(gen: torch.Generator, dtype: torch.dtype, num_rows: int, hidden: int) -> torch.Tensor:
    """Rows of six kinds in turn: any bits, some NaN, some infinite, zeros of both signs, subnormals, all magnitudes."""
    rows = torch.randn(num_rows, hidden, generator=gen)
    rows *= torch.exp2(torch.randint(-30, 15, (num_rows, 1), generator=gen).float())
    bits = torch.randint(0, 256, (num_rows, hidden * dtype.itemsize), dtype=torch.uint8, generator=gen)
    chance = torch.rand(num_rows, hidden, generator=gen)
    kind = (torch.arange(num_rows) % 6)[:, None]
    nan = float("nan")
    rows = torch.where((kind == 1) & (chance < 0.05), torch.where(chance < 0.02, nan, -nan), rows)
    rows = torch.where((kind == 2) & (chance < 0.005), torch.copysign(torch.tensor(torch.inf), rows), rows)
    rows = torch.where(kind == 3, torch.copysign(torch.tensor(0.0), rows), rows)
    rows = torch.where(kind == 4, torch.finfo(dtype).smallest_normal * chance, rows)
    rows = rows.to(dtype)
    any_bits = bits.view(dtype) if num_rows else rows
    return torch.where(kind == 0, any_bits, rows)


def _heads(value: Any, count: int) -> tuple[torch.Tensor, ...]:
    return tuple(part[:count] for part in (value if isinstance(value, tuple) else (value,)))


def compare_dispatch(ctx: RankContext, buffer: Any, portable: Any, routing: Routing, what: str, **options: Any) -> Any:
    """An uncached or worst-case dispatch on both: all results have the same bits.

    Returns:
        what the kernels' dispatch returned, and the handle of the portable engine.
    """
    options.setdefault("config", Config(16))  # or the handle's channels might differ
    got, want = dispatch(buffer, routing, **options), dispatch(portable, on_cpu(routing), **options)
    count = received(want[4], ctx.rank)
    expect_bits(_heads(got[0], count), _heads(want[0], count), f"{what}: rows")
    expect_bits(got[1], want[1], f"{what}: top-k, padding included")
    expect_bits(got[2][:count], want[2][:count], f"{what}: weights")
    expect_bits(got[3], want[3], f"{what}: counts")
    expect_bits(got[4], want[4], f"{what}: handle")
    return got, want[4]


def compare_cached(
    ctx: RankContext, pair: tuple[Any, Any], handles: tuple[Any, Any], x: torch.Tensor, what: str, **options: Any
) -> Any:
    """A cached dispatch on both; ``pair`` and ``handles``: of the kernels, then of the portable engine.

    Returns:
        rows, or rows and scales, of the kernels.
    """
    got = pair[0].dispatch(x, handle=handles[0], **options)[0]
    want = pair[1].dispatch(x.cpu(), handle=handles[1], **options)[0]
    count = received(handles[1], ctx.rank)
    expect_bits(_heads(got, count), _heads(want, count), f"{what}: cached rows")
    return got


@dataclass
class CombineInputs:
    """Arguments of a combine on this rank, and what the portable engine makes of them."""

    rows: torch.Tensor
    weights: torch.Tensor
    bias: Any
    want: torch.Tensor
    want_weights: torch.Tensor

    @classmethod
    def make(
        cls, ctx: RankContext, portable: Any, handle: Any, hidden: int, dtype: torch.dtype, num_bias: int, seed: int
    ) -> CombineInputs:
        """``handle``: of the portable engine."""
        num_rows, num_tokens = handle[3].shape[0], handle[5].shape[0]
        gen = generator(204, ctx.rank, seed)
        rows = make_rows(gen, "fp32", num_rows, hidden).to(dtype)
        weights = torch.rand(num_rows, NUM_TOPK, generator=gen)
        biases = [make_rows(gen, "fp32", num_tokens, hidden).to(dtype) for _ in range(num_bias)]
        bias: Any = None if not biases else biases[0] if num_bias == 1 else tuple(biases)
        want, want_weights, _ = portable.combine(rows, handle, topk_weights=weights, bias=bias)
        return cls(*to_device((rows, weights, bias), ctx.device), want, want_weights)


def rebuilt(handle: Any) -> Any:
    """As a caller gets it back from saved tensors: only the values are left."""
    return tuple(tensor.clone() for tensor in handle)


def fill_pool(buffer: Any) -> list[torch.Tensor]:
    """Take all that the pool of symmetric memory has, down to small pieces; it is full as long as they live."""
    held = []
    for size in (16 * MIB, 8 * MIB, 4 * MIB, 2 * MIB, MIB, 256 << 10, 64 << 10, 16 << 10, 4 << 10):
        while (piece := buffer.runtime.memory.try_empty((size,), torch.uint8)) is not None:
            held.append(piece)
    return held


# ---------------------------------------------------------------------------------------------------------------
# Many random operations without synchronisation


@dataclass
class Step:
    """One iteration, the same on all ranks but for the tensors."""

    routing: Routing
    num_worst_tokens: int
    again: list[tuple[int, Any]]  # cached dispatches: (number of an earlier step, rows for its tokens)
    combines: list[int]  # numbers of earlier steps
    bias: list[torch.Tensor]
    num_sms: int
    aside: bool  # on the communication stream


def make_steps(ctx: RankContext, count: int, seed: int) -> list[Step]:
    """All inputs of a run, made beforehand: a copy from the host would synchronise the stream."""
    pick = random.Random(seed)  # equal on all ranks
    steps: list[Step] = []
    token_counts: list[int] = []
    for number in range(count):
        tokens = [pick.choice((0, 1, 3, 17, 64)) for _ in range(ctx.num_ranks)]
        hidden = pick.choice((64, 256, 520))
        mask = pick.choice(("none", "some", "rows", "skew"))
        mine = tokens[ctx.rank]
        token_counts.append(mine)
        routing = make_routing(ctx, 1000 * seed + number, mine, hidden, mask)
        worst = pick.choice((0, 0, sum(tokens) + pick.randint(1, 9)))
        again = []
        for _ in range(pick.randint(0, 2)):
            which, payload = pick.randint(max(0, number - 5), number), pick.choice(("bf16_bits", "fp8_scales", "fp32"))
            rows = make_rows(generator(202, ctx.rank, seed, number, which), payload, token_counts[which], 384)
            again.append((which, to_device(rows, ctx.device)))
        combines = [pick.randint(max(0, number - 5), number) for _ in range(pick.randint(1, 2))]
        bias = [
            make_rows(generator(203, ctx.rank, seed, number, i), "bf16", mine, hidden).to(ctx.device)
            for i in range(pick.randint(0, 2))
        ]
        num_sms, aside = pick.choice((2, 8, 20)), pick.random() < 0.3
        steps.append(Step(routing, worst, again, combines, bias, num_sms, aside))
    return steps


def run_steps(buffer: Any, steps: list[Step]) -> list[Any]:
    """Every result of the steps, with the handle that says how many rows count."""
    results: list[Any] = []
    made: list[tuple[Any, Any]] = []
    default_sms = Buffer.num_sms
    try:
        for number, step in enumerate(steps):
            Buffer.set_num_sms(step.num_sms)
            options: dict[str, Any] = {"async_finish": True} if step.aside else {}

            def ready(event: Any) -> None:
                if event.event is not None:
                    event.current_stream_wait()

            recv, idx, weights, counts, handle, event = dispatch(
                buffer, step.routing, num_worst_tokens=step.num_worst_tokens, **options
            )
            ready(event)
            made.append((recv, handle))
            results.append(("dispatch", number, handle, recv, idx, weights, counts))
            for which, rows in step.again:
                out = buffer.dispatch(rows, handle=made[which][1], **options)
                ready(out[5])
                parts = out[0] if isinstance(out[0], tuple) else (out[0],)
                results.append(("cached", number, made[which][1], *parts))
            for which in step.combines:
                rows, its_handle = made[which]
                own = which == number
                bias: Any = step.bias if own and step.bias else None
                combined, combined_weights, event = buffer.combine(
                    rows if len(step.again) % 2 else rows * 3,
                    its_handle,
                    topk_weights=weights if own else None,
                    bias=bias[0] if bias and len(bias) == 1 else bias and tuple(bias),
                    **options,
                )
                ready(event)
                results.append(("combine", number, None, combined, combined_weights))
    finally:
        Buffer.set_num_sms(default_sms)
    return results


def _significant(ctx: RankContext, result: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    kind, number, handle, *values = result
    count = None if handle is None else received(handle, ctx.rank)
    for i, value in enumerate(values):
        what = f"step {number}: {kind}[{i}]"
        yield what, value[:count] if isinstance(value, torch.Tensor) and count is not None else value
    if kind == "dispatch":
        for i in (0, 4, 5):
            yield f"step {number}: handle[{i}]", handle[i]
        yield f"step {number}: recv_src_idx", handle[3][:count]
        yield f"step {number}: padding", bool((values[1][count:] == -1).all())


def expect_same_results(ctx: RankContext, got: list[Any], want: list[Any]) -> None:
    assert len(got) == len(want)
    for mine, other in zip(got, want, strict=True):
        for (what, a), (_, b) in zip(_significant(ctx, mine), _significant(ctx, other), strict=True):
            expect_bits(a, b, what)


def run_against_portable(ctx: RankContext, count: int, seed: int) -> dict[str, int]:
    """Random iterations back to back, compared with the portable engine at the end; the kernels' launches."""
    steps = make_steps(ctx, count, seed)
    buffer = make_buffer(ctx, num_nvl_bytes=1 << 29)
    torch.cuda.synchronize()
    got = run_steps(buffer, steps)
    torch.cuda.synchronize()
    buffer.check()
    want = run_steps(make_buffer(ctx, "portable"), steps)
    expect_same_results(ctx, got, want)
    return dict(buffer.runtime.kernels.launches)
