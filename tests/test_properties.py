"""Random cases of normal mode: ranks, tokens, top-k, hidden, experts, masks, payloads, bias, alignment, nodes."""

import random

import pytest
import torch
from cases import PAYLOADS, Case, check_case

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    given = None

CACHED_PAYLOADS = tuple(p for p in PAYLOADS if "use_fp8" not in p)
HIDDEN = (16, 32, 48, 128, 144, 384, 512, 1040, 2048, 7168)
EXAMPLES = {1: 30, 2: 80, 3: 50, 4: 80, 8: 40}


def draw_case(pick, num_ranks: int) -> Case:
    """`pick(options)` chooses one of a sequence; shared by hypothesis and by the seeded fallback."""
    hidden = pick(HIDDEN)
    # The element count stays bounded: wide rows come with few tokens.
    most = 2 if hidden > 2048 else 9 if hidden > 256 else 70
    tokens = tuple(pick([t for t in (0, 1, 2, 3, 5, 8, 9, 33, 64, 69) if t <= most]) for _ in range(num_ranks))
    num_experts = pick((1, 2, 3, 4, 7, 8, 16, 17, 31, 64))
    domain = pick([None] + [d for d in range(1, num_ranks) if num_ranks % d == 0])
    worst_extra = pick((None, None, 0, 1, 17))
    return Case(
        num_ranks=num_ranks,
        tokens=tokens,
        hidden=hidden,
        num_topk=pick(range(1, 17)),
        num_experts=num_experts,
        payload=pick(PAYLOADS),
        cached_payload=pick(CACHED_PAYLOADS),
        combine_dtype=pick((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
        idx_dtype=pick((torch.int64, torch.int32)),
        mask=pick(("none", "some", "rows", "all", "skew")),
        with_topk=worst_extra is not None or pick((True, True, True, False)),
        num_bias=pick((0, 1, 2)),
        alignment=pick((1, 1, 4, 128)),
        worst_extra=worst_extra,
        domain=domain,
        repeats=pick((1, 2)),
        seed=pick(range(1000)),
    )


if given is not None:

    @st.composite
    def cases(draw, num_ranks: int) -> Case:
        return draw_case(lambda options: draw(st.sampled_from(list(options))), num_ranks)

    @pytest.mark.parametrize("num_ranks", sorted(EXAMPLES))
    def test_random_cases(num_ranks):
        # A failing case is replayed while it shrinks: each replay is one more run of the ranks, which is quick.
        settings(max_examples=EXAMPLES[num_ranks])(given(cases(num_ranks))(check_case))()

else:

    @pytest.mark.parametrize("num_ranks", sorted(EXAMPLES))
    def test_random_cases(num_ranks):
        source = random.Random(num_ranks)
        for _ in range(EXAMPLES[num_ranks]):
            check_case(draw_case(lambda options: source.choice(list(options)), num_ranks))
