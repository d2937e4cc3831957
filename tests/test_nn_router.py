"""Router: selection, groups, weights, balancing, dropping."""

from __future__ import annotations

import pytest
import torch
from test_nn_examples import examples

from deep_ep.errors import ConfigError
from deep_ep.nn import Router, capacity_cap, mask_padding


def tokens(num_tokens: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((num_tokens, hidden), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_groups", "topk_groups"), [(1, None), (4, 2), (4, 1), (2, 2)])
def test_selection_equals_a_loop_over_tokens(scoring, num_groups, topk_groups):
    num_experts, num_topk = 16, 4
    router = Router(32, num_experts, num_topk, scoring=scoring, num_groups=num_groups, topk_groups=topk_groups)
    router.bias.copy_(torch.randn(num_experts, generator=torch.Generator().manual_seed(5)) * 0.1)
    x = tokens(50, 32)
    out = router(x)
    per_group = num_experts // num_groups
    logits = x @ router.weight.detach().t()
    for t in range(x.shape[0]):
        row = logits[t].softmax(0) if scoring == "softmax" else logits[t].sigmoid()
        biased = (row + router.bias).tolist()
        rank_of_group = []
        for g in range(num_groups):
            best = sorted(biased[g * per_group : (g + 1) * per_group], reverse=True)
            rank_of_group.append((-(best[0] if scoring == "softmax" else sum(best[:2])), g))
        allowed = {g for _, g in sorted(rank_of_group)[: topk_groups or num_groups]}
        candidates = [e for e in range(num_experts) if e // per_group in allowed]
        want = sorted(candidates, key=lambda e: (-biased[e], e))[:num_topk]
        assert out.topk_idx[t].tolist() == want
        weights = row[want]
        torch.testing.assert_close(out.topk_weights[t], weights / weights.sum(), rtol=1e-5, atol=1e-7)
    assert len({tuple(r) for r in out.topk_idx.tolist()}) > 1


@examples(
    40,
    num_tokens=(0, 1, 7, 33),
    per_group=range(1, 5),
    num_groups=range(1, 6),
    allowed=range(1, 6),
    wanted=range(1, 21),
    scoring=("softmax", "sigmoid"),
)
def test_properties(num_tokens, per_group, num_groups, allowed, wanted, scoring):
    num_experts = per_group * num_groups
    topk_groups = min(allowed, num_groups)
    num_topk = min(wanted, topk_groups * per_group)
    router = Router(
        16, num_experts, num_topk, scoring=scoring, num_groups=num_groups, topk_groups=topk_groups, routed_scaling=2.5
    )
    out = router(tokens(num_tokens, 16))
    assert out.topk_idx.shape == out.topk_weights.shape == (num_tokens, num_topk)
    assert out.topk_idx.dtype == torch.int64 and out.topk_weights.dtype == torch.float32
    assert out.scores.shape == (num_tokens, num_experts)
    for row in out.topk_idx.tolist():
        assert len(set(row)) == num_topk and all(0 <= e < num_experts for e in row)
        assert len({e // per_group for e in row}) <= topk_groups
    torch.testing.assert_close(out.topk_weights.sum(1), torch.full((num_tokens,), 2.5), rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lower_index():
    router = Router(8, 12, 5, num_groups=3, topk_groups=2)
    torch.nn.init.zeros_(router.weight)
    out = router(tokens(6, 8))
    assert out.topk_idx.tolist() == [[0, 1, 2, 3, 4]] * 6
    torch.testing.assert_close(out.topk_weights, torch.full((6, 5), 0.2))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_bias_moves_the_load_towards_balance(scoring):
    router = Router(16, 8, 2, scoring=scoring, bias_update_rate=0.02)
    x = tokens(2000, 16) + 0.5  # a common direction makes some experts favourites

    def imbalance() -> float:
        load = torch.bincount(router(x).topk_idx.flatten(), minlength=8).float()
        return float(load.max() / load.mean())

    before = imbalance()
    for _ in range(100):
        router.update_bias(torch.bincount(router(x).topk_idx.flatten(), minlength=8))
    assert before > 1.4
    assert imbalance() < 1.15


def test_bias_selects_but_does_not_weigh():
    router = Router(16, 8, 2, scoring="sigmoid", normalize_weights=False)
    x = tokens(20, 16)
    router.bias[3] = 10.0
    out = router(x)
    assert (out.topk_idx[:, 0] == 3).all()
    torch.testing.assert_close(out.topk_weights[:, 0], torch.sigmoid(x @ router.weight[3]))


def test_one_update_is_one_step_of_the_sign():
    router = Router(8, 4, 1, bias_update_rate=0.5)
    router.update_bias(torch.tensor([10, 0, 5, 5]))
    assert router.bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_gate_stays_fp32_under_autocast_and_weights_have_gradients():
    router = Router(32, 8, 3)
    x = tokens(11, 32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x)
    outside = router(x)
    assert inside.scores.dtype == torch.float32
    assert torch.equal(inside.scores, outside.scores)
    (inside.topk_weights * torch.arange(3.0)).sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_topk": 9}, "num_topk"),
        ({"num_topk": 0}, "num_topk"),
        ({"scoring": "tanh"}, "scoring"),
        ({"num_groups": 3}, "num_groups"),
        ({"num_groups": 4, "topk_groups": 5}, "topk_groups"),
        ({"num_groups": 4, "topk_groups": 1, "num_topk": 3}, "topk_groups"),
        ({"bias_update_rate": -1.0}, "bias_update_rate"),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ConfigError, match=word):
        Router(**{"hidden": 16, "num_experts": 8, "num_topk": 2, **arguments})


def test_bad_inputs_are_named():
    router = Router(16, 8, 2)
    with pytest.raises(ConfigError, match="tokens, 16"):
        router(torch.zeros(2, 3, 16))
    with pytest.raises(ConfigError, match="expected float"):
        router(torch.zeros((2, 16), dtype=torch.int64))
    with pytest.raises(ConfigError, match="load has shape"):
        router.update_bias(torch.zeros(7))


def test_mask_padding():
    idx = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert mask_padding(idx, torch.tensor([True, False, True])).tolist() == [[1, 2], [-1, -1], [5, 6]]
    assert idx[1].tolist() == [3, 4]
    with pytest.raises(ConfigError, match="valid"):
        mask_padding(idx, torch.tensor([1, 0, 1]))


@examples(
    60,
    num_tokens=range(31),
    num_topk=range(1, 5),
    num_experts=range(1, 7),
    capacity=range(9),
    seed=range(10**6),
)
def test_capacity_cap_keeps_the_heaviest(num_tokens, num_topk, num_experts, capacity, seed):
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(-1, num_experts, (num_tokens, num_topk), generator=g)
    weights = torch.randint(1, 4, (num_tokens, num_topk), generator=g).float()  # few values: many ties
    got_idx, got_weights = capacity_cap(idx, weights, num_experts, capacity)
    for e in range(num_experts):
        pairs = [(t, k) for t in range(num_tokens) for k in range(num_topk) if idx[t, k] == e]
        keep = set(sorted(pairs, key=lambda p: (-float(weights[p]), p))[:capacity])
        for p in pairs:
            assert int(got_idx[p]) == (e if p in keep else -1)
            assert float(got_weights[p]) == (float(weights[p]) if p in keep else 0.0)
    assert (got_idx[idx == -1] == -1).all() and (got_weights[idx == -1] == 0).all()


def test_capacity_cap_errors():
    with pytest.raises(ConfigError, match="capacity"):
        capacity_cap(torch.zeros((2, 1), dtype=torch.int64), torch.ones(2, 1), 4, -1)
    with pytest.raises(ConfigError, match="topk_weights"):
        capacity_cap(torch.zeros((2, 1), dtype=torch.int64), torch.ones(2, 2), 4, 1)
