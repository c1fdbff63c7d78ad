"""Sampled output has the target's law after all processors, whatever is drafted and however it is verified."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import tiny
from contract import laws
from contract.laws import FILTERED, PLAIN, check_law
from contract.runs import MAKERS, decoded, finish, open_run, truth_of
from contract.scripted import DrawingDrafter, DrawingSession, RandomDrafter, Scripted
from understudy.core.records import Budget, Proposal
from understudy.drafting.protocols import Drafter, DraftSampler
from understudy.drafting.spec import specs
from understudy.drafting.stateless import nothing
from understudy.target.params import SamplingParams
from understudy.target.target import Target

TABLE = torch.randn(4, laws.V, generator=torch.Generator().manual_seed(3))
SHAPES = {"chain": [-1, 0], "siblings": [-1, -1, -1], "tree": [-1, -1, 0, 1]}


@pytest.mark.parametrize("params", [PLAIN, FILTERED], ids=["plain", "filtered"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_matching_any_drafts(tree: bool, params: SamplingParams) -> None:
    drafted, accepted = check_law(lambda _: RandomDrafter(laws.V, tree=tree), params, 1500)
    assert drafted > 1500 and accepted > 50


@pytest.mark.parametrize("params", [PLAIN, FILTERED], ids=["plain", "filtered"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rejection_of_drawn_drafts(shape: str, params: SamplingParams) -> None:
    parents = SHAPES[shape]
    drafted, accepted = check_law(lambda _: DrawingDrafter(TABLE[: len(parents)], parents), params, 1500, "sample")
    assert accepted > 300 and drafted - accepted > 300


@pytest.mark.parametrize("rule", ["argmax", "sample"])
@pytest.mark.parametrize("name", specs())
def test_every_drafter_keeps_the_law(name: str, rule: str) -> None:
    for i in range(len(specs()[name].tiny(laws.table_target()))):
        check_law(lambda target, i=i: specs()[name].tiny(target)[i], PLAIN, 600, rule)


def test_drawn_drafts_are_accepted_more_often() -> None:
    """The target as its own drafter: a draw from the same law is always accepted, its argmax is not."""
    accepted = {}
    for rule in ("argmax", "sample"):
        drafted, kept = check_law(lambda t: specs()["small-model"].tiny(t)[0], PLAIN, 200, rule)
        accepted[rule] = kept / drafted
    assert accepted["sample"] == 1.0 and accepted["argmax"] < 0.8


class _Dropping(DrawingSession):
    """Draws a token, and proposes it only if it likes it: that would bias rejection towards what it likes."""

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        proposal = super().propose(budget, sampler)
        return nothing() if proposal.tokens.tolist()[:1] == [0] else proposal


def test_a_drafter_may_not_drop_what_it_drew() -> None:
    liked = torch.eye(laws.V)[:1]
    with pytest.raises(AssertionError, match="propose every token that it drew"):
        check_law(lambda _: DrawingDrafter(liked, [-1], _Dropping), PLAIN, 50, "sample")
    check_law(lambda _: DrawingDrafter(liked, [-1], _Dropping), PLAIN, 1000)


class _Shaping(DrawingSession):
    """Decides by what it drew whether the second draft is the first one's sibling or child."""

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        proposal = super().propose(budget, sampler)
        if proposal.parents is not None and int(proposal.tokens[-1]) < 3:
            proposal.parents = [-1] * len(proposal.parents)
        return proposal


def test_a_tree_shaped_by_its_draws_is_matched() -> None:
    """Rejection would be biased by it, so drafters must say when their shape is fixed."""
    drafter = DrawingDrafter(TABLE[:2], [-1, 0])
    drafter.kind, drafter.nodes = _Shaping, 2
    for rule in ("argmax", "sample"):
        check_law(lambda _: drafter, PLAIN, 1000, rule)


