"""Validation errors as one line in our words, naming each option as it was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pydantic


@dataclass(frozen=True)
class Given:
    """A value that somebody gave, and what to call it in a message: the flag as typed, or `key in file.yaml`."""

    label: str
    value: Any


def show(value: Any) -> str:
    """A value inside a message: text without quotes unless it is empty or has blanks, and never long."""
    plain = isinstance(value, str) and value and not any(c.isspace() for c in value)
    text = value if plain else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_WHOLE, _NUMBER, _SWITCH, _TEXT = "must be a whole number", "must be a number", "must be true or false", "must be text"
_SAYS = {  # pydantic's error type -> our words; {ge} and the like come from its context
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "literal_error": "must be one of {expected}",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float", "int_parsing_size"), _WHOLE),
    **dict.fromkeys(("float_parsing", "float_type"), _NUMBER),
    "finite_number": "must be a finite number",
    **dict.fromkeys(("bool_parsing", "bool_type"), _SWITCH),
    "string_type": _TEXT,
    "path_type": "must be a path",
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"),
}


def _say(error: Any, given: dict[str, Given]) -> str:
    """One pydantic error in our words, beginning with the option as it was typed."""
    kind, where, context = error["type"], error["loc"], error.get("ctx", {})
    name = str(where[0]) if where else ""
    label = given[name].label if name in given else f"--{name.replace('_', '-')}"
    if kind == "missing":
        return f"{label} is required"
    if kind in ("value_error", "assertion_error"):
        own = str(context["error"])
        return f"{label}: {own}" if name else own
    if kind in ("string_too_short", "too_short") and not error["input"]:
        return f"{label} must not be empty"
    bounds = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in context.items()}
    words = _SAYS[kind].format(**bounds) if kind in _SAYS else error["msg"].replace("Input should", "must")
    got = "null" if error["input"] is None else show(error["input"])
    if kind in ("string_type", "path_type"):  # only YAML gives what is not text: a number, a date, null
        got += "; quote it in YAML to mean the word"
    return f"{label} {words} (got {got})"


def explain(error: pydantic.ValidationError, given: dict[str, Given]) -> str:
    """A validation error as one line: one clause per option that is wrong."""
    first: dict[Any, str] = {}
    for item in error.errors(include_url=False):
        first.setdefault(item["loc"][:1], _say(item, given))
    return "; ".join(first.values())
