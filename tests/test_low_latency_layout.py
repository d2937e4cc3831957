"""Where things lie in the region and the outputs of low-latency operations: sizes, and that nothing overlaps."""

import itertools
from dataclasses import astuple, dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deep_ep._native import _C
from deep_ep.config import low_latency_size_hint
from deep_ep.engines.low_latency_regions import RegionShape
from deep_ep.layout import first_local_expert, num_local_experts

HEADER_BYTES, FLAG_BYTES, MAX_PIECES, STEP_BYTES, NUM_SETS = 128, 8, 8, 1024, 2
PACKET_BYTES, LINE_BYTES = 16, 128


@dataclass(frozen=True)
class Shape:
    num_ranks: int
    num_max_tokens: int
    num_topk: int
    num_experts: int
    hidden: int

    @property
    def region(self) -> RegionShape:
        return RegionShape(self.num_max_tokens, self.num_topk, self.num_experts, self.hidden)


def offsets(shape: Shape, set_: int, rank: int, token: int, part: int = 0) -> dict[str, int]:
    return _C.low_latency_offsets(*astuple(shape), set_, rank, token, part)


def ranges(shape: Shape) -> list[tuple[int, int, str]]:
    """Begin, end and name of everything in a region."""
    sizes = _C.low_latency_layout(*astuple(shape))
    num_local = -(-shape.num_experts // shape.num_ranks)
    selections = shape.num_max_tokens * shape.num_topk
    widths = {
        "dispatch_header": HEADER_BYTES,
        "dispatch_counts": 8 * num_local,
        "dispatch_entries": 8 * selections,
        "dispatch_weights": 8 * selections,
        "combine_header": HEADER_BYTES,
        "combine_selections": PACKET_BYTES * selections,
    }
    found = []
    for set_ in range(NUM_SETS):
        for rank in range(shape.num_ranks):
            at = offsets(shape, set_, rank, 0)
            found += [(at[name], at[name] + width, f"{name} {set_} {rank}") for name, width in widths.items()]
            for token in range(shape.num_max_tokens):
                at = offsets(shape, set_, rank, token)
                found.append((at["dispatch_slot"], at["dispatch_slot"] + sizes["slot"], f"slot {set_} {rank} {token}"))
                for name in ("dispatch_lines", "combine_lines"):
                    if token < sizes[name.removesuffix("s") + "_tokens"]:
                        found.append((at[name], at[name] + sizes["line_row"], f"{name} {set_} {rank} {token}"))
                for part in range(MAX_PIECES):
                    flag = offsets(shape, set_, rank, token, part)["dispatch_flag"]
                    found.append((flag, flag + FLAG_BYTES, f"flag {set_} {rank} {token} {part}"))
        # In combine the second index is a rank or, unsummed, a k.
        for token in range(shape.num_max_tokens):
            for j in range(max(shape.num_ranks, shape.num_topk)):
                at = offsets(shape, set_, j, token)
                end = at["combine_slot"] + sizes["slot"]
                found.append((at["combine_slot"], end, f"home slot {set_} {token} {j}"))
                for part in range(MAX_PIECES):
                    flag = offsets(shape, set_, j, token, part)["combine_flag"]
                    found.append((flag, flag + FLAG_BYTES, f"home flag {set_} {token} {j} {part}"))
    return found


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 1, 1, 8),
        Shape(2, 3, 4, 7, 136),
        Shape(3, 5, 2, 8, 128),
        Shape(8, 4, 3, 5, 1032),
        Shape(4, 2, 32, 40, 7168),
        Shape(17, 2, 3, 20, 256),
    ],
)
def test_nothing_overlaps(shape):
    sizes, found = _C.low_latency_layout(*astuple(shape)), sorted(ranges(shape))
    assert found[0][0] > offsets(shape, 0, 0, 0)["control"]
    for (_, end, name), (begin, _, other) in itertools.pairwise(found):
        assert end <= begin, (name, other)
    assert found[-1][1] <= sizes["total"]
    slots = [item for item in found if "slot" in item[2]]
    # What is cleared before the first operation is all that is read before it was written.
    assert all(begin >= sizes["state"] for begin, _, _ in slots)
    assert all(end <= sizes["state"] for _, end, name in found if "slot" not in name)
    assert all(begin % 128 == 0 for begin, _, _ in slots)
    # Lines of 128 bytes, and one more for the words that tags take the place of; tags are cleared with the flags.
    assert sizes["line_row"] == (STEP_BYTES + LINE_BYTES) * -(-2 * shape.hidden // STEP_BYTES)
    assert all(begin % LINE_BYTES == 0 for begin, _, name in found if "lines" in name)
    for name, most in (("dispatch", 128), ("combine", 1024)):
        want = min(shape.num_max_tokens, most) if shape.num_ranks <= 16 else 0
        assert sizes[f"{name}_line_tokens"] == want
    # A row in any form: bf16, FP8 with scales, or coded with two bf16 values for each 128 columns.
    assert sizes["slot"] >= 2 * shape.hidden + 4 * -(-shape.hidden // 128)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 16, 32])
@pytest.mark.parametrize("num_max_tokens", [1, 8, 128, 512])
@pytest.mark.parametrize("num_topk", [1, 8, 32])
def test_the_size_hint_is_an_upper_bound(num_ranks, num_max_tokens, num_topk):
    for num_experts, hidden in ((64, 2048), (256, 7168), (288, 8192)):
        shape = Shape(num_ranks, num_max_tokens, num_topk, num_experts, hidden)
        total = _C.low_latency_layout(*astuple(shape))["total"]
        assert total == shape.region.num_bytes(num_ranks)
        assert total <= low_latency_size_hint(num_max_tokens, hidden, num_ranks, num_experts)


def test_sizes_of_a_common_shape():
    """8 ranks, 128 tokens, top-8 of 256 experts, hidden 7168: 127 MB, where slots for each expert would take 1.9 GB."""
    shape = Shape(8, 128, 8, 256, 7168)
    sizes = _C.low_latency_layout(*astuple(shape))
    slot = 14592  # 14,336 bytes of bf16 and 224 of side information, in whole lines of 128
    assert sizes["slot"] == slot
    assert sizes["dispatch_slots"] == sizes["combine_slots"] == 2 * 8 * 128 * slot
    lines = 2 * 2 * 8 * 128 * sizes["line_row"]
    assert sizes["line_row"] == 14 * 1152
    assert sizes["total"] - sizes["state"] == sizes["dispatch_slots"] + sizes["combine_slots"]
    assert sizes["state"] - lines < 1 << 20


@settings(deadline=None)
@given(divisor=st.integers(1, 1 << 16), data=st.data())
def test_division_by_multiplication_is_exact(divisor, data):
    """For n * divisor < 2^32, its bounds and the neighbours of multiples included."""
    most = min(((1 << 32) - 1) // divisor, (1 << 31) - 1)
    near = divisor * data.draw(st.integers(0, most // divisor))
    for n in (data.draw(st.integers(0, most)), near, max(near - 1, 0), most):
        assert _C.small_quotient(n, divisor) == n // divisor, n


@settings(deadline=None)
@given(num_experts=st.integers(1, 300), num_ranks=st.integers(1, 32), data=st.data())
def test_owners_of_experts(num_experts, num_ranks, data):
    """The rule of `deep_ep.layout`, as the kernels compute it."""
    expert = data.draw(st.integers(0, num_experts - 1))
    owner, first, count = _C.expert_owner(expert, num_experts, num_ranks)
    assert first <= expert < first + count
    assert first == first_local_expert(num_experts, num_ranks, owner)
    assert count == num_local_experts(num_experts, num_ranks, owner)


@settings(deadline=None)
@given(row_bytes=st.integers(1, 1 << 17).map(lambda n: 16 * n), wanted=st.integers(0, 1 << 20))
def test_rows_are_cut_into_whole_steps(row_bytes, wanted):
    count, piece = _C.low_latency_cut_row(row_bytes, wanted)
    assert 1 <= count <= min(MAX_PIECES, max(wanted, 1))
    assert piece % STEP_BYTES == 0
    assert (count - 1) * piece < row_bytes <= count * piece


@settings(deadline=None)
@given(
    num_local=st.integers(0, 40),
    num_ranks=st.integers(1, 9),
    num_max_tokens=st.integers(1, 130),
    num_topk=st.integers(1, 32),
    with_weights=st.booleans(),
    expert_major=st.booleans(),
)
def test_outputs_do_not_overlap(num_local, num_ranks, num_max_tokens, num_topk, with_weights, expert_major):
    outputs = _C.LowLatencyOutputs(num_local, num_ranks, num_max_tokens, num_topk, with_weights, expert_major)
    capacity = num_ranks * num_max_tokens
    by_expert = [(outputs.src_info_at, 4 * num_local * capacity)]
    if not expert_major:
        assert outputs.src_info_at == outputs.positions_at
        by_expert = []
    parts = [
        (0, 8 * num_local * num_ranks if expert_major else 0),
        (outputs.ticket_at, 8),
        (outputs.recv_count_at, 4 * (num_local if expert_major else num_ranks)),
        *by_expert,
        (outputs.source_tokens_at, 4 * num_ranks),
        (outputs.positions_at, 4 * capacity * num_topk),
        *([(outputs.weights_at, 4 * capacity * num_topk)] if with_weights else []),
        (outputs.small_block_bytes, 0),
    ]
    for (at, size), (following, _) in itertools.pairwise(parts):
        assert at + size <= following
        assert at % 8 == 0
