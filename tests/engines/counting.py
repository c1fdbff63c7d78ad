"""What a serving engine counts of speculative decoding, told of our own cycles and of its drafts. No torch, no engine.

vLLM's rules (0.32: `v1/core/sched/scheduler.py`, `update_from_output` and `make_spec_decoding_stats`; `v1/spec_decode/metrics.py`):

- One draft is counted per verified pass that had drafted tokens. The prefill verifies none, and gives the first token.
- Accepted are the tokens of the pass less one, before the text is cut at its length (`_update_request_with_output` comes later).
- Passes are run while the text is shorter than `max_tokens`, each with all K drafts: nothing is drafted less at a text's end.
- Position k (from 0) counts one more when at least k + 1 drafts of a pass were accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Round:
    """One verified pass: the drafts, and how many of them the target agreed with. It adds `accepted` + 1 tokens."""

    drafted: tuple[int, ...]
    accepted: int


@dataclass
class Counts:
    """vLLM's counters of speculative decoding."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)  # position k from 0 -> passes with more than k accepted drafts

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.drafts + other.drafts,
            self.draft_tokens + other.draft_tokens,
            self.accepted_tokens + other.accepted_tokens,
            [a + b for a, b in zip(self.accepted_at, other.accepted_at, strict=True)],
        )

    @property
    def tau(self) -> float:
        """Mean tokens per pass, untrimmed: accepted + 1."""
        return 1 + self.accepted_tokens / self.drafts if self.drafts else 0.0

    @property
    def rejected(self) -> int:
        return self.draft_tokens - self.accepted_tokens


def within(rounds: Sequence[Round], length: int) -> list[Round]:
    """The passes that vLLM runs for a text of `length` tokens: those that begin while it is shorter."""
    kept, made = [], 1  # the prefill's token
    for each in rounds:
        if made >= length:
            break
        kept.append(each)
        made += each.accepted + 1
    return kept


def tally(rounds: Sequence[Round], steps: int) -> Counts:
    """vLLM's counters over `rounds`, which drafted at most `steps` tokens each. A pass without drafts counts nowhere."""
    drafted = [each for each in rounds if each.drafted]
    return Counts(
        drafts=len(drafted),
        draft_tokens=sum(len(each.drafted) for each in drafted),
        accepted_tokens=sum(each.accepted for each in drafted),
        accepted_at=[sum(each.accepted > k for each in drafted) for k in range(steps)],
    )


def places(rounds: Sequence[Round]) -> dict[int, tuple[int, ...]]:
    """Length of the new text before a pass -> what was drafted there."""
    found, made = {}, 1
    for each in rounds:
        found[made] = each.drafted
        made += each.accepted + 1
    return found


def rounds_of(drafts: Sequence[Sequence[int]], text: Sequence[int]) -> list[Round]:
    """The passes of an engine that tells its drafts and the new text that came out.

    The last pass may have been cut: of it only drafts that are still in the text count as accepted.
    """
    found, made = [], 1
    for drafted in drafts:
        accepted = 0
        while accepted < len(drafted) and text[made + accepted : made + accepted + 1] == [drafted[accepted]]:
            accepted += 1
        found.append(Round(tuple(drafted), accepted))
        made += accepted + 1
    return found


def equal_drafts(ours: Sequence[Round], theirs: Sequence[Round], until: int | None) -> tuple[int, int]:
    """(drafted tokens that both engines chose alike, drafted tokens compared), pass by pass from the same text.

    Only passes count that both began at the same place, and before the texts part at `until` (None = they do not).
    """
    mine, other = places(ours), places(theirs)
    shared = [at for at in mine.keys() & other.keys() if until is None or at <= until]
    pairs = [pair for at in shared for pair in zip(mine[at], other[at], strict=False)]
    return sum(a == b for a, b in pairs), len(pairs)


def disagreements(ours: Counts, theirs: Counts, tolerance: float) -> list[str]:
    """Where two counts differ by more than `tolerance`, as a share of the drafts. One clear line each."""
    found = []
    most = max(ours.drafts, theirs.drafts)
    if abs(ours.drafts - theirs.drafts) > tolerance * most:
        found.append(f"{theirs.drafts} passes with drafts, ours {ours.drafts}")
    for k, (a, b) in enumerate(zip(ours.accepted_at, theirs.accepted_at, strict=True), start=1):
        if abs(a - b) > tolerance * most:
            found.append(f"draft {k} accepted {b} times in {theirs.drafts} passes, ours {a} in {ours.drafts}")
    return found
