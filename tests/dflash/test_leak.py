"""What a block reads: context strictly before its anchor, of its own document, and the anchor's token. Nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dflash import reference
from dflash.reference import Document, document
from dflash.serving import planted
from understudy.drafters.dflash import attention
from understudy.drafters.dflash import model as model_module
from understudy.drafters.dflash.attention import Group
from understudy.drafters.dflash.model import DFlashModel
from understudy.drafting.objective import Batch

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"sliding_window": 3},
    "Markov": {"markov_rank": 2},
}


def moved(row: list[Document], what: str, options: dict[str, Any]) -> set[tuple[int, int]]:
    """(token, anchor): the block there says something else when that token, or the taps of that token, are others.

    The row once per token, each copy with one token changed, and a block at every token: one pass.
    """
    model: DFlashModel = reference.objective(reference.small(), **options).drafter.model
    length = sum(len(d.tokens) for d in row)
    batch = reference.pack([row] * (length + 1))  # the last one stays as it is
    generator = torch.Generator().manual_seed(length)
    taps = torch.randn(1, length, model.fc.in_features, generator=generator).repeat(length + 1, 1, 1)
    each = torch.arange(length)
    if what == "taps":
        taps[each, each] += 1
    else:
        batch.ids[each, each] = (batch.ids[each, each] + 1) % reference.V
    with torch.no_grad():
        states = model.blocks(taps, batch, each.repeat(length + 1, 1), 4)
    apart = (states[:-1] - states[-1]).abs().amax((-1, -2)) > 1e-5
    return {(j, a) for j, a in apart.nonzero().tolist()}


def check(row: list[Document], kind: str) -> None:
    options = OPTIONS[kind]
    owner = [n for n, d in enumerate(row) for _ in d.tokens]
    window = options.get("sliding_window") or len(owner) + 1
    length = range(len(owner))
    assert moved(row, "ids", options) == {(j, j) for j in length}
    assert moved(row, "taps", options) == {
        (j, a) for j in length for a in length if owner[j] == owner[a] and 0 < a - j < window
    }


ROW = [document(n, "#" * n, n) for n in (3, 6, 2)]


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from(sorted(OPTIONS)), st.sampled_from([1, 12, 128])
)
def test_a_block_reads_what_lies_before_it_and_its_token(lengths: list[int], kind: str, together: int) -> None:
    with patch.object(attention, "TOGETHER", together):
        check([document(n, "#" * n, n) for n in lengths], kind)


def batch_is(**fields: Callable[[Batch], Tensor]) -> Callable[..., Any]:
    def fault(original: Any, self: DFlashModel, taps: Tensor, batch: Batch, *rest: Any) -> Any:
        return original(self, taps, dataclasses.replace(batch, **{n: f(batch) for n, f in fields.items()}), *rest)

    return fault


def with_the_anchor(original: Any, anchors: Tensor, distance: Tensor, size: int) -> Any:
    return original(anchors, torch.nn.functional.pad(distance, (1, 0))[..., :-1], size)


def one_block(original: Any, self: Group, *kind: Any) -> Tensor:
    """All blocks of a row as one: they see each other (SpecForge #470)."""
    mask: Tensor = original(self, *kind).clone()
    mask[..., -(self.rows.stop - self.rows.start) :] = 0
    return mask


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (model_module, "grouped", with_the_anchor),
        (Group, "_mask", one_block),
        (DFlashModel, "blocks", batch_is(documents=lambda batch: torch.zeros_like(batch.documents))),
        (
            DFlashModel,
            "blocks",
            batch_is(ids=lambda batch: batch.ids.roll(-1, 1)),
        ),  # a block begins with what it is to draft
    ],
)
def test_planted_leaks_are_found(owner: Any, name: str, fault: Any, kind: str) -> None:
    check(ROW, kind)
    with planted(owner, name, fault):
        check(ROW, kind)


def test_teachers_and_labels_are_the_only_other_thing_that_later_text_is() -> None:
    """The loss reads tokens after the anchor as labels; what the drafter says does not change with them."""
    objective = reference.objective(reference.small())
    features = reference.features(objective, reference.pack([[document(9, ".########", 2)]]))
    before = objective.predictions(features)
    for j in range(2, 9):
        taps = {tap: x.clone() for tap, x in features.taps.items()}
        for x in taps.values():
            x[0, j:] += 1
        ids = features.batch.ids.clone()
        ids[0, j + 1 :] = (ids[0, j + 1 :] + 1) % reference.V
        other = dataclasses.replace(features, taps=taps, batch=dataclasses.replace(features.batch, ids=ids))
        after = objective.predictions(other)
        early = before.slots <= j
        assert torch.equal(after.pred_conf[:, early], before.pred_conf[:, early]) and int(early.sum()) == min(j, 7)
