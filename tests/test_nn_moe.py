"""The MoE layer over ranks: values and gradients against a dense model in one process, equality over rank counts."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch.utils.checkpoint import checkpoint

import deep_ep
from deep_ep.errors import ConfigError
from deep_ep.nn import MoE, combine, dispatch, fp8_gemm

# See test_nn_experts.py for where these come from; dispatch, weighted sum and combine add some roundings to bf16, and
# FP8 gradients on the wire one more quantisation.
TOLERANCE = {"bf16": 1e-2, "fp8": 1e-1}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


@dataclasses.dataclass(frozen=True)
class Case:
    precision: str = "bf16"
    hidden: int = 128
    intermediate: int = 96
    num_experts: int = 8
    num_topk: int = 3
    shared: int = 0
    scoring: str = "softmax"
    num_groups: int = 1
    topk_groups: int | None = None
    num_tokens: int = 48
    dtype: torch.dtype = torch.float32
    domain: int | None = None  # ranks per node, None: all

    def layer(self, **kwargs) -> MoE:
        return MoE(
            self.hidden,
            self.intermediate,
            self.num_experts,
            self.num_topk,
            precision=self.precision,
            scoring=self.scoring,
            num_groups=self.num_groups,
            topk_groups=self.topk_groups,
            num_shared_experts=self.shared,
            routed_scaling=1.5,
            seed=7,
            **kwargs,
        )

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Global tokens and the gradient of the loss with regard to the output: a mean, so of small size."""
        g = torch.Generator().manual_seed(21)
        x = torch.randn((self.num_tokens, self.hidden), generator=g)
        grad = torch.randn((self.num_tokens, self.hidden), generator=g) / (self.num_tokens * self.hidden)
        return x.to(self.dtype), grad


def slice_of(num_tokens: int, rank: int, num_ranks: int) -> slice:
    """Contiguous and uneven: rank 0 of three or more gets nothing."""
    bounds = [num_tokens * r // num_ranks for r in range(num_ranks + 1)]
    if num_ranks > 2:
        bounds[1] = 0
    return slice(bounds[rank], bounds[rank + 1])


def step_on_rank(ctx, case: Case, rematerialise: str = "") -> dict:
    """One forward and backward of this rank's slice; gradients of the whole model on every rank."""
    layer = case.layer(buffer=ctx.buffer(domain=case.domain)) if case.domain else case.layer(group=ctx.group)
    layer.buffer.traffic.reset()
    fp8_gemm.reset_counters()
    x, grad = case.batch()
    own = slice_of(case.num_tokens, ctx.rank, ctx.num_ranks)
    x = x[own].clone().requires_grad_()
    out = checkpoint(layer, x, use_reentrant=rematerialise == "reentrant") if rematerialise else layer(x)
    (out.float() * grad[own]).sum().backward()
    assert out.dtype == x.dtype and out.shape == x.shape
    experts = {}
    for key in layer.expert_state_dict():
        expert, name = key.split(".")
        experts[key] = getattr(layer.experts, name).grad[int(expert) - layer.first_expert]
    replicated = {n: p.grad for n, p in layer.named_parameters() if not getattr(p, "is_expert", False)}
    for value in replicated.values():
        dist.all_reduce(value, group=ctx.group)
    counted = int(layer.counts.sum())
    layer.update_bias()
    traffic = layer.buffer.traffic
    return {
        "out": out.detach(),
        "grad_x": x.grad,
        "experts": experts,
        "replicated": replicated,
        "load": layer.load(),
        "bias": layer.router.bias.clone(),
        "counted": counted,
        "dtypes": dict(traffic.dispatch_dtypes),
        "dispatch_bytes": traffic.dispatch_bytes,
        "dispatch_rows": traffic.dispatch_rows,
        "combine_bytes": traffic.combine_bytes,
        "calls": (traffic.dispatch_calls, traffic.combine_calls),
        "gemms": dict(fp8_gemm.counters().operands),
    }


def merged(results: list[dict]) -> dict:
    """One result for the whole batch from those of the ranks."""
    experts = {}
    for r in results:
        experts.update(r["experts"])
    whole = {k: torch.cat([r[k] for r in results]) for k in ("out", "grad_x")}
    return {**whole, "experts": experts, **results[0]["replicated"], "load": results[0]["load"]}


def dense_reference(case: Case) -> dict:
    """The same layer as plain float64 autograd over all tokens and experts, from the layer's initial weights."""
    layer = case.layer()
    x, grad = case.batch()
    x = x.double().requires_grad_()
    gate = layer.router.weight.detach().double().requires_grad_()
    w13 = layer.experts.w13.detach().double().requires_grad_()
    w2 = layer.experts.w2.detach().double().requires_grad_()

    def mlp(rows, wide, narrow):
        a, b = (rows @ wide.t()).chunk(2, dim=1)
        return (a * torch.sigmoid(a) * b) @ narrow.t()

    logits = x @ gate.t()
    scores = logits.softmax(1) if case.scoring == "softmax" else logits.sigmoid()
    per_group = case.num_experts // case.num_groups
    grouped = scores.detach().view(-1, case.num_groups, per_group)
    strength = grouped.amax(2) if case.scoring == "softmax" else grouped.topk(2, dim=2).values.sum(2)
    chosen_groups = strength.topk(case.topk_groups or case.num_groups, dim=1).indices
    open_ = torch.zeros_like(strength, dtype=torch.bool).scatter(1, chosen_groups, True)
    masked = scores.detach().masked_fill(~open_.repeat_interleave(per_group, dim=1), -1.0)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, masked.topk(case.num_topk, dim=1).indices, True)
    weight = torch.where(chosen, scores, 0.0)
    weight = 1.5 * weight / weight.sum(1, keepdim=True)
    out = sum(weight[:, e : e + 1] * mlp(x, w13[e], w2[e]) for e in range(case.num_experts))
    inputs = {"grad_x": x, "router.weight": gate, "w13": w13, "w2": w2}
    if layer.shared is not None:
        s13 = layer.shared.w13.detach().double().requires_grad_()
        s2 = layer.shared.w2.detach().double().requires_grad_()
        out = out + mlp(x, s13[0], s2[0])
        inputs.update({"shared.w13": s13, "shared.w2": s2})
    grads = dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad.double()), strict=True))
    return {"out": out.detach(), "load": chosen.sum(0).float(), **grads}


