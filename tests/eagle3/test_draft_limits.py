"""EAGLE-3's drafts at the limits of budget and context, and the laws that they are drawn from."""

from __future__ import annotations

import pytest
import torch

import tiny
from contract.laws import PLAIN, check_law
from contract.runs import MAKERS
from eagle3 import drafts
from eagle3.drafts import KINDS, V, made
from understudy.core.records import Budget
from understudy.decoding.engine import decode
from understudy.drafters.eagle3.drafter import Eagle3Drafter
from understudy.drafting.spec import specs
from understudy.target.params import SamplingParams


@pytest.mark.parametrize("kind", KINDS)
def test_budgets(kind: str) -> None:
    drafter = made(kind)
    sequence = drafts.at(drafter, drafts.text(6))
    whole = drafts.paths(drafts.proposed(sequence))
    for depth in (0, 1, 2, 4):
        found = drafts.paths(drafts.proposed(sequence, Budget(depth, 60)))
        deepest = max(map(len, found), default=0)
        assert deepest <= depth and (deepest == depth or depth > 2)
        if not drafter.config.tree:
            assert found == whole[:depth] and len(found) == depth
    if drafter.config.tree:
        one = drafts.paths(drafts.proposed(sequence, Budget(4, 1)))
        assert len(one) == 1 and one[0] in whole
        assert [len(drafts.proposed(sequence, Budget(4, nodes)).tokens) for nodes in (0, 2, 5)] == [0, 2, 5]
        assert len(drafts.proposed(sequence, Budget(1, 60)).tokens) == min(drafter.config.top_k, 8)


def test_options_of_the_tree() -> None:
    """top_k bounds the children of a node and the nodes expanded per depth, nodes the tree."""
    for top_k, nodes in ((1, 9), (2, 9), (4, 9), (4, 3), (20, 15)):
        drafter = drafts.drafter(seed=1, spread=0.05, tree=True, top_k=top_k, nodes=nodes)
        assert drafter.nodes == nodes
        found = drafts.paths(drafts.proposed(drafts.at(drafter, drafts.text(6))))
        children = [sum(path[:-1] == parent for path in found) for parent in [(), *found]]
        assert max(children) == min(top_k, nodes, V) or top_k == 20
        expanded = {path[:-1] for path in found if len(path) > 1}
        assert all(sum(len(path) == d for path in expanded) <= top_k for d in range(1, 5))
        assert len(found) == (4 if top_k == 1 else nodes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_the_context(kind: str) -> None:
    """The text fills the context to its last position; a session asked for more drafts than fit drafts those that fit."""
    drafter, prompt = made(kind, context=26), drafts.text(15)
    sequence = drafts.opened(drafter, prompt, max_new_tokens=99)
    for cycle in decode(sequence):
        left = 26 - len(sequence.tokens)
        if left < 4 and cycle.index:
            found = drafts.paths(drafts.proposed(sequence, Budget(9, 60)))
            deepest = max(map(len, found), default=0)
            assert deepest <= left and (deepest == left or drafter.config.tree)
    assert sequence.output == tiny.continuation(drafter.target.model, prompt, 11) and sequence.finished == "length"


def test_a_text_of_one_token() -> None:
    want = tiny.continuation(drafts.target().model, [4], 12)
    for kind in KINDS:
        sequence = drafts.opened(made(kind), [4], max_new_tokens=12)
        assert [token for cycle in decode(sequence) for token in cycle.committed] == want, kind


# Laws

SAMPLED = SamplingParams(temperature=0.7, top_k=4, seed=3)


def test_the_recorded_law_is_that_of_the_draft_vocabulary() -> None:
    """q stands in the columns of the tokens that the drafter can say; after a drawn token it is that of the drawn text."""
    drafter, text = drafts.drafter(seed=1, draft_vocab_size=5), drafts.text(6)
    sequence = drafts.at(drafter, text, sampling=SAMPLED, draft_sampling="sample")
    q = (proposal := drafts.proposed(sequence)) and sequence.recorder.settle(proposal)
    slow = drafts.Slow(drafter, text)
    assert q is not None and q.shape == (4, V) and set(proposal.tokens.tolist()) <= set(slow.ids)
    for i, row in enumerate(q):
        logits = slow.logits(tuple(proposal.tokens[:i].tolist())) / 0.7
        logits[logits < logits.topk(4).values[-1]] = -torch.inf
        want = torch.zeros(V).index_copy_(0, torch.tensor(slow.ids), logits.softmax(0).float())
        torch.testing.assert_close(row, want, rtol=1e-4, atol=1e-5)


def test_trees_are_matched_and_not_rejected() -> None:
    """Their shape depends on their tokens, so nothing is drawn: the same tree at any temperature, and no q."""
    drafter, text = made("tree"), drafts.text(6)
    sequence = drafts.at(drafter, text, sampling=SAMPLED, draft_sampling="sample")
    proposal = drafts.proposed(sequence)
    assert sequence.recorder.settle(proposal) is None
    assert drafts.paths(proposal) == drafts.paths(drafts.proposed(drafts.at(drafter, text)))


@pytest.mark.parametrize(("instance", "rule"), [(1, "sample"), (2, "argmax")])
def test_law_where_some_drafts_are_accepted(instance: int, rule: str) -> None:
    drafted, accepted = check_law(lambda target: specs()["eagle3"].tiny(target)[instance], PLAIN, 300, rule)
    assert accepted >= 60 and drafted - accepted >= 60


def test_the_contract_runs_over_every_mode() -> None:
    """The tiny instances that every check of the contract takes: all and part of the vocabulary, a chain and a tree, normed feedback."""
    made = [MAKERS[name].make(tiny.target("gemma2"), []) for name in MAKERS if name.startswith("eagle3-")]
    assert all(isinstance(each, Eagle3Drafter) and each.model.taps == (0, 1, 3) for each in made)
    modes = {(each.model.ids is not None, each.config.tree, each.model.config.norm_output) for each in made}  # type: ignore[attr-defined]
    assert modes == {(False, False, False), (True, False, True), (True, True, False)}
