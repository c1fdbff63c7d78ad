"""Taps by number, or as a folder of `understudy layers` proposes them."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from understudy.core.files import write_json
from understudy.drafters.dflash.config import DFlashObjectiveConfig
from understudy.drafters.eagle3.config import Eagle3ObjectiveConfig
from understudy.drafting.taps import even

MEASURED = Path(__file__).parents[1] / "benchmarks/results/layers-pocket"


@pytest.mark.parametrize("config", [DFlashObjectiveConfig, Eagle3ObjectiveConfig])
@pytest.mark.parametrize(
    ("given", "taps"),
    [
        (["1,3", "6"], [1, 3, 6]),
        ("2, 4", [2, 4]),
        ([7], [7]),
        (str(MEASURED), [1, 3, 6, 8, 11]),
        ([str(MEASURED)], [1, 3, 6, 8, 11]),
    ],
)
def test_numbers_or_what_was_measured(config, given, taps):
    assert config(taps=given).taps == taps


@pytest.mark.parametrize(
    ("holds", "said"),
    [
        (None, "there is no .*layers.json"),
        ({"rank": 0}, "proposes no taps"),
        ({"taps": []}, "proposes no taps"),
        ([1], "proposes no taps"),
    ],
)
def test_a_folder_without_a_proposal_is_refused(tmp_path, holds, said):
    if holds is not None:
        write_json(tmp_path / "layers.json", holds)
    with pytest.raises(pydantic.ValidationError, match=said):
        DFlashObjectiveConfig(taps=[str(tmp_path)])


def test_numbers_that_are_none_are_refused():
    for wrong in (["1,x"], ["1", "runs/layers"], ["-"]):
        with pytest.raises(pydantic.ValidationError):
            DFlashObjectiveConfig(taps=wrong)


@pytest.mark.parametrize(
    ("layers", "count", "taps"),
    [(12, 5, [2, 4, 6, 8, 10]), (36, 5, [2, 10, 18, 26, 34]), (5, 5, [2, 3]), (3, 5, [1, 2]), (12, 1, [6])],
)
def test_even_ones(layers, count, taps):
    assert even(layers, count) == taps
