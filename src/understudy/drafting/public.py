"""What readers of public drafters' configurations have in common: numbers and rotary positions, checked, and refusals of one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from understudy.core.errors import UserError

STATIC_ROPE = ("default", "linear", "llama3", "yarn")


def refuse(folder: Path, what: str) -> NoReturn:
    raise UserError(f"{folder}: {what}")


def whole(values: Mapping[str, Any], key: str, folder: Path, default: int | None = None, least: int = 1) -> int:
    """A whole number of a configuration, at least `least`. UserError if it is something else, or not there and without default."""
    value = values.get(key, default)
    if value is None:
        raise UserError(f"{folder / 'config.json'} is no drafter's configuration: it has no {key}")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "positive whole number" if least == 1 else f"whole number from {least} on"
        refuse(folder, f"{key} is {value!r}, no {kind}")
    return value


def rotary(values: Mapping[str, Any], folder: Path, default: float | None = None) -> dict[str, Any]:
    """Rotary parameters, from `rope_parameters` or `rope_theta` with `rope_scaling`; `default` = the theta of a configuration without one.

    UserError where the places differ, for a kind that is not supported, and for a configuration without theta if there is no default.
    """
    both = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)]
    if not all(isinstance(rope, dict) for rope in both):
        refuse(folder, "rope_parameters or rope_scaling is no object")
    kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in both]
    found = [{k: v for k, v in rope.items() if k not in ("rope_theta", "type", "rope_type")} for rope in both]
    thetas = [place["rope_theta"] for place in (*both, values) if place.get("rope_theta") is not None]
    if not thetas and default is None:
        refuse(folder, "it has no rope_theta, and engines differ in what they take then")
    thetas = thetas or [default]
    if any(each != every[0] for every in (kinds, found, thetas) for each in every):
        refuse(
            folder,
            "rope_theta, rope_scaling and rope_parameters contradict each other: engines would read different ones",
        )
    kind, rest, theta = [*kinds, "default"][0], [*found, {}][0], thetas[0]
    if "mrope_section" in rest or kind not in STATIC_ROPE:
        kind = "mrope" if "mrope_section" in rest else kind
        refuse(folder, f"rotary positions of type {kind} are not supported; supported are {', '.join(STATIC_ROPE)}")
    if rest.pop("partial_rotary_factor", values.get("partial_rotary_factor", 1)) != 1:
        refuse(folder, "rotary positions on a part of each head (partial_rotary_factor) are not supported")
    if wrong := [key for key, value in [("rope_theta", theta), *rest.items()] if not isinstance(value, int | float)]:
        refuse(folder, f"{wrong[0]} of its rotary positions is no number")
    return {"rope_type": kind, "rope_theta": float(theta)} | (rest if kind != "default" else {})
