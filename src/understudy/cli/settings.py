"""From what was typed and what a YAML file says to one validated Config, or to one line that says what is wrong.

Precedence: flag > YAML > default. An unknown key is an error, and so are two names of one option with unequal values.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic

from understudy.cli import spell
from understudy.core.config import Config, names_of
from understudy.core.errors import UserError
from understudy.core.explain import Given, explain, show
from understudy.core.strict_yaml import read_yaml

C = TypeVar("C", bound=Config)


def kind_of(annotation: Any) -> tuple[Any, bool]:
    """The type of one value of a field, and whether the field takes several: `list[int] | None` -> (int, True).

    A mapping takes several KEY=VALUE pairs: `dict[int, float]` -> (dict, True).
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(args[0])
    if origin in (Union, types.UnionType):
        present = [a for a in args if a is not type(None)]
        return kind_of(present[0]) if len(present) == 1 else (str, False)
    if origin is dict:
        return dict, True
    if origin in (list, tuple, set, frozenset) or origin is typing.get_origin(Sequence[str]):
        return kind_of(args[0])[0], True
    return annotation, False


def _same(a: Any, b: Any) -> bool:
    """Equal values, however written: `5e-5` and `0.00005` are."""
    if a == b:
        return True
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return False


def by_field(config: type[Config], entries: Iterable[tuple[str, Given]]) -> dict[str, Given]:
    """Sort (hyphenated name, value) entries by field; the names must be known."""
    field_of = {alias: name for name, field in config.model_fields.items() for alias in names_of(name, field)}
    found: dict[str, Given] = {}
    for alias, given in entries:
        name = field_of[alias]
        if name in found and not _same(found[name].value, given.value):
            raise UserError(f"{found[name].label} and {given.label} are one option and have different values; give one")
        found.setdefault(name, given)
    return found


def options_in(config: type[Config], path: Path) -> dict[str, Given]:
    """The options in a YAML file, by field. Keys take hyphens or underscores, and every alias."""
    content = read_yaml(path, f"--config {path}")
    if not isinstance(content, dict | None):
        raise UserError(f"{path} must hold `option: value` lines, not a {type(content).__name__}")
    known = [alias for name, field in config.model_fields.items() for alias in names_of(name, field)]
    entries = []
    for key, value in (content or {}).items():
        alias = spell(str(key))
        if alias not in known:
            near = difflib.get_close_matches(alias, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "--help lists the known ones"
            raise UserError(f"unknown key '{key}' in {path}; {hint}")
        entries.append((alias, Given(f"{key} in {path}", value)))
    return by_field(config, entries)


def _shape(annotation: Any, given: Given) -> Any:
    """The value in the shape of its field: one value of a list field becomes a list, KEY=VALUE pairs become a mapping."""
    kind, several = kind_of(annotation)
    value = given.value
    if several and isinstance(value, str | int | float):
        value = [value]
    if kind is dict and isinstance(value, list):
        pairs = [str(pair).partition("=") for pair in value]
        if bad := ["".join(pair) for pair in pairs if not pair[1]]:
            raise UserError(f"{given.label} must be KEY=VALUE (got {show(bad[0])})")
        value = {key.strip(): text.strip() for key, _, text in pairs}
    return value


def resolve(config: type[C], flags: Iterable[tuple[str, Given]], file: Path | None = None) -> C:
    """The config that flags (hyphenated name, value) and a YAML file make together."""
    given = (options_in(config, file) if file is not None else {}) | by_field(config, flags)
    values = {name: _shape(config.model_fields[name].annotation, item) for name, item in given.items()}
    try:
        return config.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(explain(error, given)) from None


def choices_of(kind: Any) -> tuple[Any, ...] | None:
    """The values of a Literal, or None."""
    return get_args(kind) if get_origin(kind) is Literal else None
