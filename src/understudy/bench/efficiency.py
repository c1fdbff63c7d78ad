"""How much of what the model allows the engine delivers.

    efficiency = measured decode speed-up / (tau * t(1) / (t_draft + t_verify))

A cycle commits tau tokens for one draft and one verify, plain decoding one token for one pass over one row; the quotient in the
denominator is the speed-up of an engine that costs nothing. The three times are taken alone, in the same process: at the same
states of the same texts, by calling just that part, several times from the same state, in turns, so that a machine that slows
down slows all three. Median per state, mean over states.

Cycles differ: a look-up finds nothing and the cycle is a plain step, or confidence ends a draft early. So states are sampled
evenly over cycles, and the means are weighted by how often each draft length occurred in the measured run.

Model time is time inside the layers and heads of target and drafter. The time of a drafter that runs no model (prompt lookup)
counts as overhead.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from understudy.analysis.clock import medians, undisturbed
from understudy.bench.modes import EngineMode, Turn
from understudy.core.records import Proposal
from understudy.decoding.engine import decode
from understudy.decoding.sequence import DecodeSequence
from understudy.drafting.protocols import DraftSession

STATES, PROMPTS, TRIES = 48, 8, 5


@dataclass(frozen=True)
class Sample:
    """One state: median seconds of each part, alone."""

    width: int  # drafted tokens
    one: float  # a pass over one row
    draft: float
    verify: float


@dataclass(frozen=True)
class Alone:
    """Mean seconds of the parts of a cycle, each timed alone."""

    one: float
    draft: float
    verify: float
    states: int
    runs_model: bool  # drafting runs layers or a head: its time is model time

    def ideal(self, tau: float) -> float:
        """The decode speed-up of an engine without overhead."""
        return tau * self.one / (self.draft + self.verify)

    def as_json(self) -> dict[str, Any]:
        names = {"one_row": self.one, "draft": self.draft, "verify": self.verify}
        return {**{f"{name}_ms": 1000 * seconds for name, seconds in names.items()}, "states": self.states}


def alone(mode: EngineMode, prompts: Sequence[list[int]], turns: Sequence[Turn], limit: int) -> Alone | None:
    """Time the parts of `mode`'s cycles. `turns`: its measured answers to `prompts`. None if there was no cycle at all."""
    busy = [i for i, turn in enumerate(turns) if turn.stats.cycles]
    if not busy:
        return None
    chosen = busy[:: -(-len(busy) // PROMPTS)]
    stride = max(1, sum(turns[i].stats.cycles for i in chosen) // STATES)
    samples: list[Sample] = []
    count = stride // 2
    with undisturbed():
        for index in chosen:
            sequence = mode.sequence(prompts[index], index, limit)
            for _ in decode(sequence):
                if count % stride == 0 and sequence.finished is None:
                    samples.append(_sample(sequence))
                count += 1
    return _mean(samples, sum((turn.widths for turn in turns), Counter()), mode.drafter.runs_model)


def _sample(sequence: DecodeSequence) -> Sample:
    """Each part TRIES times, in turns, with the sequence back where it was after each."""
    target, drafted = sequence.target, list[Proposal | None]()
    draft = sequence.draft

    def back() -> None:
        """Forget what was run since the last commit."""
        target.rewind(len(sequence.tokens))

    def before_drafting() -> None:
        """A drafter may do once per commit what it then need not do again: every draft begins where the loop's did."""
        nonlocal draft
        back()
        draft = sequence.draft.fork(target)

    parts: dict[str, Callable[[], object]] = {
        "one": lambda: target.verify(None),
        "draft": lambda: drafted.append(_propose(draft, sequence)),
        "verify": lambda: target.verify(drafted[-1]),
    }
    seconds = medians(parts, TRIES, target.device, {"one": before_drafting, "verify": back})
    width = drafted[-1].tokens.shape[0] if drafted[-1] else 0
    return Sample(width, **seconds)


def _propose(draft: DraftSession, sequence: DecodeSequence) -> Proposal | None:
    """What the engine would ask for now."""
    budget = sequence.budget()
    return draft.propose(budget, sequence.recorder.begin()) if budget.depth else None


def _mean(samples: Sequence[Sample], widths: Counter[int], runs_model: bool) -> Alone | None:
    """Means over the sampled states, weighted so that each draft length counts as often as it occurred."""
    if not samples:
        return None
    groups: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.width].append(sample)
    draft = verify = 0.0
    for width, cycles in widths.items():
        group = groups[min(groups, key=lambda known: abs(known - width))]
        draft += cycles * fmean(s.draft for s in group)
        verify += cycles * fmean(s.verify for s in group)
    total = sum(widths.values())
    return Alone(fmean(s.one for s in samples), draft / total, verify / total, len(samples), runs_model)
