"""How serving frameworks call `Buffer`: each function is the skeleton of one integration, argument names kept."""

import pickle
import weakref

import pytest
import reference as ref
import torch
import torch.distributed as dist
from cases import generator, make_topk, to_cpu
from client_cases import E, H, K, T, expected, inputs
from harness import RankContext, expect_bits, run_ranks

import deep_ep
from deep_ep import Buffer


def run_sglang(ctx: RankContext):
    config = deep_ep.Config(
        num_sms=24,
        num_max_nvl_chunked_send_tokens=8,
        num_max_nvl_chunked_recv_tokens=512,
        num_max_rdma_chunked_send_tokens=16,
        num_max_rdma_chunked_recv_tokens=512,
    )
    hint = Buffer.get_low_latency_rdma_size_hint(32, H * 4, ctx.group.size(), E)
    buffer = Buffer(
        ctx.group, 1 << 20, hint, low_latency_mode=True, num_qps_per_rank=4, allow_mnnvl=True, use_fabric=True
    )
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes, buffer.low_latency_mode) == (1 << 20, hint, True)
    x, idx, weights = inputs(ctx)
    q, scales = ref.quantize_1x128(x.cpu())
    padded = torch.zeros(1, 12)
    padded[:, :T] = scales.t()
    colmajor = padded.t()[:T].to(ctx.device)
    assert colmajor.stride(0) == 1
    previous = Buffer.capture()
    layout = buffer.get_dispatch_layout(
        idx, E, previous_event=previous, async_finish=True, allocate_on_comm_stream=previous is not None
    )
    (recv_q, recv_scales), recv_idx, _recv_weights, counts, handle, event = buffer.dispatch(
        (q.to(ctx.device), colmajor),
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
        previous_event=layout[4],
        async_finish=True,
        allocate_on_comm_stream=True,
        expert_alignment=128,
        config=config,
    )
    event.current_stream_wait()
    assert isinstance(counts, list)
    assert all(type(c) is int and c % 128 == 0 for c in counts)
    back = ref.dequantize_1x128(recv_q.cpu(), recv_scales.cpu()).bfloat16().to(ctx.device)
    _combined, _, event = buffer.combine(
        back, handle, async_finish=True, previous_event=None, allocate_on_comm_stream=False, config=config
    )
    event.current_stream_wait()
    want = expected(ctx)
    expect_bits(recv_idx.cpu(), want[1], "recv_topk_idx")
    for tensor in (recv_q, recv_scales, recv_idx):  # received tensors are disposed of like this
        tensor.set_(torch.empty((0,), dtype=tensor.dtype, device=tensor.device))
    buffer.clean_low_latency_buffer(32, H * 4, E)
    wide = torch.randn(T, H * 4, generator=generator(71, ctx.rank)).bfloat16().to(ctx.device)
    for hook_mode in (True, False):
        hidden, _count, handle, event, hook = buffer.low_latency_dispatch(
            wide,
            idx,
            32,
            E,
            use_fp8=True,
            async_finish=not hook_mode,
            return_recv_hook=hook_mode,
            round_scale=True,
            use_ue8m0=True,
        )
        if hook_mode:
            hook()
        else:
            event.current_stream_wait()
        assert len(handle) == 5
        assert len(hidden) == 2
        values = ref.dequantize_1x128(hidden[0].cpu(), hidden[1].cpu()).bfloat16().to(ctx.device)
        out, event, hook = buffer.low_latency_combine(
            x=values,
            topk_idx=idx,
            topk_weights=weights,
            handle=handle,
            async_finish=not hook_mode,
            return_recv_hook=hook_mode,
        )
        if hook_mode:
            hook()
        else:
            event.current_stream_wait()
        total = torch.where(idx >= 0, weights, 0.0).sum(1, keepdim=True)
        assert torch.allclose(out.float(), wide.float() * total, atol=0.05, rtol=0.08)


def test_sglang():
    run_ranks(2, run_sglang)


