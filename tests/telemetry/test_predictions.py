"""Tables, scalars and text of predictions: literal, and against slow sums in Python."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from understudy.telemetry.predictions import (
    BROKEN,
    COLUMNS,
    HIGH_CONFIDENCE,
    LEARNING,
    LEARNING_ACCURACY,
    LEARNING_GAP,
    MORE,
    WELL,
    WELL_ACCURACY,
    WELL_GAP,
    WRONG,
    WRONG_GAP,
    Draft,
    Sample,
    Summary,
    block,
    rows,
    summary,
    verdict,
    visible,
    visible_token,
)

SAMPLES = [
    Sample("Hello...", [Draft(0, "world", "world", True, 0.892, 0.892), Draft(1, "today", "there", False, 0.6449, 0.2344)]),
    Sample("The quick...", [Draft(0, "␣fox", "␣dog", False, 0.5, 0.0)]),
]  # fmt: skip
SCALARS = {
    "predictions/overall_pred_confidence": 0.768,
    "predictions/overall_target_confidence": 0.563,
    "predictions/confidence_gap": -0.205,
}
OF = Summary(SCALARS, accuracy=0.8, by_position=[0.851, 0.779], high_confidence_wrong=1, count=9)


def test_the_columns_are_those_of_the_document():
    assert " | ".join(COLUMNS) == (
        "step | sample | context | draft_position | accuracy | predicted | target | match | pred_conf | target_conf"
    )


def test_rows():
    assert rows(200, SAMPLES, OF) == [
        [200, 0, '"Hello..."', 0, "85%", '"world"', '"world"', "✓", 0.892, 0.892],
        [200, 0, '"Hello..."', 1, "78%", '"today"', '"there"', "✗", 0.645, 0.234],
        [200, 1, '"The quick..."', 0, "85%", '"␣fox"', '"␣dog"', "✗", 0.5, 0.0],
    ]


TEXT = """\
================================================================================
Step 200 - Detailed Predictions
================================================================================

Model Flow:
  1. Target model generates hidden states from input_ids
  2. Draft model receives: input_ids + hidden_states
  3. Draft model predicts next tokens at 2 positions
  4. Predictions compared against target model's outputs

[Sample 0]
Context: Hello...

  Position 0 (Acc: 85%) ✓
    Predicted: world (conf: 0.892)
    Target:    world (conf: 0.892)

  Position 1 (Acc: 78%) ✗
    Predicted: today (conf: 0.645)
    Target:    there (conf: 0.234)
    ⚠️  High confidence in wrong prediction!

[Sample 1]
Context: The quick...

  Position 0 (Acc: 85%) ✗
    Predicted: ␣fox (conf: 0.500)
    Target:    ␣dog (conf: 0.000)

[Confidence Summary]
  Avg confidence in predictions: 0.768
  Avg confidence in targets: 0.563
  Gap (target - pred): -0.205
  → Model needs more training
