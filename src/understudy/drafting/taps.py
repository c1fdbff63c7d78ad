"""Which of a target's hidden states a drafter reads, where nothing was measured."""

from __future__ import annotations


def even(layers: int, count: int) -> list[int]:
    """`count` taps spread evenly from the second layer's output to the last but two (z-lab's `build_target_layer_ids`).

    Fewer in a target that is too shallow; in one of less than four layers from the first to the last but one.
    """
    low, high = (2, layers - 2) if layers >= 4 else (1, layers - 1)
    count = min(count, high - low + 1)
    if count == 1:
        return [max(1, layers // 2)]
    return [round(low + i * (high - low) / (count - 1)) for i in range(count)]
