"""The time cap, on a simulated machine."""

from __future__ import annotations

import random

import pytest

from understudy.training.online.pace import MISSES, PAUSE, SMALLEST, Pace


def simulate(pace: Pace, cost: object, due: int = 400, batch: int = 64) -> tuple[list[tuple[int, float]], int]:
    """(samples, ms) of the updates that ran, and how many were skipped."""
    ran, skipped = [], 0
    for i in range(due):
        n = pace.size(batch)
        if n == 0:
            pace.skip()
            skipped += 1
            continue
        ms = cost(i, n)  # type: ignore[operator]
        pace.record(n, ms)
        ran.append((n, ms))
    return ran, skipped


def test_without_a_cap_every_batch_is_whole() -> None:
    ran, skipped = simulate(Pace(0), lambda i, n: 1e6)
    assert skipped == 0 and {n for n, _ in ran} == {64}


@pytest.mark.parametrize(("fixed", "each"), [(0.5, 0.02), (1.0, 0.1), (3.0, 0.1), (0.1, 0.5)])
def test_batches_grow_and_shrink_to_what_fits(fixed: float, each: float) -> None:
    ran, skipped = simulate(Pace(5.0), lambda i, n: fixed + each * n)
    assert skipped == 0
    assert all(ms <= 5.0 for _, ms in ran[5:])
    most = min(64.0, (5.0 - fixed) / each)
    assert ran[-1][0] >= 0.5 * most  # not smaller than it has to be


def test_noise_costs_small_updates_and_no_skips() -> None:
    noise = random.Random(0)
    ran, skipped = simulate(
        Pace(5.0), lambda i, n: (1 + 0.05 * n) * (8.0 if noise.random() < 0.03 else 0.9 + 0.2 * noise.random())
    )
    assert skipped == 0
    assert sum(ms <= 5.0 for _, ms in ran[5:]) >= 0.95 * len(ran[5:])
    assert sum(n for n, _ in ran) / len(ran) > 40


def test_a_machine_that_interrupts_often_still_gets_its_updates() -> None:
    noise = random.Random(1)
    ran, skipped = simulate(Pace(5.0), lambda i, n: 1 + 0.05 * n + (12.0 if noise.random() < 0.4 else 0.0), due=2000)
    assert skipped < 0.1 * 2000
    assert sum(n for n, _ in ran) / len(ran) > 30


def test_a_slow_spell_passes() -> None:
    def cost(i: int, n: int) -> float:
        return (20.0 if 100 <= i < 300 else 0.5) + 0.03 * n

    pace = Pace(5.0)
    ran, skipped = simulate(pace, cost, due=100)
    assert skipped == 0 and ran[-1][0] == 64
    ran, skipped = simulate(pace, lambda i, n: cost(i + 100, n), due=200)
    assert skipped >= 160  # nothing fits
    assert all(n == SMALLEST for n, _ in ran[-5:])  # what is tried now and then is the smallest
    assert len(ran) >= MISSES + 200 // (PAUSE + 8)
    ran, skipped = simulate(pace, lambda i, n: cost(i + 300, n), due=100)
    assert skipped <= PAUSE and ran[-1][0] == 64
