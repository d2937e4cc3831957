"""Typed errors: what was given, what is expected, on every rank that needs to know, and never a hang."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from cases import generator, make_topk
from harness import Died, RankContext, environ, expect_bits, run_ranks

import deep_ep
from deep_ep import Buffer
from deep_ep.errors import (
    BufferDestroyed,
    BufferOverflow,
    CommTimeout,
    ConfigError,
    DeepEPError,
    PeerError,
    TopologyError,
)

E, K, H, T = 8, 3, 128, 9


def catch(call):
    """(error class name, message) of what the call raised, or None."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def expect_error(call, kinds, *words):
    """The call raises one of `kinds`, and its message contains each word."""
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    try:
        call()
    except kinds as error:
        missing = [w for w in words if str(w).lower() not in str(error).lower()]
        if missing:
            raise AssertionError(f"the message lacks {missing}: {error}") from error
        return error
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} instead of {[k.__name__ for k in kinds]}: {error}") from error
    raise AssertionError(f"nothing was raised, expected {[k.__name__ for k in kinds]}")


def test_hierarchy():
    assert issubclass(ConfigError, ValueError)
    for kind in (TopologyError, CommTimeout, PeerError, BufferOverflow, BufferDestroyed):
        assert issubclass(kind, RuntimeError)
        assert issubclass(kind, DeepEPError)
        assert getattr(deep_ep, kind.__name__, kind) is kind
    assert issubclass(ConfigError, DeepEPError)


def solo():
    return Buffer(None, comm=deep_ep.SoloComm())


@pytest.fixture
def one():
    """A buffer of one rank with a good dispatch's arguments."""
    buffer = solo()
    idx, weights = make_topk(generator(1), T, K, E)
    layout = buffer.get_dispatch_layout(idx, E)
    return buffer, torch.randn(T, H).bfloat16(), idx, weights, layout


def dispatch(buffer, x, layout, idx, weights, **changes):
    arguments = {
        "num_tokens_per_rank": layout[0],
        "num_tokens_per_rdma_rank": layout[1],
        "is_token_in_rank": layout[3],
        "num_tokens_per_expert": layout[2],
        "topk_idx": idx,
        "topk_weights": weights,
    }
    arguments.update(changes)
    return buffer.dispatch(x, **arguments)


BAD_LAYOUT = {
    "dtype": (lambda idx: (idx.float(), E), ("float32", "int64")),
    "one-dimensional": (lambda idx: (idx[0], E), ("[3]", "shape")),
    "too large": (lambda idx: (torch.full((2, 3), 11), E), (11, E)),
    "below -1": (lambda idx: (torch.full((2, 3), -7), E), (-7,)),
    "no experts": (lambda idx: (idx, 0), (0,)),
    "not a tensor": (lambda idx: (idx.tolist(), E), ("list",)),
}


@pytest.mark.parametrize("name", sorted(BAD_LAYOUT))
def test_bad_layout_arguments(one, name):
    make, words = BAD_LAYOUT[name]
    arguments = make(one[2])
    expect_error(lambda: one[0].get_dispatch_layout(*arguments), ConfigError, *words)


