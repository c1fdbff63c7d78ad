"""Draws follow their law exactly; filters and penalties equal transformers' own, which are the oracle."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from understudy.core import seeds
from understudy.ops import laws

DRAWS = 100_000


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """The probability of a worse fit, by the chi-square test; an impossible outcome that occurred gives 0."""
    possible = expected > 0
    if counts[~possible].any():
        return 0.0
    statistic = ((counts[possible] - expected[possible]) ** 2 / expected[possible]).sum()
    return torch.special.gammaincc((possible.sum().double() - 1) / 2, statistic / 2).item()


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [False, True])
def test_draws_follow_the_weights(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Zeros at both ends and inside; a block without weight, and a last block of three.
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.5, 0.0, 0.0, 0.7, 1.5, 0.0])
    if blocks:
        monkeypatch.setattr(laws, "_DIRECT", 4)
        monkeypatch.setattr(laws, "_BLOCK", 4)
    tokens = laws.draw(weights.expand(DRAWS, -1), seeds.generator("cpu", 0, "draw"))
    counts = tokens.bincount(minlength=len(weights)).double()
    assert chi_square_p(counts, weights.double() / weights.sum() * DRAWS) > 1e-4
    wrong = weights.clone()
    wrong[1] += 0.3  # the test notices a law that is 2 % off
    assert chi_square_p(counts, wrong.double() / wrong.sum() * DRAWS) < 1e-6


def test_each_row_has_its_own_law_and_number() -> None:
    weights = torch.rand(9, 50, generator=torch.Generator().manual_seed(1))
    tokens = torch.stack([laws.draw(weights, seeds.generator("cpu", s)) for s in range(2_000)])
    for row in range(9):
        expected = weights[row].double() / weights[row].sum() * len(tokens)
        assert chi_square_p(tokens[:, row].bincount(minlength=50).double(), expected) > 1e-4
    same = laws.draw(torch.ones(1_000, 50), seeds.generator("cpu", 0))
    assert len(same.unique()) == 50


@pytest.mark.parametrize("vocabulary", [5, 30_000])
@pytest.mark.parametrize("point", [0.0, 0.25, 1 - 2**-53, 1.0])
def test_tokens_without_weight_are_never_drawn(vocabulary: int, point: float) -> None:
    """At the very ends too (rounding can make a 1), and with a total that is not a round number."""
    for positive in (1, 2, vocabulary - 2):
        weights = torch.zeros(1, vocabulary)
        weights[0, positive] = 0.1
        assert laws.inverse_cdf(weights, torch.tensor([point], dtype=torch.float64)).item() == positive


@pytest.mark.parametrize("vocabulary", [5, 30_000])
def test_a_row_without_a_law_gives_no_token(vocabulary: int) -> None:
    weights = torch.stack([torch.zeros(vocabulary), torch.full((vocabulary,), math.nan), torch.ones(vocabulary)])
    tokens = laws.draw(weights, seeds.generator("cpu", 0))
    assert tokens[0] >= vocabulary
    assert tokens[1] >= vocabulary
    assert tokens[2] < vocabulary


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 400), st.integers(0, 2**31))
def test_drawing_in_blocks_is_drawing_at_once(blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = laws._DIRECT + blocks * 37
    weights = torch.rand(3, vocabulary, generator=generator) * (torch.rand(3, vocabulary, generator=generator) < 0.01)
    points = laws.uniforms(3, generator)
    cdf = weights.double().cumsum(1)
    expected = torch.searchsorted(cdf, points[:, None] * cdf[:, -1:], right=True).squeeze(1)
    assert torch.equal(laws.inverse_cdf(weights, points), expected)


# --- filters and penalties: transformers' are the oracle ------------------------------------------------------------


def random_logits(seed: int, rows: int, vocabulary: int, scale: float, removed: float) -> Tensor:
    """[rows, vocabulary] with no two equal finite values in a row, some of them -inf."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(vocabulary, generator=generator) for _ in range(rows)])
    logits = (ranks + 0.5 * torch.rand(rows, vocabulary, generator=generator)) / vocabulary * scale - scale / 3
    gone = torch.rand(rows, vocabulary, generator=generator) < removed
    gone[:, 0] = False
    return logits.masked_fill(gone, -math.inf)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    vocabulary=st.sampled_from([2, 17, 300, 5_000]),
    scale=st.sampled_from([0.5, 4.0, 30.0]),
    removed=st.sampled_from([0.0, 0.5]),
    top_k=st.sampled_from([0, 1, 5, 50, 10_000]),
    top_p=st.sampled_from([0.0, 0.1, 0.6, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_filters_equal_transformers(seed, vocabulary, scale, removed, top_k, top_p, min_p) -> None:
    logits = random_logits(seed, 3, vocabulary, scale, removed)
    expected = logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    edge = torch.zeros_like(
        logits, dtype=torch.bool
    )  # tokens that fp32 sums, in whichever order, may put in or out of top-p
    if top_p < 1.0:
        law, order = expected.double().softmax(-1).sort(descending=True)
        edge.scatter_(1, order, (law.cumsum(-1) - law - top_p).abs() < 1e-5)
        expected = TopPLogitsWarper(top_p)(None, expected)
    expected = MinPLogitsWarper(min_p)(None, expected) if min_p else expected
    got = laws.truncate(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(got[~edge], expected[~edge])
    assert (got > -math.inf).any(dim=1).all()


def test_a_wide_nucleus_on_a_large_vocabulary() -> None:
    """Rows whose nucleus lies within the first window, within the second and beyond both, in one call."""
    logits = random_logits(3, 3, 40_000, 1.0, 0.0) * torch.tensor([[4_000.0], [40.0], [1.0]])
    got, expected = laws.truncate(logits, top_p=0.9), TopPLogitsWarper(0.9)(None, logits)
    kept = (got > -math.inf).sum(1).tolist()
    assert kept[0] < 256 < kept[1] < 4096 < kept[2]
    differ = (got == -math.inf) != (expected == -math.inf)
    # transformers adds 40,000 small numbers from below in fp32; ours stays close to the exact nucleus.
    assert laws.law(logits)[differ].sum() < 1e-3
    mass = laws.law(logits.double()).masked_fill(got == -math.inf, 0.0).sum(1)
    assert ((mass - 0.9).abs() < 1e-3).all()


def test_ties_at_the_floor_all_stay_whatever_the_width_of_the_pass() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0, -1.0]])
    for options in (
        {"top_k": 2},
        {"top_p": 0.3},
        {"min_p": 0.9},
        {"top_k": 2, "top_p": 0.5},
        {"top_k": 1, "min_p": 0.5},
    ):
        kept = laws.truncate(logits, **options) > -math.inf
        assert kept.tolist() == [[False, True, True, True, False, False]], options
        assert torch.equal(laws.truncate(logits.repeat(9, 1), **options)[4:5] > -math.inf, kept)
    # Top-p after top-k divides by the mass of all that top-k kept, ties included: the first token holds 2/6, not 2/3.
    kept = laws.truncate(torch.tensor([[math.log(2), 0.0, 0.0, 0.0, 0.0, -1.0]]), top_k=2, top_p=0.5) > -math.inf
    assert kept.tolist() == [[True, True, True, True, True, False]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), penalty=st.sampled_from([0.5, 1.0, 1.05, 3.0]), length=st.integers(1, 30))
def test_repetition_penalty_equals_transformers(seed: int, penalty: float, length: int) -> None:
    logits = random_logits(seed, 1, 40, 8.0, 0.2)
    tokens = torch.randint(40, (1, length), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(1, 40, dtype=torch.bool).scatter_(1, tokens, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    assert torch.equal(laws.repetition_penalty(logits, seen, penalty), expected)


def test_presence_and_frequency_penalties() -> None:
    logits = torch.tensor([[1.0, 2.0, -3.0, -math.inf]])
    counts = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    got = laws.presence_frequency(logits, counts, presence=0.5, frequency=0.25)
    assert got.tolist() == [[1.0, 2.0 - 0.75, -3.0 - 1.25, -math.inf]]
    assert laws.presence_frequency(logits, counts, 0.0, 0.0) is logits


def test_the_law_of_a_removed_token_is_zero_in_fp32() -> None:
    law = laws.law(torch.tensor([[0.0, -math.inf, 1.0]], dtype=torch.bfloat16))
    assert law.dtype == torch.float32
    assert law[0, 1] == 0.0
    assert law.sum().item() == pytest.approx(1.0)
