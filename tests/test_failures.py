"""What kernels report, as errors that say what happened."""

import pytest

from deep_ep.engines.failures import failure, never_ran, overflowed, refusal
from deep_ep.errors import CommTimeout, ConfigError, PeerError


@pytest.mark.parametrize(
    ("record", "kind", "words"),
    [
        ((1, 1, 1, 3, 7, 6), CommTimeout, ["dispatch", "rank 3", "announcement", "expected 7, seen 6", "timeout_s"]),
        ((1, 2, 2, 1, 9, 8), CommTimeout, ["combine", "rank 1", "end of the operation", "rank 0 waited 2 s"]),
        ((1, 2, 5, 2, 9, 8), CommTimeout, ["combine", "rank 2", "pushed rows"]),
        ((2, 2, 1, 2, 0xAB, 0xCD), PeerError, ["combine", "rank 2", "0xab", "0xcd", "same order"]),
        ((4, 1, 3, 1, 5, 2**64 - 7), ConfigError, ["get_dispatch_layout: topk_idx[5, 1] is -7", "-1"]),
        ((4, 3, 3, 0, 2, 99), ConfigError, ["low_latency_dispatch: topk_idx[2, 0] is 99"]),
        ((4, 4, 3, 0, 2, 99), ConfigError, ["low_latency_combine: topk_idx[2, 0] is 99"]),
        ((1, 3, 5, 2, 9, 8), CommTimeout, ["low_latency_dispatch", "rank 2", "pushed rows"]),
        ((5, 2, 1, 3, 0, 0), PeerError, ["combine: rank 3 gave the operation up"]),
        ((9, 0, 0, 0, 0, 0), PeerError, ["an operation", "error 9"]),
    ],
)
def test_messages_of_failures(record, kind, words):
    error = failure(record, 0, 2.0)
    assert type(error) is kind
    assert [word for word in words if word not in str(error)] == []
    if kind is CommTimeout:
        assert (error.peer, error.waited_s) == (record[3], 2.0)
        assert error.operation == {1: "dispatch", 2: "combine", 3: "low_latency_dispatch"}[record[1]]
    if kind is PeerError and record[0] != 9:
        assert error.peer == record[3]


def test_messages_of_what_breaks_no_buffer():
    assert (refusal(2).peer, refusal(2).operation) == (2, "dispatch")
    assert str(refusal(1, "combine")).startswith("combine: rank 1 gave the operation up")
    text = str(overflowed(3, 40, 32))
    assert "rank 3 was to receive 40 tokens but num_worst_tokens is 32" in text and "at least 40" in text
    error = never_ran("dispatch", 14.0)
    assert isinstance(error, CommTimeout) and error.waited_s == 14.0 and "14 s" in str(error)
