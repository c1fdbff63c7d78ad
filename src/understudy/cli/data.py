"""`understudy data`: make and inspect data."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import click

from understudy.cli import SETTINGS
from understudy.cli.data_capture import capture_command
from understudy.cli.data_regenerate import regenerate_command
from understudy.cli.options import config_command
from understudy.core.config import Config, option
from understudy.core.errors import UserError

WIDTH = 400  # characters of a text that `peek` shows


@click.group("data", context_settings=SETTINGS, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Make and inspect data."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


class StdlibConfig(Config):
    """Options of `understudy data stdlib`."""

    output: Path = option(..., "folder for train.jsonl and eval.jsonl", "output-dir", "outdir")


@config_command(StdlibConfig, name="stdlib")
def stdlib(config: StdlibConfig) -> None:
    """Write the built-in corpus: this interpreter's standard library as conversations, held out by module.

    The last line is JSON: the folder, the Python version, and conversations, answers and characters of each split.
    """
    from understudy.data.stdlib import write_corpus

    counts = write_corpus(config.output)
    for split in ("train", "eval"):
        n = counts[split]
        click.echo(
            f"{config.output / f'{split}.jsonl'}: {n['conversations']:,} conversations, {n['answers']:,} answers,"
            f" {n['characters'] / 1e6:.1f} M characters"
        )
    click.echo(json.dumps(counts))


@click.command("peek", context_settings=SETTINGS)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(min=1), default=3, show_default=True, help="Pairs to print.")
@click.option("--all", "everything", is_flag=True, help="Read on to the end of the file, to count its lines.")
def peek(file: Path, count: int, everything: bool) -> None:
    """Print the first prompt/answer pairs of a file of conversations, one of each, and what was skipped.

    The file is streamed, and not read further than needed. The last line is JSON: conversations read, and lines skipped.
    """
    from understudy.data.conversations import Skipped, read
    from understudy.data.pairs import first_pair

    skipped, total = Skipped(keep=5), 0
    conversations = read(file, skipped)
    for conversation in islice(conversations, count):
        total += 1
        asked = next(message.content for message in conversation.messages if message.role == "user")
        prompt, answer = first_pair(conversation) or (asked, None)
        click.echo(f"[{conversation.id}]\nprompt: {_cut(prompt)}\nanswer: {_cut(answer) if answer else '(none)'}\n")
    if everything:
        total += sum(1 for _ in conversations)
    if not total:
        raise UserError(f"{file} holds no conversation: {skipped.first[0] if skipped.first else 'it is empty'}")
    for line in skipped.first:
        click.echo(f"skipped {line}")
    if skipped.count > len(skipped.first):
        click.echo(f"skipped {skipped.count - len(skipped.first)} more")
    click.echo(json.dumps({"conversations": total, "skipped": skipped.count}))


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else f"{text[:WIDTH]} ... ({len(text):,} characters)"


command.add_command(stdlib)
command.add_command(peek)
command.add_command(capture_command)
command.add_command(regenerate_command)
