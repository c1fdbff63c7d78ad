"""A `Config` as command-line options: every field is a flag and a YAML key, described once.

    class GreetConfig(Config):
        name: str = option(..., "Whom to greet.", "who", min_length=1)
        times: int = option(1, "Greetings to print.", ge=1)
        loud: bool = option(False, "Greet in capitals.")

    @config_command(GreetConfig)
    def command(config: GreetConfig) -> None:
        '''Greet somebody.'''

gives `--name`, `--who`, `--times 3`, `--loud`, `--loud true|false|1|0`, `--no-loud` and `--config run.yaml`. Underscores equal
hyphens. A `Literal` is a choice, a `list[...]` field a repeatable flag, a `dict[...]` field a repeatable `--bias 42=-1`. A field
declared as `CommaList` also splits its values at commas, in YAML too; its description should say so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from understudy.cli import SETTINGS, spell
from understudy.cli.settings import choices_of, kind_of, resolve
from understudy.core.config import Config, names_of
from understudy.core.explain import Given, show

C = TypeVar("C", bound=Config)

METAVARS = {int: "INT", float: "FLOAT", Path: "PATH", dict: "KEY=VALUE"}


class Switch(click.ParamType):
    """The value of a boolean option where one is given: true, false, 1 or 0."""

    name = "switch"
    VALUES = {"true": True, "1": True, "false": False, "0": False}  # noqa: RUF012

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bool:
        if isinstance(value, bool):
            return value
        if value.lower() not in self.VALUES:
            self.fail(f"must be true, false, 1 or 0 (got {show(value)})", param, ctx)
        return self.VALUES[value.lower()]


class OneOf(click.Choice):
    """A choice whose refusal reads like those of the other options."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        *most, last = map(repr, self.choices)
        return f"must be one of {', '.join(most)}{' or ' if most else ''}{last} (got {show(value)})"


class FieldOption(click.Option):
    """One spelling of a field. The first one carries the help; the others are hidden, so that unequal values can be told apart."""

    def __init__(self, flags: list[str], alias: str, negative: bool = False, **settings: Any) -> None:
        destination = flags[0].lstrip("-").replace("-", "_")
        super().__init__([destination, *flags], **settings)
        self.alias, self.flag, self.negative = alias, flags[0], negative

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        if self.hidden:
            return None
        value = f"/ --no-{self.alias}" if isinstance(self.type, Switch) else self.make_metavar(ctx)
        return f"{self.flag} {value}", self.help or ""

    def read(self, ctx: click.Context) -> tuple[str, Given] | None:
        """(name, value) when this spelling was typed."""
        assert self.name is not None
        if ctx.get_parameter_source(self.name) is not ParameterSource.COMMANDLINE:
            return None
        value = ctx.params[self.name]
        return self.alias, Given(self.flag, False if self.negative else list(value) if self.multiple else value)


def _help_text(field: FieldInfo, aliases: list[str]) -> str:
    """The description, the other names, and the default."""
    assert field.description, "every field has a description"
    text = field.description
    if aliases:
        text += f" (also {', '.join('--' + a for a in aliases)})"
    if field.is_required():
        return f"{text} [required]"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None or default in ([], (), {}, ""):
        return text
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, list | tuple):
        default = ", ".join(map(str, default))
    return f"{text} [default: {default}]"


def _metavar(kind: Any) -> str:
    choices = choices_of(kind)
    return f"[{'|'.join(map(str, choices))}]" if choices else METAVARS.get(kind, "TEXT")


def _options_of(name: str, field: FieldInfo) -> Iterator[FieldOption]:
    """Every spelling of one field."""
    names = names_of(name, field)
    kind, several = kind_of(field.annotation)
    shown: dict[str, Any] = {"help": _help_text(field, names[1:])}
    if several:  # one option with all names: values of a repeatable flag keep their order
        yield FieldOption([f"--{n}" for n in names], names[0], multiple=True, metavar=f"{_metavar(kind)} ...", **shown)
        return
    for alias in names:
        if kind is bool:
            yield FieldOption([f"--{alias}"], alias, is_flag=False, flag_value=True, type=Switch(), **shown)
            yield FieldOption([f"--no-{alias}"], alias, negative=True, is_flag=True, hidden=True)
        elif choices := choices_of(kind):
            yield FieldOption([f"--{alias}"], alias, type=OneOf(choices), **shown)
        else:  # pydantic reads the text: what it refuses is worded alike for flags and YAML
            yield FieldOption([f"--{alias}"], alias, type=click.STRING, metavar=_metavar(kind), **shown)
        shown = {"hidden": True}


def options(config: type[Config]) -> list[click.Option]:
    """The options of a Config, its own fields before inherited ones, and `--config`."""
    fields = config.model_fields
    own = [name for name in config.__annotations__ if name in fields]
    order = dict.fromkeys([*own, *fields])  # what a command adds to the shared options stands first in its help
    made: list[click.Option] = [o for name in order for o in _options_of(name, fields[name])]
    flags = [flag for option in made for flag in option.opts]
    twice = {flag for flag in flags if flags.count(flag) > 1 or flag == "--config"}
    assert not twice, f"{config.__name__} uses {sorted(twice)} for two things"
    return [*made, click.Option(["--config"], metavar="FILE", help="YAML file of these options; flags win over it.")]


def config_command(config: type[C], name: str | None = None) -> Callable[[Callable[[C], int | None]], click.Command]:
    """Make a command of a function that takes the resolved config. Its docstring is the help; what it returns is the exit code (None = 0).

    `name` is only needed where the command is added to a group by hand.
    """

    def make(function: Callable[[C], int | None]) -> click.Command:
        def callback(**_: Any) -> int | None:
            ctx = click.get_current_context()
            flags = [given for p in ctx.command.params if isinstance(p, FieldOption) and (given := p.read(ctx))]
            file = ctx.params["config"]
            return function(resolve(config, flags, Path(file) if file is not None else None))

        return click.Command(
            name or spell(function.__name__),
            params=list(options(config)),
            callback=callback,
            help=inspect.cleandoc(function.__doc__ or ""),
            context_settings=SETTINGS,
        )

    return make
