"""EAGLE-3's options of drafting: one that nothing would read is refused, and a chain ends at the threshold."""

from __future__ import annotations

import pytest

import tiny
from contract.laws import PLAIN, check_law
from contract.scripted import Wrapped
from eagle3 import drafts
from eagle3.drafts import made
from understudy.bench.lineup import line_up
from understudy.cli.bench import BenchOptions
from understudy.cli.common import draft_defaults
from understudy.core.errors import UserError
from understudy.core.records import Proposal
from understudy.decoding.engine import decode
from understudy.drafters.eagle3.config import Eagle3Config
from understudy.drafters.eagle3.drafter import Eagle3Drafter
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import configured, parse
from understudy.target.target import Target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eagle3,top_k=4", "drafter eagle3: top_k shapes trees: give tree=true with it"),
        ("eagle3,num-nodes=4,tree=false", "drafter eagle3: num_nodes shapes trees"),
        ("eagle3,tree=true,threshold=0.9", "drafter eagle3: threshold belongs to chains"),
    ],
)
def test_what_nothing_would_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as error:
        configured(text)
    assert "\n" not in str(error.value)


def test_a_threshold_beside_the_drafters_is_for_those_that_read_it() -> None:
    """A tree next to a chain does not mind it; trees alone would ignore it."""
    config = BenchOptions(threshold=0.9)
    assert draft_defaults(config, ["eagle3,tree=true", "eagle3"]) == {"threshold": 0.9}
    assert configured("eagle3,tree=true,top_k=4", threshold=0.9)[2].tree  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"^--threshold is given, but no drafter here has it: eagle3,tree=true$"):
        draft_defaults(config, ["eagle3,tree=true"])


def test_a_preset_with_another_model_asks_for_drafters() -> None:
    """The preset's own are the built-in model's; those that somebody gave are just refused."""
    hint = r"with another one, give --drafter\)$"
    with pytest.raises(UserError, match=rf"^drafter eagle3 has no weights for llama: .*--preset pocket .*{hint}"):
        line_up(BenchOptions(preset="pocket", exit_layer=1), tiny.target("llama"), exit_layer=1)
    with pytest.raises(UserError, match=r"^drafter eagle3 has no weights for llama") as error:
        line_up(BenchOptions(preset="pocket", drafter=["eagle3"]), tiny.target("llama"))
    assert "--preset" not in str(error.value)
    modes = line_up(BenchOptions(preset="pocket", drafter=["prompt-lookup"], baselines=["null"]), tiny.target("llama"))
    assert [mode.name for mode in modes] == ["none", "null", "prompt-lookup"]


# The threshold of a chain


def until(drafter: Eagle3Drafter, threshold: float) -> Eagle3Drafter:
    return Eagle3Drafter(drafter.target, drafter.model, Eagle3Config(steps=drafter.steps, threshold=threshold))


def beliefs(drafter: Eagle3Drafter, text: list[int], drafted: list[int]) -> list[float]:
    """The probability of each draft of a chain, slowly."""
    slow = drafts.Slow(drafter, text)
    return [float(slow.logits(tuple(drafted[:i])).softmax(0).max()) for i in range(len(drafted))]


@pytest.mark.parametrize("kind", ["chain", "reduced"])
def test_drafting_stops_after_the_draft_that_is_unsure_and_verifies_it(kind: str) -> None:
    drafter, threshold = until(made(kind), 0.7), 0.7
    sequence = drafts.opened(drafter, drafts.text(7))
    lengths, accepted = set(), 0
    before, depth = list(sequence.tokens), 0
    for cycle in decode(sequence):
        if cycle.index and depth:
            sure = [p >= threshold for p in beliefs(drafter, before, list(cycle.drafted))]
            assert all(sure[:-1]) and (not sure[-1] or len(sure) == depth), f"after {before}"
            lengths.add(len(sure))
            accepted += not sure[-1] and cycle.accepted == len(sure)
        before, depth = list(sequence.tokens), sequence.budget().depth
    assert len(lengths) >= 3 and accepted >= 2
    assert sequence.output == tiny.continuation(drafter.target.model, drafts.text(7), 24)


def test_at_0_it_never_stops_and_at_1_always() -> None:
    drafter, text = made("chain"), drafts.text(6)
    assert len(drafts.proposed(drafts.at(until(drafter, 0.0), text)).tokens) == 4
    assert min(beliefs(drafter, text, drafts.Slow(drafter, text).chain(4))) < 0.999
    assert len(drafts.proposed(drafts.at(until(drafter, 1.0), text)).tokens) == 1


def test_the_law_of_drawn_drafts_with_a_threshold() -> None:
    """A draft that ends a chain was drawn and is verified like any other: the output law stays exact."""
    lengths: list[int] = []

    def make(target: Target) -> Drafter:
        drafter = drafts.drafter(target, seed=2, spread=0.3, taps=[0, 1], draft_vocab_size=4)
        return Wrapped(until(drafter, 0.5), on_propose=seen)

    def seen(proposal: Proposal) -> None:
        lengths.append(len(proposal.tokens))

    drafted, accepted = check_law(make, PLAIN, 400, "sample")
    assert accepted >= 60 and drafted - accepted >= 60
    assert set(lengths) == {1, 2}, "of 3 and 2 that the budget allows"


def test_a_colon_names_a_path():
    """`eagle3:$RUN` with an unset variable must not measure another drafter."""
    with pytest.raises(UserError, match="has no path behind its colon"):
        parse("eagle3:,tree=true")


@pytest.mark.parametrize("option", ["nodes=1025", "top_k=257"])
def test_a_tree_has_bounds(option):
    with pytest.raises(UserError, match=f"{option.partition('=')[0]}.*at most"):
        configured(f"eagle3,tree=true,{option}")