def errors_against_dense(case: Case, whole: dict) -> dict[str, float]:
    want = dense_reference(case)
    assert torch.equal(whole["load"], want["load"])
    stacked = {
        name: torch.stack([whole["experts"][f"{e}.{name}"] for e in range(case.num_experts)]) for name in ("w13", "w2")
    }
    names = [n for n in want if n not in ("load", *stacked)]
    return {
        **{n: relative_error(whole[n], want[n]) for n in names},
        **{n: relative_error(stacked[n], want[n]) for n in stacked},
    }


CASES = [
    (1, Case()),
    (1, Case(precision="fp8", hidden=256)),
    (2, Case(shared=1, scoring="sigmoid", dtype=torch.bfloat16)),
    (2, Case(precision="fp8", shared=2)),
    (3, Case(num_experts=7, scoring="sigmoid")),
    (4, Case(num_experts=8, num_groups=4, topk_groups=2)),
    (4, Case(precision="fp8", num_experts=10, num_topk=4, scoring="sigmoid", num_groups=5, topk_groups=3)),
    (4, Case(num_experts=8, num_groups=2, topk_groups=1, domain=2)),
    (4, Case(precision="fp8", domain=1)),
    (4, Case(precision="fp8", num_experts=3, num_topk=2, hidden=72)),
]


