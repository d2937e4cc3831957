"""Buffers made and dropped, interpreter exit, Python threads, and rank counts beyond a host's usual eight."""

import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from cases import generator, make_topk
from harness import REPO_ROOT, RankContext, environ, expect_bits, run_ranks

import deep_ep
from deep_ep import Buffer

E, H = 8, 64


def round_trip(ctx: RankContext, buffer, seed: int, tokens: int = 12):
    idx, weights = make_topk(generator(90, ctx.rank, seed), tokens, 3, E)
    x = torch.randn(tokens, H, generator=generator(91, ctx.rank, seed)).bfloat16().to(ctx.device)
    idx, weights = idx.to(ctx.device), weights.to(ctx.device)
    layout = buffer.get_dispatch_layout(idx, E)
    recv, _, _, _, handle, _ = buffer.dispatch(x, None, layout[0], layout[1], layout[3], layout[2], idx, weights)
    visits = layout[3].sum(1, keepdim=True).float()
    expect_bits(buffer.combine(torch.ones_like(recv), handle)[0].float(), visits.expand(-1, H).contiguous(), "visits")


def count_open_files() -> int:
    import os

    return len(os.listdir("/proc/self/fd"))


def run_many_buffers(ctx: RankContext):
    """Construct, use, drop: by garbage collection and by destroy; files and threads do not pile up."""
    counts = []
    for i in range(12):
        buffer = ctx.fresh_buffer(explicitly_destroy=i % 2 == 0)
        round_trip(ctx, buffer, i)
        ref = weakref.ref(buffer)
        if i % 2 == 0:
            buffer.destroy()
        del buffer
        gc.collect()
        assert ref() is None, "a dropped buffer is freed"
        counts.append((count_open_files(), threading.active_count()))
    assert counts[-1][0] <= counts[3][0] + 2, counts
    assert counts[-1][1] <= counts[3][1] + 1, counts


def test_buffers_come_and_go():
    run_ranks(3, run_many_buffers)


def run_side_by_side(ctx: RankContext):
    first, second = ctx.fresh_buffer(), ctx.fresh_buffer(low_latency_mode=True, num_rdma_bytes=1 << 16)
    for step in range(3):
        round_trip(ctx, first, step)
        round_trip(ctx, second, step)
    first_ref = first
    del first, first_ref
    gc.collect()
    round_trip(ctx, second, 9)


def test_buffers_side_by_side():
    run_ranks(2, run_side_by_side)


def run_dropped_on_one_rank_first(ctx: RankContext):
    """A rank may drop its buffer while its peers still hold theirs: nobody waits for anybody."""
    buffer = ctx.fresh_buffer()
    round_trip(ctx, buffer, 1)
    if ctx.rank == 0:
        del buffer
        gc.collect()
    ctx.barrier()


def test_drop_is_not_collective():
    run_ranks(2, run_dropped_on_one_rank_first, timeout=30)


def run_bad_call_after_a_peer_left(ctx: RankContext) -> list[str]:
    buffer = ctx.fresh_buffer(explicitly_destroy=True, timeout_s=20)
    round_trip(ctx, buffer, 1)
    ctx.barrier()
    if ctx.rank == 1:
        buffer.destroy()
    ctx.barrier()
    errors = []
    # The notice to the peer may find the connection open, closing or closed.
    for _ in range(3 if ctx.rank == 0 else 0):
        with pytest.raises(deep_ep.DeepEPError) as raised:
            buffer.dispatch(torch.zeros(4), None)
        errors.append(f"{raised.typename}: {raised.value}")
        time.sleep(0.1)
    if ctx.rank == 0:
        buffer.destroy()
    return errors


def test_bad_arguments_are_named_after_a_peer_has_left():
    errors = run_ranks(2, run_bad_call_after_a_peer_left)[0]
    assert len(errors) == 3
    assert all(error.startswith("ConfigError: dispatch: x is float32 [4]") for error in errors), errors


