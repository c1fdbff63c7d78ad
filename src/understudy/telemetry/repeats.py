"""How much a text repeats itself. A small model that loops makes every drafter look good, so this stands beside every tau."""

from __future__ import annotations

from collections.abc import Sequence


def repeat_share(ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of `ids` that occurred before: 1 - distinct / total. Fewer than n tokens have none: 0.0."""
    total = len(ids) - n + 1
    if total <= 0:
        return 0.0
    return (total - len({tuple(ids[i : i + n]) for i in range(total)})) / total
