"""Measured acceptance: known drafters give known figures, prompts and modes stay as they were; perplexity and plain time."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

import tiny
from contract.scripted import RandomDrafter, Scripted, chain
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.decoding import acceptance
from understudy.decoding.acceptance import measure_acceptance, perplexity, plain_ms_per_token
from understudy.drafting.spec import build
from understudy.target.target import Target
from understudy.telemetry.repeats import repeat_share

PROMPT = tiny.prompt(10)
NEW = 41  # the prefill's token and 40 more: 10 cycles of 4


def truth(family: str = "llama", prompt=PROMPT) -> list[int]:
    return [*prompt, *tiny.reference(family, prompt, NEW + 20)]


def scripted(pattern, tree: bool = False, family: str = "llama") -> Scripted:
    return Scripted(truth(family), pattern, tree=tree, vocab=tiny.V)


def test_no_drafts():
    target = tiny.target("llama")
    result = measure_acceptance(target, build("none", target), [PROMPT], NEW)
    assert result.tau == 1 and result.acceptance_rate == 0 and result.tokens == NEW and result.stats.cycles == NEW - 1
    assert result.outputs == [tiny.reference("llama", PROMPT, NEW)]
    assert result.joint == result.marginal == result.conditional == []
    assert 0 < result.stats.decode_s < result.seconds


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3-vl"])
def test_always_right(family):
    result = measure_acceptance(tiny.target(family), scripted([chain(3)], family=family), [PROMPT], NEW)
    assert result.tau == 4 and result.acceptance_rate == 1 and result.stats.cycles == 10
    assert result.joint == result.marginal == result.conditional == [1, 1, 1]
    assert result.outputs == [tiny.reference(family, PROMPT, NEW)]


def test_three_accuracies_of_a_known_pattern():
    """One draft, wrong; then two right and one wrong: every number by hand."""
    result = measure_acceptance(tiny.target("llama"), scripted([chain(0, 1), chain(2, 1)]), [PROMPT], NEW)
    assert result.stats.cycles == 20 and result.tau == 2  # 1 token, 3 tokens, ten times
    assert result.joint == [0.5, 0.5]
    assert result.marginal == [0.5, 1, 0]  # positions 2 and 3 exist in every other cycle only
    assert result.conditional == [0.5, 1, 0]
    assert result.acceptance_rate == 20 / 39  # the last cycle has no room for a third draft
    assert sum(result.joint) + 1 == result.tau


class Watch:
    needs = Needs(last=True)

    def __init__(self) -> None:
        self.rounds: list[tuple[list[int], list[int], int]] = []  # drafts, choices, accepted

    def on_cycle(self, cycle) -> None:
        assert cycle.rows.last is not None
        if cycle.index:
            self.rounds.append((cycle.drafted, cycle.choices, cycle.accepted))


def test_marginal_is_not_conditional():
    """A target that says the same after every prefix, so drafts are right after wrong ones too; against the cycles one by one."""
    target = Target(tiny.fresh_model("llama"))
    target.model.generation_config.sequence_bias = {(7,): 100.0}
    rng = random.Random(0)
    pattern = [[(0, rng.choice(["right", "wrong"])) for _ in range(rng.randint(1, 3))] for _ in range(17)]
    watch, drafter = Watch(), Scripted([7] * 99, pattern, tree=False, vocab=tiny.V)
    result = measure_acceptance(target, drafter, [PROMPT] * 2, NEW, listeners=[watch])
    assert result.tokens == 2 * NEW and len(watch.rounds) == result.stats.cycles
    for k in range(3):
        those = [r for r in watch.rounds if len(r[0]) > k]
        assert result.marginal[k] == sum(drafts[k] == choices[k] for drafts, choices, _ in those) / len(those)
        reached = [r for r in those if r[2] >= k]
        assert result.conditional[k] == sum(drafts[k] == choices[k] for drafts, choices, _ in reached) / len(reached)
        accepted = sum(r[2] > k for r in watch.rounds)
        assert (result.joint[k] if k < len(result.joint) else 0) == accepted / len(watch.rounds)
    assert result.marginal != result.conditional
    figures = result.figures()
    assert figures["marginal_2"] == result.marginal[1] and figures["conditional_1"] == result.conditional[0]
    assert figures["tau"] == result.tau and all(isinstance(value, float) for value in figures.values())


def test_trees_have_the_joint_accuracy_only():
    drafter = scripted([[(0, "wrong"), (9, "right"), (0, "right")]], tree=True)
    result = measure_acceptance(tiny.target("llama"), drafter, [PROMPT], NEW)
    assert result.outputs == [tiny.reference("llama", PROMPT, NEW)]
    assert (
        result.stats.cycles == 14 and result.joint == [13 / 14] * 2
    )  # 13 times 3 tokens, and one without room for drafts
    assert result.marginal == result.conditional == []


def test_repeat_share_and_stops():
    want = tiny.reference("llama", PROMPT, NEW)
    stop = next(token for i, token in enumerate(want) if i > 5 and token not in want[:i])
    target = Target(tiny.fresh_model("llama"))
    target.model.generation_config.eos_token_id = stop
    result = measure_acceptance(target, scripted([chain(3)]), [PROMPT], NEW)
    assert result.outputs == [want[: want.index(stop) + 1]]

    assert result.repeat_share == repeat_share(result.outputs[0]) == 0

    target.model.generation_config.sequence_bias = {(7,): 100.0}
    result = measure_acceptance(target, scripted([chain(3)]), [PROMPT, PROMPT[:5]], NEW)
    assert result.outputs == [[7] * NEW] * 2 and result.repeat_share == 1 - 1 / (NEW - 3)


def test_temperature_is_that_of_the_law():
    target, drafter = tiny.target("llama"), scripted([chain(3)])
    greedy = measure_acceptance(target, drafter, [PROMPT], NEW)
    drawn = [measure_acceptance(target, drafter, [PROMPT], NEW, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].outputs == drawn[1].outputs != drawn[2].outputs
    assert drawn[0].outputs != greedy.outputs and drawn[0].tau < greedy.tau


def test_the_models_own_generation_config_counts():
    target = Target(tiny.fresh_model("llama"))
    target.model.generation_config.suppress_tokens = tiny.reference("llama", PROMPT, 1)
    result = measure_acceptance(target, build("none", target), [PROMPT], 8)
    assert result.outputs[0][0] != tiny.reference("llama", PROMPT, 1)[0]


def test_nothing_is_left_changed():
    target, drafter = Target(tiny.fresh_model("llama")), RandomDrafter(tiny.V, tree=False)
    drafter.parts = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    drafter.train()
    drafter.parts[1].eval()
    target.model.get_decoder().layers[1].train()
    weights = {name: value.clone() for name, value in target.model.state_dict().items()}
    seen = []

    class Look:
        needs = Needs()

        def on_cycle(self, cycle) -> None:
            seen.append(drafter.training or target.model.get_decoder().layers[1].training)

    before = torch.random.get_rng_state()
    measure_acceptance(target, drafter, [PROMPT], 8, listeners=[Look()])
    assert seen and not any(seen)
    assert drafter.training and drafter.parts[0].training and not drafter.parts[1].training
    assert target.model.get_decoder().layers[1].training and not target.model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in target.model.state_dict().items())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
@pytest.mark.parametrize("chunk", [4, 256])
def test_perplexity(family, chunk, monkeypatch):
    """Against the model's own logits of each whole text; soft-caps, scales and windows count, and chunks do not."""
    monkeypatch.setattr(acceptance, "CHUNK", chunk)
    texts = [tiny.prompt(21), tiny.prompt(9, 1), tiny.prompt(1, 2)]
    total = 0.0
    for text in texts[:2]:
        logits = tiny.logits(tiny.model(family), text)[:-1].double()
        total -= logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None]).sum().item()
    assert perplexity(tiny.target(family), texts) == pytest.approx(math.exp(total / 28), rel=1e-4)


