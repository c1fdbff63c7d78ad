"""Weights of drafts by their place, against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.ops.position_weights import dpace, exponential


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.floats(0.2, 50))
def test_exponential(lengths: list[int], gamma: float) -> None:
    asked = torch.arange(6) < torch.tensor(lengths)[:, None]
    found = exponential(asked, gamma)
    for row, length in zip(found.tolist(), lengths, strict=True):
        assert row == pytest.approx([math.exp(-k / gamma) if k < length else 0.0 for k in range(6)])


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(st.floats(0, 1), min_size=5, max_size=5), st.integers(0, 5)), min_size=1, max_size=4),
       st.floats(0, 0.99))  # fmt: skip
def test_dpace(rows: list[tuple[list[float], int]], alpha: float) -> None:
    """w_k = sum over j >= k of the chance to get past draft j; what is not asked for counts nothing and lengthens nothing."""
    q, lengths = torch.tensor([row for row, _ in rows]), [length for _, length in rows]
    found = dpace(q, torch.arange(5) < torch.tensor(lengths)[:, None], alpha)
    for got, (row, length) in zip(found.tolist(), rows, strict=True):
        past = [math.prod((1 - alpha) * each + alpha for each in row[: j + 1]) for j in range(length)]
        assert got == pytest.approx([sum(past[k:]) for k in range(length)] + [0.0] * (5 - length), rel=1e-4, abs=1e-6)


def test_dpace_by_hand() -> None:
    q = torch.tensor([[0.5, 0.0, 1.0]])
    every = torch.ones(1, 3, dtype=torch.bool)
    assert dpace(q, every, 0.0).tolist() == [[0.5, 0.0, 0.0]]  # nothing gets past the second draft
    assert dpace(q, every, 0.5).tolist() == [[0.75 + 0.375 + 0.375, 0.375 + 0.375, 0.375]]
    assert dpace(torch.ones(1, 3), every, 0.5).tolist() == [[3.0, 2.0, 1.0]]
