"""What decoding did, as sums and counts; ratios are taken at the very end.

Cycle 0 is the prefill: its token and its time are outside every mean. `tau` counts committed tokens, after cutting at a stop;
acceptance counts what the target agreed with, before cutting.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from understudy.core.records import Cycle
from understudy.telemetry.stopwatch import SECTIONS


@dataclass
class Stats:
    """Sums over the cycles of one or more turns."""

    turns: int = 0
    cycles: int = 0
    tokens: int = 0  # committed after the first one
    drafted: int = 0
    accepted: int = 0
    accept_hist: Counter[int] = field(default_factory=Counter)  # accepted drafts -> cycles
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECTIONS, 0.0))
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def add(self, cycle: Cycle) -> None:
        """Count a cycle. Times are those of the cycle itself; what callers do between cycles is theirs."""
        spent = sum(cycle.seconds.values())
        if cycle.index == 0:
            self.turns += 1
            self.prefill_s += spent
            return
        self.cycles += 1
        self.tokens += len(cycle.committed)
        self.drafted += len(cycle.drafted)
        self.accepted += cycle.accepted
        self.accept_hist[cycle.accepted] += 1
        self.decode_s += spent
        for section, seconds in cycle.seconds.items():
            self.seconds[section] += seconds

    def merge(self, other: Stats) -> None:
        for name in ("turns", "cycles", "tokens", "drafted", "accepted", "prefill_s", "decode_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.accept_hist.update(other.accept_hist)
        for section, seconds in other.seconds.items():
            self.seconds[section] += seconds

    @property
    def tau(self) -> float:
        """Mean tokens committed per cycle."""
        return self.tokens / self.cycles if self.cycles else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def rejected(self) -> int:
        return self.drafted - self.accepted

    @property
    def acc_at(self) -> list[float]:
        """Joint acceptance per position k = 1, 2, ...: share of cycles whose first k drafts were all accepted."""
        longest = max(self.accept_hist, default=0)
        reached = [sum(n for a, n in self.accept_hist.items() if a >= k) for k in range(1, longest + 1)]
        return [n / self.cycles for n in reached]

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens (without the first) / decode seconds."""
        return self.tokens / self.decode_s if self.decode_s else 0.0

    def summary(self) -> dict[str, Any]:
        """The ratios, JSON-ready."""
        return {
            "tokens": self.tokens,
            "cycles": self.cycles,
            "tau": self.tau,
            "acceptance_rate": self.acceptance_rate,
            "acc_at": self.acc_at,
            "accept_hist": {str(k): self.accept_hist[k] for k in sorted(self.accept_hist)},
            "rejected_drafts": self.rejected,
            "prefill_s": self.prefill_s,
            "decode_s": self.decode_s,
            "tokens_per_s": self.tokens_per_s,
        }
