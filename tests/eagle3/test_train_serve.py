"""What the objective says of a text is what decoding does when it writes that text, draft by draft and cycle by cycle."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import tiny
from eagle3 import reference
from eagle3.serving import NEW, PROMPT, agree, learned, met, planted, text_of
from understudy.drafters.eagle3.objective import Eagle3Objective
from understudy.training.replay import Decoding

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fc norm": {"fc_norm": True},
    "norm before fc": {"norm_before_fc": True, "draft_vocab_size": tiny.V // 2},
    "norm output": {"norm_output": True},
    "norm before residual": {"norm_before_residual": True},
    "EAGLE-3.1 over a part of the vocabulary": {"fc_norm": True, "norm_output": True, "draft_vocab_size": tiny.V // 2},
}


@pytest.mark.parametrize("knows", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_drafts_are_the_unrolled_steps(case, knows):
    """Drafters that know the text half, so that cycles accept nothing, a few drafts and all of them."""
    prompt = tiny.prompt(12, 3)
    objective = reference.objective(tiny.target("llama"), ttt_length=4, spread=0.05 if knows else 0.25, **CASES[case])
    if knows:
        reference.taught(objective, text_of("llama", prompt))
    accepted = agree(objective, prompt)
    assert not knows or (len(set(accepted)) > 2 and max(accepted) == 4), accepted


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "granite", "cohere2"])
def test_other_families(family):
    """Among them embeddings that are scaled on entry (tap 0 has them scaled, the drafter's own input not), and windows."""
    prompt = tiny.prompt(12, 3)
    objective = reference.objective(tiny.target(family), ttt_length=4, spread=0.05)
    accepted = agree(reference.taught(objective, text_of(family, prompt)), prompt, chunk=5)
    assert len(set(accepted)) > 1, accepted


def test_tau_is_what_the_walk_says():
    """Also with fewer drafts than steps were trained, with more, and over several prompts."""
    prompts = [tiny.prompt(12, 3), tiny.prompt(9, 4)]
    objective = reference.objective(tiny.target("llama"), ttt_length=3, spread=0.05)
    reference.taught(objective, [row for p in prompts for row in text_of("llama", p)])
    taus = []
    for steps in (1, 3, 5):
        objective.drafter.steps = steps
        cycles = []
        for prompt in prompts:
            _, found = met(objective.drafter, prompt)
            assert found[0][0] == len(prompt) + 1 and sum(a + 1 for *_, a in found) == NEW - 1
            cycles += found
        figures = Decoding(objective, objective.drafter.target, prompts, NEW)()
        assert figures["tau"] == pytest.approx(len(prompts) * (NEW - 1) / len(cycles))
        assert figures["tau_replayed"] == pytest.approx(figures["tau"])
        taus.append(figures["tau"])
    assert 1 < taus[0] < taus[1] <= taus[2]


def check_figures(drafts: int = 4, steps: int = 4) -> None:
    """The simulated accept length is the mean of real cycles: decoding begins at every slot of a text once."""
    objective = learned(ttt_length=steps)
    text = text_of("llama", PROMPT)[0][0]
    real = []
    with patch.object(objective.drafter, "steps", drafts), torch.no_grad():
        figures = objective.eval()(reference.features(objective, reference.pack([[text]]))).metrics
        for n in range(len(PROMPT), len(text.tokens) - 1):
            _, cycles = met(objective.drafter, text.tokens[:n], new=drafts + 2)
            real.append(min(cycles[0][2], len(text.tokens) - n - 1))
    assert max(real) == drafts
    assert [float(x) for x in figures["tau_sim"]] == [sum(real) + len(real), len(real)]
    for k in range(drafts):
        tried = sum(a >= k for n, a in enumerate(real) if n + k < len(real))
        right = sum(a >= k + 1 for a in real)
        assert [float(x) for x in figures[f"joint_acc_{k}"]] == [right, len(real)]
        assert [float(x) for x in figures[f"cond_acc_{k}"]] == [right, tried]


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_simulated_is_measured_whatever_is_unrolled_in_training(drafts):
    """Two steps are trained: decoding drafts fewer, or more."""
    check_figures(drafts, steps=2)


def test_products_of_accuracies_are_no_accept_length():
    check_figures()

    def product(original: Any, objective: Eagle3Objective, found: Any, right: Tensor, wanted: Tensor) -> dict[str, Any]:
        figures: dict[str, Any] = original(objective, found, right, wanted)
        expected, chain = torch.ones(()), torch.ones(())
        for k in range(len(wanted)):
            total, count = figures[f"acc_{k}"]
            chain = chain * total / count
            expected = expected + chain
        return {**figures, "tau_sim": (expected * wanted[0].sum(), wanted[0].sum())}

    with planted(Eagle3Objective, "_metrics", product):
        check_figures()