# What is changed in a good call, and what the message has to name (given and expected).
BAD_DISPATCH = {
    "x not a tensor": (lambda a: {"x": 5.0}, ("float", "tensor")),
    "x one-dimensional": (lambda a: {"x": a.x.reshape(-1)}, (T * H,)),
    "x has other tokens than the layout": (lambda a: {"x": a.x[:4]}, (4, T)),
    "scales of other tokens": (lambda a: {"x": (a.x.to(torch.float8_e4m3fn), torch.ones(T + 1, 1))}, (T + 1, T)),
    "scales of a wrong dtype": (
        lambda a: {"x": (a.x.to(torch.float8_e4m3fn), torch.ones(T, 1, dtype=torch.float64))},
        ("float64", "float32"),
    ),
    "three parts": (lambda a: {"x": (a.x, a.x, a.x)}, (3,)),
    "is_token_in_rank dtype": (lambda a: {"is_token_in_rank": a.layout[3].int()}, ("int32", "bool")),
    "is_token_in_rank shape": (lambda a: {"is_token_in_rank": torch.ones(T, 3, dtype=torch.bool)}, (3, 1)),
    "is_token_in_rank missing": (lambda a: {"is_token_in_rank": None}, ("is_token_in_rank",)),
    "num_tokens_per_rank missing": (lambda a: {"num_tokens_per_rank": None}, ("num_tokens_per_rank",)),
    "num_tokens_per_rank dtype": (lambda a: {"num_tokens_per_rank": a.layout[0].long()}, ("int64", "int32")),
    "num_tokens_per_rank shape": (lambda a: {"num_tokens_per_rank": torch.ones(5, dtype=torch.int32)}, (5, 1)),
    "num_tokens_per_expert missing": (lambda a: {"num_tokens_per_expert": None}, ("num_tokens_per_expert",)),
    "num_tokens_per_expert dtype": (lambda a: {"num_tokens_per_expert": a.layout[2].float()}, ("float32", "int32")),
    "top-k indices without weights": (lambda a: {"topk_weights": None}, ("topk_weights",)),
    "weights without indices": (lambda a: {"topk_idx": None}, ("topk_idx",)),
    "weights dtype": (lambda a: {"topk_weights": a.weights.bfloat16()}, ("bfloat16", "float32")),
    "weights shape": (lambda a: {"topk_weights": a.weights[:, :2]}, (2, K)),
    "index dtype": (lambda a: {"topk_idx": a.idx.to(torch.int16)}, ("int16", "int64")),
    "index too large": (lambda a: {"topk_idx": a.idx + E}, (E,)),
    "alignment": (lambda a: {"expert_alignment": 0}, ("expert_alignment", 0)),
    "worst tokens negative": (lambda a: {"num_worst_tokens": -1}, ("num_worst_tokens", -1)),
    "worst tokens without top-k": (
        lambda a: {"num_worst_tokens": 9, "topk_idx": None, "topk_weights": None},
        ("topk",),
    ),
    "config of a wrong type": (lambda a: {"config": 20}, ("int", "Config")),
    "previous_event of a wrong type": (lambda a: {"previous_event": 3}, ("int", "Event")),
    "use_fp8 of FP8 rows": (
        lambda a: {"x": (a.x.to(torch.float8_e4m3fn), torch.ones(T, 1)), "use_fp8": True},
        ("use_fp8",),
    ),
    "use_fp8 of integers": (lambda a: {"x": a.x.view(torch.int32), "use_fp8": True}, ("int32",)),
    "ue8m0 without rounding": (lambda a: {"use_fp8": True, "use_ue8m0": True}, ("round_scale",)),
}


class Good:
    def __init__(self, one):
        self.buffer, self.x, self.idx, self.weights, self.layout = one


@pytest.mark.parametrize("name", sorted(BAD_DISPATCH))
def test_bad_dispatch_arguments(one, name):
    change, words = BAD_DISPATCH[name]
    good = Good(one)
    arguments = change(good)
    x = arguments.pop("x", good.x)
    expect_error(
        lambda: dispatch(good.buffer, x, good.layout, good.idx, good.weights, **arguments), ConfigError, *words
    )
    recv, *_ = dispatch(good.buffer, good.x, good.layout, good.idx, good.weights)
    assert recv.shape == (T, H), "a refused call leaves the buffer usable"


BAD_COMBINE = {
    "rows": (lambda a: {"x": a.recv[:4]}, (4, T)),
    "dtype": (lambda a: {"x": a.recv.int()}, ("int32", "bfloat16")),
    "one-dimensional": (lambda a: {"x": a.recv.reshape(-1)}, (T * H,)),
    "bias shape": (lambda a: {"bias": torch.zeros(T, H + 8).bfloat16()}, (H + 8, H)),
    "bias dtype": (lambda a: {"bias": torch.zeros(T, H)}, ("float32", "bfloat16")),
    "three biases": (lambda a: {"bias": (a.x, a.x, a.x)}, (3, "two")),
    "weights shape": (lambda a: {"topk_weights": torch.zeros(T + 2, K)}, (T + 2, T)),
    "weights dtype": (lambda a: {"topk_weights": torch.zeros(T, K).half()}, ("float16", "float32")),
    "no handle": (lambda a: {"handle": None}, ("handle",)),
    "handle of a wrong length": (lambda a: {"handle": a.handle[:4]}, (4, 6)),
    "handle with a non-tensor": (lambda a: {"handle": (*a.handle[:5], 7)}, ("int",)),
}


