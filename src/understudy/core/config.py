"""The base of every configuration: strict, immutable, one description per field that feeds `--help`, YAML and the docs."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from pydantic.fields import FieldInfo


class Config(pydantic.BaseModel):
    """A frozen record of options. Unknown keys are errors; every field has a description with its unit."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


def option(default: Any, doc: str, *aliases: str, **constraints: Any) -> Any:
    """A field of a Config. `doc` is its one description; `aliases` are further flag names (hyphenated, without dashes).

    `constraints` are pydantic's (`ge`, `gt`, `le`, ...). A default of `...` makes the field required.
    """
    return pydantic.Field(default, description=doc, json_schema_extra={"aliases": list(aliases)}, **constraints)


def names_of(name: str, field: FieldInfo) -> list[str]:
    """The hyphenated names of a field, the canonical one first."""
    extra = field.json_schema_extra
    aliases = extra.get("aliases", []) if isinstance(extra, dict) else []
    assert isinstance(aliases, list)
    return [str(n).replace("_", "-") for n in (name, *aliases)]


def _parts(value: Any) -> Any:
    """`"a,b"` or `["a,b", "c"]` -> the parts, in order and without blanks; anything else as it is, for pydantic to refuse."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        return value
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def split_commas(value: Any) -> Any:
    """Names separated by commas, each once."""
    parts = _parts(value)
    return list(dict.fromkeys(parts)) if isinstance(parts, list) and all(isinstance(p, str) for p in parts) else parts


CommaList = Annotated[list[str], pydantic.BeforeValidator(split_commas)]
NumberList = Annotated[list[int], pydantic.BeforeValidator(_parts)]  # separated by commas, as often as they are given
