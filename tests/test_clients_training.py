"""How training frameworks call `Buffer`: each function is the skeleton of one integration, argument names kept."""

import pytest
import reference as ref
import torch
from cases import to_cpu
from client_cases import E, H, expected, inputs
from harness import RankContext, environ, expect_bits, run_ranks

from deep_ep import Buffer, EventHandle, EventOverlap


class TrainDispatch(torch.autograd.Function):
    """Megatron-LM: everything asynchronous, the handle an opaque tuple."""

    @staticmethod
    def forward(ctx, x, token_indices, token_probs, buffer, num_experts, async_finish):
        previous_event = EventOverlap(EventHandle()) if async_finish else None
        (per_rank, per_rdma_rank, per_expert, in_rank, event) = buffer.get_dispatch_layout(
            token_indices,
            num_experts,
            previous_event=previous_event,
            async_finish=async_finish,
            allocate_on_comm_stream=async_finish,
        )
        (recv_x, recv_idx, recv_probs, counts, handle, after_event) = buffer.dispatch(
            x,
            topk_idx=token_indices,
            topk_weights=token_probs,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            async_finish=async_finish,
            allocate_on_comm_stream=async_finish,
        )
        if async_finish:
            after_event.current_stream_wait()
        ctx.buffer, ctx.handle, ctx.async_finish = buffer, handle, async_finish
        return recv_x, recv_idx, recv_probs, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx, grad_output, _idx, grad_probs, _counts, _handle):
        previous_event = EventOverlap(EventHandle()) if ctx.async_finish else None
        grad_x, grad_weights, after_event = ctx.buffer.combine(
            grad_output.contiguous(),
            ctx.handle,
            topk_weights=grad_probs.float(),
            previous_event=previous_event,
            async_finish=ctx.async_finish,
            allocate_on_comm_stream=ctx.async_finish,
        )
        if ctx.async_finish:
            after_event.current_stream_wait()
        return grad_x, None, grad_weights, None, None, None


class TrainCombine(torch.autograd.Function):
    """Megatron-LM, with xtuner's habit of carrying the handle through save_for_backward."""

    @staticmethod
    def forward(ctx, x, buffer, async_finish, *handle):
        previous_event = EventOverlap(EventHandle()) if async_finish else None
        combined, _, after_event = buffer.combine(
            x,
            handle=handle,
            async_finish=async_finish,
            previous_event=previous_event,
            allocate_on_comm_stream=async_finish,
        )
        if async_finish:
            after_event.current_stream_wait()
        ctx.save_for_backward(*handle)
        ctx.buffer, ctx.async_finish = buffer, async_finish
        return combined

    @staticmethod
    def backward(ctx, grad_output):
        previous_event = EventOverlap(EventHandle()) if ctx.async_finish else None
        grad_x, none1, none2, none3, none4, after_event = ctx.buffer.dispatch(
            grad_output.contiguous(),
            handle=ctx.saved_tensors,
            previous_event=previous_event,
            async_finish=ctx.async_finish,
            allocate_on_comm_stream=ctx.async_finish,
        )
        assert none1 is none2 is none3 is none4 is None
        if ctx.async_finish:
            after_event.current_stream_wait()
        return (grad_x, None, None, *[None] * len(ctx.saved_tensors))


_megatron_buffer = None


def megatron_buffer(group, hidden_bytes):
    global _megatron_buffer
    nvl = rdma = 0
    for config in (Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size())):
        nvl = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size()), nvl)
        rdma = max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size()), rdma)
    if (
        _megatron_buffer is None
        or _megatron_buffer.group != group
        or _megatron_buffer.num_nvl_bytes < nvl
        or _megatron_buffer.num_rdma_bytes < rdma
    ):
        _megatron_buffer = Buffer(group, nvl, rdma)
    return _megatron_buffer


