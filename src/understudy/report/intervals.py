"""What a few repeats say about a mean: Student's t interval, also along a curve.

With three seeds the t quantile is 4.30, not 1.96: the interval is wide because three runs say little about their own spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from understudy.core.errors import UserError

Array: TypeAlias = NDArray[np.float64]
Curve: TypeAlias = tuple[Sequence[float] | Array, Sequence[float] | Array]  # x, y

CONFIDENCE = 0.95
POINTS = 300  # of an aligned curve


class Interval(NamedTuple):
    """A mean of n values and its 95 % t interval, mean - half to mean + half. One value has no spread, hence no interval."""

    mean: float
    half: float | None
    n: int

    @property
    def sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.half is not None and abs(self.mean) > self.half


def _central(t: float, df: int) -> float:
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = total = (cosine if df > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, df - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@cache
def t_quantile(df: int) -> float:
    """t with P(|T| <= t) = 0.95, for df = 1, 2, ... degrees of freedom."""
    assert df >= 1
    low, high = 1.9, 13.0  # df = infinity: 1.960; df = 1: 12.706
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central(middle, df) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def interval(values: Sequence[float]) -> Interval | None:
    """Mean and t interval of independent repeats; None of no values."""
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Interval(mean, t_quantile(n - 1) * math.sqrt(variance / n), n)


def align(curves: Sequence[Curve], points: int = POINTS) -> tuple[Array, Array]:
    """Curves at common places: x [P], P = `points` even steps over the range that all have, and y [n, P], linear in between."""
    ordered = []
    for x, y in curves:
        xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        assert xs.shape == ys.shape and xs.ndim == 1 and xs.size, "a curve is as many y as x, at least one"
        order = np.argsort(xs, kind="stable")
        ordered.append((xs[order], ys[order]))
    first, last = max(xs[0] for xs, _ in ordered), min(xs[-1] for xs, _ in ordered)
    if first > last:
        raise UserError(
            f"curves without a common range cannot be compared: one begins at {first:g}, one ends at {last:g}"
        )
    places = np.linspace(first, last, points) if first < last else np.array([first])
    return places, np.stack([np.interp(places, xs, ys) for xs, ys in ordered])


def band(curves: Sequence[Curve], points: int = POINTS) -> tuple[Array, Array, Array | None]:
    """x [P], mean [P] and the half width [P] of the pointwise t interval of repeated curves; None for one curve."""
    x, y = align(curves, points)
    n = len(y)
    half = t_quantile(n - 1) * y.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else None
    return x, y.mean(axis=0), half
