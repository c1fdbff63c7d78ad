"""Decoding a text and asking the objective about that very text: do they say the same, draft by draft and cycle by cycle?"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import tiny
from eagle3 import reference
from eagle3.reference import Document
from understudy.core.files import write_json
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.drafters.eagle3.config import Eagle3Config
from understudy.drafters.eagle3.drafter import Eagle3Drafter
from understudy.drafters.eagle3.files import read_drafter
from understudy.drafters.eagle3.objective import Eagle3Objective

NEW = 40
PROMPT = tiny.prompt(12, 3)


def met(drafter: Eagle3Drafter, prompt: list[int], new: int = NEW, chunk: int = 512) -> tuple[list[int], list[Any]]:
    """(text, [(tokens before the cycle, drafts, accepted)]) of greedy decoding with the drafter."""
    sequence = DecodeSequence(drafter.target, drafter, DecodeParams(max_new_tokens=new, prefill_chunk=chunk))
    sequence.prefill(prompt)
    cycles, before = [], len(prompt)
    for cycle in decode(sequence):
        if cycle.index:
            cycles.append((before, cycle.drafted, cycle.accepted))
        before = len(sequence.tokens)
    return list(sequence.tokens), cycles


def agree(objective: Eagle3Objective, prompt: list[int], drafter: Eagle3Drafter | None = None, **how: int) -> list[int]:
    """Every cycle of decoding with `drafter`, by default the objective's own, is the one that `predictions` and `lengths` tell.

    Returns how many drafts were accepted, by cycle.
    """
    objective.eval()
    text, cycles = met(drafter or objective.drafter, prompt, **how)
    features = reference.features(
        objective, reference.pack([[Document(text, [i >= len(prompt) for i in range(len(text))])]])
    )
    said, lengths = objective.predictions(features), objective.lengths(features)[0].tolist()
    at = len(prompt) + 1
    for before, drafts, accepted in cycles:
        assert before == at  # walking the text by `lengths` meets the same cycles
        column = said.slots.tolist().index(before - 1)
        for k, draft in enumerate(drafts):
            assert bool(said.asked[k, column]) and draft == int(said.predicted[k, column])
            assert (draft == text[before + k]) == (draft == int(said.target[k, column]))
            if draft != text[before + k]:
                break  # from here on the objective reads the true token, and decoding its own
        assert accepted == min(lengths[before - 1], len(drafts))
        at += accepted + 1
    assert at == len(text)
    return [accepted for *_, accepted in cycles]


def text_of(family: str, prompt: list[int]) -> list[list[Document]]:
    answer = tiny.reference(family, prompt, NEW)
    return [[Document(prompt + answer, [False] * len(prompt) + [True] * len(answer))]]


@contextmanager
def planted(owner: Any, name: str, fault: Callable[..., Any]) -> Iterator[None]:
    """`fault(original, *args)` instead of a function of ours. What is checked inside has to fail."""
    original = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        return fault(original, *args, **kwargs)

    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    with patch.object(owner, name, staticmethod(faulty) if static else faulty), pytest.raises(AssertionError):
        yield


@functools.cache
def learned(**options: Any) -> Eagle3Objective:
    """A drafter that knows a text of the target half; trained on four steps unless `options` say otherwise."""
    objective = reference.objective(tiny.target("llama"), **{"ttt_length": 4, "spread": 0.05, **options})
    return reference.taught(objective, text_of("llama", PROMPT))


def served(objective: Eagle3Objective, folder: Path) -> Eagle3Drafter:
    """What is read back of a checkpoint."""
    model = read_drafter(folder, objective.drafter.target)
    return Eagle3Drafter(objective.drafter.target, model, Eagle3Config(steps=objective.drafter.steps))


def change(folder: Path, **keys: Any) -> None:
    write_json(folder / "config.json", {**json.loads((folder / "config.json").read_text()), **keys})
