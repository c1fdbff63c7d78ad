"""Sums that become ratios at the last moment, and the two evaluations: held-out loss, and real acceptance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from understudy.core.errors import UserError
from understudy.training.distributed import Ranks
from understudy.training.optimizer import Masters
from understudy.training.protocols import FeatureSource, HeldOut, Measure
from understudy.training.rng import preserved_rng

# Of the accept length, between decoding and its replay: other shapes round differently, and in bf16 near ties then fall otherwise
TOLERANCE = 0.05


class Sums:
    """(sum, count) per name. Values stay on their device until `ratios`, so that adding waits for nothing."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (total, count) in metrics.items():
            total, count = total.detach(), torch.as_tensor(count, device=total.device)
            self._sums[name] = self._sums[name] + total if name in self._sums else total.clone()
            self._counts[name] = self._counts[name] + count if name in self._counts else count.clone()

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum, count) so far, of this rank."""
        return {name: (self._sums[name], self._counts[name]) for name in self._sums}

    def ratios(self, ranks: Ranks) -> dict[str, float]:
        """Sum / count over all ranks, by name; names without a count are left out. A collective: every rank calls it."""
        mine = {name: (float(self._sums[name]), float(self._counts[name])) for name in self._sums}
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        for one in ranks.gather(mine):
            for name, (total, count) in one.items():
                sums[name] += total
                counts[name] += count
        return {name: sums[name] / counts[name] for name in sums if counts[name]}


def held_out(ranks: Ranks, model: nn.Module, features: FeatureSource, batches: HeldOut) -> dict[str, float]:
    """Loss and metrics of the held-out batches as `StepOutput` defines them, of all ranks. Changes neither weights nor random state."""
    sums = Sums()
    was = model.training
    model.eval()
    try:
        with preserved_rng(), torch.no_grad():
            for batch in batches:
                given = features(batch.to(ranks.device))
                with ranks.accelerator.autocast():
                    loss, _, divisor, metrics = model(given)
                sums.add({**metrics, "loss": (loss, divisor)})
    finally:
        model.train(was)
    return sums.ratios(ranks)


def measured(ranks: Ranks, model: nn.Module, masters: Masters, measure: Measure) -> dict[str, float]:
    """What decoding on rank 0 gives with the drafter as it would be saved now; the same on every rank."""
    with ranks.whole(model):
        figures = None
        if ranks.main:
            with masters.serving(), preserved_rng():
                figures = {name: float(value) for name, value in measure().items()}
        figures = ranks.of_main(figures)
    assert "tau" in figures, "a measure says tau"
    return figures


def mismatch(real: float, replayed: float | None, simulated: float | None) -> tuple[str, str] | None:
    """Why training's figures and decoding's disagree, (cause, text); None = they agree, or nothing can be said.

    `real` = measured accept length; `replayed` = what training says of the very texts that decoding wrote; `simulated` = what it
    says of the held-out data, where a cycle begins at every slot of its answers. `serving`: `replayed` differs from `real` by more
    than `TOLERANCE`: the drafter decodes from other inputs than it is trained on. `data`: accepted drafts (tau - 1) are less than
    half of the simulated ones although a replay agrees: what differs is the text, because the target did not write the data, or
    because the prompts are of another kind. Without a replay the two cannot be told apart, and the cause is `unknown`.
    """
    if replayed is not None and abs(replayed - real) > TOLERANCE * real:
        return "serving", (
            f"train/serve mismatch: decoding had an accept length of {real:.2f}, and on the very texts that it wrote training says"
            f" {replayed:.2f}. The drafter decodes from other inputs than it is trained on: look at taps, positions, masks and"
            " whether what decodes is a stale checkpoint"
        )
    if simulated is None or simulated - 1 < 0.5 or real - 1 >= (simulated - 1) / 2:
        return None
    found = f"accept length is {simulated:.2f} simulated on the held-out data and {real:.2f} in decoding of the prompts"
    if replayed is None:
        return "unknown", (
            f"train/serve mismatch, or data that is not the target's own text: {found}. Look at taps, positions and masks, chat"
            " template and thinking mode"
        )
    return "data", (
        f"probably the data are not the target's own text: {found}, although training agrees about the text that decoding wrote."
        " If somebody else wrote the answers, or the target in another thinking mode or under another chat template, let the target"
        " itself answer the prompts again and train on that; if the prompts are of another kind than the data, measure on like ones"
    )


def require_measure(measure: Measure | None, early_stop: int) -> None:
    if early_stop and measure is None:
        raise UserError("--early-stop follows the measured accept length, and there are no prompts to measure it on")
