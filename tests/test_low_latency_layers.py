"""Low-latency operations that feed one another, as in a model: kernels begin before those ahead of them have ended."""

import dataclasses
import itertools

import pytest
import torch
from cuda_cases import finished, make_buffer
from harness import RankContext, expect_bits, run_ranks
from low_latency_cases import LowLatencyCase, make_inputs


def run_chained(ctx: RankContext, tokens: int, early: bool) -> None:
    """Layers back to back must have the bits of layers with the host waiting after each, in a graph too."""
    buffer = make_buffer(ctx)
    shape = LowLatencyCase(ctx.num_ranks, (tokens,) * ctx.num_ranks, tokens, 1024, 4, 8 * ctx.num_ranks, fp8="none")
    layers = [make_inputs(dataclasses.replace(shape, seed=seed), ctx.rank) for seed in range(6)]
    experts = [idx.to(ctx.device) for _, idx, _ in layers]
    first = layers[0][0].to(ctx.device)
    weights = torch.full((tokens, 4), -1.03 / 4, device=ctx.device)

    def chain(wait: bool) -> list[torch.Tensor]:
        x, outputs = first, []
        for idx in experts * 4:
            known = weights if early else None
            recv, _, handle, _, _ = buffer.low_latency_dispatch(
                x, idx, tokens, shape.num_experts, use_fp8=False, topk_weights=known
            )
            x = buffer.low_latency_combine(recv, idx, weights, handle)[0]
            outputs.append(x)
            if wait:
                torch.cuda.synchronize()
        return outputs

    want = [t.clone() for t in chain(wait=True)]
    # What is left over from the operation before would show.
    for before, after in itertools.pairwise([first, *want]):
        torch.testing.assert_close(after.float(), before.float() * -1.03, rtol=0.03, atol=0)
    for number in range(4):
        got = chain(wait=False)
        finished(buffer)
        for layer, (output, wanted) in enumerate(zip(got, want, strict=True)):
            expect_bits(output, wanted, f"run {number}, layer {layer}")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(wait=False)
    for number in range(3):
        for output in got:
            output.fill_(7.0)
        graph.replay()
        finished(buffer)
        for layer, (output, wanted) in enumerate(zip(got, want, strict=True)):
            expect_bits(output, wanted, f"replay {number}, layer {layer}")
    del graph


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("tokens", [8, 200])
def test_kernels_that_feed_one_another(on_gpus, num_ranks, early, tokens):
    on_gpus(num_ranks)
    run_ranks(num_ranks, run_chained, tokens, early)
