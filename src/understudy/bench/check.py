"""Is the output the same? Where it is not, by how little.

In half precision a row of a W-row pass may round otherwise than a 1-row pass, so an argmax can flip where two logits nearly tie.
So the first difference of an output is judged by the gap between the two tokens' logits, on a fresh pass over everything before
them: above LIMIT units in the last place it is no near tie, and the check fails. What follows the first difference is another text
and is not compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from understudy.bench.modes import Mode, Turn
from understudy.target.params import SamplingParams
from understudy.target.processors import Processors
from understudy.target.session import TargetSession
from understudy.target.target import Target

LIMIT = 2.0  # ulp
ENOUGH = 200  # rejected drafts below which "identical" says little


@dataclass(frozen=True)
class Divergence:
    """Where an output leaves plain decoding's."""

    prompt: int  # index, from 0
    position: int  # of the first differing token in the output, from 0
    gap: (
        float | None
    )  # between the logits of the two tokens, in ulp of the dtype; None = one output ended without a reason
    gap_raw: float | None  # the same in units of the logits
    tokens: tuple[int | None, int | None]  # plain decoding's, and this mode's

    @property
    def excusable(self) -> bool:
        return self.gap is not None and self.gap <= LIMIT

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "position": self.position,
            "gap": self.gap,
            "gap_raw": self.gap_raw,
            "tokens": list(self.tokens),
        }


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two outputs differ, the shorter one's end included; None if they are equal."""
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return at
    return None if len(a) == len(b) else min(len(a), len(b))


def ulps(gap: float, magnitude: float, dtype: torch.dtype) -> float:
    """`gap` in units in the last place of `dtype` at `magnitude`."""
    exponent = math.floor(math.log2(magnitude)) if magnitude > 0 else 0
    return gap / (torch.finfo(dtype).eps * 2.0**exponent)


class Checker:
    """Compares outputs with plain decoding's. `stop_ids` matter to penalties that hold back stop tokens."""

    def __init__(self, target: Target, sampling: SamplingParams, stop_ids: Sequence[int]) -> None:
        self.target = target
        self.processors = Processors(sampling, target.vocab_size, sorted(stop_ids), target.device)

    def compare(
        self, prompts: Sequence[list[int]], plain: Sequence[Sequence[Turn]], other: Sequence[Sequence[Turn]]
    ) -> list[Divergence]:
        """First divergence of every prompt, over all repeats ([repeat][prompt]), each place once."""
        found: dict[tuple[int, int], Divergence] = {}
        for theirs, ours in zip(plain, other, strict=True):
            for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
                at = first_difference(a.output, b.output)
                if at is not None and (index, at) not in found:
                    found[index, at] = self._judge(prompts[index], index, at, a.output, b.output)
        return [found[key] for key in sorted(found)]

    def _judge(self, prompt: list[int], index: int, at: int, a: list[int], b: list[int]) -> Divergence:
        x, y = a[at] if at < len(a) else None, b[at] if at < len(b) else None
        if x is None or y is None:
            return Divergence(index, at, None, None, (x, y))
        logits = self.logits(prompt, a[:at])
        gap = abs(logits[x] - logits[y]).item()
        magnitude = max(abs(logits[x]), abs(logits[y])).item()
        return Divergence(index, at, ulps(gap, magnitude, self.target.dtype), gap, (x, y))

    def logits(self, prompt: list[int], prefix: list[int]) -> torch.Tensor:
        """[V] processed logits after `prompt` and `prefix`, from one pass over both."""
        tokens = [*prompt, *prefix]
        with torch.inference_mode():
            logits = TargetSession(self.target).prefill(tokens, want_logits=True).logits
            assert logits is not None
            history = self.processors.history(prompt)
            if history is None:
                return self.processors.apply(logits[-1:])[0]
            history.extend(prefix)
            last = torch.tensor(tokens[-1:], device=self.target.device)
            return self.processors.apply(logits[-1:], history.rows(last))[0]


def verdict(
    modes: Sequence[Mode], found: dict[str, list[Divergence]], rejected: dict[str, int | None]
) -> dict[str, Any]:
    """What `--check` says of all modes: passed or not, why not, and where the proof is thin."""
    failures, warnings = [], []
    for mode in modes:
        bad = [d for d in found[mode.name] if not d.excusable]
        if bad:
            worst = max(bad, key=lambda d: math.inf if d.gap is None else d.gap)
            how = "one output ended early" if worst.gap is None else f"a gap of {worst.gap:.3g} ulp"
            where = f"prompt {worst.prompt}, token {worst.position}: {how}"
            failures.append(f"{mode.name}: {len(bad)} outputs differ beyond a near tie ({where})")
        made = rejected[mode.name]
        if made is not None and made < ENOUGH:
            warnings.append(f"{mode.name} had only {made} drafts rejected: below {ENOUGH}, equal outputs prove little")
    return {"passed": not failures, "failures": failures, "warnings": warnings}
