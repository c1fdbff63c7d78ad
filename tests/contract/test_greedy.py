"""Greedy output is the target's own, token for token: every drafter on every family, and enough drafts are rejected to say so."""

from __future__ import annotations

import pytest

import tiny
from contract.checks import check_adaptive, check_greedy, check_rejections, check_states
from contract.runs import BRANCHED, CHAINS, MAKERS, Maker
from understudy.drafting.spec import specs

OTHERS = [family for family in tiny.FAMILIES if family not in tiny.CONTRACT]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", MAKERS)
def test_output_is_the_targets_own(family: str, name: str) -> None:
    check_greedy(family, MAKERS[name])


@pytest.mark.parametrize("family", tiny.CONTRACT)
@pytest.mark.parametrize("name", MAKERS)
def test_states_of_committed_rows(family: str, name: str) -> None:
    check_states(family, MAKERS[name])


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("name", ["ragged", "ragged-resumed", "ragged-tree"])
def test_states_on_the_other_families(family: str, name: str) -> None:
    check_states(family, MAKERS[name])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_each_mode_rejects_and_accepts(family: str) -> None:
    check_rejections(family, CHAINS)
    check_rejections(family, BRANCHED)


@pytest.mark.parametrize("name", [name for name in specs() if name != "none"])
def test_each_drafter_is_rejected_somewhere(name: str) -> None:
    """Without rejections "identical" says nothing."""
    runs = [check_greedy(family, maker) for family in ("llama", "gemma3") for maker in _instances(name)]
    assert sum(run.rejected for run in runs) >= 40


def test_right_drafts_are_all_accepted() -> None:
    run = check_greedy("cohere2", MAKERS["right"], count=31)
    assert run.rejected == 0 and len(run.cycles) == 7  # the prefill's token, then five tokens a cycle
    run = check_greedy("cohere2", MAKERS["right-tree"], count=31)
    assert len(run.cycles) == 7 and all(cycle.accepted == 4 for cycle in run.cycles[1:])


def test_wrong_drafts_are_all_rejected() -> None:
    for name in ("wrong", "wrong-tree", "null-0"):
        run = check_greedy("gemma2", MAKERS[name], count=12)
        assert run.accepted == 0 and len(run.cycles) == 12


@pytest.mark.parametrize("name", ["ragged", "ragged-tree", "ragged-resumed", "early-exit-1", "small-model-1", "none-0"])
def test_draft_length_does_not_matter(name: str) -> None:
    check_adaptive("mistral", MAKERS[name])


def _instances(name: str) -> list[Maker]:
    return [maker for maker in MAKERS.values() if maker.name.rpartition("-")[0] == name]