def run_megatron(ctx: RankContext, async_finish: bool, domain):
    with environ(DEEP_EP_NVL_DOMAIN=domain):
        global _megatron_buffer
        _megatron_buffer = None
        Buffer.set_num_sms(20)
        buffer = megatron_buffer(ctx.group, H * 2)
        assert megatron_buffer(ctx.group, H * 2) is buffer
    x, idx, weights = inputs(ctx)
    for _ in range(2):  # the second time as activation recomputation does it
        x = x.detach().requires_grad_()
        weights = weights.detach().requires_grad_()
        recv_x, recv_idx, recv_probs, counts, handle = TrainDispatch.apply(x, idx, weights, buffer, E, async_finish)
        assert type(handle) is tuple
        assert counts.dtype == torch.int64
        out = TrainCombine.apply(recv_x * 2, buffer, async_finish, *handle)
        (out.float().sum() + (recv_probs * 3)[recv_idx >= 0].sum()).backward()
        visits = ref.layout(idx.cpu(), E, ctx.num_ranks).is_token_in_rank.sum(1, keepdim=True).float()
        expect_bits(x.grad.cpu().float(), (2 * visits).expand(-1, H).contiguous(), "gradient of x")
        expect_bits(weights.grad.cpu(), torch.where(idx.cpu() >= 0, 3.0, 0.0), "gradient of the router weights")
        x.grad = weights.grad = None
    if not domain:
        expect_bits(recv_x.detach().cpu(), expected(ctx)[0], "recv_x")


@pytest.mark.parametrize("async_finish", [False, True])
@pytest.mark.parametrize("domain", [None, "2"])
def test_megatron(async_finish, domain):
    run_ranks(4, run_megatron, async_finish, domain)


def run_sync_mode_chains_events(ctx: RankContext):
    """Megatron in synchronous mode hands the layout's event on: an EventOverlap whose event is None."""
    buffer = ctx.buffer()
    x, idx, weights = inputs(ctx)
    lay = buffer.get_dispatch_layout(idx, E)
    assert lay[4].event is None
    cases = [
        None,
        EventOverlap(None),
        EventOverlap(),
        EventOverlap(EventHandle()),
        EventHandle(),
        Buffer.capture(),
        buffer.capture(),
    ]
    want = expected(ctx)
    for previous in cases:
        for async_finish in (False, True):
            for on_comm_stream in (False, True):
                if on_comm_stream and (
                    previous is None or not async_finish or getattr(previous, "event", previous) is None
                ):
                    continue
                how = {
                    "previous_event": previous,
                    "async_finish": async_finish,
                    "allocate_on_comm_stream": on_comm_stream,
                }
                layout = buffer.get_dispatch_layout(idx, E, **how)
                recv, _, w, _, handle, event = buffer.dispatch(
                    x,
                    num_tokens_per_rank=layout[0],
                    num_tokens_per_rdma_rank=layout[1],
                    is_token_in_rank=layout[3],
                    num_tokens_per_expert=layout[2],
                    topk_idx=idx,
                    topk_weights=weights,
                    **how,
                )
                assert (event.event is not None) == async_finish
                cached, *_, cached_event = buffer.dispatch(x, handle=handle, **how)
                combined, _, combined_event = buffer.combine(recv, handle, w, **how)
                for e in (event, cached_event, combined_event):
                    assert (e.event is not None) == async_finish
                    if async_finish:
                        e.current_stream_wait()
                expect_bits(
                    (recv.cpu(), cached.cpu(), combined.cpu()),
                    (want[0], want[0], want[3]),
                    f"previous_event={previous!r}",
                )


def test_previous_event_variants():
    run_ranks(2, run_sync_mode_chains_events)


def run_all_keyword(ctx: RankContext):
    """torchtitan (V1 era): keywords for everything, None for what a cached dispatch lacks."""
    buffer = ctx.buffer()
    x, idx, weights = inputs(ctx)
    per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx=idx, num_experts=E)
    assert per_rdma_rank is None
    how = {"previous_event": EventOverlap(EventHandle()), "async_finish": True, "allocate_on_comm_stream": True}
    recv, recv_idx, recv_weights, _counts, handle, event = buffer.dispatch(
        x=x,
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        **how,
    )
    event.current_stream_wait()
    out, out_weights, event = buffer.combine(x=recv, handle=handle, **how)
    event.current_stream_wait()
    assert out_weights is None
    again, none_idx, none_weights, none_counts, none_handle, event = buffer.dispatch(
        x=x,
        topk_idx=None,
        topk_weights=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        handle=handle,
        **how,
    )
    event.current_stream_wait()
    assert none_idx is none_weights is none_counts is none_handle is None
    want = expected(ctx)
    expect_bits(to_cpu((recv, recv_idx, recv_weights, out, again)), (*want, want[0]), "all-keyword calls")


