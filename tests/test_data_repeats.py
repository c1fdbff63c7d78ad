"""repeat_share against a slow count, and its edges."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.telemetry.repeats import repeat_share


def test_literal_values():
    assert repeat_share([]) == 0.0
    assert repeat_share([1, 1, 1]) == 0.0  # no 4-gram
    assert repeat_share([1, 1, 1, 1]) == 0.0  # one, and it is new
    assert repeat_share([1, 1, 1, 1, 1]) == 0.5
    assert repeat_share([1, 2, 3, 4, 1, 2, 3, 4]) == 1 / 5  # 1234 2341 3412 4123 1234
    assert repeat_share([1, 2, 1, 2], n=2) == 1 / 3


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40), st.integers(1, 5))
def test_equals_a_slow_count(ids, n):
    grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
    repeats = sum(gram in grams[:i] for i, gram in enumerate(grams))
    share = repeat_share(ids, n)
    assert abs(share - (repeats / len(grams) if grams else 0)) < 1e-12
    assert 0 <= share < 1