def run_threads(ctx: RankContext, same_buffer: bool):
    """Two Python threads, each with its own order of calls; on one buffer they take turns as two-batch overlap does.

    On GPUs each thread works on a stream of its own: ranks queue the operations of two buffers in different orders, and
    on one stream they would wait for each other.
    """
    buffers = [ctx.fresh_buffer()]
    buffers.append(buffers[0] if same_buffer else ctx.fresh_buffer())
    errors = []
    turns = [threading.Semaphore(1), threading.Semaphore(0)]

    def own_stream() -> contextlib.AbstractContextManager[object]:
        if ctx.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.stream(torch.cuda.Stream(ctx.device))

    def work(which: int) -> None:
        try:
            with own_stream():
                for step in range(6):
                    if same_buffer:
                        turns[which].acquire()
                    round_trip(ctx, buffers[which], 10 * which + step, tokens=9 + which)
                    if same_buffer:
                        turns[1 - which].release()
        except BaseException as error:
            errors.append(error)
            turns[1 - which].release()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("same_buffer", [True, False])
def test_two_threads(same_buffer):
    run_ranks(2, run_threads, same_buffer)


# The pause: a thread of torch's gloo that lets go of a collective's tensors only while the interpreter ends aborts the
# process. Without this library one of 222 processes that ended right after `all_gather_object` did.
SCRIPT = """
import sys, time, torch, torch.distributed as dist, deep_ep
rank, size = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=size)
buffer = deep_ep.Buffer(dist.group.WORLD{arguments})
idx = torch.arange(size).view(1, size)
layout = buffer.get_dispatch_layout(idx, size)
out = buffer.dispatch(torch.zeros(1, 16), None, layout[0], layout[1], layout[3], layout[2], idx, torch.ones(1, size))
buffer.combine(out[0], out[4])
time.sleep(0.3)
{end}
dist.destroy_process_group()
print("done", flush=True)
"""


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("arguments", "end"),
    [("", ""), (", explicitly_destroy=True", ""), (", explicitly_destroy=True", "buffer.destroy()")],
)
def test_interpreter_exit(tmp_path, size, arguments, end):
    """Processes end with live buffers, dropped in the interpreter's shutdown, and neither hang nor complain."""
    code = SCRIPT.format(arguments=arguments, end=end)
    with environ(OMP_NUM_THREADS="1"):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), str(size), str(tmp_path / "store")],
                cwd=REPO_ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
    try:
        for process in ranks:
            stdout, stderr = process.communicate(timeout=60)
            assert process.returncode == 0, stderr
            assert "done" in stdout
            assert "Traceback" not in stderr, stderr
    finally:
        for process in ranks:
            process.kill()


def run_many_ranks(ctx: RankContext, domain):
    round_trip(ctx, ctx.fresh_buffer(domain), 5, tokens=4)


@pytest.mark.parametrize(("num_ranks", "domain"), [(5, None), (12, 4)])
def test_other_rank_counts(spawn_fresh, num_ranks, domain):
    assert spawn_fresh(num_ranks, run_many_ranks, domain) == [None] * num_ranks


def run_outputs(ctx: RankContext):
    """Received tensors are fresh leaves of ordinary storage, and inputs may require gradients."""
    buffer = ctx.buffer()
    idx, weights = make_topk(generator(92, ctx.rank), 6, 2, E)
    x = torch.randn(6, H).to(ctx.device).requires_grad_()
    idx, weights = idx.to(ctx.device), weights.to(ctx.device).requires_grad_()
    layout = buffer.get_dispatch_layout(idx, E)

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(fctx, x, weights):
            out = buffer.dispatch(x, None, layout[0], layout[1], layout[3], layout[2], idx, weights)
            first = out[0].clone()
            again = buffer.dispatch(x * 2, handle=out[4])
            expect_bits(out[0], first, "an earlier output is untouched by the next call")
            assert again[0].data_ptr() != out[0].data_ptr() or out[0].numel() == 0
            for tensor in (out[0], out[1], out[2], again[0]):
                assert tensor.is_leaf
                assert not tensor.requires_grad
                assert tensor.storage_offset() == 0 or tensor.is_contiguous()
            assert out[0].requires_grad_().requires_grad
            return out[0].detach()

        @staticmethod
        def backward(fctx, grad):
            return None, None

    assert Call.apply(x, weights).requires_grad


def test_outputs_are_ordinary_tensors():
    run_ranks(2, run_outputs)


def test_import_is_quiet_and_light():
    """Importing needs no process group, no CUDA context, no NVSHMEM, and prints nothing."""
    code = (
        "import sys, deep_ep, torch; assert not torch.cuda.is_initialized(); "
        "assert not any('nvshmem' in m for m in sys.modules); assert not torch.distributed.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert deep_ep.Buffer is Buffer
