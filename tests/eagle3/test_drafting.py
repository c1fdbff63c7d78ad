"""Drafting with EAGLE-3 through the engine: chains and trees, whatever happens to a sequence."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from contract import histories
from contract.runs import MAKERS
from contract.scripted import Wrapped
from eagle3 import drafts, reference
from eagle3.drafts import KINDS, V, made
from understudy.core.errors import UserError
from understudy.core.records import Budget, Proposal
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafters.eagle3.config import Eagle3Config
from understudy.drafters.eagle3.drafter import Eagle3Drafter
from understudy.drafters.eagle3.layout import FLAGS
from understudy.drafting.protocols import Drafter
from understudy.target.target import Target

CLEAR = 1e-4  # below this, float32 may choose otherwise
OTHERS = ("gemma3", "cohere2", "granite", "qwen3-vl")
CASES = [("llama", kind) for kind in KINDS] + [(family, kind) for family in OTHERS for kind in ("reduced", "tree")]


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


@pytest.mark.parametrize("flag", [None, *FLAGS])
@pytest.mark.parametrize("size", [4, V])
def test_chains_of_wild_drafters_are_the_slow_ones(size: int, flag: str | None) -> None:
    """Each draft is recomputed from the text and the drafts before it alone; random weights show every slip."""
    compared = 0
    for seed in range(12):
        options = {"draft_vocab_size": size, **({flag: True} if flag else {})}
        drafter, text = drafts.drafter(seed=seed, **options), drafts.text(3 + seed % 5, seed)
        slow = drafts.Slow(drafter, text)
        want = slow.chain(4)
        if slow.gap > CLEAR:
            assert drafts.proposed(drafts.at(drafter, text)).tokens.tolist() == want
            compared += 1
    assert compared >= 10


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


# What a tree is worth, and where there is none


def test_a_tree_accepts_no_less_than_a_chain() -> None:
    """With a drafter that has half learned a text, and with one that knows it.

    The target is sure of what it says. Where it is not, the tree that is likeliest to hold a draw is broad, and greedy text leaves it.
    """
    model = tiny.fresh_model("llama")
    model.get_output_embeddings().weight.mul_(6)  # type: ignore[operator]
    target, prompt = Target(model), tiny.prompt(8)
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
    assert 1.2 < half[False] < half[True] and half[True] < whole[False] <= whole[True], taus


def test_trees_are_refused_where_the_family_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that see all rows before them are right for chains only."""
    target = Target(tiny.model("llama"))
    row_causal = lambda parents: torch.ones(len(parents), len(parents)).bool().tril()  # noqa: E731
    monkeypatch.setattr("understudy.target.session.ancestors", row_causal)

    def sequence(drafter: Drafter) -> DecodeSequence:
        return DecodeSequence(target, drafter, stop=StopRule())

    with pytest.raises(UserError, match=r"^LlamaForCausalLM is not supported: a tree of drafts") as error:
        sequence(drafts.drafter(target, tree=True))
    assert "\n" not in str(error.value)
    sequence(drafts.drafter(target))
