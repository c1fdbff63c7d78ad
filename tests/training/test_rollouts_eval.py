"""What evaluation and timing after rollouts measure, against the obvious way to find it."""

from __future__ import annotations

import pytest
import torch

import tiny
from training import words
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.decoding.acceptance import measure_acceptance
from understudy.drafters.early_exit.adapter import Adapter
from understudy.drafters.early_exit.config import DVIConfig
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafters.early_exit.head import DrafterHead
from understudy.training.rollouts.evaluate import clock, ctar, draft_length, evaluate, hits


@pytest.fixture(scope="module")
def target():
    return words.target()


def with_adapter(target) -> ExitDrafter:
    torch.manual_seed(0)
    adapter = Adapter.identity(target, 3)
    torch.nn.init.normal_(adapter.block.self_attn.o_proj.weight, std=0.3)
    config = DVIConfig(exit_layer=3, threshold=0.0, steps=3)
    head = DrafterHead(target, 2, 2.0)
    torch.nn.init.normal_(head.proj.B, std=0.05)
    return ExitDrafter(target, config, adapter.requires_grad_(False), head, None, config)


class FirstBlock:
    """Keeps how many drafts of the first verify pass were accepted."""

    needs = Needs()
    accepted = -1

    def on_cycle(self, cycle) -> None:
        if cycle.index == 1:
            self.accepted = cycle.accepted


@pytest.mark.parametrize("kind", ["head", "shallow", "adapter"])
def test_ctar_is_what_the_engine_accepts_at_every_place(target, kind):
    """From every place of the text one block of w drafts, for real."""
    drafter = (
        with_adapter(target) if kind == "adapter" else words.drafter(target, 2 if kind == "shallow" else 0, noise=0.03)
    )
    prompt, w = tiny.prompt(8), 2
    text = prompt + tiny.reference("llama", prompt, 14)
    places = []
    # the prefill adds a token itself: a block that begins at place t follows a prompt that ends before it
    for t in range(len(prompt), len(text) - w):
        watch = FirstBlock()
        with draft_length(drafter, w):
            measure_acceptance(target, drafter, [text[:t]], w + 2, listeners=[watch])
        places.append(watch.accepted == w)
    row = hits(drafter, text, len(prompt))
    assert len(row) == len(text) - 1 - len(prompt)
    assert ctar([row], w) == pytest.approx(sum(places) / len(places))
    assert 0 < sum(row) < len(row)


def test_ctar_counts_places_with_w_tokens_after_them():
    rows = [[True, True, False, True], [True], []]
    assert ctar(rows, 1) == 4 / 5
    assert ctar(rows, 2) == 1 / 3  # of (0, 1), (1, 2), (2, 3) of the first text
    assert ctar(rows, 4) == 0.0
    assert ctar(rows, 5) is None


def test_an_evaluation_measures_every_draft_length(target):
    drafter = words.drafter(target, 2, noise=0.02)
    prompts = words.prompts(3)
    rows = evaluate(target, drafter, prompts, 3, 16)
    assert [row["k"] for row in rows] == [1, 2, 3] and drafter.steps == 3
    for row in rows:
        with draft_length(drafter, row["k"]):
            found = measure_acceptance(target, drafter, prompts, 16)
        assert (row["tau"], row["acceptance_rate"], row["tokens"]) == (found.tau, found.acceptance_rate, found.tokens)
        assert found.stats.drafted <= row["k"] * found.stats.cycles
        assert row["acc"] == (found.joint[row["k"] - 1] if len(found.joint) >= row["k"] else 0.0)
    assert [row["ctar"] for row in rows] == sorted((row["ctar"] for row in rows), reverse=True)


def test_the_draft_length_comes_back_after_an_error(target):
    drafter = words.drafter(target, 0)
    seen: list[int] = []

    def fail() -> None:
        with draft_length(drafter, 1):
            seen.append(drafter.steps)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [1] and drafter.steps == 3


@pytest.mark.parametrize("greedy", [True, False])
def test_timed_texts_are_the_same(target, greedy):
    """At temperature 1 too: draws go by position."""
    found = clock(target, words.drafter(target, 0), words.prompts(2), 10, 2, greedy)
    assert found["same"] == found["prompts"] == 2 and found["repeats"] == 2
    assert found["tokens"] == 2 * 9, "lengths are equal: stops do not end a timed text, and the first token is prefill"
    assert found["speedup"] == pytest.approx(found["tokens_per_s"] / found["plain_tokens_per_s"])


def test_what_listeners_take_is_not_timed(target):
    class Slow:
        needs = Needs()
        calls = 0

        def on_cycle(self, cycle) -> None:
            import time

            self.calls += 1
            time.sleep(0.15)

    slow = Slow()
    found = clock(target, words.drafter(target, 0), words.prompts(1), 4, 1, True, [slow])
    assert slow.calls >= 2  # prefill and verify passes of the timed text alone
    asleep = 0.15 * (slow.calls - 1)
    assert found["tokens"] / found["tokens_per_s"] < asleep


def test_nothing_to_time_is_an_error(target):
    with pytest.raises(UserError, match="no prompt to time"):
        clock(target, words.drafter(target, 0), [], 8, 1, True)
    with pytest.raises(UserError, match="no token was left to time"):
        clock(target, words.drafter(target, 0), words.prompts(1), 1, 1, True)
