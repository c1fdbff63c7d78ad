"""From counts and times to what a person decides by: curves, proposed taps, exits with their predicted speed-up. JSON-ready.

Every layer is named twice: `layer` as taps count (0 = embeddings, i = output of the i-th layer counted from 1), and `target_layer_id` as
`layers[i]` counts in the model's code, from 0 (null for the embeddings).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from understudy.analysis.cost import Cost
from understudy.analysis.ranks import RankFile, merged
from understudy.analysis.tally import Tally
from understudy.analysis.taps import equal_steps, lowest_loss, progress
from understudy.core.errors import UserError
from understudy.drafting.taps import even

VERSION = 1
EXIT = ("ce", "agreement", "kl")  # what step B says of a layer
BLOCK_LAYERS, BLOCK_ROWS = (1, 2, 3, 5), (8, 16)  # block drafters whose cost is told


def findings(parts: Sequence[RankFile], asked: Sequence[int], num_taps: int) -> dict[str, Any]:
    """All that `layers.json` holds. `asked`: which of the measured layers may be proposed, none = all; `num_taps`: at most so many.

    UserError for a layer that was not measured, and if nothing was counted.
    """
    head, tally = parts[0], merged(parts)
    layers, measured = head.settings["layers"], head.settings["candidates"]
    if missing := sorted(set(asked) - {*measured, layers}):
        raise UserError(
            f"--layers {missing[0]} was not measured: step B has layers {', '.join(map(str, measured))}; measure again with it"
        )
    if not tally.samples:
        raise UserError("not one token of an answer was counted: the samples have none that follows another token")
    chosen = [layer for layer in measured if not asked or layer in asked]
    cost = head.times
    return {
        "version": VERSION,
        "settings": head.settings,
        "samples": tally.samples,
        "tokens": tally.tokens,
        "world_size": head.world_size,
        "curves": [curve(tally, layer, layer in (*chosen, layers)) for layer in range(layers + 1)],
        "taps": proposed_taps(tally, layers, chosen, num_taps, math.log(head.settings["vocab_size"])),
        "exits": exits(tally, layers, chosen, cost),
        "no_split": head.no_split,
        "cost": {**cost.as_json(), "blocks": blocks(cost)},
        "environment": head.environment,
    }


def id_of(layer: int) -> int | None:
    """Our number of a layer as `layers[i]` counts; the embeddings have none."""
    return layer - 1 if layer else None


def curve(tally: Tally, layer: int, has_exit: bool) -> dict[str, Any]:
    """One layer: cosines, and its early exit if step B looked at it. Errors are standard errors over samples."""
    early = {kind: tally.mean(f"{kind}/{layer}") for kind in EXIT if has_exit}
    errors = {f"{kind}_error": tally.error(f"{kind}/{layer}") for kind in early}
    return {
        "layer": layer,
        "target_layer_id": id_of(layer),
        "cosine": tally.mean(f"cosine/{layer}"),
        "cosine_error": tally.error(f"cosine/{layer}"),
        "cosine_last": tally.mean(f"cosine_last/{layer}"),
        "early_exit": {**early, **errors} or None,
    }


def proposed_taps(
    tally: Tally, layers: int, chosen: Sequence[int], count: int, ignorance: float
) -> list[dict[str, Any]]:
    """Sets of taps by rule, the proposed one first (`taps` says what the rules are)."""
    losses = {layer: tally.mean(f"ce/{layer}") for layer in chosen}
    done = progress({layer: tally.mean(f"cosine/{layer}") for layer in chosen}, losses, ignorance) if chosen else {}
    usable = {layer: loss for layer, loss in losses.items() if 0 < layer < layers}
    found = {
        "equal_steps": equal_steps(done, list(usable), count),
        "lowest_loss": lowest_loss(usable, count),
        "even": even(layers, count),
    }
    return [
        {
            "rule": rule,
            "taps": taps,
            "target_layer_ids": [id_of(tap) for tap in taps],
            "progress": [done.get(tap) for tap in taps],
        }
        for rule, taps in found.items()
    ]


def exits(tally: Tally, layers: int, chosen: Sequence[int], cost: Cost) -> list[dict[str, Any]]:
    """Exit layers with their best number of drafts, the fastest first; none if the target cannot be split."""
    if not cost.first:
        return []
    found = [cost.best_exit(layer, tally.mean(f"agreement/{layer}")) for layer in chosen if 0 < layer < layers]
    return [
        {
            "layer": one.layer,
            "target_layer_id": id_of(one.layer),
            "agreement": one.agreement,
            "steps": one.steps,
            "tau": one.tau,
            "cycle_ms": 1000 * one.cycle,
            "speedup": one.speedup,
        }
        for one in sorted(found, key=lambda one: -one.speedup)
    ]


def blocks(cost: Cost) -> list[dict[str, Any]]:
    """What a block drafter of some layers costs, and the tau from which on it pays."""
    found = [cost.block(n, rows) for rows in BLOCK_ROWS for n in BLOCK_LAYERS if n < cost.layers]
    return [
        {
            "draft_layers": one.draft_layers,
            "rows": one.rows,
            "draft_ms": 1000 * one.draft,
            "verify_ms": 1000 * one.verify,
            "breakeven_tau": one.breakeven,
        }
        for one in found
    ]
