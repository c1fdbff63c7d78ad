"""What a sequence goes through: stops and limits anywhere in a block, chunks, turns, cancels, exceptions, rewinds, forks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import pytest
import torch

import tiny
from contract import checks, histories, runs
from contract.runs import MAKERS
from contract.scripted import chain
from understudy.core.errors import UserError
from understudy.core.records import Budget, Cycle, Needs, Proposal, Rows
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafting.protocols import Drafter, DraftSampler, View
from understudy.drafting.stateless import StatelessSession
from understudy.target.target import Target

FEW = ("ragged-resumed", "ragged-tree", "small-model-0")
# every drafter where windows are crossed, and a few where embeddings are scaled, scores capped, positions three-fold
FEW_PAIRS = [(family, name) for family in ("granite", "qwen3-vl", "gemma2") for name in FEW]
PAIRS = [("gemma3", name) for name in MAKERS] + FEW_PAIRS


def on_pairs(function: object) -> object:
    return pytest.mark.parametrize(("family", "name"), PAIRS, ids=lambda value: value)(function)  # type: ignore[call-overload]


@on_pairs
def test_stop_token_inside_a_block(family: str, name: str) -> None:
    checks.check_stop_token(family, MAKERS[name])


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_stop_token_at_every_place_of_a_block(tree: bool) -> None:
    """First draft, in the middle, the last draft, the token that the target adds."""
    pattern = [[(0, "wrong"), (9, "right"), (0, "right"), (0, "right")]] if tree else [chain(3)]
    maker = runs.scripted("three right", pattern, tree=tree)
    assert set(checks.check_stop_token("granite", maker, limit=9)) == {0, 1, 2, 3}


@on_pairs
def test_stop_string_across_tokens(family: str, name: str) -> None:
    checks.check_stop_string(family, MAKERS[name])


@on_pairs
def test_max_new_tokens_is_exact(family: str, name: str) -> None:
    checks.check_max_new_tokens(family, MAKERS[name])


@on_pairs
def test_prefill_chunks(family: str, name: str) -> None:
    checks.check_prefill(family, MAKERS[name])


@on_pairs
def test_turns(family: str, name: str) -> None:
    histories.check_turns(family, MAKERS[name])


@on_pairs
def test_cancel(family: str, name: str) -> None:
    histories.check_cancel(family, MAKERS[name])


# Faults of the engine that are known; once mended, these run on PAIRS
@pytest.mark.parametrize("name", FEW)
def test_cancel_then_stop(name: str) -> None:
    histories.check_cancel_then_stop("gemma3", MAKERS[name])


@on_pairs
def test_exceptions(family: str, name: str) -> None:
    histories.check_exceptions(family, MAKERS[name])


@pytest.mark.parametrize("name", ["small-model-0", "small-model-1"])
def test_exceptions_in_observe(name: str) -> None:
    histories.check_exceptions("gemma3", MAKERS[name], ("observe",))


@pytest.mark.parametrize("name", FEW)
def test_rewind_before_decoding(name: str) -> None:
    histories.check_rewind_before_decoding("gemma3", MAKERS[name])


@pytest.mark.parametrize("name", FEW)
def test_penalties_forget_what_was_rewound(name: str) -> None:
    histories.check_rewind_penalties("gemma3", MAKERS[name])


@on_pairs
def test_rewind(family: str, name: str) -> None:
    histories.check_rewind(family, MAKERS[name])


@on_pairs
def test_fork(family: str, name: str) -> None:
    histories.check_fork(family, MAKERS[name])


@on_pairs
def test_penalties_see_the_drafts(family: str, name: str) -> None:
    checks.check_penalties(family, MAKERS[name])


# Requests and drafters at their limits


@pytest.mark.parametrize("name", ["ragged", "ragged-tree", "ragged-resumed", "small-model-0", "prompt-lookup-0"])
def test_the_context_ends_the_output(name: str) -> None:
    """The last position of the context may be filled, and no further; drafts stop short of it."""
    model = tiny.fresh_model("llama", max_position_embeddings=40)
    target = Target(model)
    prompt = tiny.prompt()
    want = tiny.reference("llama", prompt, 40)
    drafter = MAKERS[name].make(target, [*prompt, *want])
    sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=99), stop=StopRule())
    sequence.prefill(prompt)
    list(decode(sequence))
    assert sequence.output == want[:20] and sequence.finished == "length"
    for wrong in ([], [5]):
        with pytest.raises(UserError, match=r"the prompt is empty|the model's context is 40"):
            sequence.prefill(wrong)
    assert sequence.tokens == [*prompt, *want[:20]]


def test_prefill_twice() -> None:
    run = runs.open_run("llama", MAKERS["right"], tiny.prompt())
    with pytest.raises(UserError, match="waits to be decoded"):
        run.sequence.prefill([5, 6])


class _Greedy(StatelessSession):
    """Proposes ten right tokens, whatever the budget."""

    truth: list[int]

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        at = len(self.view.tokens)
        return Proposal(torch.tensor(self.truth[at : at + 10]))


class _GreedyDrafter(Drafter):
    steps = 3

    def __init__(self, truth: list[int]) -> None:
        super().__init__()
        self.truth = truth

    def session(self, view: View) -> _Greedy:
        session = _Greedy(view)
        session.truth = self.truth
        return session


def test_a_drafter_that_ignores_its_budget() -> None:
    """The output is as long as asked for, whether the engine cuts the surplus or refuses it."""
    prompt = tiny.prompt()
    maker = runs.Maker("boundless", lambda target, truth: _GreedyDrafter(truth))
    run = runs.open_run("llama", maker, prompt, max_new_tokens=7)
    with suppress(AssertionError):
        runs.finish(run)
    runs.same(run.output, tiny.reference("llama", prompt, 32)[: len(run.output)], "beyond the budget")
    assert len(run.output) <= 7


def test_an_interrupted_prefill_can_be_repeated() -> None:
    prompt = tiny.prompt()
    run = runs.decoded("llama", MAKERS["small-model-0"], prompt, max_new_tokens=8)
    before = list(run.sequence.tokens)
    passes = iter([False, True])  # the second chunk fails
    prefill = run.sequence.target.prefill

    def failing(tokens: list[int], want_logits: bool) -> Rows:
        if next(passes):
            raise KeyboardInterrupt
        return prefill(tokens, want_logits)

    run.sequence.target.prefill = failing  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        run.sequence.prefill(tiny.prompt(18, seed=2))
    run.sequence.target.prefill = prefill  # type: ignore[method-assign]
    assert run.sequence.tokens == before
    turn = tiny.prompt(9, seed=3)
    run.sequence.prefill(turn)
    assert runs.finish(run).output == tiny.reference("llama", [*before, *turn], 8)


def _tidy(ids: Sequence[int]) -> str:
    """Decodes as tokenizers do that clean up spaces: what a token says depends on the one after it."""
    return "".join(f"{i} " if i % 2 else f"{i}" for i in ids).replace(" 9", "9")


def test_stop_strings_that_later_tokens_hide() -> None:
    """Without drafts the text is looked at after each token: drafts must not make it end elsewhere."""
    prompt = tiny.prompt()
    whole = tiny.reference("llama", prompt, 32)
    hidden = next(
        i for i in range(8, 31) if _tidy(whole[: i + 1]) != _tidy(whole[: i + 2])[: len(_tidy(whole[: i + 1]))]
    )
    stop = StopRule(strings=(_tidy(whole[hidden - 2 : hidden + 1]),), decode=_tidy)
    outputs = [
        runs.decoded("llama", MAKERS[name], prompt, stop=stop).output for name in ("none-0", "right", "ragged-tree")
    ]
    assert outputs[0] == outputs[1] == outputs[2] == whole[: hidden + 1]


# Listeners


def test_listeners_see_every_cycle_and_what_they_asked_for() -> None:
    seen: list[tuple[int, list[int], bool, int | None]] = []

    def look(cycle: Cycle) -> None:
        rows = cycle.rows
        assert rows.exit is not None and set(rows.taps) == {0, 4} and rows.last is None
        assert rows.exit.shape == rows.taps[4].shape == (rows.width, 32)
        assert rows.logits is not None and rows.logits.shape == (rows.width, tiny.V)
        if cycle.index:  # greedy: the choices are the argmax of the raw logits
            assert rows.logits.argmax(-1).tolist() == cycle.choices
        seen.append((cycle.index, cycle.committed, cycle.stopped, rows.logits.shape[0]))

    needs = Needs(taps=frozenset({0, 4}), exit=2, logits=True)
    listeners = [runs.Listener(look, needs), runs.Listener(lambda cycle: None)]
    run = runs.decoded("gemma2", MAKERS["ragged"], tiny.prompt(), listeners=listeners)
    assert [entry[:3] for entry in seen] == [(c.index, c.committed, c.stopped) for c in run.cycles]
    assert [token for entry in seen for token in entry[1]] == run.output


def test_nothing_is_kept_that_nobody_asked_for() -> None:
    run = runs.decoded("gemma2", MAKERS["ragged"], tiny.prompt(), max_new_tokens=8)
    for cycle in run.cycles:
        rows = cycle.rows
        assert rows.taps == {} and rows.exit is None and rows.last is None
        assert rows.logits is not None and rows.logits.shape[0] == (rows.width if cycle.index else 1)


def test_one_sequence_has_one_exit_layer() -> None:
    listener = runs.Listener(lambda cycle: None, Needs(exit=3))
    with pytest.raises(AssertionError, match="one exit layer"):
        runs.open_run("llama", MAKERS["ragged-resumed"], tiny.prompt(), listeners=[listener])
