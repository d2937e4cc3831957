"""The NVLink engine for long: every kind of case at 2 to 8 ranks, thousands of operations and graph replays in a row.

Ranks may outnumber the GPUs (fixture `on_gpus`).
"""

import os
import random
import threading

import pytest
import torch
from cases import PAYLOADS, Case, check_case
from cuda_cases import Routing, dispatch, finished, make_buffer, make_routing, round_trip
from harness import MPS_VARIABLES, RankContext, environ, mps_daemon, run_ranks
from soak_cases import Mismatches, Soak, draw_cases, prepare

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# ---------------------------------------------------------------------------------------------------------------
# The portable suite's cases


def portable_cases(num_ranks: int) -> list[Case]:
    """What the portable suite tries, at one number of ranks: its subjects crossed with each other, not repeated."""
    pick = random.Random(num_ranks)

    def tokens(*options: int) -> tuple[int, ...]:
        return tuple(pick.choice(options) for _ in range(num_ranks))

    some = tuple(11 + 3 * r for r in range(num_ranks))
    cached = {p: p if "use_fp8" not in p else "bf16" for p in PAYLOADS}
    cases = [Case(num_ranks, some, hidden=128, num_topk=4, num_experts=16, mask="some", num_bias=1, repeats=3)]
    cases += [
        Case(num_ranks, tokens(4, 5, 9), 272, 3, 8, payload=payload, cached_payload=cached[payload], alignment=16)
        for payload in PAYLOADS
    ]
    cases += [
        Case(num_ranks, tokens(0, 4, 9), 48, 5, 7, combine_dtype=dtype, num_bias=number, mask="rows")
        for dtype, number in ((BF16, 0), (FP16, 1), (FP32, 2), (BF16, 2))
    ]
    cases += [
        Case(num_ranks, rows, 32, 3, 12, mask=mask, num_bias=1, combine_dtype=FP32, worst_extra=worst)
        for rows, mask, worst in (
            ((0,) * num_ranks, "none", None),
            ((0,) * num_ranks, "none", 0),
            ((1, *(0,) * (num_ranks - 1)), "none", 0),
            (tokens(0, 1, 2, 65), "skew", 17),
            (tokens(0, 1, 2, 65), "all", None),
            ((64,) * num_ranks, "rows", 1),
        )
    ]
    cases += [
        Case(num_ranks, (6,) * num_ranks, num_topk=min(4, number), num_experts=number) for number in (1, 2, 5, 9, 64)
    ]
    cases += [
        Case(num_ranks, tokens(7, 8), num_topk=topk, num_experts=33, mask="some", idx_dtype=torch.int32)
        for topk in (1, 7, 32)
    ]
    cases += [Case(num_ranks, tokens(3, 5), hidden, num_bias=2, cached_payload="bf16") for hidden in (16, 2048, 7168)]
    return [*cases, Case(num_ranks, tokens(1, 5, 8), with_topk=False, mask="some")]


def run_engine_name(ctx: RankContext) -> str:
    return ctx.buffer().engine


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_portable_cases_on_the_kernels(on_gpus, num_ranks):
    on_gpus(num_ranks)
    assert run_ranks(num_ranks, run_engine_name) == ["cuda"] * num_ranks
    for case in portable_cases(num_ranks):
        check_case(case)


# ---------------------------------------------------------------------------------------------------------------
# Random operations back to back


def run_soak(ctx: RankContext, engine: str, num_cases: int, count: int, seed: int, delays: int = 0) -> dict[str, int]:
    """`count` operations without a synchronisation that the calls do not make themselves; launches or kinds counted."""
    prepared = [prepare(ctx, case) for case in draw_cases(ctx.num_ranks, num_cases, seed)]
    with environ(DEEP_EP_DEBUG_DELAYS=str(delays)):
        buffer = make_buffer(ctx, engine)
    ctx.barrier()
    soak = Soak(ctx, buffer, prepared, seed)
    soak.run(count)
    if ctx.device.type == "cuda":
        finished(buffer)
    found = soak.mismatches.found()
    assert not found, f"{len(found)} comparisons failed, the first: {found[:3]}"
    ctx.barrier()
    return dict(buffer.runtime.kernels.launches) if engine == "cuda" else dict(soak.counts)


