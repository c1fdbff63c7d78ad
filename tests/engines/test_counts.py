"""Counting as vLLM counts: which passes it runs for a text, and what it adds up over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from comparing import Limits, Place, faults
from counting import Counts, Round, disagreements, equal_drafts, places, rounds_of, tally, within
from hypothesis import given, settings
from hypothesis import strategies as st

K = 3


def a_pass(accepted: int, drafted: Sequence[int] = (7, 8, 9)) -> Round:
    return Round(tuple(drafted), accepted)


def scheduler(accepted: Sequence[int], length: int) -> Counts:
    """vLLM's scheduler for one text, step by step: a slow oracle."""
    counts, output = Counts(accepted_at=[0] * K), ["first"]
    script = iter(accepted)
    while len(output) < length:
        agreed = next(script)
        counts.drafts += 1
        counts.draft_tokens += K
        counts.accepted_tokens += agreed
        for k in range(agreed):
            counts.accepted_at[k] += 1
        for _ in range(agreed + 1):
            if len(output) < length:  # cut after counting
                output.append("token")
    return counts


def test_a_pass_counts_if_it_began_before_the_text_was_long_enough() -> None:
    rounds = [a_pass(0), a_pass(3), a_pass(1), a_pass(2)]  # texts of 1, 2, 6, 8 and 11 tokens lie between them
    assert within(rounds, 1) == []
    assert within(rounds, 2) == rounds[:1]
    assert within(rounds, 3) == rounds[:2]
    assert within(rounds, 6) == rounds[:2]
    assert within(rounds, 7) == rounds[:3]
    assert within(rounds, 99) == rounds


def test_tally_is_untrimmed() -> None:
    counts = tally([a_pass(0), a_pass(3), a_pass(1), Round((), 0)], K)
    assert counts == Counts(drafts=3, draft_tokens=9, accepted_tokens=4, accepted_at=[2, 1, 1])
    assert counts.tau == pytest.approx(7 / 3)
    assert counts.rejected == 5
    assert (counts + counts).accepted_at == [4, 2, 2]


@settings(deadline=None)
@given(accepted=st.lists(st.integers(0, K), min_size=1, max_size=40), length=st.integers(1, 30))
def test_as_the_scheduler_does(accepted: list[int], length: int) -> None:
    accepted = accepted + [0] * length  # our engine always decodes at least as far
    assert tally(within([a_pass(a) for a in accepted], length), K) == scheduler(accepted, length)


@settings(deadline=None)
@given(accepted=st.lists(st.integers(0, K), min_size=1, max_size=20), length=st.integers(1, 30))
def test_passes_are_found_again_in_text_and_drafts(accepted: list[int], length: int) -> None:
    text, rounds = [0], []
    for number in accepted + [0] * length:  # no two tokens of the text are equal, and a wrong draft is in no text
        at = len(text)
        drafted = [at + k if k < number else -1 for k in range(K)]
        rounds.append(a_pass(number, drafted))
        text += range(at, at + number + 1)
    kept = within(rounds, length)
    found = rounds_of([each.drafted for each in kept], text[:length])
    assert places(found) == places(kept)
    assert [each.accepted for each in found[:-1]] == [each.accepted for each in kept[:-1]]  # the last one may be cut


def test_drafts_are_compared_where_both_began_a_pass_on_the_same_text() -> None:
    ours = [a_pass(1, (1, 2, 3)), a_pass(0, (4, 5, 6)), a_pass(0, (7, 7, 7))]  # at 1, 3, 4
    theirs = [a_pass(1, (1, 2, 9)), a_pass(1, (4, 5, 6)), a_pass(0, (8, 8, 8))]  # at 1, 3, 5
    assert equal_drafts(ours, theirs, None) == (5, 6)
    assert equal_drafts(ours, theirs, 3) == (5, 6)  # what is drafted after three tokens depends on those only
    assert equal_drafts(ours, theirs, 2) == (2, 3)


def test_disagreements_are_shares_of_the_passes() -> None:
    ours = Counts(200, 600, 300, [150, 100, 50])
    assert disagreements(ours, Counts(200, 600, 302, [152, 100, 50]), 0.01) == []
    (line,) = disagreements(ours, Counts(200, 600, 303, [150, 103, 50]), 0.01)
    assert line == "draft 2 accepted 103 times in 200 passes, ours 100 in 200"
    (line,) = disagreements(ours, Counts(203, 609, 300, [150, 100, 50]), 0.01)
    assert line == "203 passes with drafts, ours 200"


def test_every_condition_can_fail() -> None:
    limits = Limits(steps=K, tolerance=0.01, enough=50, strict=True)
    counts = Counts(200, 600, 300, [150, 100, 50])
    assert faults(limits, counts, counts, [], 1.0) == []
    few = Counts(20, 60, 49, [20, 19, 10])
    assert "49 drafts accepted" in faults(limits, few, few, [], 1.0)[0]
    assert "only 98.0 %" in faults(limits, counts, counts, [], 0.98)[0]
    assert "draft 2" in faults(limits, counts, Counts(200, 600, 310, [150, 110, 50]), [], 1.0)[0]
    place = Place(4, 17, {"float32": 0.25})
    (line,) = faults(limits, counts, counts, [place], 1.0)
    assert "prompt 4, token 17 (logits 0.25 apart)" in line
    assert faults(replace(limits, strict=False), counts, few, [place], 0.5) == [faults(limits, few, few, [], 1.0)[0]]