def test_torchtitan_keywords():
    run_ranks(3, run_all_keyword)


def run_axolotl(ctx: RankContext):
    """axolotl: synchronous, configs always given, only three layout tensors passed."""
    buffer = Buffer(group=ctx.group, num_nvl_bytes=256 << 20, num_rdma_bytes=0, low_latency_mode=False)
    dispatch_config, combine_config = (
        Buffer.get_dispatch_config(ctx.num_ranks),
        Buffer.get_combine_config(ctx.num_ranks),
    )
    x, idx, weights = inputs(ctx)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, E)
    recv, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        x,
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        config=dispatch_config,
    )
    out, out_weights, _ = buffer.combine(recv, handle, topk_weights=recv_weights, config=combine_config)
    again = buffer.dispatch(x, handle=handle, config=dispatch_config)[0]
    want = expected(ctx)
    expect_bits(to_cpu((recv, recv_idx, recv_weights, out, again)), (*want, want[0]), "axolotl calls")
    expect_bits(out_weights.cpu(), torch.where(idx >= 0, weights, 0.0).cpu(), "combined weights")
    assert sum(counts) == int((recv_idx >= 0).sum())


def test_axolotl():
    run_ranks(2, run_axolotl)


def run_xtuner(ctx: RankContext):
    """xtuner: the shim's EventHandle, a low-latency buffer for normal mode, events assigned from one to another."""
    from deep_ep_cpp import EventHandle as CppEventHandle

    Buffer.set_num_sms(20)
    buffer = Buffer(
        ctx.group,
        1 << 20,
        1 << 20,
        low_latency_mode=True,
        num_qps_per_rank=max(E // ctx.num_ranks, Buffer.num_sms // 2),
    )
    x, idx, weights = inputs(ctx)
    previous = EventOverlap(CppEventHandle())
    layout = buffer.get_dispatch_layout(
        idx, E, previous_event=previous, async_finish=True, allocate_on_comm_stream=previous is not None
    )
    recv, recv_idx, recv_weights, _counts, handle, event = buffer.dispatch(
        x,
        topk_idx=idx,
        topk_weights=weights,
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
        previous_event=layout[4],
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    later = EventOverlap(None)
    later.event = event.event
    later.current_stream_wait()
    later.current_stream_wait()  # more than once is fine
    recv.requires_grad_()  # a leaf of ordinary storage
    assert recv.is_leaf
    out, _, event = buffer.combine(
        recv.detach(), handle, async_finish=True, previous_event=None, allocate_on_comm_stream=False
    )
    event.current_stream_wait()
    expect_bits(to_cpu((recv.detach(), recv_idx, recv_weights, out)), expected(ctx), "xtuner calls")


def test_xtuner():
    run_ranks(2, run_xtuner)


def run_outstanding(ctx: RankContext):
    """prime-rl: several asynchronous dispatches in flight on one buffer, waited for later, handles interleaved."""
    buffer = ctx.buffer()
    x, idx, weights = inputs(ctx)
    calls = []
    for step in range(3):
        layout = buffer.get_dispatch_layout(idx, E)
        calls.append(
            buffer.dispatch(
                x + step,
                None,
                layout[0],
                layout[1],
                layout[3],
                layout[2],
                idx,
                weights,
                previous_event=EventOverlap(EventHandle()),
                async_finish=True,
                allocate_on_comm_stream=True,
            )
        )
    outs = []
    for recv, _, _, _, handle, event in reversed(calls):
        event.current_stream_wait()
        outs.append(
            buffer.combine(
                recv,
                handle,
                previous_event=EventOverlap(EventHandle()),
                async_finish=True,
                allocate_on_comm_stream=True,
            )
        )
    for _, _, event in outs:
        event.current_stream_wait()
    expect_bits(outs[-1][0].cpu(), expected(ctx)[3], "the first of three")
    assert not torch.equal(outs[0][0], outs[-1][0])


def test_prime_rl_outstanding():
    run_ranks(2, run_outstanding)