def test_perplexity_holds_few_logits(monkeypatch):
    monkeypatch.setattr(acceptance, "CHUNK", 8)
    target, shapes = Target(tiny.fresh_model("llama")), []
    target.model.get_output_embeddings().register_forward_hook(lambda *x: shapes.append(x[2].shape[-2]))
    perplexity(target, [tiny.prompt(60)])
    assert sum(shapes) == 59 and max(shapes) == 8


def test_plain_time(monkeypatch):
    """A clock that counts its readings: the time of the cycles, per token after the first, stop tokens or not."""
    target = Target(tiny.fresh_model("llama"))
    target.model.generation_config.eos_token_id = tiny.reference("llama", PROMPT, 3)[-1]
    passes = []
    target.model.get_output_embeddings().register_forward_hook(lambda *_: passes.append(1))
    tick = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(tick) * 1e-3)
    got = plain_ms_per_token(target, [PROMPT, PROMPT[:6]], 12)
    assert len(passes) == 8 + 12 + 12
    assert got == pytest.approx(5)  # draft, verify, sample, cache, other


def test_mistakes():
    target = tiny.target("llama")
    with pytest.raises(UserError, match="there is no prompt"):
        measure_acceptance(target, build("none", target), [])
    with pytest.raises(UserError, match="the prompt is empty"):
        measure_acceptance(target, build("none", target), [[]])
    with pytest.raises(UserError, match="the model's context is 512"):
        plain_ms_per_token(target, [[5] * 600])
    with pytest.raises(UserError, match="at least 2 new tokens"):
        plain_ms_per_token(target, [PROMPT], 1)
    with pytest.raises(UserError, match="a text has 600 tokens, the model's context is 512"):
        perplexity(target, [[5] * 600])
    with pytest.raises(UserError, match="a text of at least two tokens"):
        perplexity(target, [[5]])
