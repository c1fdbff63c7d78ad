"""What the objective says of a text is what decoding does when it writes that text, draft by draft and cycle by cycle."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import tiny
from dflash import reference
from dflash.serving import NEW, PROMPT, agree, learned, met, planted, text_of
from understudy.drafters.dflash.objective import DFlashObjective
from understudy.training.replay import Decoding

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fewer drafts than rows": {"block_size": 8, "draft_steps": 3},
    "window": {"sliding_window": 6, "lessons": 8},
    "mixed layers": {"sliding_window": 4, "layer_types": ("sliding_attention", "full_attention"), "lessons": 10},
    "causal full layers": {"causal": True},
    "Markov": {"markov_rank": 4},
    "embeddings": {"train_embeddings": True},
    "mask row in the target": {"mask_token_id": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_drafts_are_the_trained_blocks(case):
    """Drafters that know the text half, so that cycles accept nothing, a few drafts and all of them."""
    accepted = agree(learned(**CASES[case]), PROMPT)
    assert len(set(accepted)) > 2, accepted


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "granite", "cohere2"])
def test_other_families(family):
    """Among them embeddings that are scaled on entry, scaled and capped logits, and windows."""
    objective = reference.objective(tiny.target(family), block_size=5, spread=0.05)
    accepted = agree(reference.taught(objective, text_of(family, PROMPT), 14, lr=1e-2), PROMPT, chunk=5)
    assert len(set(accepted)) > 1, accepted


def test_tau_is_what_the_walk_says():
    """Also with fewer drafts than a block has, and over several prompts."""
    prompts = [tiny.prompt(12, 3), tiny.prompt(9, 4)]
    objective = reference.objective(tiny.target("llama"), block_size=5, spread=0.05)
    reference.taught(objective, [row for p in prompts for row in text_of("llama", p)], 20, lr=1e-2)
    taus = []
    for steps in (1, 2, 4):
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
    assert min(taus) > 1 and max(taus) > 1.3


def check_figures(drafts: int = 4) -> None:
    """The simulated accept length is the mean of real cycles: decoding begins at every token of an answer once."""
    objective = learned()
    text = text_of("llama", PROMPT)[0][0]
    real = []
    with patch.object(objective.drafter, "steps", drafts), torch.no_grad():
        figures = objective.eval()(reference.features(objective, reference.pack([[text]]))).metrics
        for n in range(len(PROMPT), len(text.tokens) - 1):
            _, cycles = met(objective.drafter, text.tokens[:n], new=drafts + 2)
            real.append(min(cycles[0][2], len(text.tokens) - n - 1))
    assert max(real) == drafts and len(set(real)) > 1
    assert [float(x) for x in figures["tau_sim"]] == [sum(real) + len(real), len(real)]
    assert [float(x) for x in figures["coverage"]] == [len(real), len(real)]
    for k in range(drafts):
        tried = sum(a >= k for n, a in enumerate(real) if n + k < len(real))
        right = sum(a >= k + 1 for a in real)
        assert [float(x) for x in figures[f"joint_acc_{k}"]] == [right, len(real)]
        assert [float(x) for x in figures[f"cond_acc_{k}"]] == [right, tried]


@pytest.mark.parametrize("drafts", [1, 4])
def test_simulated_is_measured(drafts):
    check_figures(drafts)


def test_products_of_accuracies_are_no_accept_length():
    def product(original: Any, objective: DFlashObjective, found: Any, *rest: Any) -> dict[str, Any]:
        figures: dict[str, Any] = original(objective, found, *rest)
        cycles = found.asked[:, 0].sum()
        expected, chain = torch.ones(()), torch.ones(())
        for k in range(found.asked.shape[1]):
            total, count = figures[f"acc_{k}"]
            chain = chain * total / count
            expected = expected + chain
        return {**figures, "tau_sim": (expected * cycles, cycles)}

    with planted(DFlashObjective, "_metrics", product):
        check_figures()


def test_a_replay_with_full_blocks_is_found() -> None:
    """Decoding with fewer drafts asks narrower blocks, whose rows say something else."""
    objective = learned(block_size=8, draft_steps=3)

    def full(original: Any, self: DFlashObjective, features: Any, anchors: Tensor, real: Tensor, wanted: Tensor) -> Any:
        model = self.drafter.model
        blocks = model.blocks
        with patch.object(model, "blocks", lambda taps, batch, at, rows: blocks(taps, batch, at, 8)[:, :, :rows]):
            return original(self, features, anchors, real, wanted)

    with planted(DFlashObjective, "_blocks", full):
        agree(objective, PROMPT)
