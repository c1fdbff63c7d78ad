"""Means and errors from sums equal those from all values; parts add up to the whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.analysis.tally import Tally

SAMPLES = st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=6), min_size=2, max_size=8)


def tally(samples: list[list[float]]) -> Tally:
    made = Tally(["x", "-2x"])
    for values in samples:
        made.add(np.array([sum(values), -2 * sum(values)]), len(values))
    return made


@given(SAMPLES)
def test_mean_and_error_are_those_of_the_values(samples):
    found, tokens = tally(samples), sum(map(len, samples))
    mean = sum(map(sum, samples)) / tokens
    assert found.mean("x") == pytest.approx(mean, abs=1e-12)
    assert found.mean("-2x") == pytest.approx(-2 * mean, abs=1e-12)
    m = len(samples)
    spread = sum((sum(values) - mean * len(values)) ** 2 for values in samples)
    assert found.error("x") == pytest.approx((m / (m - 1) * spread) ** 0.5 / tokens, abs=1e-6)


def test_the_error_of_samples_of_one_token_is_that_of_a_mean():
    values = [1.0, 2.0, 4.0, 9.0]
    assert tally([[v] for v in values]).error("x") == pytest.approx(np.std(values, ddof=1) / 2)
    assert tally([[1.0, 2.0]]).error("x") is None


@given(SAMPLES, st.data())
def test_parts_add_up_and_files_keep_every_digit(samples, data):
    cut = data.draw(st.integers(0, len(samples)))
    first, second = tally(samples[:cut]), tally(samples[cut:])
    first.merge(Tally.from_json(json.loads(json.dumps(second.as_json()))))
    whole = tally(samples)
    assert (first.samples, first.tokens, first.tokens_squared) == (whole.samples, whole.tokens, whole.tokens_squared)
    assert np.allclose(first.sums, whole.sums, rtol=1e-12, atol=1e-12)
    again = Tally.from_json(json.loads(json.dumps(whole.as_json())))
    assert again.names == whole.names and np.array_equal(again.sums, whole.sums)


def test_what_is_kept_does_not_grow():
    few, many = tally([[1.0]] * 2), tally([[1.0]] * 500)
    assert few.sums.shape == many.sums.shape and many.samples == 500
