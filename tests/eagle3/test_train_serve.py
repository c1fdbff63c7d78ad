"""What the objective says of a text is what decoding does when it writes that text, draft by draft and cycle by cycle."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from eagle3 import reference
from eagle3.serving import NEW, agree, met, text_of
from understudy.training.replay import Decoding

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fc norm": {"fc_norm": True},
    "norm before fc": {"norm_before_fc": True, "draft_vocab_size": tiny.V // 2},
    "norm output": {"norm_output": True},
    "norm before residual": {"norm_before_residual": True},
    "EAGLE-3.1 over a part of the vocabulary": {"fc_norm": True, "norm_output": True, "draft_vocab_size": tiny.V // 2},
}


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_drafts_are_the_unrolled_steps(case, learned):
    """Drafters that know the text half, so that cycles accept nothing, a few drafts and all of them."""
    prompt = tiny.prompt(12, 3)
    objective = reference.objective(tiny.target("llama"), ttt_length=4, spread=0.05 if learned else 0.25, **CASES[case])
    if learned:
        reference.taught(objective, text_of("llama", prompt))
    accepted = agree(objective, prompt)
    assert not learned or (len(set(accepted)) > 2 and max(accepted) == 4), accepted


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
            text, found = met(objective.drafter, prompt)
            assert found[0][0] == len(prompt) + 1 and sum(a + 1 for *_, a in found) == NEW - 1
            cycles += found
        figures = Decoding(objective, objective.drafter.target, prompts, NEW)()
        assert figures["tau"] == pytest.approx(len(prompts) * (NEW - 1) / len(cycles))
        assert figures["tau_replayed"] == pytest.approx(figures["tau"])
        taus.append(figures["tau"])
    assert 1 < taus[0] < taus[1] <= taus[2]
