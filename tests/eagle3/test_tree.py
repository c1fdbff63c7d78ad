"""The draft tree: its nodes are those of a slow beam search that runs every path from scratch."""

from __future__ import annotations

import math
import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from eagle3 import drafts
from understudy.core.records import Budget
from understudy.decoding.sequence import DecodeSequence
from understudy.drafters.eagle3.model import Eagle3Model
from understudy.drafters.eagle3.tree import Candidates

CLEAR = 1e-4  # below this, float32 may choose otherwise
TREES = settings(deadline=None, max_examples=40, database=None, derandomize="CI" in os.environ,
                 suppress_health_check=list(HealthCheck))  # fmt: skip
shapes = st.fixed_dictionaries(
    {
        "top_k": st.integers(1, 5),
        "nodes": st.integers(1, 20),
        "draft_vocab_size": st.sampled_from([1, 2, 4, drafts.V]),
        "spread": st.sampled_from([0.02, 0.1, 0.25]),
        "norm_output": st.booleans(),
        "seed": st.integers(0, 3),
    }
)


def _with_head(scale: float, **options: Any) -> drafts.Eagle3Drafter:
    drafter = drafts.drafter(tree=True, **options)
    drafter.model.lm_head.weight.mul_(scale)
    return drafter


def _scored(sequence: DecodeSequence, budget: Budget) -> dict[drafts.Path, float]:
    """The drafts with the scores that they were chosen by."""
    kept: list[Candidates] = []
    with patch.object(
        Candidates, "proposal", lambda self, made=Candidates.proposal: (kept.append(self), made(self))[1]
    ):
        found = drafts.paths(drafts.proposed(sequence, budget))
    scores = torch.cat(kept[0].scores)
    picked = sorted(range(len(scores)), key=lambda c: -float(scores[c]))[: len(found)]
    return dict(zip(found, (float(scores[c]) for c in sorted(picked)), strict=True))


@TREES
@given(shapes, st.integers(1, 5), st.integers(2, 7), st.sampled_from([1.0, 3.0]))
def test_the_tree_is_that_of_the_slow_search(shape: dict, depth: int, length: int, sure: float) -> None:
    """Each node's law is recomputed from the text and its path alone: so keys, positions, states and masks of the fast way are right."""
    drafter, text = _with_head(sure, **shape), drafts.text(length, shape["seed"])
    slow = drafts.Slow(drafter, text)
    want = slow.tree(shape["top_k"], depth, shape["nodes"])
    assume(slow.gap > CLEAR)
    sequence = drafts.at(drafter, text)
    for _ in range(2):  # what the first one leaves in the cache is scratch
        found = _scored(sequence, Budget(depth, 60))
        assert set(found) == set(want)
        assert all(abs(found[path] - want[path]) < CLEAR for path in want)
        order = list(found)
        assert all(path[:-1] == () or path[:-1] in order[:i] for i, path in enumerate(order))
        assert [len(path) for path in order] == sorted(len(path) for path in order)  # in the order they were made


def test_deep_and_wide_trees() -> None:
    """The same where it is known that nodes of one depth continue different ones."""
    drafter, text = drafts.drafter(tree=True, top_k=3, nodes=24, spread=0.1, draft_vocab_size=6), drafts.text(6)
    want = drafts.Slow(drafter, text).tree(3, 5, 24)
    found = _scored(drafts.at(drafter, text), Budget(5, 60))
    assert set(found) == set(want) and all(abs(found[path] - want[path]) < CLEAR for path in want)
    parents = [{path[:-1] for path in want if len(path) == d} for d in (2, 3, 4)]
    assert all(len(each) > 1 for each in parents)


def _rows(drafter: drafts.Eagle3Drafter, text: list[int], budget: Budget) -> tuple[list[drafts.Path], int]:
    """(the drafts, rows that were expanded for them)."""
    rows = 0

    def counting(self: Eagle3Model, tokens: torch.Tensor, *rest: object, branches=Eagle3Model.branches) -> torch.Tensor:
        nonlocal rows
        rows += len(tokens)
        return branches(self, tokens, *rest)

    with patch.object(Eagle3Model, "branches", counting):
        return drafts.paths(drafts.proposed(drafts.at(drafter, text), budget)), rows


@TREES
@given(shapes, st.integers(1, 5))
def test_rows_that_cannot_matter_are_not_run(shape: dict, depth: int) -> None:
    """Where looking is dear (on a GPU) all of a depth are expanded: the same tree comes out."""
    drafter, text = drafts.drafter(tree=True, **shape), drafts.text(6)
    few, run = _rows(drafter, text, Budget(depth, 60))
    with patch.object(Candidates, "worth", lambda self, top_k: min(top_k, len(self.scores[-1]))):
        whole, all_rows = _rows(drafter, text, Budget(depth, 60))
    assert few == whole and run <= all_rows