_vllm_cache: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def run_vllm(ctx: RankContext):
    """vLLM: a gloo group, keywords, buffers in a WeakValueDictionary, results through `out=`, destroy at the end."""
    kwargs = {
        "group": ctx.group,
        "num_nvl_bytes": 1 << 30,
        "num_rdma_bytes": 0,
        "low_latency_mode": False,
        "num_qps_per_rank": 1,
        "explicitly_destroy": True,
    }
    buffer = Buffer(**kwargs)
    _vllm_cache["ht"] = buffer
    assert _vllm_cache["ht"] is buffer
    assert weakref.ref(buffer)() is buffer
    Buffer.set_num_sms(18)
    assert Buffer.num_sms == 18
    Buffer.set_num_sms(20)
    x, idx, weights = inputs(ctx)
    previous = buffer.capture()
    layout = buffer.get_dispatch_layout(
        topk_idx=idx, num_experts=E, previous_event=previous, async_finish=False, allocate_on_comm_stream=False
    )
    recv, recv_idx, recv_weights, _counts, handle, event = buffer.dispatch(
        x=x,
        handle=None,
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
        topk_idx=idx,
        topk_weights=weights,
        expert_alignment=1,
        config=None,
        previous_event=previous,
        async_finish=True,
        allocate_on_comm_stream=False,
    )
    if event.event is not None:
        event.current_stream_wait()
    combined, _, event = buffer.combine(
        x=recv,
        handle=handle,
        topk_weights=None,
        config=Buffer.get_combine_config(ctx.num_ranks),
        previous_event=previous,
        async_finish=False,
        allocate_on_comm_stream=False,
    )
    assert event.event is None
    expect_bits(to_cpu((recv, recv_idx, recv_weights, combined)), expected(ctx), "vLLM high-throughput calls")
    buffer.destroy()
    hint = Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=16, hidden=512, num_ranks=ctx.num_ranks, num_experts=E
    )
    ll = Buffer(
        group=ctx.group,
        num_nvl_bytes=0,
        num_rdma_bytes=hint,
        low_latency_mode=True,
        num_qps_per_rank=E // ctx.num_ranks,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
        enable_shrink=True,
    )
    wide = torch.randn(T, 512, generator=generator(72, ctx.rank)).bfloat16().to(ctx.device)
    recv, count, handle, event, hook = ll.low_latency_dispatch(
        wide, idx, 16, E, use_fp8=True, round_scale=False, use_ue8m0=False, async_finish=False, return_recv_hook=True
    )
    hook()
    assert recv[0].is_contiguous()
    assert count.dtype == torch.int32
    out = torch.empty_like(wide)
    rows = ref.dequantize_1x128(recv[0].cpu(), recv[1].cpu().contiguous()).bfloat16().to(ctx.device)
    _, _, hook = ll.low_latency_combine(
        rows, idx, weights, handle, async_finish=False, zero_copy=False, return_recv_hook=False, out=out
    )
    assert hook is None
    total = torch.where(idx >= 0, weights, 0.0).sum(1, keepdim=True)
    assert torch.allclose(out.float(), wide.float() * total, atol=0.05, rtol=0.08)
    status = torch.zeros(ctx.num_ranks, dtype=torch.int32, device=ctx.device)
    ll.low_latency_query_mask_buffer(status)
    scratch = ll.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True)
    assert scratch.dtype == torch.int8
    assert scratch.numel() >= hint
    scratch.zero_()
    ll.low_latency_clean_mask_buffer()
    ll.destroy()


def test_vllm():
    run_ranks(2, run_vllm)


