"""Which of a target's hidden states a drafter reads: as measured by `understudy layers`, or evenly spread where nothing was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from understudy.core.config import NumberList
from understudy.core.errors import UserError

if TYPE_CHECKING:
    from understudy.target.target import Target

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


class Proposed(list[int]):
    """Taps that were measured to be good for the target with this fingerprint."""

    def __init__(self, taps: Sequence[int], fingerprint: str, folder: str) -> None:
        super().__init__(taps)
        self.fingerprint, self.folder = fingerprint, folder


def check_measured(taps: Sequence[int], target: Target) -> None:
    """UserError for taps that were measured on another target."""
    from understudy.target.fingerprint import fingerprint

    if isinstance(taps, Proposed) and taps.fingerprint != fingerprint(target):
        raise UserError(
            f"--taps {taps.folder} was measured on another target than {target.name or 'this one'}: measure this one, `understudy layers`"
        )


def _measured(value: Any, number_list: pydantic.ValidatorFunctionWrapHandler) -> list[int]:
    """Numbers as they are; for a folder of `understudy layers` the first of its proposals."""
    match value:
        case [str() as text] | str(text) if re.search(r"[^\d\s,+-]", text):
            path = Path(text) / MEASURED
        case _:
            numbers: list[int] = number_list(value)
            return numbers
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        taps = Proposed(number_list(found["taps"][0]["taps"]), found["settings"]["fingerprint"], text)
        if not taps:
            raise ValueError
    except OSError:
        raise ValueError(
            f"must be layers separated by commas, or a folder of `understudy layers` (there is no {path})"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"must be a folder of `understudy layers` ({path} proposes no taps)") from None
    return taps


# Layers in our count separated by commas, or a folder of `understudy layers`, which stands for what was proposed there first
Taps = Annotated[NumberList, pydantic.WrapValidator(_measured)]
