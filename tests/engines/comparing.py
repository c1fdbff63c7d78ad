"""One drafter's results, ours beside the engine's: what must agree, what does not, and where texts part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from counting import Counts, Round, disagreements, equal_drafts, rounds_of, tally

from understudy.bench.check import Checker, first_difference
from understudy.target.params import SamplingParams
from understudy.target.target import Target

SAME_DRAFTS = 0.99  # share of drafted tokens that must be the same in float32: near ties aside it is 1


@dataclass(frozen=True)
class Place:
    """Where two texts part, and by how little: the gap between the two tokens' logits, by the target's dtype."""

    prompt: int
    position: int
    gaps: dict[str, float]


@dataclass(frozen=True)
class Limits:
    """What counts as agreement. `strict`: texts, drafts and counts have to agree (float32)."""

    steps: int
    tolerance: float
    enough: int
    strict: bool


def compare(
    limits: Limits,
    targets: Sequence[Target],
    prompts: Sequence[list[int]],
    plain: Sequence[list[int]],
    served: dict[str, Any],
    decoded: tuple[list[list[int]], list[list[Round]]],
) -> tuple[dict[str, Any], list[str]]:
    """(JSON-ready results, what failed) of the engine alone (`plain`), the engine with the drafter, and us with it.

    `served` is what `serve_vllm.py` writes; `decoded` are our texts and the passes that the engine would have run; logits at places where
    texts part are those of `targets`, the first of which is float32.
    """
    texts, passes = decoded
    ours = sum((tally(each, limits.steps) for each in passes), start=tally([], limits.steps))
    theirs = sum((Counts(**each) for each in served["counts"]), start=tally([], limits.steps))
    same = compared = 0
    for mine, drafts, text, other in zip(passes, served["drafts"], texts, served["outputs"], strict=True):
        equal, pairs = equal_drafts(mine, rounds_of(drafts, other), first_difference(text, other))
        same, compared = same + equal, compared + pairs
    parted = differences(targets, prompts, plain, served["outputs"])
    strange = differences(targets, prompts, plain, texts)
    row = {
        "engine": asdict(theirs) | {"tau": theirs.tau},
        "understudy": asdict(ours) | {"tau": ours.tau},
        "drafts_compared": compared,
        "drafts_equal": same,
        "texts": len(prompts),
        "texts_equal_to_engine_alone": len(prompts) - len(parted),
        "texts_equal_to_understudy": len(prompts) - len(strange),
        "first_differences": [asdict(place) for place in parted],
        "first_differences_to_understudy": [asdict(place) for place in strange],
    }
    return row, faults(limits, ours, theirs, parted, same / compared if compared else 0.0)


def faults(limits: Limits, ours: Counts, theirs: Counts, parted: Sequence[Place], same: float) -> list[str]:
    """What does not hold, one clear line each. `same`: share of drafted tokens that both engines chose."""
    found = []
    if min(theirs.accepted_tokens, theirs.rejected) < limits.enough:
        found.append(
            f"{theirs.accepted_tokens} drafts accepted and {theirs.rejected} rejected: fewer than {limits.enough} of one"
            " kind prove nothing"
        )
    if not limits.strict:
        return found
    if parted:
        first = parted[0]
        gap = next(iter(first.gaps.values()))
        found.append(
            f"{len(parted)} texts differ from the engine's own, the first at prompt {first.prompt}, token {first.position}"
            f" (logits {gap:.3g} apart)"
        )
    if same < SAME_DRAFTS:
        found.append(f"only {100 * same:.1f} % of the drafted tokens are the same")
    return found + disagreements(ours, theirs, limits.tolerance)


def differences(
    targets: Sequence[Target], prompts: Sequence[list[int]], a: Sequence[list[int]], b: Sequence[list[int]]
) -> list[Place]:
    """Where texts part, with the logits' gaps there as each target computes them."""
    places = []
    for index, (prompt, x, y) in enumerate(zip(prompts, a, b, strict=True)):
        at = first_difference(x, y)
        if at is not None:
            gaps = {}
            for target in targets:
                logits = Checker(target, SamplingParams(), ()).logits(prompt, x[:at])
                gaps[str(target.dtype).removeprefix("torch.")] = abs(logits[x[at]] - logits[y[at]]).item()
            places.append(Place(index, at, gaps))
    return places


def table(rows: Sequence[dict[str, Any]]) -> str:
    """What a person reads."""
    lines = []
    for row in rows:
        lines.append(
            f"{row['drafter']}, {row['vocabulary']} tokens: {row['texts_equal_to_engine_alone']} of {row['texts']} texts as vLLM"
            f" alone, {row['texts_equal_to_understudy']} as Understudy; {row['drafts_equal']} of {row['drafts_compared']}"
            " drafted tokens the same"
        )
        lines.append(f"  {'':12}{'passes':>8}{'drafts':>8}{'accepted':>9}{'tau':>7}  accepted at 1, 2, ...")
        for name, side in (("vLLM", row["engine"]), ("Understudy", row["understudy"])):
            at = " ".join(f"{n:5d}" for n in side["accepted_at"])
            numbers = f"{side['drafts']:8d}{side['draft_tokens']:8d}{side['accepted_tokens']:9d}{side['tau']:7.3f}"
            lines.append(f"  {name:12}{numbers}  {at}")
    return "\n".join(lines)
