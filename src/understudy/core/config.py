"""The base of every configuration: strict, immutable, one description per field that feeds `--help`, YAML and the docs."""

from __future__ import annotations

from typing import Any

import pydantic


class Config(pydantic.BaseModel):
    """A frozen record of options. Unknown keys are errors; every field has a description with its unit."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, validate_default=True)


def option(default: Any, doc: str, *aliases: str, **constraints: Any) -> Any:
    """A field of a Config. `doc` is its one description; `aliases` are further flag names (hyphenated, without dashes).

    `constraints` are pydantic's (`ge`, `gt`, `le`, ...). A default of `...` makes the field required.
    """
    return pydantic.Field(default, description=doc, json_schema_extra={"aliases": list(aliases)}, **constraints)
