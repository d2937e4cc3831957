"""What callers need of the package and of the class itself: imports, signatures, attributes, subclasses, groups."""

import inspect

import pytest
import reference as ref
import torch
import torch.distributed as dist
from client_cases import E, H, expected, inputs
from harness import RankContext, expect_bits, run_ranks

import deep_ep
from deep_ep import Buffer, EventOverlap


def test_import_surface():
    from deep_ep.utils import EventHandle as handle2
    from deep_ep.utils import EventOverlap as overlap2
    from deep_ep.utils import check_nvlink_connections
    from deep_ep.utils.event import EventHandle as handle3
    from deep_ep.utils.event import EventOverlap as overlap3

    assert handle2 is handle3 is deep_ep.EventHandle
    assert overlap2 is overlap3 is deep_ep.EventOverlap
    assert callable(check_nvlink_connections)
    assert deep_ep.topk_idx_t is torch.int64
    assert isinstance(deep_ep.__version__, str)
    assert deep_ep.Config is not None
    assert not hasattr(deep_ep, "HybridEPBuffer"), "callers that find it choose it; it has to be complete or absent"


def test_deep_ep_cpp_shim():
    import deep_ep_cpp

    assert deep_ep_cpp.Config is deep_ep.Config
    assert deep_ep_cpp.EventHandle is deep_ep.EventHandle
    assert deep_ep_cpp.topk_idx_t is deep_ep.topk_idx_t
    assert isinstance(deep_ep_cpp.is_sm90_compiled(), bool)
    assert deep_ep_cpp.get_low_latency_rdma_size_hint(128, 7168, 8, 256) == Buffer.get_low_latency_rdma_size_hint(
        128, 7168, 8, 256
    )


def test_helper_modules():
    from deep_ep.utils import envs, math, testing

    for name in (
        "init_dist",
        "init_seed",
        "get_local_seed",
        "get_global_seed",
        "dist_print",
        "check_nvlink_connections",
        "check_torch_deterministic",
        "get_physical_domain_size",
        "get_logical_domain_size",
    ):
        assert callable(getattr(envs, name)), name
    for name in ("bench", "bench_kineto", "flush_l2_cache", "suppress_stdout_stderr", "empty_suppress"):
        assert callable(getattr(testing, name)), name
    x = torch.randn(5, 200).bfloat16()
    q, scales = math.per_token_cast_to_fp8(x)
    want_q, want_scales = ref.quantize_1x128(x)
    expect_bits((q, scales), (want_q, want_scales), "per_token_cast_to_fp8")
    assert math.calc_diff(math.per_token_cast_back(q, scales).float(), x.float()) < 1e-3
    assert math.calc_diff(x, x) == pytest.approx(0, abs=1e-12)
    assert (math.ceil_div(7, 3), math.align(7, 4), math.safe_div(1, 0), math.count_bytes(x, (q, None))) == (
        3,
        8,
        0,
        3000,
    )
    row = torch.tensor([[3, 1, 3, -1], [-1, -1, -1, -1]])
    math.inplace_unique(row, 5)
    assert row.tolist() == [[3, 1, -1, -1], [-1, -1, -1, -1]]
    assert math.hash_tensor(torch.tensor([1, 2], dtype=torch.int32)) == 3
    grouped = math.create_grouped_scores(torch.ones(1, 4), torch.tensor([[1]]), 2)
    assert grouped.tolist() == [[0, 0, 1, 1]]
    average, least, most = testing.bench(lambda: None, num_warmups=1, num_tests=3)
    assert 0 <= least <= average <= most


