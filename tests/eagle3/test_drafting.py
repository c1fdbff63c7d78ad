"""Drafting with EAGLE-3 through the engine: chains and trees, whatever happens to a sequence, at the limits of budget and context."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from contract import histories
from contract.laws import PLAIN, check_law
from contract.runs import MAKERS
from contract.scripted import Wrapped
from eagle3 import drafts, reference
from eagle3.drafts import V
from understudy.core.errors import UserError
from understudy.core.records import Budget, Proposal
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafters.eagle3.config import Eagle3Config
from understudy.drafters.eagle3.drafter import Eagle3Drafter
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import specs
from understudy.target.params import SamplingParams
from understudy.target.target import Target

CLEAR = 1e-4  # below this, float32 may choose otherwise
KINDS: dict[str, dict[str, Any]] = {
    "chain": {"norm_output": True},
    "reduced": {"draft_vocab_size": 7, "fc_norm": True},
    "tree": {"draft_vocab_size": 8, "tree": True, "norm_before_residual": True},
    "wide tree": {"tree": True, "top_k": 5, "nodes": 20, "norm_before_fc": True},
}
OTHERS = ("gemma3", "cohere2", "granite", "qwen3-vl")
CASES = [("llama", kind) for kind in KINDS] + [(family, kind) for family in OTHERS for kind in ("reduced", "tree")]


@cache
def made(kind: str, family: str = "llama", context: int = 512) -> Eagle3Drafter:
    """Drafters that have learned a little, so that paths of any length are accepted."""
    return drafts.drafter(drafts.target(family, context), seed=1, lessons=12, spread=0.05, **KINDS[kind])


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_drafts_are_the_slow_ones(family: str, kind: str) -> None:
    """In every cycle of a run, after accepted paths of different lengths."""
    drafter = made(kind, family)
    compared = []

    def compare(proposal: Proposal) -> None:
        slow = drafts.Slow(drafter, sequence.tokens)
        depth, found = sequence.budget().depth, drafts.paths(proposal)
        if drafter.config.tree:
            want = list(slow.tree(drafter.config.top_k, depth, drafter.config.nodes))
        else:
            chain = slow.chain(depth)
            want = [tuple(chain[: i + 1]) for i in range(depth)]
        if slow.gap > CLEAR:
            assert set(found) == set(want) and len(found) == len(want), f"after {sequence.tokens}"
            compared.append(len(found))

    params = DecodeParams(max_new_tokens=14, prefill_chunk=3)
    sequence = DecodeSequence(drafter.target, Wrapped(drafter, on_propose=compare), params, stop=StopRule())
    sequence.prefill(drafts.text(7))
    cycles = list(decode(sequence))[1:]
    assert len(compared) >= len(cycles) // 2 and sum(compared) >= 10
    assert sequence.output == tiny.continuation(drafter.target.model, drafts.text(7), 14)


def test_such_runs_accept_and_reject() -> None:
    for kind in KINDS:
        sequence = drafts.opened(made(kind), drafts.text(7), max_new_tokens=60)
        cycles = list(decode(sequence))[1:]
        lengths = {cycle.accepted for cycle in cycles}
        assert len(lengths) >= 3, f"{kind} accepts only {lengths}"
        assert sum(len(cycle.drafted) - cycle.accepted for cycle in cycles) >= 40


# Whatever happens to a sequence


def _same_as_fresh(sequence: DecodeSequence, drafter: Eagle3Drafter, may_be_nothing: bool) -> None:
    """The session drafts what a session drafts that saw the text at once."""
    if sequence.pending is not None or len(sequence.tokens) < 2:
        return
    got = drafts.proposed(sequence)
    if may_be_nothing and not len(got.tokens):
        return
    assert drafts.paths(got) == drafts.paths(drafts.proposed(drafts.at(drafter, list(sequence.tokens)))), (
        sequence.tokens
    )


def _broken_cycle(sequence: DecodeSequence, where: str) -> None:
    """One cycle that fails after drafting, verifying or observing."""
    owner, method = {
        "draft": (sequence.draft, "propose"),
        "verify": (sequence.target, "verify"),
        "observe": (sequence.draft, "observe"),
    }[where]
    call = getattr(owner, method)

    def failing(*args: object) -> None:
        call(*args)
        raise histories.Broken

    setattr(owner, method, failing)
    try:
        next(decode(sequence), None)
    except histories.Broken:
        pass
    finally:
        delattr(owner, method)


HISTORIES = settings(deadline=None, max_examples=40, database=None, derandomize="CI" in os.environ,
                     suppress_health_check=list(HealthCheck))  # fmt: skip
operations = st.one_of(
    st.tuples(st.just("decode"), st.integers(1, 4)),
    st.tuples(st.just("fail"), st.sampled_from(["draft", "verify", "observe"])),
    st.tuples(st.just("rewind"), st.integers(0, 9)),
    st.tuples(st.just("prefill"), st.integers(1, 9)),
    st.tuples(st.just("fork"), st.integers(1, 9)),
    st.tuples(st.just("propose"), st.integers(1, 3)),
    st.tuples(st.just("plain"), st.just(1)),
)


@HISTORIES
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 8), st.lists(operations, min_size=1, max_size=8))
def test_any_history(kind: str, length: int, history: list[tuple[str, Any]]) -> None:
    """Cycles, failures, rewinds, turns, forks, drafts that are thrown away, cycles without drafts."""
    drafter = made(kind)
    sequence = drafts.opened(drafter, drafts.text(length), max_new_tokens=30)
    behind = False  # the row to draft from went with a rewind; the next cycle brings it back
    for what, how in [*history, ("decode", 2)]:
        if what == "decode":
            before = len(sequence.tokens)
            for _, cycle in zip(range(how), decode(sequence), strict=False):
                behind &= not cycle.committed
            behind &= len(sequence.tokens) == before
        elif what == "fail":
            _broken_cycle(sequence, how)
            behind = True  # where it failed in observe
        elif what == "rewind":
            sequence.rewind(max(1, len(sequence.tokens) - how))
            behind = True
        elif what == "prefill" and sequence.pending is None:
            sequence.prefill(drafts.text(how, seed=9))
            behind = False
        elif what == "fork":
            sequence = sequence.fork(how)
        elif what == "propose" and sequence.pending is None:
            drafts.proposed(sequence, Budget(how, 60))
        elif what == "plain":  # a cycle that may draft nothing
            sequence.length.steps, steps = 0, sequence.length.steps
            next(decode(sequence), None)
            sequence.length.steps = steps
        _same_as_fresh(sequence, drafter, behind)


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_forks_do_not_share_rows(kind: str) -> None:
    drafter = made(kind)
    sequence = drafts.opened(drafter, drafts.text(6), max_new_tokens=30)
    for _ in zip(range(3), decode(sequence), strict=False):
        pass
    other = sequence.fork(1)
    other.rewind(3)
    other.prefill(drafts.text(9, seed=4))
    for _ in zip(range(3), decode(other), strict=False):
        pass
    assert other.tokens[:8] != sequence.tokens[:8]
    for each in (sequence, other):
        _same_as_fresh(each, drafter, may_be_nothing=False)


@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_a_prefill_that_fails_while_rows_are_written(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were not written do not count as written."""
    drafter = made(kind)
    sequence = drafts.opened(drafter, drafts.text(9), max_new_tokens=3)
    list(decode(sequence))
    before, write = list(sequence.tokens), drafter.model.write

    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drafter.model, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        sequence.prefill(drafts.text(20, seed=2))
    monkeypatch.setattr(drafter.model, "write", write)
    assert sequence.tokens == before
    sequence.prefill(drafts.text(9, seed=3))
    next(decode(sequence))
    _same_as_fresh(sequence, drafter, may_be_nothing=False)


