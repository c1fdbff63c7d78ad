"""`understudy experiment`: a method trained between two evaluations."""

from __future__ import annotations

import click

from understudy.cli import LazyGroup

EXPERIMENTS = {  # name -> (module, one line of help)
    "dvi-rl": ("understudy.cli.experiment_dvi_rl", "Policy gradient on an early exit: before and after."),
}


@click.pass_context
def _print_help(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


command = LazyGroup(
    EXPERIMENTS,
    name="experiment",
    help="Evaluate, train, evaluate again: one method, one folder, results as JSON.",
    no_args_is_help=False,
    invoke_without_command=True,
    callback=_print_help,
)
