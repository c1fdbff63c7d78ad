"""Which of a target's hidden states a drafter reads: as measured by `understudy layers`, or evenly spread where nothing was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import pydantic

from understudy.core.config import NumberList

MEASURED = "layers.json"


def even(layers: int, count: int) -> list[int]:
    """`count` taps spread evenly from the second layer's output to the last but two (z-lab's `build_target_layer_ids`).

    Fewer in a target that is too shallow; in one of less than four layers from the first to the last but one.
    """
    low, high = (2, layers - 2) if layers >= 4 else (1, layers - 1)
    count = min(count, high - low + 1)
    if count == 1:
        return [max(1, layers // 2)]
    return [round(low + i * (high - low) / (count - 1)) for i in range(count)]


def _measured(value: Any) -> Any:
    """The first proposal of the folder of `understudy layers` that is named; numbers, and whatever else, as they are."""
    match value:
        case [str() as text] | str(text) if re.search(r"[^\d\s,+-]", text):
            path = Path(text) / MEASURED
        case _:
            return value
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        taps = found["taps"][0]["taps"]
    except OSError:
        raise ValueError(
            f"must be layers separated by commas, or a folder of `understudy layers` (there is no {path})"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"must be a folder of `understudy layers` ({path} proposes no taps)") from None
    return taps


# Layers in our count separated by commas, or a folder of `understudy layers`, which stands for what was proposed there first
Taps = Annotated[NumberList, pydantic.BeforeValidator(_measured)]
