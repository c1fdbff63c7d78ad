"""How many samples an update may take so that it stays within its milliseconds, on a machine that others use too."""

from __future__ import annotations

AIM = 0.8  # of the cap: room for what a machine does besides
SMALLEST = 4  # samples; fewer teach nothing
FIRST = 16  # samples of the first update, whose cost nobody knows
MISSES = 8  # updates of the smallest size in a row over the cap before updates are skipped
PAUSE = 24  # updates skipped before the next tries
TRIES = 2


class Pace:
    """Follows ms(n) by what the last updates took: n' = n AIM cap / ms(n), by steps of at most a half down and a half up.

    For ms(n) = a + b n this settles where ms(n) = AIM cap, whatever a and b are. Of the last two updates the better one counts: one that
    the machine interrupted says nothing of the next, and a smaller one would have been interrupted too.
    Where even the smallest update takes too long, updates are skipped, and a few are tried now and then.
    """

    def __init__(self, max_ms: float) -> None:
        self.max_ms = max_ms  # 0 = no cap: every batch is whole, and nothing depends on time
        self._fit = float(FIRST)
        self._last = 0.0  # what the update before said
        self._misses = 0
        self._pause = 0

    def size(self, batch: int) -> int:
        """How many of `batch` samples the next update may take; 0 = skip it."""
        if not self.max_ms:
            return batch
        return 0 if self._pause else min(batch, max(SMALLEST, int(self._fit)))

    def skip(self) -> None:
        """An update was due and `size` was 0."""
        self._pause -= 1

    def record(self, n: int, ms: float) -> None:
        """An update of `n` samples took `ms`."""
        if not self.max_ms:
            return
        now = n * min(1.5, max(0.5, AIM * self.max_ms / max(ms, 1e-6)))
        self._fit = max(float(SMALLEST), now, self._last)
        self._last = now
        self._misses = self._misses + 1 if n <= SMALLEST and ms > self.max_ms else 0
        if self._misses >= MISSES:
            self._pause = PAUSE
            self._misses = MISSES - TRIES