def _tiny(tree: bool) -> tuple[Target, Drafter]:
    model = tiny.fresh_model(
        "llama", vocab_size=laws.V, num_hidden_layers=2, hidden_size=16, head_dim=4, initializer_range=0.6
    )
    return Target(model), RandomDrafter(laws.V, tree=tree, steps=2, nodes=5)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_law_of_a_real_model(tree: bool) -> None:
    target, drafter = _tiny(tree)
    check_law(lambda _: drafter, FILTERED, 500, target=target)


# Seeds


SAMPLED = SamplingParams(temperature=0.9, top_k=20, seed=5)


def test_output_is_a_function_of_the_seed() -> None:
    prompt = tiny.prompt()
    for name in ("none-0", "ragged-tree", "early-exit-0", "small-model-1"):
        for rule in ("argmax", "sample"):
            first, second = (
                decoded("qwen3", MAKERS[name], prompt, sampling=SAMPLED, draft_sampling=rule, max_new_tokens=12).output
                for _ in range(2)
            )
            assert first == second and len(first) == 12
    other = SamplingParams(temperature=0.9, top_k=20, seed=6)
    outputs = [
        tuple(decoded("qwen3", MAKERS["none-0"], prompt, sampling=params, index=index, max_new_tokens=12).output)
        for params, index in ((SAMPLED, 0), (SAMPLED, 1), (other, 0))
    ]
    assert len(set(outputs)) == 3


def test_the_first_token_does_not_depend_on_the_drafter() -> None:
    """It is drawn before anything is drafted."""
    prompt = tiny.prompt()
    first = {
        name: decoded("gemma3", maker, prompt, sampling=SAMPLED, max_new_tokens=1).output[0]
        for name, maker in MAKERS.items()
    }
    assert len(set(first.values())) == 1


@pytest.mark.parametrize("name", ["none-0", "ragged-resumed", "ragged-tree", "small-model-1", "prompt-lookup-0"])
@pytest.mark.parametrize("rule", ["argmax", "sample"])
def test_samples_from_one_prefill(name: str, rule: str) -> None:
    """Forks of one prefill equal sequences that were prefilled by themselves, with the same seed and index."""
    prompt = tiny.prompt()
    options = {"sampling": SAMPLED, "draft_sampling": rule, "max_new_tokens": 10}
    root = open_run("qwen3", MAKERS[name], prompt, **options)
    forks = [root.sequence.fork(index) for index in (1, 2, 3)]
    outputs = []
    for index, fork in zip((1, 2, 3), forks, strict=True):
        root_run = open_run("qwen3", MAKERS[name], prompt, **options, index=index)
        outputs.append(finish(root_run).output)
        root_run.sequence = fork
        assert finish(root_run).output == outputs[-1]
    assert finish(root).output == decoded("qwen3", MAKERS[name], prompt, **options).output
    assert len({tuple(output) for output in outputs}) == 3


def test_low_temperature_is_greedy() -> None:
    prompt = tiny.prompt()
    params = SamplingParams(temperature=1e-3)
    for name in ("ragged", "ragged-tree", "early-exit-0"):
        assert decoded("llama", MAKERS[name], prompt, sampling=params).output == truth_of("llama", prompt)[20:52]


def test_forbidden_tokens_never_come() -> None:
    """Not even when they are drafted at every place."""
    prompt = tiny.prompt()
    banned = tiny.reference("llama", prompt, 40)[:6]
    params = SamplingParams(temperature=1.0, suppress_tokens=tuple(banned))
    drafter = Scripted([*prompt, *banned * 10], [[(0, "right")] * 4], tree=False, vocab=tiny.V)
    seen: Counter[int] = Counter()
    for index in range(5):
        run = open_run("llama", MAKERS["none-0"], prompt, wrap=lambda _: drafter, sampling=params, index=index)
        seen.update(finish(run).output)
    assert not seen.keys() & set(banned) and len(seen) > 20
