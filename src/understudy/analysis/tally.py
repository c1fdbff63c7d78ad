"""Means over tokens with their errors, kept as sums: memory depends on the number of statistics, not on what was seen.

A mean is R = sum of values / sum of tokens, over all samples. Tokens of one sample resemble each other, so samples, not tokens, are
what is independent: with s_i the sum and n_i the tokens of sample i, m samples,

    error(R) = sqrt(m / (m - 1) * sum_i (s_i - R n_i)^2) / sum_i n_i        (ratio estimator; Cochran, Sampling Techniques, 6.3)

and the square needs the sums of s_i^2, s_i n_i and n_i^2 only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]


class Tally:
    """Sums of S named statistics. Two tallies of the same names add up to that of all their samples."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.samples = self.tokens = self.tokens_squared = 0
        # [3, S]: sum of s, of s^2 and of s n
        self.sums: Floats = np.zeros((3, len(self.names)))

    def add(self, sums: Floats, tokens: int) -> None:
        """One sample: the sum of every statistic over its tokens, [S]."""
        assert sums.shape == (len(self.names),) and tokens > 0
        self.samples += 1
        self.tokens += tokens
        self.tokens_squared += tokens**2
        self.sums += np.stack([sums, sums**2, sums * tokens])

    def merge(self, other: Tally) -> None:
        """Take in what another process counted."""
        assert self.names == other.names
        self.samples += other.samples
        self.tokens += other.tokens
        self.tokens_squared += other.tokens_squared
        self.sums += other.sums

    def mean(self, name: str) -> float:
        return float(self.sums[0, self.names.index(name)]) / self.tokens

    def error(self, name: str) -> float | None:
        """Standard error of the mean; None from a single sample."""
        if self.samples < 2:
            return None
        mean, (_, squares, cross) = self.mean(name), self.sums[:, self.names.index(name)]
        spread = max(
            float(squares - 2 * mean * cross) + mean**2 * self.tokens_squared, 0.0
        )  # rounding may fall below 0
        return math.sqrt(self.samples / (self.samples - 1) * spread) / self.tokens

    def as_json(self) -> dict[str, Any]:
        """Everything, with every digit."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "tokens_squared": self.tokens_squared,
            "sums": {name: column.tolist() for name, column in zip(self.names, self.sums.T, strict=True)},
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> Tally:
        """What `as_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        tally = Tally(list(value["sums"]))
        tally.samples, tally.tokens, tally.tokens_squared = (
            int(value[name]) for name in ("samples", "tokens", "tokens_squared")
        )
        tally.sums = np.array(list(value["sums"].values()), dtype=np.float64).reshape(-1, 3).T.copy()
        return tally
