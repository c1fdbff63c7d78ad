"""How many tokens to draft next: a fixed number, or the one that past costs and acceptance make best.

The choice depends on past cycles only, never on the drafts at hand, so it is legal under every verification rule.
"""

from __future__ import annotations

from typing import Protocol

from understudy.core.records import Cycle

DECAY = 0.95  # weight of the past in the running means
FIRST = 0.6  # acceptance assumed before anything was seen


class DraftLength(Protocol):
    steps: int  # the most it will say

    def depth(self) -> int: ...

    def update(self, cycle: Cycle) -> None: ...


class FixedLength:
    """Always K."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def depth(self) -> int:
        return self.steps

    def update(self, cycle: Cycle) -> None:
        """Nothing to learn."""


class AdaptiveLength:
    """Maximises expected tokens per second, K from 0 to `steps`.

    With conditional acceptance a per position, a cycle of K drafts yields 1 + a + ... + a^K tokens. Its cost is fitted as
    base + slope * K over exponentially weighted past cycles.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._accepted, self._tried = FIRST, 1.0
        self._n = self._k = self._kk = self._t = self._kt = 0.0

    def depth(self) -> int:
        acceptance = self._accepted / self._tried
        base, slope = self._cost()
        if base is None:
            # widths must differ before a slope can be fitted
            return self.steps if self._n < 1 else min(self.steps, max(1, self.steps // 2))
        best, best_rate, tokens, term = 0, 0.0, 0.0, 1.0
        for k in range(self.steps + 1):
            tokens += term
            term *= acceptance
            rate = tokens / max(base + slope * k, 1e-9)
            if rate > best_rate:
                best, best_rate = k, rate
        # at zero nothing would be learnt any more: keep one draft as a probe
        return min(self.steps, max(best, 1))

    def _cost(self) -> tuple[float | None, float]:
        if self._n < 1:
            return None, 0.0
        spread = self._n * self._kk - self._k * self._k
        if spread < 1e-3 * self._n * self._n:
            return None, 0.0
        slope = max(0.0, (self._n * self._kt - self._k * self._t) / spread)
        return max(1e-9, (self._t - slope * self._k) / self._n), slope

    def update(self, cycle: Cycle) -> None:
        k, seconds = len(cycle.drafted), sum(cycle.seconds.values())
        tried = min(cycle.accepted + 1, k)  # positions whose outcome was seen: all accepted ones and the first reject
        self._accepted = DECAY * self._accepted + cycle.accepted
        self._tried = DECAY * self._tried + tried
        for name, value in (("_n", 1.0), ("_k", k), ("_kk", k * k), ("_t", seconds), ("_kt", k * seconds)):
            setattr(self, name, DECAY * getattr(self, name) + value)