def test_the_soak_itself():
    """The same operations on CPU tensors: what the soak expects is what the portable engine does."""
    for counts in run_ranks(2, run_soak, "portable", 10, 60, 5):
        assert set(counts) == {"counted", "worst", "cached", "combine"}
        assert sum(counts.values()) == 60


def test_mismatches_are_found():
    mismatches = Mismatches(torch.device("cpu"))
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    mismatches.compare(tensor, tensor.clone(), "same")
    mismatches.compare(tensor[:0], tensor[:0], "nothing")
    mismatches.compare(tensor, tensor + 1e-6, "other bits")
    mismatches.compare(torch.zeros(2), -torch.zeros(2), "other sign of zero")
    assert mismatches.found() == ["other bits", "other sign of zero"]
    with pytest.raises(AssertionError, match="other rows"):
        mismatches.compare(tensor, tensor[:1], "other rows")


@pytest.mark.parametrize("code", [0, 3])
def test_mps_daemon(tmp_path, monkeypatch, code):
    """A daemon is started with folders of its own and told to quit; one that does not start is a reason."""
    control, log = tmp_path / "nvidia-cuda-mps-control", tmp_path / "log"
    control.write_text(
        f'#!/bin/sh\necho "$@" "$CUDA_MPS_PIPE_DIRECTORY" >> {log}\n'
        f'[ "$1" = -d ] && echo no luck >&2 && exit {code}\ncat >> {log}\n'
    )
    control.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with mps_daemon(4) as env:
        if code:
            assert env == "nvidia-cuda-mps-control -d ended with 3: no luck"
            return
        assert set(env) == set(MPS_VARIABLES)
        assert env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
        pipe = env["CUDA_MPS_PIPE_DIRECTORY"]
        assert log.read_text() == f"-d {pipe}\n"
    assert log.read_text() == f"-d {pipe}\n{pipe}\nquit -t 5\n"
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with mps_daemon(4) as env:
        assert env == "nvidia-cuda-mps-control is not installed"


@pytest.mark.gpu
def test_two_thousand_operations(on_gpus):
    on_gpus(2)
    for launches in run_ranks(2, run_soak, "cuda", 40, 2000, 1):
        assert launches["dispatch_notify"] > 300
        assert launches["combine_rows"] > 300


@pytest.mark.gpu
def test_operations_on_crowded_gpus(on_gpus):
    num_ranks = 2 * torch.cuda.device_count()
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_soak, "cuda", 16, 300, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_operations_with_delays(on_gpus, seed):
    """Seeded delays at every signal and wait, in the order of operations and bits of which nothing may change."""
    on_gpus(2)
    run_ranks(2, run_soak, "cuda", 16, 250, 10 + seed, seed)


# ---------------------------------------------------------------------------------------------------------------
# Graph replays between eager calls


