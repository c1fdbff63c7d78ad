"""Which layers a drafter of taps (EAGLE-3, DFlash) should read: three rules, from nothing to measurements.

- `even` (`drafting.taps`): spread evenly, from the second layer's output to the last but two. What DFlash has without a measurement.
- `lowest_loss`: the layers whose early exit has the lowest cross-entropy. Taken literally, where loss falls with every layer, it gives the
  last few layers, which say nearly the same.
- `equal_steps`, the one proposed: taps at equal steps of progress from the embeddings to the last usable layer. Progress is the mean of
  two curves, each scaled to 0..1: how far the cosine to the final state has risen (step A), and how far the early-exit loss has fallen
  below that of knowing nothing, ln V (step B). Both count the best value so far: a layer that falls back adds nothing. With n taps, the
  j-th lies where j/n of the progress is made, so where the target decides quickly taps are dense, and each says about as much new.

The last layer's output is never tapped: taps are 1 to L - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate


def lowest_loss(losses: Mapping[int, float], count: int) -> list[int]:
    """The `count` layers with the lowest early-exit loss, ascending."""
    return sorted(sorted(losses, key=lambda layer: losses[layer])[:count])


def progress(cosines: Mapping[int, float], losses: Mapping[int, float], ignorance: float) -> dict[int, float]:
    """Layer -> 0..1, for the layers of `losses`; it never falls. `ignorance`: the loss of knowing nothing, ln V, in nats.

    A curve that does not move says nothing and is left out; if neither moves, layers make progress one by one.
    """
    order = sorted(losses)
    rise = _scaled([cosines[layer] for layer in order])
    fall = _scaled([max(ignorance - losses[layer], 0.0) for layer in order])
    curves = [curve for curve in (rise, fall) if curve] or [_scaled([float(layer) for layer in order]) or [1.0]]
    return {layer: sum(values) / len(curves) for layer, *values in zip(order, *curves, strict=True)}


def _scaled(values: Sequence[float]) -> list[float]:
    """The highest value so far, as a share of the way from the first to the highest; nothing if there is no way."""
    best = list(accumulate(values, max))
    way = best[-1] - best[0]
    return [(value - best[0]) / way for value in best] if way > 0 else []


def equal_steps(done: Mapping[int, float], usable: Sequence[int], count: int) -> list[int]:
    """The `count` layers of `usable`, ascending, whose progress `done` is nearest to 1/n, 2/n, ..., 1 (least squares, exactly).

    Fewer if there are fewer. Of equally good choices the lowest layers.
    """
    layers = sorted(usable)
    count = min(count, len(layers))
    best: list[tuple[float, list[int]]] = [(0.0, []), *[(float("inf"), [])] * count]  # by number of taps so far
    for layer in layers:
        for taken in range(count, 0, -1):
            error, taps = best[taken - 1]
            error += (done[layer] - taken / count) ** 2
            if error < best[taken][0] - 1e-12:
                best[taken] = (error, [*taps, layer])
    return best[count][1]