@pytest.mark.parametrize("name", sorted(BAD_COMBINE))
def test_bad_combine_arguments(one, name):
    change, words = BAD_COMBINE[name]
    good = Good(one)
    good.recv, _, _, _, good.handle, _ = dispatch(good.buffer, good.x, good.layout, good.idx, good.weights)
    arguments = {"x": good.recv, "handle": good.handle, **change(good)}
    expect_error(lambda: good.buffer.combine(**arguments), ConfigError, *words)
    expect_bits(good.buffer.combine(good.recv, good.handle)[0], good.x, "a refused call leaves the buffer usable")


def test_bad_cached_dispatch(one):
    good = Good(one)
    handle = dispatch(good.buffer, good.x, good.layout, good.idx, good.weights)[4]
    expect_error(
        lambda: good.buffer.dispatch(good.x, handle=handle, topk_idx=good.idx, topk_weights=good.weights),
        ConfigError,
        "topk",
    )
    expect_error(lambda: good.buffer.dispatch(good.x[:5], handle=handle), ConfigError, 5, T)
    expect_error(lambda: good.buffer.dispatch(good.x, handle=handle[:3]), ConfigError, 3, 6)


def test_bad_constructor_arguments():
    expect_error(lambda: Buffer(None), ValueError, "group", "comm")
    expect_error(lambda: Buffer(None, num_nvl_bytes=-128, comm=deep_ep.SoloComm()), ConfigError, "num_nvl_bytes", -128)
    expect_error(lambda: Buffer(None, num_rdma_bytes=-1, comm=deep_ep.SoloComm()), ConfigError, "num_rdma_bytes", -1)
    expect_error(lambda: Buffer(None, comm=object()), (ConfigError, TypeError), "Get_rank")
    expect_error(lambda: Buffer("group"), (ConfigError, TypeError), "str")
    expect_error(lambda: Buffer(None, comm=deep_ep.SoloComm(), timeout_s=0), ConfigError, "timeout")


@pytest.mark.parametrize("text", ["three", "0", "-2"])
def test_bad_domain_in_the_environment(text):
    with environ(DEEP_EP_NVL_DOMAIN=text):
        expect_error(solo, TopologyError, "DEEP_EP_NVL_DOMAIN", text)


@pytest.mark.parametrize("text", ["soon", "-1"])
def test_bad_timeout_in_the_environment(text):
    with environ(DEEP_EP_TIMEOUT_S=text):
        expect_error(solo, ConfigError, "DEEP_EP_TIMEOUT_S", text)


def test_bad_sizes_and_configs():
    expect_error(lambda: Buffer.set_num_sms(7), ConfigError, 7, "even")
    expect_error(lambda: Buffer.set_num_sms(-2), ConfigError, -2)
    expect_error(lambda: deep_ep.Config(-1), ConfigError, -1)
    expect_error(lambda: deep_ep.Config(20, 8, 4), ConfigError, 8, 4)
    expect_error(lambda: deep_ep.Config(20, 0, 4), ConfigError, 0)
    expect_error(lambda: deep_ep.Config(20, 6, 256, 6, 8), ConfigError, 6, 8)
    expect_error(lambda: Buffer.get_dispatch_config(0), ConfigError, 0)
    expect_error(lambda: Buffer.get_low_latency_rdma_size_hint(0, 128, 1, 1), ConfigError, 0)
    expect_error(lambda: deep_ep.Config().get_nvl_buffer_size_hint(-2, 4), ConfigError, -2)


def test_destroyed_buffer():
    buffer = Buffer(None, comm=deep_ep.SoloComm(), explicitly_destroy=True)
    buffer.destroy()
    idx = torch.zeros(1, 1, dtype=torch.int64)
    layout = solo().get_dispatch_layout(idx, 1)
    for call in (
        lambda: dispatch(buffer, torch.zeros(1, 16), layout, idx, torch.ones(1, 1)),
        lambda: buffer.low_latency_dispatch(torch.zeros(1, 512).bfloat16(), idx, 4, 1),
    ):
        expect_error(call, BufferDestroyed, "destroy")
    buffer.destroy()  # again: nothing happens


# ---------------------------------------------------------------------------------------------------------------
# Low latency


