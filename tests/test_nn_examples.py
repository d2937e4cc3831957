"""`examples`: run a test on many drawn arguments, by hypothesis where it is installed, else by a seeded generator."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Sequence
from typing import Any

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    given = None


def examples(count: int, **options: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: call the test `count` times, each argument drawn from its sequence."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        if given is not None:
            return settings(max_examples=count)(given(**{k: st.sampled_from(v) for k, v in options.items()})(test))

        @functools.wraps(test)
        def run() -> None:
            source = random.Random(test.__name__)
            for _ in range(count):
                test(**{k: source.choice(v) for k, v in options.items()})

        run.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
        return run

    return decorate


@examples(20, number=range(5), word=("a", "b"))
def test_arguments_come_from_their_sequences(number, word):
    assert number in range(5) and word in ("a", "b")
