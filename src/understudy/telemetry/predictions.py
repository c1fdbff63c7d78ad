"""What a drafter predicts, for people to read: rows of a table, scalars, and a block of text.

`summary` reduces the predictions of a whole batch; `rows` and `block` show a few of them, one cycle per sample. No tokenizer and no
file is known here: tokens come as text. `docs/training-logs.md` says how to read all of it.

`target_conf` is the *drafter's* probability of the target's token, and a draft is the drafter's most probable token. So the gap
(target_conf - pred_conf) is never positive, it is 0 where they agree, and a drafter that is sure of nothing has one near 0 as well:
the verdict looks at accuracy too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

COLUMNS = (
    "step", "sample", "context", "draft_position", "accuracy", "predicted", "target", "match", "pred_conf", "target_conf",
)  # fmt: skip
Row = list[int | float | str]

HIGH_CONFIDENCE = 0.5  # a wrong draft that is more probable than this is marked

WELL = "→ Model is learning well"
LEARNING = "→ Model is learning"
MORE = "→ Model needs more training"
WRONG = "→ Model is confidently wrong"
BROKEN = "→ Confidences are not finite"

WELL_GAP, WELL_ACCURACY = -0.1, 0.5  # learning well: both at least this
LEARNING_GAP, LEARNING_ACCURACY = -0.2, 0.3  # learning: both at least this
WRONG_GAP = -0.3  # confidently wrong: the gap is below

_SIGNS = {"\n": "↵", "\r": "⇤", "\t": "⇥"}


@dataclass(frozen=True, slots=True)
class Draft:
    """One draft position of a sample."""

    position: int
    predicted: str
    target: str
    match: bool  # of ids: two tokens may read alike
    pred_conf: float
    target_conf: float


@dataclass(frozen=True, slots=True)
class Sample:
    """A place where decoding would begin a cycle: the text up to the last committed token, and the drafts after it."""

    context: str
    drafts: Sequence[Draft]


@dataclass(frozen=True, slots=True)
class Summary:
    """All predictions of a batch that decoding would ask for."""

    scalars: dict[str, float]  # `predictions/*` and `hidden_states/*`
    accuracy: float  # share of the asked predictions that are the target's token
    by_position: list[float | None]  # [P] the same per draft position; None where nothing is asked
    high_confidence_wrong: int  # wrong, and more probable than HIGH_CONFIDENCE
    count: int  # asked predictions

    @property
    def gap(self) -> float:
        return self.scalars["predictions/confidence_gap"]


def summary(match: Tensor, pred_conf: Tensor, target_conf: Tensor, asked: Tensor, hidden: Tensor) -> Summary:
    """Means over `asked`. `match`, `asked` [P, N] bool; `pred_conf`, `target_conf` [P, N]; `hidden` [N, D], of which the slots where
    anything is asked count. Something must be asked. The standard deviation is over all elements (not N - 1).
    """
    match, asked = match.cpu(), asked.cpu()
    sure, right = pred_conf.cpu().double(), target_conf.cpu().double()
    states = hidden[asked.any(0).to(hidden.device)].float()
    overall_pred, overall_target = sure[asked].mean().item(), right[asked].mean().item()
    scalars = {
        "predictions/overall_pred_confidence": overall_pred,
        "predictions/overall_target_confidence": overall_target,
        "predictions/confidence_gap": overall_target - overall_pred,
    }
    by_position: list[float | None] = []
    for position, here in enumerate(asked):
        by_position.append(match[position][here].double().mean().item() if here.any() else None)
        if here.any():
            scalars[f"predictions/pos_{position}_pred_confidence"] = sure[position][here].mean().item()
            scalars[f"predictions/pos_{position}_target_confidence"] = right[position][here].mean().item()
    scalars |= {
        "hidden_states/mean": states.mean().item(),
        "hidden_states/std": states.std(correction=0).item(),
        "hidden_states/min": states.min().item(),
        "hidden_states/max": states.max().item(),
    }
    return Summary(
        scalars=scalars,
        accuracy=match[asked].double().mean().item(),
        by_position=by_position,
        high_confidence_wrong=int((asked & ~match & (sure > HIGH_CONFIDENCE)).sum()),
        count=int(asked.sum()),
    )


def verdict(gap: float, accuracy: float) -> str:
    """What gap and accuracy (both of the whole batch) say together; the thresholds are the constants above."""
    if not math.isfinite(gap):
        return BROKEN
    if gap >= WELL_GAP and accuracy >= WELL_ACCURACY:
        return WELL
    if gap >= LEARNING_GAP and accuracy >= LEARNING_ACCURACY:
        return LEARNING
    return MORE if gap >= WRONG_GAP else WRONG


def visible(text: str) -> str:
    """Text on one line: line ends and tabs as signs, what cannot be printed as its code point."""
    return "".join(_SIGNS.get(c) or (c if c.isprintable() else f"<U+{ord(c):04X}>") for c in text)


def visible_token(text: str) -> str:
    """The same with spaces as signs: `and` and `␣and` are two tokens."""
    return visible(text).replace(" ", "␣")


def _percent(share: float | None) -> str:
    assert share is not None, "what is shown is asked, so it counts"
    return f"{share:.0%}"


def _sign(match: bool) -> str:
    return "✓" if match else "✗"


def rows(step: int, samples: Sequence[Sample], of: Summary) -> list[Row]:
    """One row per draft position of each sample, under `COLUMNS`. `accuracy` is that of the position over the whole batch."""
    return [
        [
            step,
            number,
            f'"{sample.context}"',
            draft.position,
            _percent(of.by_position[draft.position]),
            f'"{draft.predicted}"',
            f'"{draft.target}"',
            _sign(draft.match),
            round(draft.pred_conf, 3),
            round(draft.target_conf, 3),
        ]
        for number, sample in enumerate(samples)
        for draft in sample.drafts
    ]


def block(step: int, samples: Sequence[Sample], of: Summary) -> str:
    """The same as text, with what the batch as a whole says below it. Ends with a line end."""
    line, positions = "=" * 80, len(of.by_position)
    lines = [
        line,
        f"Step {step} - Detailed Predictions",
        line,
        "",
        "Model Flow:",
        "  1. Target model generates hidden states from input_ids",
        "  2. Draft model receives: input_ids + hidden_states",
        f"  3. Draft model predicts next tokens at {positions} position{'s' if positions > 1 else ''}",
        "  4. Predictions compared against target model's outputs",
    ]
    for number, sample in enumerate(samples):
        lines += ["", f"[Sample {number}]", f"Context: {sample.context}"]
        for draft in sample.drafts:
            lines += ["", *_draft(draft, of)]
    lines += [
        "",
        "[Confidence Summary]",
        f"  Avg confidence in predictions: {of.scalars['predictions/overall_pred_confidence']:.3f}",
        f"  Avg confidence in targets: {of.scalars['predictions/overall_target_confidence']:.3f}",
        f"  Gap (target - pred): {round(of.gap, 3) + 0.0:.3f}",  # no -0.000
        f"  {verdict(of.gap, of.accuracy)}",
    ]
    return "\n".join(lines) + "\n"


def _draft(draft: Draft, of: Summary) -> list[str]:
    lines = [
        f"  Position {draft.position} (Acc: {_percent(of.by_position[draft.position])}) {_sign(draft.match)}",
        f"    Predicted: {draft.predicted} (conf: {draft.pred_conf:.3f})",
        f"    Target:    {draft.target} (conf: {draft.target_conf:.3f})",
    ]
    if not draft.match and draft.pred_conf > HIGH_CONFIDENCE:
        lines.append("    ⚠️  High confidence in wrong prediction!")
    return lines
