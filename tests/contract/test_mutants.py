"""Every planted fault is noticed (see `tests/mutants.py`), by checks that pass without it."""

from __future__ import annotations

import pytest

from mutants import CHECKS, MUTANTS, Mutant, killer


@pytest.mark.parametrize("name", CHECKS)
def test_checks_pass_without_a_fault(name: str) -> None:
    CHECKS[name]()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_killed(mutant: Mutant) -> None:
    assert killer(mutant) is not None, f"the fault goes unnoticed: {mutant.name}"