@pytest.mark.parametrize(("num_ranks", "case"), CASES, ids=[f"{n}-{c.precision}-{i}" for i, (n, c) in enumerate(CASES)])
def test_values_and_gradients_equal_a_dense_model(num_ranks, case):
    results = run_ranks(num_ranks, step_on_rank, case)
    for r in results[1:]:
        assert torch.equal(r["load"], results[0]["load"]) and torch.equal(r["bias"], results[0]["bias"])
    errors = errors_against_dense(case, merged(results))
    assert max(errors.values()) < TOLERANCE[case.precision], errors
    if case.precision == "fp8":
        assert errors["out"] > 1e-2 and errors["w13"] > 1e-2  # coarser than bf16: FP8 did take part
    assert sum(r["counted"] for r in results) == case.num_tokens * case.num_topk


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_rank_count_changes_rounding_only(precision):
    """Rows reach an expert in the same order whatever the rank count. What differs: per-rank partial sums of a token
    are rounded to bf16 (2^-9) before they are added, and gradients computed from them inherit that."""
    case = Case(precision=precision, shared=1)
    by_ranks = {n: merged(run_ranks(n, step_on_rank, case)) for n in (1, 2, 4)}
    for n in (2, 4):
        a, b = by_ranks[1], by_ranks[n]
        assert torch.equal(a["load"], b["load"])
        assert relative_error(b["out"], a["out"]) < 2.0**-8
        assert relative_error(b["grad_x"], a["grad_x"]) < 2.0**-8
        assert relative_error(b["router.weight"], a["router.weight"]) < 2.0**-8
        for key, value in a["experts"].items():
            # The upstream gradient is the same, rows and their order too: only FP8's local unit factor could differ.
            assert relative_error(b["experts"][key], value) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_what_travels(precision):
    case = Case(precision=precision, hidden=256)
    results = run_ranks(2, step_on_rank, case)
    rows = sum(r["dispatch_rows"] for r in results)
    total = sum(r["dispatch_bytes"] for r in results)
    # One byte a value and four for each of the two scales, or two bytes a value; forward tokens and backward gradients.
    assert total == rows * (256 + 8 if precision == "fp8" else 512)
    assert sum(r["combine_bytes"] for r in results) == rows * 512
    for r in results:
        assert r["calls"] == (2, 2)
        assert len(r["dtypes"]) == 1 and ("float8_e4m3fn" in next(iter(r["dtypes"]))) == (precision == "fp8")
        assert all(("float8_e4m3fn" in name) == (precision == "fp8") for name in r["gemms"])


def calls_on_rank(ctx, case: Case) -> dict:
    """What a forward and backward pass to the buffer, and whether the rows of its combines were computed in place."""
    layer = case.layer(group=ctx.group)
    buffer = layer.buffer
    given, seen = [], {"dispatch": [], "combine": []}

    def empty_combine_input(handle, hidden, dtype):
        given.append(type(buffer).empty_combine_input(buffer, handle, hidden, dtype))
        return given[-1]

    def spy_dispatch(x, **kwargs):
        seen["dispatch"].append((str(x.dtype), kwargs.get("use_fp8", False)))
        return type(buffer).dispatch(buffer, x, **kwargs)

    def spy_combine(x, handle, **kwargs):
        tensors = [t for t in (x, kwargs.get("topk_weights")) if t is not None]
        seen["combine"].append([any(t.data_ptr() == g.data_ptr() for g in given) for t in tensors])
        return type(buffer).combine(buffer, x, handle, **kwargs)

    buffer.empty_combine_input, buffer.dispatch, buffer.combine = empty_combine_input, spy_dispatch, spy_combine
    try:
        x, grad = case.batch()
        own = slice_of(case.num_tokens, ctx.rank, ctx.num_ranks)
        layer(x[own].requires_grad_()).backward(grad[own])
    finally:
        del buffer.empty_combine_input, buffer.dispatch, buffer.combine
    return seen


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_calls_quantise_on_the_way_and_combine_without_a_copy(precision):
    for seen in run_ranks(2, calls_on_rank, Case(precision=precision)):
        # Tokens in the forward and gradients in the backward, both as they are: the dispatch itself makes them FP8.
        assert seen["dispatch"] == [("torch.bfloat16", precision == "fp8")] * 2
        assert seen["combine"] == [[True], [True, True]]  # outputs; gradients of rows and of weights