def run_replays(ctx: RankContext, count: int) -> None:
    """Replays between eager calls that free and reallocate; every result compared with the portable engine's."""
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    tokens = 32
    worst = tokens * ctx.num_ranks
    inputs = [make_routing(ctx, 400 + i, tokens, 256) for i in range(8)]
    wanted = [tuple(t.clone() for t in round_trip(portable, routing)) for routing in inputs]
    static = Routing(*(t.clone() for t in (inputs[0].x, inputs[0].idx, inputs[0].weights)))
    fixed = dispatch(buffer, inputs[0])[4]
    fixed_rows = wanted[0][0].shape[0]
    fixed_wanted = []
    portable_handle = dispatch(portable, inputs[0])[4]
    for routing in inputs:
        fixed_wanted.append(portable.dispatch(routing.x, handle=portable_handle)[0])
        assert fixed_wanted[-1].shape[0] == fixed_rows
    capture_stream = torch.cuda.Stream()
    with torch.cuda.stream(capture_stream):  # everything is loaded before the capture
        round_trip(buffer, static, worst)
    finished(buffer)
    graph, cached_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=capture_stream):
        static_out = round_trip(buffer, static, worst)
    with torch.cuda.graph(cached_graph, stream=capture_stream):
        static_cached = buffer.dispatch(static.x, handle=fixed)[0]
    ctx.barrier()
    pick = random.Random(9)  # equal on all ranks
    mismatches = Mismatches(ctx.device)

    def compare(got, want, what: str) -> None:
        for i, (mine, expected) in enumerate(zip(got, want, strict=True)):
            mismatches.compare(mine[: expected.shape[0]], expected, f"{what} [{i}]")

    kept = []
    for step in range(count):
        which = pick.randrange(len(inputs))
        for into, source in zip(
            (static.x, static.idx, static.weights),
            (inputs[which].x, inputs[which].idx, inputs[which].weights),
            strict=True,
        ):
            into.copy_(source)
        if pick.random() < 0.7:
            graph.replay()
            compare(static_out, wanted[which], f"replay {step}")
        else:
            cached_graph.replay()
            compare((static_cached,), (fixed_wanted[which],), f"replay {step} of the cached dispatch")
        if pick.random() < 0.5:
            other = pick.randrange(len(inputs))
            eager = round_trip(buffer, inputs[other], pick.choice((0, 0, worst)))
            compare(eager, wanted[other], f"eager call after replay {step}")
            kept.append((eager, wanted[other], step))
        if len(kept) > pick.randrange(1, 8):
            eager, expected, since = kept.pop(pick.randrange(len(kept)))
            compare(eager, expected, f"eager outputs kept from {since} to {step}")
    for eager, expected, since in kept:
        compare(eager, expected, f"eager outputs kept from {since} to the end")
    finished(buffer)
    found = mismatches.found()
    assert not found, f"{len(found)} comparisons failed, the first: {found[:3]}"
    ctx.barrier()


@pytest.mark.gpu
def test_a_thousand_replays_between_eager_calls(on_gpus):
    on_gpus(2)
    run_ranks(2, run_replays, 1000)


# ---------------------------------------------------------------------------------------------------------------
# Two threads on one buffer


def run_two_threads(ctx: RankContext, count: int) -> None:
    """Threads that take turns on one buffer as two-batch overlap does, each on its own stream, never synchronised."""
    buffer, portable = make_buffer(ctx), make_buffer(ctx, "portable")
    inputs = [make_routing(ctx, 500 + i, 7 + 20 * i, 256) for i in range(4)]
    wanted = [tuple(t.clone() for t in round_trip(portable, routing)) for routing in inputs]
    torch.cuda.synchronize()
    ctx.barrier()
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    found: list[list[str]] = [[], []]
    errors: list[BaseException] = []

    def work(which: int) -> None:
        mismatches = Mismatches(ctx.device)
        try:
            torch.cuda.set_device(ctx.device)
            with torch.cuda.stream(torch.cuda.Stream(ctx.device)):
                for step in range(count):
                    assert turns[which].acquire(timeout=30)
                    number = (step + which) % len(inputs)
                    try:
                        got = round_trip(buffer, inputs[number])
                    finally:
                        turns[1 - which].release()
                    for i, (mine, want) in enumerate(zip(got, wanted[number], strict=True)):
                        mismatches.compare(mine, want, f"thread {which}, step {step} [{i}]")
                found[which] = mismatches.found()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
    finished(buffer)
    assert found == [[], []], found


@pytest.mark.gpu
def test_two_threads_in_turn(on_gpus):
    on_gpus(2)
    run_ranks(2, run_two_threads, 100)
