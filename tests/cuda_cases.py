"""What ranks do in the tests of the kernels: inputs on the GPU, and calls whose results two engines must agree on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from cases import generator, make_rows, make_topk, to_device
from harness import RankContext, environ, expect_bits

from deep_ep import Buffer
from deep_ep.errors import DeepEPError

NUM_EXPERTS, NUM_TOPK = 10, 3
LONG_SLEEP = 2_000_000_000  # cycles, about a second
SHORT_SLEEP = 100_000_000


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


def round_trip(buffer: Any, routing: Routing, num_worst_tokens: int = 0) -> tuple[torch.Tensor, ...]:
    """Dispatch, cached dispatch, combine; what a caller may look at. Never waits for the device by itself."""
    recv, idx, weights, _, handle, _ = dispatch(buffer, routing, num_worst_tokens=num_worst_tokens)
    cached = buffer.dispatch(routing.x, handle=handle)[0]
    combined, combined_weights, _ = buffer.combine(recv * 2, handle, topk_weights=weights)
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
