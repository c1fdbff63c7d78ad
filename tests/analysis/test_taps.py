"""The rules for taps: literals, and brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.analysis.taps import equal_steps, lowest_loss, progress
from understudy.drafters.dflash.layout import default_taps
from understudy.drafting.taps import even


def test_even_taps_are_those_of_public_drafters():
    assert [tap - 1 for tap in even(36, 5)] == [1, 9, 17, 25, 33]  # z-lab's build_target_layer_ids(36, 5)
    assert even(12, 5) == [2, 4, 6, 8, 10]
    assert even(36, 1) == [18]


def test_even_taps_are_the_default_of_training():
    for layers in range(4, 81):
        for count in (1, 3, 5, 8):
            assert even(layers, count) == default_taps(layers, count)


@pytest.mark.parametrize(("layers", "taps"), [(1, []), (2, [1]), (3, [1, 2]), (4, [2]), (5, [2, 3])])
def test_a_shallow_target_has_fewer(layers, taps):
    assert even(layers, 5) == taps


def test_lowest_loss_is_by_loss_and_told_by_layer():
    assert lowest_loss({1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0}, 3) == [2, 3, 4]
    assert lowest_loss({1: 5.0}, 3) == [1]


def test_progress_is_the_mean_of_what_cosine_and_loss_have_done():
    cosines = {0: 0.0, 1: 0.2, 2: 0.1, 3: 1.0}
    # ignorance is a loss of 4: layer 0 is worse than knowing nothing, which counts as knowing nothing
    losses = {0: 9.0, 1: 4.0, 2: 3.0, 3: 2.0}
    assert progress(cosines, losses, 4.0) == pytest.approx({0: 0, 1: (0.2 + 0) / 2, 2: (0.2 + 0.5) / 2, 3: 1})


def test_a_curve_that_says_nothing_is_left_out():
    flat, rising = dict.fromkeys(range(3), 0.5), {0: 0.0, 1: 0.25, 2: 1.0}
    useless = dict.fromkeys(range(3), 99.0)  # beyond ignorance everywhere
    assert progress(rising, useless, 4.0) == rising
    assert progress(flat, {0: 4.0, 1: 3.0, 2: 0.0}, 4.0) == rising
    assert progress(flat, useless, 4.0) == {0: 0, 1: 0.5, 2: 1}
    assert progress({7: 0.3}, {7: 1.0}, 4.0) == {7: 1}


def test_taps_are_dense_where_the_target_decides():
    done = {0: 0, 1: 0.02, 2: 0.04, 3: 0.06, 4: 0.08, 5: 0.1, 6: 0.3, 7: 0.5, 8: 0.7, 9: 0.9, 10: 1}
    assert equal_steps(done, range(1, 11), 4) == [6, 7, 8, 10]
    assert equal_steps(done, range(1, 11), 1) == [10]
    assert equal_steps(done, [3, 5], 4) == [3, 5]
    assert equal_steps(done, [], 4) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(1, 5))
def test_no_other_choice_is_nearer(values, count):
    done = dict(enumerate(sorted(values), start=1))
    n = min(count, len(done))

    def error(taps):
        return sum((done[tap] - (j + 1) / n) ** 2 for j, tap in enumerate(taps))

    found = equal_steps(done, list(done), count)
    assert len(found) == n and found == sorted(set(found))
    assert error(found) == pytest.approx(min(map(error, combinations(done, n))), abs=1e-9)