REQUIRED = inspect.Parameter.empty
SIGNATURES = {
    "__init__": [
        ("group", REQUIRED),
        ("num_nvl_bytes", 0),
        ("num_rdma_bytes", 0),
        ("low_latency_mode", False),
        ("num_qps_per_rank", 24),
        ("allow_nvlink_for_low_latency_mode", True),
        ("allow_mnnvl", False),
        ("explicitly_destroy", False),
        ("enable_shrink", False),
        ("comm", None),
    ],
    "get_dispatch_layout": [
        ("topk_idx", REQUIRED),
        ("num_experts", REQUIRED),
        ("previous_event", None),
        ("async_finish", False),
        ("allocate_on_comm_stream", False),
    ],
    "dispatch": [
        ("x", REQUIRED),
        ("handle", None),
        ("num_tokens_per_rank", None),
        ("num_tokens_per_rdma_rank", None),
        ("is_token_in_rank", None),
        ("num_tokens_per_expert", None),
        ("topk_idx", None),
        ("topk_weights", None),
        ("expert_alignment", 1),
        ("num_worst_tokens", 0),
        ("config", None),
        ("previous_event", None),
        ("async_finish", False),
        ("allocate_on_comm_stream", False),
    ],
    "combine": [
        ("x", REQUIRED),
        ("handle", REQUIRED),
        ("topk_weights", None),
        ("bias", None),
        ("config", None),
        ("previous_event", None),
        ("async_finish", False),
        ("allocate_on_comm_stream", False),
    ],
    "low_latency_dispatch": [
        ("x", REQUIRED),
        ("topk_idx", REQUIRED),
        ("num_max_dispatch_tokens_per_rank", REQUIRED),
        ("num_experts", REQUIRED),
        ("cumulative_local_expert_recv_stats", None),
        ("dispatch_wait_recv_cost_stats", None),
        ("use_fp8", True),
        ("round_scale", False),
        ("use_ue8m0", False),
        ("async_finish", False),
        ("return_recv_hook", False),
    ],
    "low_latency_combine": [
        ("x", REQUIRED),
        ("topk_idx", REQUIRED),
        ("topk_weights", REQUIRED),
        ("handle", REQUIRED),
        ("use_logfmt", False),
        ("zero_copy", False),
        ("async_finish", False),
        ("return_recv_hook", False),
        ("out", None),
        ("combine_wait_recv_cost_stats", None),
    ],
    "clean_low_latency_buffer": [
        ("num_max_dispatch_tokens_per_rank", REQUIRED),
        ("hidden", REQUIRED),
        ("num_experts", REQUIRED),
    ],
    "get_next_low_latency_combine_buffer": [("handle", REQUIRED)],
    "get_local_buffer_tensor": [("dtype", REQUIRED), ("size", None), ("offset", 0), ("use_rdma_buffer", False)],
    "low_latency_update_mask_buffer": [("rank_to_mask", REQUIRED), ("mask", False)],
    "low_latency_query_mask_buffer": [("mask_status", REQUIRED)],
    "low_latency_clean_mask_buffer": [],
    "destroy": [],
    "get_comm_stream": [],
    "capture": [],
    "is_sm90_compiled": [],
    "set_num_sms": [("new_num_sms", REQUIRED)],
    "get_dispatch_config": [("num_ranks", REQUIRED)],
    "get_combine_config": [("num_ranks", REQUIRED)],
    "get_low_latency_rdma_size_hint": [
        ("num_max_dispatch_tokens_per_rank", REQUIRED),
        ("hidden", REQUIRED),
        ("num_ranks", REQUIRED),
        ("num_experts", REQUIRED),
    ],
}


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signature(name):
    parameters = [p for p in inspect.signature(getattr(Buffer, name)).parameters.values() if p.name != "self"]
    assert not [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)], "callers inspect the names"
    positional = [(p.name, p.default) for p in parameters if p.kind != p.KEYWORD_ONLY]
    assert positional == SIGNATURES[name]
    extras = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    assert all(p.default is not REQUIRED for p in extras), "what is added beside the interface is optional"


@pytest.mark.parametrize("name", ["internode_dispatch", "internode_combine"])
def test_internode_signature(name):
    names = [p.name for p in inspect.signature(getattr(Buffer, name)).parameters.values() if p.name != "self"]
    wanted = (
        ["x", "handle", "topk_weights", "bias", "config"]
        if name == "internode_combine"
        else [
            "x",
            "handle",
            "num_tokens_per_rank",
            "num_tokens_per_rdma_rank",
            "is_token_in_rank",
            "num_tokens_per_expert",
            "topk_idx",
            "topk_weights",
            "expert_alignment",
        ]
    )
    assert names[: len(wanted)] == wanted
    assert {"config", "previous_event", "async_finish", "allocate_on_comm_stream"} <= set(names)


def test_class_is_ordinary():
    assert isinstance(Buffer, type)
    assert isinstance(Buffer.num_sms, int)
    assert "use_fabric" in inspect.signature(Buffer.__init__).parameters
    assert "align_fp8_quantization" not in inspect.signature(Buffer.low_latency_dispatch).parameters, (
        "forks are probed by this name"
    )
    assert isinstance(Buffer.is_sm90_compiled(), bool)
    assert isinstance(Buffer.capture(), EventOverlap)
    bias = torch.zeros(1)
    assert Buffer._unpack_bias(None) == (None, None)
    assert Buffer._unpack_bias(bias)[0] is bias
    assert Buffer._unpack_bias((bias, bias))[1] is bias