@pytest.fixture
def ll():
    buffer = Buffer(None, 0, 1 << 20, low_latency_mode=True, comm=deep_ep.SoloComm(), enable_shrink=True)
    idx, weights = make_topk(generator(1), 6, K, E)
    return buffer, torch.randn(6, 512).bfloat16(), idx, weights


BAD_LL_DISPATCH = {
    "dtype": (lambda x, idx: (x.float(), idx, 8, E, {}), ("float32", "bfloat16")),
    "shape": (lambda x, idx: (x[0], idx, 8, E, {}), (512,)),
    "tokens above the maximum": (lambda x, idx: (x, idx, 4, E, {}), (6, 4)),
    "index too large": (lambda x, idx: (x, idx + E, 8, E, {}), (E,)),
    "index dtype": (lambda x, idx: (x, idx.float(), 8, E, {}), ("float32", "int64")),
    "index shape": (lambda x, idx: (x, idx[:3], 8, E, {}), (3, 6)),
    "ue8m0 without rounding": (lambda x, idx: (x, idx, 8, E, {"use_ue8m0": True}), ("round_scale",)),
    "hook and async": (
        lambda x, idx: (x, idx, 8, E, {"async_finish": True, "return_recv_hook": True}),
        ("async_finish", "return_recv_hook"),
    ),
    "statistics shape": (
        lambda x, idx: (x, idx, 8, E, {"cumulative_local_expert_recv_stats": torch.zeros(3, dtype=torch.int32)}),
        (3, E),
    ),
    "statistics dtype": (
        lambda x, idx: (x, idx, 8, E, {"cumulative_local_expert_recv_stats": torch.zeros(E)}),
        ("float32", "int32"),
    ),
    "weights dtype": (lambda x, idx: (x, idx, 8, E, {"topk_weights": torch.ones(6, K).half()}), ("float16", "float32")),
    "weights shape": (lambda x, idx: (x, idx, 8, E, {"topk_weights": torch.ones(5, K)}), (5, 6)),
    "wait statistics dtype": (
        lambda x, idx: (x, idx, 8, E, {"dispatch_wait_recv_cost_stats": torch.zeros(1)}),
        ("float32", "int64"),
    ),
}


@pytest.mark.parametrize("name", sorted(BAD_LL_DISPATCH))
def test_bad_low_latency_dispatch(ll, name):
    make, words = BAD_LL_DISPATCH[name]
    x, idx, most, experts, extra = make(ll[1], ll[2])
    expect_error(lambda: ll[0].low_latency_dispatch(x, idx, most, experts, **extra), ConfigError, *words)
    assert int(ll[0].low_latency_dispatch(ll[1], ll[2], 8, E)[1].sum()) == 18


BAD_LL_COMBINE = {
    "dtype": (lambda a: {"x": a["x"].float()}, ("float32", "bfloat16")),
    "shape": (lambda a: {"x": a["x"][:, :5]}, (5, 8)),
    "index shape": (lambda a: {"topk_idx": a["topk_idx"][:4]}, (4, 6)),
    "weights dtype": (lambda a: {"topk_weights": a["topk_weights"].double()}, ("float64", "float32")),
    "weights shape": (lambda a: {"topk_weights": a["topk_weights"][:, :2]}, (2, K)),
    "out shape": (lambda a: {"out": torch.zeros(5, 512).bfloat16()}, (5, 6)),
    "out dtype": (lambda a: {"out": torch.zeros(6, 512)}, ("float32", "bfloat16")),
    "logfmt and zero copy": (lambda a: {"use_logfmt": True, "zero_copy": True}, ("use_logfmt", "zero_copy")),
    "handle": (lambda a: {"handle": a["handle"][:3]}, ("handle", "low_latency_dispatch")),
    "hook and async": (
        lambda a: {"async_finish": True, "return_recv_hook": True},
        ("async_finish", "return_recv_hook"),
    ),
}


@pytest.mark.parametrize("name", sorted(BAD_LL_COMBINE))
def test_bad_low_latency_combine(ll, name):
    buffer, x, idx, weights = ll
    recv, _, handle, _, _ = buffer.low_latency_dispatch(x, idx, 8, E, use_fp8=False)
    good = {"x": recv, "topk_idx": idx, "topk_weights": weights, "handle": handle}
    change, words = BAD_LL_COMBINE[name]
    expect_error(lambda: buffer.low_latency_combine(**{**good, **change(good)}), ConfigError, *words)
    assert buffer.low_latency_combine(**good)[0].shape == x.shape


