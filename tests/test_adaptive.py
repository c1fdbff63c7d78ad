"""The choice of a draft length from costs and acceptance that are given, not measured."""

from types import SimpleNamespace

import pytest

from understudy.decoding.adaptive import AdaptiveLength

STEPS = 6


def settled(acceptance: float, base: float, slope: float, cycles: int = 200) -> int:
    """The draft length after many cycles that cost `base + slope * K` seconds and accept `acceptance` of what is tried."""
    length, owed = AdaptiveLength(STEPS), 0.0
    for _ in range(cycles):
        k = length.depth()
        assert 1 <= k <= STEPS
        owed += sum(acceptance**i for i in range(1, k + 1))  # the mean number of accepted drafts, paid in whole ones
        accepted = min(k, int(owed))
        owed -= accepted
        length.update(SimpleNamespace(drafted=[0] * k, accepted=accepted, seconds={"all": base + slope * k}))
    return length.depth()


@pytest.mark.parametrize(
    ("acceptance", "slope", "expected"),
    [(0.0, 0.1, 1), (0.0, 0.001, 1), (0.5, 1.0, 1), (0.95, 0.01, STEPS), (1.0, 0.5, STEPS)],
)
def test_the_length_follows_cost_and_acceptance(acceptance, slope, expected):
    assert settled(acceptance, base=1.0, slope=slope) == expected


def test_a_dearer_draft_is_never_drafted_longer():
    lengths = [settled(0.7, base=1.0, slope=slope) for slope in (0.01, 0.1, 0.3, 1.0)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