def run_patched(ctx: RankContext):
    """slime and miles replace `Buffer.__init__`; others subclass."""
    original = Buffer.__init__
    seen = []

    def patched(self, *args, **kwargs):
        seen.append(len(args))
        return original(self, *args, **kwargs)

    Buffer.__init__ = patched
    try:
        buffer = Buffer(ctx.group, 1 << 20)
    finally:
        Buffer.__init__ = original
    assert seen == [2]

    class MyBuffer(Buffer):
        def __init__(self, group):
            super().__init__(group, num_nvl_bytes=128)
            self.mine = True

        def dispatch(self, x, **kwargs):
            return super().dispatch(x, **kwargs)

    mine = MyBuffer(ctx.group)
    assert isinstance(mine, Buffer)
    assert mine.mine
    assert mine.num_nvl_bytes == 128
    x, idx, weights = inputs(ctx)
    layout = mine.get_dispatch_layout(idx, E)
    recv = mine.dispatch(
        x,
        num_tokens_per_rank=layout[0],
        num_tokens_per_rdma_rank=layout[1],
        is_token_in_rank=layout[3],
        num_tokens_per_expert=layout[2],
        topk_idx=idx,
        topk_weights=weights,
    )[0]
    expect_bits(recv.cpu(), expected(ctx)[0], "through a subclass")
    assert buffer.engine == "portable" or ctx.device.type == "cuda"


def test_patched_and_subclassed():
    run_ranks(2, run_patched)


def run_attributes(ctx: RankContext):
    buffer = ctx.fresh_buffer(num_nvl_bytes=256, num_rdma_bytes=0)
    assert buffer.group is ctx.group
    assert (buffer.group != ctx.group) is False
    assert (buffer.rank, buffer.group_size) == (ctx.rank, ctx.num_ranks)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes, buffer.low_latency_mode) == (256, 0, False)
    assert (buffer.explicitly_destroy, buffer.enable_shrink) == (False, False)
    assert buffer.runtime.get_num_rdma_ranks() == 1
    if ctx.device.type == "cpu":
        buffer.runtime.get_local_device_id()
    assert buffer.runtime.is_available()
    scratch = buffer.get_local_buffer_tensor(torch.float32, torch.Size([4, 8]), offset=64)
    assert scratch.shape == (4, 8)
    scratch.fill_(1.0)
    flat = buffer.get_local_buffer_tensor(torch.uint8)
    assert flat.numel() == 256
    assert bool((flat[64:192].view(torch.float32) == 1.0).all()), "a view of the same memory; the offset counts bytes"


def test_attributes():
    run_ranks(2, run_attributes)


def run_subgroups(ctx: RankContext):
    """Buffers of the whole group and of two halves at once, each with its own traffic."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = halves[ctx.rank // 2]
    whole, half = Buffer(ctx.group), Buffer(mine)
    assert half.group_size == 2
    assert half.rank == ctx.rank % 2
    x, idx, weights = inputs(ctx)
    for buffer in (whole, half, whole, half):
        layout = buffer.get_dispatch_layout(idx, E)
        recv, _, _, _, handle, _ = buffer.dispatch(x, None, layout[0], layout[1], layout[3], layout[2], idx, weights)
        visits = layout[3].sum(1, keepdim=True).float()
        expect_bits(
            buffer.combine(torch.ones_like(recv), handle)[0].float(), visits.expand(-1, H).contiguous(), "visits"
        )
    alone = dist.new_group([ctx.rank], use_local_synchronization=True)
    assert Buffer(alone).group_size == 1


def test_subgroups_and_new_group(spawn_fresh):
    assert spawn_fresh(4, run_subgroups) == [None] * 4


def run_get_or_grow(ctx: RankContext):
    first = Buffer.get_or_grow(ctx.group, 1024)
    assert Buffer.get_or_grow(ctx.group, 512) is first
    grown = Buffer.get_or_grow(ctx.group, 4096)
    assert grown is not first
    assert grown.num_nvl_bytes >= 4096
    assert Buffer.get_or_grow(ctx.group, 1024) is grown


def test_get_or_grow(spawn_fresh):
    assert spawn_fresh(2, run_get_or_grow) == [None, None]


def run_traffic(ctx: RankContext):
    buffer = ctx.fresh_buffer()
    x, idx, weights = inputs(ctx)
    layout = buffer.get_dispatch_layout(idx, E)
    buffer.traffic.reset()
    recv, _, _, _, handle, _ = buffer.dispatch(x, None, layout[0], layout[1], layout[3], layout[2], idx, weights)
    rows = int(layout[0].sum())
    stats = buffer.traffic
    assert (stats.dispatch_calls, stats.dispatch_rows, stats.dispatch_bytes) == (1, rows, rows * H * 2)
    buffer.dispatch(x, handle=handle, use_fp8=True)
    assert stats.dispatch_bytes == rows * H * 2 + rows * (H + 4)
    assert sorted(stats.dispatch_dtypes) == ["bfloat16", "float8_e4m3fn"] or len(stats.dispatch_dtypes) == 2
    buffer.combine(recv, handle)
    assert (stats.combine_calls, stats.combine_rows, stats.combine_bytes) == (1, recv.size(0), recv.size(0) * H * 2)
    buffer.traffic.reset()
    assert buffer.traffic.dispatch_calls == 0


def test_traffic_counts():
    run_ranks(2, run_traffic)
