"""`understudy ablate`: a grid of runs, resumable, with curves and a table at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from understudy.cli import one_line, root
from understudy.cli.options import config_command
from understudy.core.config import CommaList, Config, option
from understudy.core.errors import UserError

if TYPE_CHECKING:
    from understudy.bench.grid import Cell, Grid


class AblateOptions(Config):
    """Options of `understudy ablate`."""

    output_dir: Path = option(Path("runs/ablations"), "results go to a folder with the grid's name in here", "outdir")
    only: CommaList = option([], "names of runs, separated by commas; default: all of the grid")
    set: dict[str, str] = option(
        {}, "an option of every run, instead of what the grid file fixes; what a run has for itself stays; repeatable"
    )
    jobs: int = option(1, "runs at the same time; where times are compared, only 1 is fair", ge=1)
    dry_run: bool = option(False, "print the command of every run and its state, and run nothing")
    force: bool = option(False, "run finished runs anew whose settings have changed since; their old results go")


def check_commands(grid: Grid, cells: list[Cell]) -> None:
    """Refuse options that the grid's command does not have before anything runs. Of other programs nothing is known."""
    if not isinstance(grid.command, str):
        return
    ctx = click.Context(root)
    command: click.Command | None = root
    for word in cells[0].command[3:]:
        command = command.get_command(ctx, word) if isinstance(command, click.Group) else None
        if command is None:
            raise UserError(f"grid {grid.name}: there is no command 'understudy {grid.command}'")
        ctx = click.Context(command, parent=ctx, info_name=word)
    assert command is not None
    for cell in cells:
        try:
            command.make_context(grid.command, cell.argv(Path("."))[len(cell.command) :])
        except click.ClickException as error:
            raise UserError(f"grid {grid.name}, {cell.title}: {one_line(error)}") from None


@config_command(AblateOptions)
def command(config: AblateOptions) -> int:
    """Run every run of a GRID: a YAML file, or the name of a grid that comes with Understudy (dvi).

    Each run is a process of its own with a folder of its own. What is finished is not run again, so that the same command goes on
    after an interruption. At the end come curves with intervals over seeds (PNG), table.md and results.json. Failed runs are
    listed, and the exit code is then 1.
    """
    from rich.console import Console

    from understudy.bench.ablate import ablate, dry_run
    from understudy.bench.grid import chosen, find, read_grid
    from understudy.bench.places import Place

    grid = read_grid(find(click.get_current_context().params["grid"])).with_options(config.set)
    cells = chosen(grid, config.only)
    check_commands(grid, cells)
    console = Console(stderr=not config.dry_run, highlight=False)
    if config.dry_run:
        dry_run([Place(cell, config.output_dir / grid.name) for cell in cells], console)
        return 0
    results, failed = ablate(grid, config.output_dir, cells, config.jobs, config.force, console)
    folder = config.output_dir / grid.name
    click.echo((folder / "table.md").read_text(encoding="utf-8"))
    for title, says in failed.items():
        click.echo(f"FAILED {title}: {says}", err=True)
    counts = {"finished": sum(map(len, results["finished"].values())), "failed": failed, "missing": results["missing"]}
    click.echo(json.dumps({"folder": str(folder), **counts}, ensure_ascii=False))
    return 1 if failed else 0


command.params.insert(0, click.Argument(["grid"]))