def run_lmdeploy(ctx: RankContext):
    """lmdeploy: one buffer for both modes, SM count set through the instance, the received pair iterated."""
    hint = Buffer.get_low_latency_rdma_size_hint(16, 512, ctx.num_ranks, E)
    buffer = Buffer(
        ctx.group,
        num_nvl_bytes=1 << 20,
        num_rdma_bytes=hint,
        low_latency_mode=True,
        num_qps_per_rank=max(4, 20),
        allow_mnnvl=True,
        explicitly_destroy=True,
    )
    buffer.set_num_sms(16)
    assert Buffer.num_sms == buffer.num_sms == 16
    Buffer.set_num_sms(20)
    assert isinstance(buffer, Buffer)
    assert buffer.group is ctx.group
    assert buffer.group_size == ctx.num_ranks
    x, idx, weights = inputs(ctx, hidden=512)
    layout = buffer.get_dispatch_layout(idx, E)
    recv, _, _, _counts, handle, event = buffer.dispatch(
        x,
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
        previous_event=layout[4],
        async_finish=False,
        allocate_on_comm_stream=False,
        expert_alignment=128,
    )
    buffer.combine(recv, handle, async_finish=False, previous_event=event, allocate_on_comm_stream=False)
    buffer.clean_low_latency_buffer(16, 512, E)
    pair, _count, handle, event, hook = buffer.low_latency_dispatch(
        x, idx, 16, E, use_fp8=True, async_finish=False, return_recv_hook=True
    )
    hook()
    values, scales = list(pair)
    rows = ref.dequantize_1x128(values.cpu(), scales.cpu().contiguous()).bfloat16().to(ctx.device)
    out, event, hook = buffer.low_latency_combine(rows, idx, weights, handle, async_finish=True, return_recv_hook=False)
    event.current_stream_wait()
    assert out.shape == x.shape
    buffer.destroy()


def test_lmdeploy():
    run_ranks(2, run_lmdeploy)


def run_lightllm(ctx: RankContext):
    """LightLLM: all-keyword low-latency dispatch with the top-k first; the buffer as flat workspace in between."""
    hint = Buffer.get_low_latency_rdma_size_hint(16, 512, ctx.num_ranks, E)
    buffer = Buffer(ctx.group, num_rdma_bytes=hint, low_latency_mode=True, num_qps_per_rank=E // ctx.num_ranks)
    x, idx, weights = inputs(ctx, hidden=512)
    recv, _count, handle, _event, hook = buffer.low_latency_dispatch(
        topk_idx=idx.to(torch.long),
        x=x,
        num_max_dispatch_tokens_per_rank=16,
        num_experts=E,
        use_fp8=False,
        async_finish=False,
        return_recv_hook=False,
    )
    assert hook is None
    out, _event, hook = buffer.low_latency_combine(
        recv, idx, weights, handle, async_finish=False, return_recv_hook=False
    )
    workspace = buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)
    assert workspace.dim() == 1
    assert workspace.is_contiguous()
    assert workspace.numel() == hint
    workspace.fill_(255)
    buffer.clean_low_latency_buffer(16, 512, E)
    recv, _, handle, _, _ = buffer.low_latency_dispatch(
        topk_idx=idx, x=x, num_max_dispatch_tokens_per_rank=16, num_experts=E, use_fp8=False
    )
    expect_bits(buffer.low_latency_combine(recv, idx, weights, handle)[0], out, "after the workspace was used")


def test_lightllm():
    run_ranks(2, run_lightllm)


