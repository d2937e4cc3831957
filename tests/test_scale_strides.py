"""Scales of a dispatch may have any strides: they are read where they lie, by both engines, and arrive row-major."""

from typing import Any

import pytest
import torch
from cases import TorchOperations, generator, laid_out, make_rows, scale_layouts
from cuda_cases import dispatch, finished, make_buffer, make_routing, on_cpu, received
from harness import RankContext, expect_bits, run_ranks

from deep_ep import Config, checks, fp8
from deep_ep.errors import ConfigError

DTYPES = (torch.float32, torch.int32)
HIDDEN = 1280
#: Torch operators that read one tensor and write another.
COPIES = ("aten.clone", "aten.copy_", "aten._to_copy", "aten.contiguous")


def make_payload(ctx: RankContext, seed: int, num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 rows and row-major scales of any bits, on the CPU; as many scales as 128-column tiles, or packed words."""
    gen = generator(900, ctx.rank, seed)
    columns = fp8.scale_columns(HIDDEN, "fp32" if dtype == torch.float32 else "ue8m0")[1]
    bits = torch.randint(-(1 << 31), 1 << 31, (num_tokens, columns), dtype=torch.int64, generator=gen)
    return make_rows(gen, "fp8", num_tokens, HIDDEN), bits.int().view(dtype)


def all_layouts(values: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By name: scales with some strides, and the row-major ones that they are equal to."""
    layouts = {name: (laid_out(values, *at), values) for name, at in scale_layouts(*values.shape).items()}
    shared = values[:1].expand_as(values)
    layouts["one row for all tokens"] = shared, shared.contiguous()
    return layouts


# ---------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_checked_scales_are_those_given(num_tokens, dtype):
    rows, values = torch.zeros(num_tokens, 640, dtype=torch.uint8), torch.zeros(num_tokens, 5, dtype=dtype)
    for name, (scales, _) in all_layouts(values).items():
        got = checks.check_rows((rows, scales), "dispatch")
        assert got[0] is rows and got[1] is scales, name
        for wrong, words in (
            (scales[:, :0], "S of at least 1"),
            (scales.double(), "expected dtype float32 or int32"),
            (torch.cat([scales, scales[:1], values.new_zeros(1, 5)]), "expected shape"),
            (scales.t()[None], "expected shape"),
            (scales.to("meta"), "all tensors of a call share one device"),
            (scales.tolist(), "expected a 2-D torch.Tensor"),
        ):
            with pytest.raises(ConfigError, match=words):
                checks.check_rows((rows, wrong), "dispatch")


def test_rows_are_still_made_contiguous():
    rows, scales = torch.zeros(640, 7, dtype=torch.uint8).t(), torch.zeros(5, 7).t()
    got = checks.check_rows((rows, scales), "dispatch")
    assert got[0].is_contiguous() and got[1] is scales


# ---------------------------------------------------------------------------------------------------------------
# Either engine against the portable one with row-major scales


def compare_layouts(ctx: RankContext, buffer: Any, portable: Any) -> None:
    """Uncached, worst-case and cached dispatches of scales of all strides, in turn."""
    options: dict[str, Any] = {"config": Config(16)}
    for number, (num_tokens, dtype) in enumerate((tokens, dtype) for tokens in (45, 1, 0, 130) for dtype in DTYPES):
        routing = make_routing(ctx, 910 + number, num_tokens + ctx.rank, 16)
        worst = sum(num_tokens + rank for rank in range(ctx.num_ranks)) + 3
        rows, values = make_payload(ctx, number, num_tokens + ctx.rank, dtype)
        for name, (scales, plain) in all_layouts(values.to(ctx.device)).items():
            what = f"{num_tokens} tokens, {dtype} scales, {name}"
            given, reference = (rows.to(ctx.device), scales), (rows, plain.cpu())
            before = scales.clone()
            for fixed in (0, worst):
                got = dispatch(buffer, routing, given, num_worst_tokens=fixed, **options)
                want = dispatch(portable, on_cpu(routing), reference, num_worst_tokens=fixed, **options)
                count = received(want[4], ctx.rank)
                expect_heads(got[0], want[0], count, f"{what}, room for {fixed}")
                expect_bits(got[3], want[3], f"{what}: counts")
                got, want = buffer.dispatch(given, handle=got[4])[0], portable.dispatch(reference, handle=want[4])[0]
                expect_heads(got, want, count, f"{what}, room for {fixed}, cached")
            expect_bits(scales, before, f"{what}: scales of the caller")


def expect_heads(got: Any, want: Any, count: int, what: str) -> None:
    """The rows and scales that came; a worst-case dispatch leaves the others as they are."""
    assert got[1].is_contiguous(), what
    expect_bits(tuple(part[:count] for part in got), tuple(part[:count] for part in want), what)


def run_portable(ctx: RankContext) -> None:
    buffer = ctx.buffer()
    compare_layouts(ctx, buffer, buffer)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_portable_engine(num_ranks):
    run_ranks(num_ranks, run_portable)


def run_kernels(ctx: RankContext) -> None:
    buffer = make_buffer(ctx)
    compare_layouts(ctx, buffer, make_buffer(ctx, "portable"))
    launches = buffer.runtime.kernels.launches
    assert launches["dispatch_rows"] >= 4 * 8 * len(DTYPES) * 4
    assert "dispatch_rows_fp8" not in launches
    finished(buffer)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_kernels(on_gpus, num_ranks):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_kernels)


