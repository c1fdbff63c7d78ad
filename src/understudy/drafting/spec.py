"""SPEC: how a drafter introduces itself, and how `NAME[:PATH][,key=value...]` becomes a drafter.

Drafters are found by listing `understudy.drafters`: each file or folder there exports one SPEC or several in `SPECS`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pydantic
import yaml

from understudy.core.config import Config, names_of, option
from understudy.core.errors import UserError
from understudy.core.explain import Given, explain
from understudy.drafting.objective import Objective, TokenCounts
from understudy.drafting.protocols import Drafter
from understudy.target.target import Target
from understudy.telemetry.options import AlignTelemetryParams

PACKAGE = "understudy.drafters"
TELEMETRY = set(AlignTelemetryParams.model_fields)


class DrafterConfig(AlignTelemetryParams):
    """Options that every drafter has. Telemetry's work inside the drafter's text too."""

    steps: int = option(6, "most tokens drafted in a row per cycle", "num-speculative-tokens", ge=0)

    def unread(self) -> dict[str, str]:
        """Options that nothing reads beside the others as they are -> why. A drafter's text may not give one."""
        return {}


@dataclass(frozen=True)
class Spec:
    """One drafter: its name on the command line, its options, how it is built, and small instances for the contract tests."""

    name: str
    summary: str  # one line for `--help`
    config: type[DrafterConfig]
    build: Callable[[Any, Target, str | None], Drafter]  # (config, target, path)
    tiny: Callable[[Target], list[Drafter]]  # instances for a small target, one per mode worth testing
    takes_path: bool = False
    objective: Callable[[Any, Target, Path | None, TokenCounts], Objective] | None = (
        None  # offline training: (config, target, warm start, how often each token is supervised)
    )
    objective_config: type[Config] | None = None  # the options of that


@cache
def specs() -> dict[str, Spec]:
    """All drafters, by name."""
    package = importlib.import_module(PACKAGE)
    found: dict[str, Spec] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        for spec in importlib.import_module(f"{PACKAGE}.{module}").SPECS:
            assert spec.name not in found, f"two drafters are called {spec.name}"
            found[spec.name] = spec
    return found


def parse(text: str) -> tuple[Spec, str | None, dict[str, str]]:
    """`NAME[:PATH][,key=value...]` -> (spec, path, options as text)."""
    head, *pairs = text.split(",")
    name, colon, path = head.partition(":")
    if colon and not path:
        raise UserError(
            f"drafter {text!r} has no path behind its colon: name a checkpoint or run, or leave the colon out"
        )
    name = name.strip().replace("_", "-")
    if name not in specs():
        near = difflib.get_close_matches(name, specs(), n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown drafter {name!r}{hint}; known drafters: {', '.join(specs())}")
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"drafter option {pair!r} of {name} is not key=value")
        options[key.strip().replace("-", "_")] = value.strip()
    spec = specs()[name]
    if path and not spec.takes_path:
        raise UserError(f"drafter {name} takes no path (got {path!r})")
    return spec, path or None, options


def configured(text: str, **defaults: Any) -> tuple[Spec, str | None, DrafterConfig]:
    """(spec, path, config) that `text` names. `defaults` apply where `text` says nothing and the drafter has the option.

    UserError for a text that is wrong, or gives an option that nothing would read; a default that nothing reads is no mistake.
    """
    spec, path, options = parse(text)
    names = spellings(spec.config)
    values = {key: value for key, value in defaults.items() if key in spec.config.model_fields and value is not None}
    for key, value in options.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            known = ", ".join(spec.config.model_fields)
            raise UserError(f"drafter {spec.name} has no option {key!r}{hint}; it has: {known}")
        try:
            values[names[key]] = yaml.safe_load(value) if value else value
        except yaml.YAMLError:
            raise UserError(f"drafter {spec.name}: cannot read {key}={value}") from None
    try:
        config = spec.config.model_validate(values)
    except pydantic.ValidationError as error:
        labels = {names[key]: Given(f"drafter {spec.name}: {key}", value) for key, value in options.items()}
        raise UserError(explain(error, labels)) from None
    unread = config.unread()
    if ignored := [key for key in options if names[key] in unread]:
        raise UserError(f"drafter {spec.name}: {ignored[0]} {unread[names[ignored[0]]]}")
    return spec, path, config


def build(text: str, target: Target, **defaults: Any) -> Drafter:
    """The drafter that `text` names, for `target`; `defaults` as in `configured`."""
    spec, path, config = configured(text, **defaults)
    drafter = spec.build(config, target, path)
    drafter.telemetry = {name: getattr(config, name) for name in TELEMETRY & config.model_fields_set}
    return drafter


def telemetry_of(drafter: Drafter, config: AlignTelemetryParams) -> AlignTelemetryParams:
    """The telemetry options of a command, and those that the drafter's own text gives, which come first."""
    beside = {name: getattr(config, name) for name in TELEMETRY & config.model_fields_set}
    return AlignTelemetryParams.model_validate({**beside, **drafter.telemetry})


def spellings(config: type[Config]) -> dict[str, str]:
    """Every accepted spelling of every field, with underscores -> field name."""
    return {
        alias.replace("-", "_"): name for name, field in config.model_fields.items() for alias in names_of(name, field)
    }
