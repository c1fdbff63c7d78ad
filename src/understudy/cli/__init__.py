"""The command line: one file per command, loaded only when that command runs.

`understudy --help` reads the table below and nothing else: no torch, no transformers, no pydantic. A command module in this folder
exposes `command` (a `click.Command`, made by `understudy.cli.options.config_command`, or a `LazyGroup` of them); adding a command
is that file and one row here.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from understudy import __version__
from understudy.core.errors import UserError

COMMANDS = {  # name -> (module, one line of help)
    "demo": ("understudy.cli.demo", "Decode real text with every built-in drafter and compare."),
    "generate": ("understudy.cli.generate", "Continue a prompt, a file of prompts, or a conversation."),
    "bench": ("understudy.cli.bench", "Compare drafters: speed, acceptance, identical output."),
    "layers": ("understudy.cli.layers", "Measure which layers to tap and where to exit."),
    "train": ("understudy.cli.train", "Train a drafter: eagle3, dflash, kangaroo, dvi, dvi-rl."),
    "experiment": ("understudy.cli.experiment", "Train and evaluate in one go: dvi-rl."),
    "ablate": ("understudy.cli.ablate", "Run a grid of runs and compare their curves."),
    "data": ("understudy.cli.data", "Make and inspect data."),
}

USER_ERROR, INTERRUPTED = 2, 130  # exit codes


def spell(name: str) -> str:
    """The spelling of a name on the command line: underscores equal hyphens."""
    return name.replace("_", "-")


SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": spell,
    "max_content_width": 120,
}


class LazyGroup(click.Group):
    """A group whose commands are named in a table and imported when one of them is invoked."""

    def __init__(self, table: dict[str, tuple[str, str]], **settings: Any) -> None:
        settings.setdefault("context_settings", SETTINGS)
        super().__init__(**settings)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        command: click.Command = importlib.import_module(self.table[cmd_name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = spell(args[0])
        if name not in self.table and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.table, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the commands are {', '.join(self.table)}"
            raise click.UsageError(f"no such command '{args[0]}'; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.table.items()])


@click.pass_context
def _print_help(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


root = LazyGroup(
    COMMANDS,
    name="understudy",
    help="Lossless speculative decoding of Hugging Face models: run drafters, and measure what they gain.",
    no_args_is_help=False,
    invoke_without_command=True,
    callback=_print_help,
)
click.version_option(__version__, prog_name="understudy", message="%(prog)s %(version)s")(root)


def one_line(error: Exception) -> str:
    """What the user reads after `error:`. Errors of one option begin with the flag that was typed, as those of a Config do."""
    if isinstance(error, click.BadParameter) and error.message.startswith("must be") and error.param is not None:
        message = f"{error.param.opts[0]} {error.message}"
    elif isinstance(error, click.NoSuchOption):
        path = error.ctx.command_path if error.ctx else "understudy"
        near = error.possibilities
        hint = f"did you mean '{near[0]}'?" if near else f"{path} --help lists the options"
        message = f"no such option '{error.option_name}'; {hint}"
    elif isinstance(error, click.ClickException):
        message = error.format_message().rstrip(".")
        message = message[:1].lower() + message[1:]
    else:
        message = str(error)
    return " ".join(message.split())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, what the command returned, 2 for a user's error, 130 when interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns whenever a process is started later
    try:
        code = root.main(args=None if argv is None else list(argv), prog_name="understudy", standalone_mode=False)
        sys.stdout.flush()
    except (UserError, click.ClickException) as error:
        click.echo(f"error: {one_line(error)}", err=True)
        return USER_ERROR
    except click.Abort:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does; the last flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0
