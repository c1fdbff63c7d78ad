"""Taps by number, or as a folder of `understudy layers` proposes them."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

import tiny
from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.drafters.dflash import layout as dflash
from understudy.drafters.dflash.config import DFlashObjectiveConfig
from understudy.drafters.eagle3 import layout as eagle3
from understudy.drafters.eagle3.config import Eagle3ObjectiveConfig
from understudy.drafting.taps import even
from understudy.target.fingerprint import fingerprint

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
        ({"settings": {"fingerprint": "x"}, "taps": [{"taps": []}]}, "proposes no taps"),
        ({"settings": {"fingerprint": "x"}, "taps": [{"taps": ["a"]}]}, "proposes no taps"),
        ([1], "proposes no taps"),
    ],
)
def test_a_folder_without_a_proposal_is_refused(tmp_path, holds, said):
    if holds is not None:
        write_json(tmp_path / "layers.json", holds)
    with pytest.raises(pydantic.ValidationError, match=said):
        DFlashObjectiveConfig(taps=[str(tmp_path)])


@pytest.mark.parametrize("chosen", [dflash.chosen_taps, eagle3.chosen_taps])
def test_what_was_measured_holds_for_that_target_only(tmp_path, chosen):
    target = tiny.target("qwen3")
    found = {"settings": {"fingerprint": fingerprint(target)}, "taps": [{"taps": [1, 3]}]}
    write_json(tmp_path / "layers.json", found)
    assert chosen(target, DFlashObjectiveConfig(taps=str(tmp_path)).asked_taps) == [1, 3]
    with pytest.raises(UserError, match=rf"--taps {tmp_path} was measured on another target"):
        chosen(tiny.target("llama"), Eagle3ObjectiveConfig(taps=str(tmp_path)).taps)


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