@pytest.mark.parametrize("name", ["eagle3-0", "eagle3-1", "eagle3-2"])
def test_exceptions_in_observe(name: str) -> None:
    histories.check_exceptions("gemma3", MAKERS[name], ("observe",))


# Limits


@pytest.mark.parametrize("kind", KINDS)
def test_budgets(kind: str) -> None:
    drafter = made(kind)
    sequence = drafts.at(drafter, drafts.text(6))
    whole = drafts.paths(drafts.proposed(sequence))
    for depth in (0, 1, 2, 4):
        found = drafts.paths(drafts.proposed(sequence, Budget(depth, 60)))
        assert max(map(len, found), default=0) == min(depth, 4)
        if not drafter.config.tree:
            assert found == whole[:depth]
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
    drafter, prompt = made(kind, context=24), drafts.text(13)
    sequence = drafts.opened(drafter, prompt, max_new_tokens=99)
    for cycle in decode(sequence):
        left = 24 - len(sequence.tokens)
        if left < 4 and cycle.index:
            found = drafts.paths(drafts.proposed(sequence, Budget(9, 60)))
            assert max(map(len, found), default=0) == left
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


# What a tree is worth, and where there is none


def test_a_tree_accepts_no_less_than_a_chain() -> None:
    """With a drafter that has half learned a text, and with one that knows it."""
    target = tiny.target("llama")
    prompt = tiny.prompt(8)
    text = [*prompt, *tiny.reference("llama", prompt, 40)]
    document = reference.Document(text, [i >= 8 for i in range(len(text))])
    objective = reference.objective(target, spread=0.0, ttt_length=4)
    taus = []
    for lessons in (20, 60):
        reference.taught(objective, [[document]], lessons, lr=1e-2)
        pair = {}
        for tree in (False, True):
            config = Eagle3Config(steps=4, tree=tree, top_k=4, nodes=16)
            drafter = Eagle3Drafter(target, objective.drafter.model, config)
            sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=40), stop=StopRule())
            sequence.prefill(prompt)
            cycles = list(decode(sequence))[1:]
            assert sequence.output == text[8:48]
            pair[tree] = 39 / len(cycles)
        taus.append(pair)
    half, whole = taus
    assert 1.2 < half[False] < half[True] < 3 < whole[False] <= whole[True], taus


def test_trees_are_refused_where_the_family_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that see all rows before them are right for chains only."""
    target = Target(tiny.model("llama"))
    row_causal = lambda parents: torch.ones(len(parents), len(parents)).bool().tril()  # noqa: E731
    monkeypatch.setattr("understudy.target.session.ancestors", row_causal)

    def sequence(drafter: Drafter) -> DecodeSequence:
        return DecodeSequence(target, drafter, stop=StopRule())

    with pytest.raises(UserError, match="^LlamaForCausalLM is not supported: a tree of drafts") as error:
        sequence(drafts.drafter(target, tree=True))
    assert "\n" not in str(error.value)
    sequence(drafts.drafter(target))