def test_mask_functions_need_enable_shrink(ll):
    status = torch.zeros(1, dtype=torch.int32)
    rigid = Buffer(None, 0, 1 << 20, low_latency_mode=True, comm=deep_ep.SoloComm())
    expect_error(lambda: rigid.low_latency_query_mask_buffer(status), ConfigError, "enable_shrink")
    expect_error(lambda: ll[0].low_latency_update_mask_buffer(5, True), ConfigError, 5)


# ---------------------------------------------------------------------------------------------------------------
# Several ranks


def good_call(ctx: RankContext, buffer, hidden=H, tokens=T):
    gen = generator(80, ctx.rank)
    idx, weights = make_topk(gen, tokens, K, E)
    x = torch.randn(tokens, hidden, generator=gen).bfloat16().to(ctx.device)
    idx, weights = idx.to(ctx.device), weights.to(ctx.device)
    layout = buffer.get_dispatch_layout(idx, E)
    return dispatch(buffer, x, layout, idx, weights), x, layout


def round_trip_works(ctx: RankContext, buffer):
    (recv, _, _, _, handle, _), _x, layout = good_call(ctx, buffer)
    visits = layout[3].sum(1, keepdim=True).float()
    back = buffer.combine(torch.ones_like(recv), handle)[0]
    expect_bits(back.float(), visits.expand(-1, H).contiguous(), "a good call after the refused one")


def run_one_bad(ctx: RankContext, how: str):
    """Rank 1 gives bad input to a call whose other ranks' input is good."""
    buffer = ctx.fresh_buffer(timeout_s=20)
    (recv, _, _, _, handle, _), x, layout = good_call(ctx, buffer)
    gen = generator(80, ctx.rank)
    idx, weights = make_topk(gen, T, K, E)
    bad = ctx.rank == 1
    start = time.monotonic()
    if how == "dispatch":
        call = lambda: dispatch(buffer, x[:4] if bad else x, layout, idx, weights)  # noqa: E731
    elif how == "index":
        call = lambda: dispatch(buffer, x, layout, idx + (E if bad else 0), weights)  # noqa: E731
    elif how == "cached":
        call = lambda: buffer.dispatch(x[:4] if bad else x, handle=handle)  # noqa: E731
    elif how == "combine":
        call = lambda: buffer.combine(recv.int() if bad else recv, handle)  # noqa: E731
    elif how == "event":
        call = lambda: buffer.dispatch(x, handle=handle, previous_event=7 if bad else None)  # noqa: E731
    elif how == "worst":
        call = lambda: dispatch(buffer, x, layout, idx, weights, num_worst_tokens=1 if bad else 500)  # noqa: E731
    else:
        raise AssertionError(how)
    outcome = catch(call)
    elapsed = time.monotonic() - start
    ctx.barrier()
    round_trip_works(ctx, buffer)
    return outcome, elapsed


@pytest.mark.parametrize("how", ["dispatch", "index", "cached", "combine", "event"])
def test_one_rank_refuses_its_input(spawn_fresh, how):
    results = spawn_fresh(3, run_one_bad, how)
    for rank, (outcome, elapsed) in enumerate(results):
        assert outcome is not None, f"rank {rank} raised nothing"
        assert outcome[0] == ("ConfigError" if rank == 1 else "PeerError"), outcome
        if rank != 1:
            assert "rank 1" in outcome[1], outcome
        assert elapsed < 10


def test_too_few_worst_tokens(spawn_fresh):
    results = spawn_fresh(3, run_one_bad, "worst")
    assert results[1][0] is not None
    assert results[1][0][0] == "BufferOverflow", results[1]
    assert "num_worst_tokens" in results[1][0][1]
    assert "1" in results[1][0][1]
    for rank in (0, 2):
        assert results[rank][0] is None or results[rank][0][0] in ("PeerError", "BufferOverflow"), results[rank]