def test_no_pass_is_run_for_the_last_depth_nor_for_nothing() -> None:
    drafter, text = drafts.drafter(tree=True, top_k=3, nodes=60, spread=0.02), drafts.text(6)
    assert _rows(drafter, text, Budget(1, 60))[1] == 0
    assert _rows(drafter, text, Budget(3, 60))[1] == 6
    assert _rows(drafter, text, Budget(3, 1)) == ([_rows(drafter, text, Budget(3, 60))[0][0]], 0)
    flat = drafts.drafter(tree=True, top_k=8, nodes=8, spread=0.0, head_init="random")
    found, rows = _rows(flat, text, Budget(5, 60))  # so wide a law that no child is as likely as the first eight
    assert [len(path) for path in found] == [
        1
    ] * 8 and rows == 7  # whether one is shows in one pass; of the eighth none can be


# Equal scores


@pytest.mark.parametrize(("top_k", "nodes"), [(2, 9), (3, 10), (4, 24), (5, 3)])
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_equal_scores(top_k: int, nodes: int, depth: int) -> None:
    """All tokens are equally likely: the first ones made are chosen, which are those of the lowest depths."""
    found = drafts.paths(
        drafts.proposed(drafts.at(_with_head(0.0, top_k=top_k, nodes=nodes), drafts.text(6)), Budget(depth, 60))
    )
    assert len(set(found)) == len(found) == min(nodes, top_k + (depth - 1) * top_k**2)
    assert all(path[:-1] == () or path[:-1] in found[:i] for i, path in enumerate(found))
    widths = [sum(len(path) == d for path in found) for d in range(1, depth + 1)]
    left = nodes
    for d, width in enumerate(widths):
        assert width == min(left, top_k if d == 0 else top_k**2)
        left -= width


def test_children_as_likely_as_their_parents() -> None:
    """Log probabilities that round to 0: the likeliest chain has score 0 all along, and stays whole whatever else is as good."""
    drafter, text = _with_head(1e4, top_k=3, nodes=4), drafts.text(6)
    found = drafts.paths(drafts.proposed(drafts.at(drafter, text), Budget(6, 60)))
    chain = tuple(drafts.Slow(drafter, text).chain(4))
    assert found == [chain[: i + 1] for i in range(4)]
    wider = drafts.Eagle3Drafter(drafter.target, drafter.model, drafter.config.model_copy(update={"nodes": 10}))
    found = drafts.paths(drafts.proposed(drafts.at(wider, text), Budget(6, 60)))
    assert set(found) >= {chain[: i + 1] for i in range(4)} and len(set(found)) == 10
    assert all(path[:-1] == () or path[:-1] in found[:i] for i, path in enumerate(found))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", ["every law", "some of the later ones"])
def test_weights_that_are_no_numbers_still_give_a_tree(poison: float, at: str) -> None:
    drafter, text = drafts.drafter(tree=True, top_k=3, nodes=9), drafts.text(6)

    def poisoned(self: Eagle3Model, *given: Any, branches=Eagle3Model.branches) -> torch.Tensor:
        out = branches(self, *given)
        out[1:] = poison
        return out

    if at == "every law":
        drafter.model.lm_head.weight[2] = poison
    with patch.object(Eagle3Model, "branches", poisoned if at != "every law" else Eagle3Model.branches):
        found = drafts.paths(drafts.proposed(drafts.at(drafter, text)))
    assert len(found) == 9 and all(path[:-1] == () or path[:-1] in found[:i] for i, path in enumerate(found))


def test_branches_see_the_text_and_their_own_ancestors_only() -> None:
    """A mask of nothing but ancestors, told apart from one row of it more or less."""
    drafter, text = drafts.drafter(tree=True, top_k=2, nodes=14, spread=0.1, draft_vocab_size=2), drafts.text(5)
    want = drafts.paths(drafts.proposed(drafts.at(drafter, text), Budget(3, 60)))
    masks: list[torch.Tensor] = []

    def looking(self: Eagle3Model, *given: object, branches=Eagle3Model.branches) -> torch.Tensor:
        masks.append(given[-1].clone())  # type: ignore[attr-defined]
        return branches(self, *given)

    with patch.object(Eagle3Model, "branches", looking):
        assert drafts.paths(drafts.proposed(drafts.at(drafter, text), Budget(3, 60))) == want
    open_ = [(mask == 0).int().tolist() for mask in masks]
    first, second = open_
    assert first == [[1, 0], [0, 1]]
    parents = [row[:2].index(1) for row in second]
    assert second == [[int(parents[i] == 0), int(parents[i] == 1), int(i == 0), int(i == 1)] for i in range(2)]