@pytest.mark.parametrize("mode", ["reentrant", "saved"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_checkpointing_gives_the_same_bits(mode, precision):
    case = Case(precision=precision, shared=1)
    plain = run_ranks(2, step_on_rank, case)
    again = run_ranks(2, step_on_rank, case, mode)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a["out"], b["out"]) and torch.equal(a["grad_x"], b["grad_x"])
        assert all(torch.equal(a["experts"][k], b["experts"][k]) for k in a["experts"])
        assert all(torch.equal(a["replicated"][k], b["replicated"][k]) for k in a["replicated"])
        assert a["counted"] == b["counted"]  # a recomputation is not counted as load


def zero_tokens(ctx, precision: str) -> bool:
    layer = Case(precision=precision, shared=1).layer(group=ctx.group)
    x = torch.zeros((0, 128), requires_grad=True)
    out = layer(x)
    out.sum().backward()
    layer.update_bias()
    assert out.shape == (0, 128) and x.grad.shape == (0, 128)
    assert not layer.router.bias.any() and layer.stats().max_over_mean == 1.0
    assert not layer.experts.w13.grad.any()
    with torch.no_grad():
        one = layer(torch.ones(2, 3, 128) if ctx.rank == 0 else torch.ones(1, 0, 128))
    return one.shape == ((2, 3, 128) if ctx.rank == 0 else (1, 0, 128)) and not one.requires_grad


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_zero_tokens(precision):
    assert all(run_ranks(2, zero_tokens, precision))


def functional_on_rank(ctx, fp8_gradients: bool) -> dict:
    """dispatch, identity experts and combine: the gradient of the inputs and of the weights in closed form."""
    num_tokens, hidden, num_experts, num_topk = 5 + ctx.rank, 256, 4, 2
    g = torch.Generator().manual_seed(ctx.rank)
    x = torch.randn((num_tokens, hidden), generator=g).bfloat16().requires_grad_()
    idx = torch.stack([torch.randperm(num_experts, generator=g)[:num_topk] for _ in range(num_tokens)])
    idx[0, 1] = -1
    weights = torch.rand((num_tokens, num_topk), generator=g).requires_grad_()
    bias = torch.randn((num_tokens, hidden), generator=g).bfloat16().requires_grad_()
    buffer = deep_ep.Buffer.get_or_grow(ctx.group)
    d = dispatch(x, idx, weights, num_experts, buffer, fp8_gradients=fp8_gradients)
    # Each rank weighs its copy of a token by the sum of the weights of its own experts.
    local = (d.topk_weights * (d.topk_idx >= 0)).sum(1, keepdim=True)
    y = (d.rows.float() * local).bfloat16()
    out = combine(y, d, bias=bias)
    grad = (torch.randn((num_tokens, hidden), generator=g) * 1e-7).bfloat16()
    out.backward(grad)
    mask = (idx >= 0).float()
    total = (weights.detach() * mask).sum(1, keepdim=True)
    dots = (grad.float() * x.detach().float()).sum(1, keepdim=True) * mask
    return {
        "out": relative_error(out, x.detach().float() * total + bias.detach().float()),
        "x": relative_error(x.grad, grad.float() * total),
        "weights": relative_error(weights.grad, dots),
        "absent": float(weights.grad[0, 1]),
        "bias": torch.equal(bias.grad, grad),
    }


@pytest.mark.parametrize(("fp8_gradients", "tolerance"), [(False, 1e-2), (True, 5e-2)])
def test_functional_gradients(fp8_gradients, tolerance):
    for errors in run_ranks(2, functional_on_rank, fp8_gradients):
        assert errors["out"] < 1e-2  # the forward is bf16 in both cases
        assert errors["x"] < tolerance and errors["weights"] < tolerance, errors
        assert errors["absent"] == 0.0 and errors["bias"]


def gradients_on_rank(ctx, dtype: torch.dtype) -> list[float]:
    """Error of each token's gradient after identity experts, gradients over many orders of magnitude."""
    sizes = [2.0**-10, 0.0, 1.0, 256.0] if dtype == torch.float16 else [1e-18, 1e-9, 0.0, 1e-3, 1.0, 1e15]
    g = torch.Generator().manual_seed(ctx.rank)
    num_tokens = len(sizes)
    idx = torch.arange(ctx.num_ranks).expand(num_tokens, -1)
    x = torch.randn((num_tokens, 256), generator=g).to(dtype).requires_grad_()
    d = dispatch(
        x, idx, torch.ones(idx.shape), ctx.num_ranks, deep_ep.Buffer.get_or_grow(ctx.group), fp8_gradients=True
    )
    out = combine(d.rows * 1.0, d)
    # Each rank's own range: a receiver has to get every sender's right.
    grad = (torch.rand(out.shape, generator=g) + 1.0) * torch.tensor(sizes)[:, None] * 4.0**-ctx.rank
    out.backward(grad.to(dtype))
    want = grad.to(dtype).float() * ctx.num_ranks
    return [relative_error(a, b) for a, b in zip(x.grad.float(), want, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_small_and_large_gradients_survive_fp8_together(dtype):
    for errors in run_ranks(2, gradients_on_rank, dtype):
        assert max(errors) < 5e-2, errors


def train_on_rank(ctx, num_steps: int, state: dict | None) -> dict:
    """A few steps of SGD on a fixed target; weights keyed by global expert come back, or go in."""
    case = Case(precision="fp8", num_experts=6)
    layer = case.layer(group=ctx.group)
    if state is not None:
        layer.load_expert_state_dict(state["experts"])
        layer.router.load_state_dict(state["router"])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x, _ = case.batch()
    own = slice_of(case.num_tokens, ctx.rank, ctx.num_ranks)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (layer(x[own]) - torch.roll(x, 1, 1)[own]).square().sum() / x.numel()
        loss.backward()
        for p in layer.parameters():
            if not getattr(p, "is_expert", False):
                dist.all_reduce(p.grad, group=ctx.group)
        optimizer.step()
        layer.update_bias()
        dist.all_reduce(total := loss.detach().clone(), group=ctx.group)
        losses.append(float(total))
    experts = {k: v.clone() for k, v in layer.expert_state_dict().items()}
    return {"losses": losses, "experts": experts, "router": layer.router.state_dict(), "stats": layer.stats()}


def test_training_and_checkpoint_over_rank_counts():
    whole = run_ranks(1, train_on_rank, 6, None)[0]
    parts = run_ranks(4, train_on_rank, 6, None)
    assert whole["losses"][-1] < 0.97 * whole["losses"][0]
    assert parts[0]["losses"] == parts[3]["losses"]
    for a, b in zip(whole["losses"], parts[0]["losses"], strict=True):
        assert abs(a - b) < 2.0**-9 * a
    assert whole["stats"].pairs == parts[0]["stats"].pairs == 48 * 3
    # Three steps on two ranks, then three on three ranks from the merged state: as six steps on one.
    half = run_ranks(2, train_on_rank, 3, None)
    experts = {k: v for part in half for k, v in part["experts"].items()}
    resumed = run_ranks(3, train_on_rank, 3, {"experts": experts, "router": half[0]["router"]})
    for a, b in zip(whole["losses"], half[0]["losses"] + resumed[0]["losses"], strict=True):
        assert abs(a - b) < 2.0**-9 * a


def test_one_process_without_a_group():
    case = Case(precision="fp8")
    layer = case.layer()
    layer.train()
    out = layer(torch.randn(2, 5, 128))
    assert out.shape == (2, 5, 128)
    out.sum().backward()
    layer.update_bias()
    assert int(layer.load().sum()) == 2 * 5 * 3
    layer.eval()
    layer(torch.randn(4, 128))
    assert int(layer.counts.sum()) == 0  # evaluation is no load
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 128)
    assert torch.equal(twin(x), layer(x)) and twin.experts.w13.is_expert
    assert case.layer().buffer is layer.buffer  # one buffer for all layers
    given = deep_ep.Buffer(None, comm=deep_ep.SoloComm())
    other = case.layer(buffer=given)
    other(x)
    other.update_bias()
    assert other.buffer is given and int(other.load().sum()) == 9


def test_default_dtype_and_device_do_not_reach_the_weights():
    plain = Case(shared=1).layer()
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = Case(shared=1).layer()
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert q.dtype == torch.float32 and torch.equal(p, q), name
    with torch.device("meta"):
        assert all(p.is_meta for p in Case(shared=1).layer().parameters())


def test_errors():
    with pytest.raises(ConfigError, match="hidden=12"):
        MoE(12, 8, 4, 2)
    with pytest.raises(ConfigError, match="num_shared_experts"):
        MoE(16, 8, 4, 2, num_shared_experts=-1)
    layer = MoE(16, 8, 4, 2)
    with pytest.raises(ConfigError, match=r"\[..., 16\]"):
        layer(torch.zeros(2, 17))
    with pytest.raises(ConfigError, match="expected float"):
        layer(torch.zeros((2, 16), dtype=torch.int32))
    state = layer.expert_state_dict()
    with pytest.raises(ConfigError, match="merge the parts"):
        layer.load_expert_state_dict({k: v for k, v in state.items() if k != "2.w2"})
    with pytest.raises(ConfigError, match="in the checkpoint"):
        layer.load_expert_state_dict({**state, "1.w13": torch.zeros(3)})
    x = torch.zeros(3, 16, dtype=torch.bfloat16)
    idx, weights = torch.zeros((3, 2), dtype=torch.int64), torch.zeros(3, 2)
    for arguments, word in [
        ((x[0], idx, weights), "x is"),
        ((x, idx[:2], weights), "topk_idx"),
        ((x, idx, weights.bfloat16()), "topk_weights"),
    ]:
        with pytest.raises(ConfigError, match=word):
            dispatch(*arguments, 4, layer.buffer)
    with pytest.raises(ConfigError, match="quantises bfloat16"):
        dispatch(x.float(), idx, weights, 4, layer.buffer, use_fp8=True)
    received = dispatch(x, idx, weights, 4, layer.buffer)
    with pytest.raises(ConfigError, match="one row per received row"):
        combine(torch.zeros(7, 16), received)