def run_mismatch(ctx: RankContext, how: str):
    buffer = ctx.fresh_buffer(
        timeout_s=20, **({"low_latency_mode": True, "num_rdma_bytes": 1 << 20} if how == "low latency" else {})
    )
    (recv, _, _, _, handle, _), x, _layout = good_call(ctx, buffer)
    odd = ctx.rank == 1
    if how == "hidden":
        return catch(lambda: good_call(ctx, buffer, hidden=2 * H if odd else H))
    if how == "operation":
        return catch(lambda: buffer.combine(recv, handle) if odd else buffer.dispatch(x, handle=handle))
    if how == "dtype":
        return catch(lambda: buffer.dispatch(x.float() if odd else x, handle=handle))
    if how == "experts":
        gen = generator(80, ctx.rank)
        idx, weights = make_topk(gen, T, K, E)
        experts = 2 * E if odd else E
        lay = buffer.get_dispatch_layout(idx, experts)
        return catch(lambda: dispatch(buffer, x, lay, idx, weights))
    if how == "low latency":
        idx, _ = make_topk(generator(81, ctx.rank), 4, K, E)
        rows = torch.zeros(4, 512).bfloat16()
        return catch(lambda: buffer.low_latency_dispatch(rows, idx, 16 if odd else 8, E))
    if how == "weights at dispatch":
        idx, weights = make_topk(generator(81, ctx.rank), 4, K, E)
        rows = torch.zeros(4, 512).bfloat16()
        given = weights if odd else None
        return catch(lambda: buffer.low_latency_dispatch(rows, idx, 8, E, topk_weights=given))
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["hidden", "operation", "dtype", "experts", "low latency", "weights at dispatch"])
def test_ranks_call_different_things(spawn_fresh, how):
    start = time.monotonic()
    results = spawn_fresh(3, run_mismatch, how)
    assert time.monotonic() - start < 20, "found by comparing, not by a timeout"
    for rank, outcome in enumerate(results):
        assert outcome is not None, f"rank {rank} of {len(results)} raised nothing: {results}"
        assert outcome[0] in ("PeerError", "ConfigError"), outcome
    words = {
        "hidden": (str(H), str(2 * H)),
        "operation": ("combine", "dispatch"),
        "dtype": ("bfloat16", "float32"),
        "experts": (str(E), str(2 * E)),
        "low latency": ("8", "16"),
        "weights at dispatch": ("with_topk_weights=0", "with_topk_weights=1"),
    }[how]
    text = " ".join(outcome[1] for outcome in results)
    # Bytes a row are as good as columns and dtype.
    doubled = {"hidden": (str(2 * H), str(4 * H)), "dtype": (str(2 * H), str(4 * H))}.get(how, words)
    assert all(w in text for w in words) or all(w in text for w in doubled), text


def run_death(ctx: RankContext, when: str):
    buffer = ctx.fresh_buffer(timeout_s=15)
    (recv, _, _, _, handle, _), x, _ = good_call(ctx, buffer)
    ctx.barrier()
    if ctx.rank == 1 and when == "before":
        os._exit(17)
    start = time.monotonic()
    outcome = None
    for _ in range(400):
        if ctx.rank == 1 and when == "between" and time.monotonic() - start > 0.2:
            os._exit(17)
        outcome = catch(lambda: buffer.dispatch(x, handle=handle)) or catch(lambda: buffer.combine(recv, handle))
        if outcome:
            break
        time.sleep(0.005)
    elapsed = time.monotonic() - start
    later = catch(lambda: buffer.dispatch(x, handle=handle))
    return outcome, elapsed, later


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_rank_dies(spawn_fresh, when):
    results = spawn_fresh(3, run_death, when)
    assert isinstance(results[1], Died)
    for rank in (0, 2):
        outcome, elapsed, later = results[rank]
        assert outcome is not None, f"rank {rank} noticed nothing"
        assert outcome[0] in ("PeerError", "CommTimeout"), outcome
        assert "rank 1" in outcome[1], outcome
        assert elapsed < 16
        assert later is not None, "a buffer that lost a peer refuses further calls"
        assert later[0] in ("PeerError", "CommTimeout", "BufferDestroyed"), later


def run_slow(ctx: RankContext):
    buffer = ctx.fresh_buffer(timeout_s=1.0)
    (_, _, _, _, handle, _), x, _ = good_call(ctx, buffer)
    ctx.barrier()
    if ctx.rank == 1:
        time.sleep(4)
        return catch(lambda: buffer.dispatch(x, handle=handle))
    start = time.monotonic()
    try:
        buffer.dispatch(x, handle=handle)
    except CommTimeout as error:
        elapsed = time.monotonic() - start
        later = catch(lambda: buffer.dispatch(x, handle=handle))
        time.sleep(4)  # the slow rank finds its peers alive
        return error.peer, error.operation, str(error), elapsed, later
    return None


