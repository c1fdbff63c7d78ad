"""Decoding's own texts, walked by what training says of them, meet the very cycles that decoding had."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny
from understudy.core.records import Cycle, Needs
from understudy.decoding.acceptance import measure_acceptance
from understudy.drafters.early_exit.adapter import Adapter
from understudy.drafters.early_exit.config import ExitConfig
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafters.early_exit.objective import ExitObjective, ExitObjectiveConfig
from understudy.drafting.objective import Features, Objective
from understudy.drafting.spec import specs
from understudy.features.live import LiveFeatures
from understudy.target.target import Target
from understudy.training.replay import Decoding, answered, replayed, walk

STEPS = 4


def objective(target: Target, threshold: float, noise: float = 0.0) -> ExitObjective:
    """An adapter that is the identity, or with `noise` one that drafts by what it attends to."""
    torch.manual_seed(3)
    adapter = Adapter.identity(target, 3)
    if noise:
        torch.nn.init.normal_(adapter.block.self_attn.o_proj.weight, std=noise)
    drafter = ExitDrafter(target, ExitConfig(exit_layer=3, threshold=threshold, steps=STEPS), adapter)
    return ExitObjective(drafter, ExitObjectiveConfig(loss_chunk=7))


class Lengths:
    """A listener: tokens that every cycle committed, text by text."""

    needs = Needs()

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def on_cycle(self, cycle: Cycle) -> None:
        if cycle.index == 0:
            self.texts.append([])
        else:
            self.texts[-1].append(len(cycle.committed))


def stopping(family: str) -> Target:
    """A target that ends about half of its texts by a stop token."""
    plain = tiny.target(family)
    texts = measure_acceptance(plain, specs()["none"].tiny(plain)[0], PROMPTS, 24).outputs
    seen = Counter(token for text in texts for token in {*text[6:]})
    token = min(seen, key=lambda t: (abs(seen[t] - 3), t))
    return Target(tiny.fresh_model(family, eos_token_id=[token]), name=family)


PROMPTS = [tiny.prompt(9 + seed, seed) for seed in range(6)]


@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("noise", [0.0, 0.5], ids=["identity", "random"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_cycles_of_decoding_are_met_one_by_one(family, noise, threshold):
    target = stopping(family)
    drafts, heard = objective(target, threshold, noise), Lengths()
    found = measure_acceptance(target, drafts.drafter, PROMPTS, 24, listeners=[heard])
    ends = Counter(output[-1] in target.eos_ids for output in found.outputs)
    assert ends[True] and ends[False], "some texts end by a stop token, others by their budget"
    assert found.stats.accepted > 15 and found.stats.rejected > 15
    live = LiveFeatures(target, drafts.needs)
    # rows of one padded batch, so that a text's end is not its row's
    lengths = drafts.lengths(live(answered(PROMPTS, found.outputs)))
    for prompt, output, row, cycles in zip(PROMPTS, found.outputs, lengths, heard.texts, strict=True):
        size = len(prompt) + len(output)
        assert walk(row[:size].tolist(), len(prompt)) == cycles
        assert not row[: len(prompt)].any() and not row[size - 1 :].any(), "no cycle begins there"
    assert replayed(drafts, live, PROMPTS, found.outputs) == found.tau


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_a_walk_commits_what_there_is(lengths, data):
    first = data.draw(st.integers(0, len(lengths) - 1))
    cycles = walk(lengths, first)
    assert sum(cycles) == len(lengths) - 1 - first
    at = first
    for i, tokens in enumerate(cycles):
        assert tokens == lengths[at] + 1 or (i == len(cycles) - 1 and 1 <= tokens <= lengths[at])
        at += tokens


def test_what_is_measured_says_what_training_says_of_it():
    target = tiny.target("qwen3")
    drafts = objective(target, 0.0)
    figures = Decoding(drafts, target, PROMPTS, 24)()
    assert figures["tau_replayed"] == figures["tau"] > 1.5
    assert figures["joint_1"] > 0


class Blind(ExitObjective):
    """Trains on states of the layer before the one that it decodes from."""

    needs: Any

    def reads(self, features: Features) -> torch.Tensor:
        taps = {self.exit_layer: features.taps[self.exit_layer - 1]}
        return super().reads(Features(features.batch, taps, features.last))


def test_wrong_taps_show():
    target = tiny.target("qwen3")
    right = objective(target, 0.0)
    wrong = Blind(right.drafter, right.config)
    wrong.needs = Needs(taps=frozenset({2, 3}), last=True)
    figures = Decoding(wrong, target, PROMPTS, 24)()
    assert abs(figures["tau_replayed"] - figures["tau"]) > 0.1 * figures["tau"]


def test_a_text_of_one_token_has_no_cycle():
    target = tiny.target("qwen3")
    drafts = objective(target, 0.0)
    assert replayed(drafts, LiveFeatures(target, drafts.needs), [[5, 6]], [[7]]) == 0.0


def test_every_drafter_that_ships_says_what_it_would_draft():
    trained = [spec for spec in specs().values() if spec.objective is not None]
    assert trained
    for spec in trained:
        made = get_type_hints(spec.objective)["return"]
        assert inspect.isclass(made) and issubclass(made, Objective), spec.name
        for method in ("forward", "predictions", "lengths", "servable", "save"):
            assert getattr(made, method) is not getattr(Objective, method), f"{spec.name}: {method}"
