"""Where blocks begin: which anchors a training step draws, and what it says of a part of them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dflash import reference
from dflash.reference import document
from dflash.test_objective import compare, figures, near
from understudy.drafters.dflash.objective import DFlashObjective
from understudy.drafting.objective import Features
from understudy.drafting.slots import asked


def anchored(objective: DFlashObjective, features: Features) -> tuple[Any, list[list[int]]]:
    """(output, anchors of each row) of one call."""
    found: list[list[int]] = []
    original = objective._anchors

    def seen(wanted: Tensor) -> tuple[Tensor, Tensor]:
        anchors, real = original(wanted)
        found.extend(a[r].tolist() for a, r in zip(anchors, real, strict=True))
        return anchors, real

    with patch.object(objective, "_anchors", seen):
        return objective(features), found


LONG = [[document(40, "#" * 40, 3)], [document(20, "#" * 20, 4), document(6, "###...", 5)], [document(3, "...", 1)]]


@pytest.mark.parametrize("options", [{}, {"position_weights": "dpace", "sliding_window": 3}])
def test_a_part_of_the_anchors_is_the_slow_ones_part(options):
    objective = reference.objective(reference.small(), anchors=5, num_draft_layers=1, **options)
    features = reference.features(objective, reference.pack(LONG))
    out, found = anchored(objective.train(), features)
    assert [len(row) for row in found] == [5, 5, 0]
    by_document = {(0, t) for t in found[0]} | {(1, t) if t < 20 else (2, t - 20) for t in found[1]}
    want = reference.slow(objective, [d for row in LONG for d in row], anchors=by_document)
    torch.testing.assert_close(out.loss.detach().double(), want.loss, rtol=1e-4, atol=1e-4)
    compare(reference.gradients(objective, out.loss), want.gradients)
    assert figures(out.metrics) == near(want.metrics(3, 3, "true", set()))
    total, available = figures(out.metrics)["coverage"]
    assert available == 39 + 19 + 2 and total == len({(s.document, s.t + s.k) for s in want.slots}) < available


def test_anchors_are_uniform_without_replacement():
    """Each place of an answer as often as any other, however the answers lie; 200 draws of 4 of 21."""
    objective = reference.objective(reference.small(), anchors=4, num_draft_layers=1).train()
    rows = [[document(12, "##########..", 3), document(2, "..", 5), document(13, "#" * 13, 4)]]
    features = reference.features(objective, reference.pack(rows))
    counts = torch.zeros(27)
    torch.manual_seed(0)
    wanted = asked(features.batch, 3)[0]
    for _ in range(200):
        anchors, real = objective._anchors(wanted)
        assert real.all() and len(set(anchors[0].tolist())) == 4 and anchors[0].tolist() == sorted(anchors[0].tolist())
        counts[anchors[0]] += 1
    places = [*range(9), *range(14, 26)]
    assert counts.nonzero()[:, 0].tolist() == places
    expected = 800 / len(places)
    assert float(((counts[places] - expected) ** 2 / expected).sum()) < 50  # chi-square of 20 degrees: 1 in 4000


def test_anchors_are_the_runs_own_in_training_and_fixed_in_evaluation():
    objective = reference.objective(reference.small(), anchors=5, num_draft_layers=1)
    features = reference.features(objective, reference.pack(LONG))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = (anchored(objective.train(), features)[1] for _ in range(2))
    assert first != second
    torch.set_rng_state(state)
    assert [anchored(objective, features)[1] for _ in range(2)] == [first, second]
    objective.eval()
    before = torch.get_rng_state()
    looks = [anchored(objective, features)[1] for _ in range(2)]
    assert looks[0] == looks[1] and torch.equal(torch.get_rng_state(), before)


def test_predictions_take_every_slot_whatever_the_anchors():
    few, all_ = (reference.objective(reference.small(), anchors=n, loss_chunk=7) for n in (2, 512))
    features = reference.features(few, reference.pack(LONG))
    for a, b in ((few.predictions(features), all_.predictions(features)),):
        assert torch.equal(a.slots, b.slots) and len(a.slots) == 39 + 19 + 2
        assert torch.equal(a.predicted[a.asked], b.predicted[b.asked]) and torch.equal(a.asked, b.asked)
    assert torch.equal(few.lengths(features), all_.lengths(features))