class FakeMpiComm:
    """What `comm=` needs of an mpi4py communicator, over a torch store."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.store, self.rank, self.size, self.round = store, rank, size, 0

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def allgather(self, obj):
        self.round += 1
        self.store.set(f"comm/{self.round}/{self.rank}", pickle.dumps(obj))
        return [pickle.loads(self.store.get(f"comm/{self.round}/{r}")) for r in range(self.size)]


def run_tensorrt_llm(ctx: RankContext):
    comm = FakeMpiComm(ctx.store, ctx.rank, ctx.num_ranks)
    buffer = Buffer(None, 1 << 20, 0, num_nvl_peers=ctx.num_ranks, comm=comm)
    assert buffer.rank == ctx.rank
    assert buffer.group_size == ctx.num_ranks
    _, idx, weights = inputs(ctx)
    # NVFP4: packed bytes, and FP8 block scales whose bytes travel as float32 words.
    packed = torch.randint(0, 256, (T, H // 2), dtype=torch.uint8, generator=generator(73, ctx.rank)).to(ctx.device)
    scale_bytes = torch.randint(0, 256, (T, H // 16), dtype=torch.uint8, generator=generator(74, ctx.rank)).to(
        ctx.device
    )
    layout = buffer.get_dispatch_layout(idx.to(torch.int32), E)
    (recv, recv_scales), _recv_idx, _, _counts, handle, event = buffer.dispatch(
        (packed, scale_bytes.view(torch.float32)),
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
    )
    assert event.event is None
    made = [
        torch.randint(0, 256, (T, H // 2), dtype=torch.uint8, generator=generator(73, r)) for r in range(ctx.num_ranks)
    ]
    made_scales = [
        torch.randint(0, 256, (T, H // 16), dtype=torch.uint8, generator=generator(74, r)) for r in range(ctx.num_ranks)
    ]
    route = ref.routes(
        [
            ref.layout(make_topk(generator(70, r), T, K, E, "some")[0], E, ctx.num_ranks).is_token_in_rank
            for r in range(ctx.num_ranks)
        ]
    )
    expect_bits(recv.cpu(), ref.gather(made, route, ctx.rank), "packed rows")
    expect_bits(recv_scales.view(torch.uint8).cpu(), ref.gather(made_scales, route, ctx.rank), "scale bytes")
    del buffer  # released, and the next one constructed at once
    hint = Buffer.get_low_latency_rdma_size_hint(16, 512, ctx.num_ranks, E)
    buffer = Buffer(
        None, 0, hint, low_latency_mode=True, num_qps_per_rank=4, allow_nvlink_for_low_latency_mode=True, comm=comm
    )
    # FP8 rows travel as bf16 of half the width, and the handle's hidden size is put right afterwards.
    fp8 = torch.randint(0, 256, (T, 512), dtype=torch.uint8, generator=generator(75, ctx.rank)).to(ctx.device)
    recv, _count, handle, event, hook = buffer.low_latency_dispatch(fp8.view(torch.bfloat16), idx, 16, E, use_fp8=False)
    assert event.event is None
    assert hook is None
    experts = ref.low_latency_rows(
        [make_topk(generator(70, r), T, K, E, "some")[0] for r in range(ctx.num_ranks)], E, ctx.rank
    )
    sent = [
        torch.randint(0, 256, (T, 512), dtype=torch.uint8, generator=generator(75, r)) for r in range(ctx.num_ranks)
    ]
    for e, rows in enumerate(experts):
        for row, (src, token) in enumerate(rows.sources):
            expect_bits(recv[e, row].view(torch.uint8).cpu(), sent[src][token], "FP8 bytes as bf16")
    handle = list(handle)
    assert handle[3] == 256
    handle[3] = 512
    values = torch.ones(len(experts), 16 * ctx.num_ranks, 512, dtype=torch.bfloat16, device=ctx.device)
    out, event, hook = buffer.low_latency_combine(values, idx, weights, tuple(handle))
    assert event.event is None
    assert hook is None
    total = torch.where(idx >= 0, weights, 0.0).sum(1, keepdim=True)
    assert torch.allclose(out.float(), total.expand(-1, 512), rtol=0.02)
    buffer.clean_low_latency_buffer(16, 512, E)


def test_tensorrt_llm_with_an_mpi_like_communicator(spawn_fresh):
    results = spawn_fresh(2, run_tensorrt_llm)
    assert results == [None, None]


def test_mpi4py_communicator():
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"mpi4py has no MPI library here: {error.args[0].splitlines()[0]}")
    buffer = Buffer(None, comm=MPI.COMM_SELF)
    assert (buffer.rank, buffer.group_size) == (0, 1)


def test_solo_communicator():
    buffer = Buffer(None, comm=deep_ep.SoloComm())
    idx = torch.tensor([[0, 1], [-1, 2]])
    layout = buffer.get_dispatch_layout(idx, 3)
    x = torch.randn(2, 32).bfloat16()
    recv, _recv_idx, _weights, counts, handle, _ = buffer.dispatch(
        x, None, layout[0], layout[1], layout[3], layout[2], idx, torch.ones(2, 2)
    )
    assert counts == [1, 1, 1]
    expect_bits(recv, x, "recv")
    expect_bits(buffer.combine(recv, handle)[0], x, "combined")