"""


def test_the_block_of_text():
    assert block(200, SAMPLES, OF) == TEXT


def test_a_block_of_one_position_without_a_gap():
    scalars = {**SCALARS, "predictions/confidence_gap": -1e-9}
    text = block(7, SAMPLES[1:], Summary(scalars, 0.9, [0.9], 0, 4))
    assert "\nStep 7 - Detailed" in text and "at 1 position\n" in text
    assert text.endswith("  Gap (target - pred): 0.000\n  → Model is learning well\n")


@pytest.mark.parametrize(
    ("gap", "accuracy", "says"),
    [
        (-0.05, 0.6, "→ Model is learning well"),
        (-0.1, 0.5, "→ Model is learning well"),
        (-0.05, 0.49, "→ Model is learning"),
        (-0.11, 0.9, "→ Model is learning"),
        (-0.2, 0.3, "→ Model is learning"),
        (0.0, 0.01, "→ Model needs more training"),  # a flat law: sure of nothing, right in nothing
        (-0.205, 0.8, "→ Model needs more training"),
        (-0.3, 0.1, "→ Model needs more training"),
        (-0.31, 0.8, "→ Model is confidently wrong"),
        (math.nan, 0.5, "→ Confidences are not finite"),
    ],
)
def test_verdicts(gap, accuracy, says):
    assert verdict(gap, accuracy) == says


def test_what_cannot_be_seen_is_shown():
    assert visible("a b\n\tc\r\x07\u2028é→") == "a b↵⇥c⇤<U+0007><U+2028>é→"
    assert visible_token(" the\n\n ") == "␣the↵↵␣"


# the page about it


def page() -> str:
    return (Path(__file__).parents[2] / "docs" / "training-logs.md").read_text(encoding="utf-8")


def test_the_pages_example_is_what_is_written():
    drafts = [Draft(0, "␣and", "␣and", True, 0.892, 0.892), Draft(1, "␣today", "␣there", False, 0.645, 0.234)]
    wanted = block(200, [Sample("The quick brown fox jumps over the lazy dog...", drafts)], OF)
    assert f"```\n{wanted}```" in page()
    for row in rows(200, SAMPLES[:1], OF):
        assert "| " + " | ".join(map(str, row)) + " |" in page()


def test_the_page_explains_every_name_and_threshold():
    text = page()
    head = "| " + " | ".join(COLUMNS) + " |"
    assert head in text
    explained = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    shown = ["step", "sample", "draft_position"]  # say what they are
    assert sorted(explained) == sorted(set(COLUMNS) - set(shown))
    ones = torch.ones(1, 1)
    for key in summary(ones.bool(), ones, ones, ones.bool(), ones).scalars:
        assert f"`{key.replace('pos_0', 'pos_X')}`" in text
    verdicts = dict(re.findall(r"^\| `(→ [^`]*)` \| (.*) \|$", text, re.MULTILINE))
    assert verdicts == {
        WELL: f"at least {WELL_GAP} | at least {WELL_ACCURACY:.0%}",
        LEARNING: f"at least {LEARNING_GAP} | at least {LEARNING_ACCURACY:.0%}",
        MORE: f"at least {WRONG_GAP} | any",
        WRONG: f"below {WRONG_GAP} | any",
        BROKEN: "not a number | any",
    }
    assert f"gave more than {HIGH_CONFIDENCE} to a token" in text


# scalars


@st.composite
def predictions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    positions, slots = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    random = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    asked = torch.rand(positions, slots, generator=random) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    asked[draw(st.integers(0, positions - 1)), draw(st.integers(0, slots - 1))] = True
    match = torch.rand(positions, slots, generator=random) < 0.5
    sure, right = torch.rand(2, positions, slots, generator=random)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    hidden = torch.randn(slots, 3, generator=random).to(dtype)
    return match, sure.to(dtype), torch.where(match, sure, right * sure).to(dtype), asked, hidden


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@given(predictions())
def test_scalars_are_means_over_what_is_asked(given_):
    match, sure, right, asked, hidden = given_
    found = summary(match, sure, right, asked, hidden)
    places = [(p, n) for p in range(asked.shape[0]) for n in range(asked.shape[1]) if asked[p, n]]
    wanted = {
        "predictions/overall_pred_confidence": mean([float(sure[at]) for at in places]),
        "predictions/overall_target_confidence": mean([float(right[at]) for at in places]),
        "predictions/confidence_gap": mean([float(right[at]) - float(sure[at]) for at in places]),
    }
    by_position: list[float | None] = []
    for position in range(asked.shape[0]):
        here = [at for at in places if at[0] == position]
        by_position.append(mean([float(match[at]) for at in here]) if here else None)
        if here:
            wanted[f"predictions/pos_{position}_pred_confidence"] = mean([float(sure[at]) for at in here])
            wanted[f"predictions/pos_{position}_target_confidence"] = mean([float(right[at]) for at in here])
    states = [float(x) for n in sorted({n for _, n in places}) for x in hidden[n]]
    wanted["hidden_states/mean"] = mean(states)
    wanted["hidden_states/std"] = math.sqrt(mean([(x - mean(states)) ** 2 for x in states]))
    wanted["hidden_states/min"], wanted["hidden_states/max"] = min(states), max(states)
    assert found.scalars == pytest.approx(wanted, abs=1e-5)
    assert found.by_position == by_position
    assert found.accuracy == pytest.approx(mean([float(match[at]) for at in places]))
    assert found.count == len(places)
    assert found.high_confidence_wrong == sum(float(sure[at]) > 0.5 and not match[at] for at in places)
    assert found.gap <= 1e-6