# ---------------------------------------------------------------------------------------------------------------
# What runs besides the kernels


def run_without_copies(ctx: RankContext) -> None:
    buffer, routing = make_buffer(ctx), make_routing(ctx, 930, 64, HIDDEN)
    layout = buffer.get_dispatch_layout(routing.idx, 10)
    routed = (layout[0], layout[1], layout[3], layout[2], routing.idx, routing.weights)
    handle = buffer.dispatch(routing.x, None, *routed)[4]
    kinds: dict[str, Any] = {
        "uncached": lambda x: buffer.dispatch(x, None, *routed),
        "worst case": lambda x: buffer.dispatch(x, None, *routed, num_worst_tokens=64 * ctx.num_ranks),
        "cached": lambda x: buffer.dispatch(x, handle=handle),
        "cached, aside": lambda x: buffer.dispatch(x, handle=handle, async_finish=True)[5].current_stream_wait(),
    }
    rows, values = (part.to(ctx.device) for part in make_payload(ctx, 20, 64, torch.float32))
    for kind, call in kinds.items():
        call((rows, values))
        call((rows, values))  # the size is known by now
        for name, (scales, _) in all_layouts(values).items():
            with TorchOperations() as operations:
                call((rows, scales))
            copies = [used for used in operations.names if used.startswith(COPIES)]
            assert not copies, f"{kind}, {name}: {copies}"
    strided_rows = rows.t().contiguous().t()
    with TorchOperations() as operations:
        kinds["cached"]((strided_rows, values))
    assert any(used.startswith(COPIES) for used in operations.names), "a copy of the rows goes unnoticed"
    finished(buffer)


@pytest.mark.gpu
def test_no_torch_kernel_reads_the_scales(on_gpus):
    on_gpus(2)
    run_ranks(2, run_without_copies)


def run_captured(ctx: RankContext) -> None:
    """A graph reads what the scales are at its replay, not at its capture."""
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    routing = make_routing(ctx, 940, 50, HIDDEN)
    handle, other = dispatch(buffer, routing)[4], dispatch(portable, on_cpu(routing))[4]
    payloads = [make_payload(ctx, 21 + number, 50, torch.int32) for number in range(3)]
    rows, values = (part.to(ctx.device) for part in payloads[0])
    scales = laid_out(values, *scale_layouts(*values.shape)["column-major, padded"])
    buffer.dispatch((rows, scales), handle=handle)
    finished(buffer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = buffer.dispatch((rows, scales), handle=handle)[0]
    ctx.barrier()
    for number, payload in enumerate(payloads):
        rows.copy_(payload[0])
        scales.copy_(payload[1])
        graph.replay()
        torch.cuda.synchronize()
        expect_bits(got, portable.dispatch(payload, handle=other)[0], f"replay {number}")
    finished(buffer)


@pytest.mark.gpu(2)
def test_graphs(on_gpus):
    on_gpus(2)
    run_ranks(2, run_captured)