def test_a_slow_rank_is_named(spawn_fresh):
    results = spawn_fresh(2, run_slow)
    assert results[0] is not None
    peer, operation, text, elapsed, later = results[0]
    assert peer == 1
    assert operation == "dispatch"
    assert "rank 1" in text
    assert 0.8 < elapsed < 3
    assert later is not None
    assert later[0] in ("BufferDestroyed", "CommTimeout", "PeerError"), later


def run_foreign_handle(ctx: RankContext):
    """A handle of a smaller group, and one of another token count, in the same call on all ranks."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = Buffer(pairs[ctx.rank // 2], timeout_s=20)
    whole = ctx.fresh_buffer(timeout_s=20)
    (recv, _, _, _, small, _), x, _ = good_call(ctx, pair)
    outcomes = [catch(lambda: whole.combine(recv, small)), catch(lambda: whole.dispatch(x, handle=small))]
    (recv, _, _, _, handle, _), x, _ = good_call(ctx, whole)
    outcomes.append(catch(lambda: whole.dispatch(x[:3], handle=handle)))
    outcomes.append(catch(lambda: whole.combine(recv[:1], handle)))
    round_trip_works(ctx, whole)
    return outcomes


def test_foreign_handles(spawn_fresh):
    for outcomes in spawn_fresh(4, run_foreign_handle):
        for outcome in outcomes:
            assert outcome is not None
            assert outcome[0] == "ConfigError", outcome


def run_handle_level_mismatch(ctx: RankContext):
    flat, nodes = ctx.fresh_buffer(timeout_s=20), ctx.fresh_buffer(2, timeout_s=20)
    (recv, _, _, _, handle, _), x, _ = good_call(ctx, nodes)
    return catch(lambda: flat.combine(recv, handle)), catch(lambda: flat.dispatch(x, handle=handle))


def test_handle_of_another_topology():
    for outcomes in run_ranks(4, run_handle_level_mismatch):
        for outcome in outcomes:
            assert outcome[0] == "ConfigError"
            assert "10" in outcome[1]
            assert "6" in outcome[1]


def run_bad_domain(ctx: RankContext):
    return catch(lambda: ctx.fresh_buffer(3))


def test_domain_that_does_not_divide():
    for outcome in run_ranks(4, run_bad_domain):
        assert outcome[0] == "TopologyError"
        assert "3" in outcome[1]
        assert "4" in outcome[1]


def run_domains_differ(ctx: RankContext):
    return catch(lambda: ctx.fresh_buffer(2 if ctx.rank else 4, timeout_s=10))


def test_ranks_disagree_about_the_domain(spawn_fresh):
    for outcome in spawn_fresh(4, run_domains_differ):
        assert outcome is not None
        assert outcome[0] in ("TopologyError", "ConfigError", "PeerError"), outcome


def run_wrong_layout_length(ctx: RankContext):
    buffer = ctx.fresh_buffer(timeout_s=20)
    idx, weights = make_topk(generator(5, ctx.rank), 4, 2, 4)
    layout = list(buffer.get_dispatch_layout(idx, 4))
    x = torch.zeros(4, 16)
    outcomes = [catch(lambda: dispatch(buffer, x, [torch.zeros(3, dtype=torch.int32), *layout[1:]], idx, weights))]
    layout[3] = torch.ones(4, 3, dtype=torch.bool)
    outcomes.append(catch(lambda: dispatch(buffer, x, layout, idx, weights)))
    return outcomes


def test_layout_of_another_group_size():
    for outcomes in run_ranks(2, run_wrong_layout_length):
        for outcome in outcomes:
            assert outcome is not None
            assert outcome[0] == "ConfigError"
            assert "3" in outcome[1]
            assert "2" in outcome[1]


def run_destroyed_peer(ctx: RankContext):
    buffer = ctx.fresh_buffer(explicitly_destroy=True, timeout_s=20)
    good_call(ctx, buffer)
    buffer.destroy()
    return catch(lambda: good_call(ctx, buffer))


def test_use_after_destroy():
    for outcome in run_ranks(2, run_destroyed_peer):
        assert outcome[0] == "BufferDestroyed"
        assert "destroy" in outcome[1]
