"""`understudy experiment dvi-rl`: what policy gradient on an early exit gains."""

from __future__ import annotations

import json
from typing import Any, Literal

import click

from understudy.cli.common import ModelOptions, load
from understudy.cli.options import config_command
from understudy.core.config import option
from understudy.training.dvi_rl.config import DviRlExperimentConfig


class ExperimentDviRlConfig(DviRlExperimentConfig, ModelOptions):
    """Options of `understudy experiment dvi-rl`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "bfloat16", "dtype of the weights; auto = as saved. Both LoRAs are float32 in any case"
    )


@config_command(ExperimentDviRlConfig, name="dvi-rl")
def command(config: ExperimentDviRlConfig) -> int:
    """Train with DVI-RL between two evaluations on held-out prompts: accept rate, throughput and perplexity.

    Beside the drafter stand plain decoding and the bare exit. Results are JSON files under results/ of the run folder; the last
    line printed is the run folder and what experiment.json holds, without options and environment.
    """
    from understudy.training.dvi_rl.experiment import experiment

    summary = experiment(config, load(config), lambda text: click.echo(text, err=True))
    _print(summary)
    told = {key: value for key, value in summary.items() if key not in ("config", "env")}
    click.echo(json.dumps({"run": summary["config"]["output_dir"], **told}))
    return 1 if _differs(summary["after"]) and summary["after"]["dtype"] == "float32" else 0


def _differs(result: dict[str, Any]) -> bool:
    """Whether some drafter gave another text than plain decoding of the same model."""
    return any(row["identical"] < 1 for row in result["drafters"].values())


def _print(summary: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    before, after = summary["before"], summary["after"]
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title=f"{after['prompts']} held-out prompts, greedy")
    table.add_column("drafter", no_wrap=True)
    for column in ("when", "accept", "tau", "tok/s", "vs none", "same"):
        table.add_column(column, justify="right")
    for name in after["drafters"]:
        for when, result in (("before", before), ("after", after)):
            row = result["drafters"][name]
            accept = "-" if row["accept_rate"] is None else f"{row['accept_rate']:.1%}"
            gain = "-" if row["speedup_vs_none"] is None else f"{row['speedup_vs_none']:.2f}x"
            table.add_row(
                name, when, accept, f"{row['tau']:.2f}", f"{row['tokens_per_s']:.0f}", gain, f"{row['identical']:.0%}"
            )
    console.print(table)
    console.print(
        f"perplexity of the held-out text under the verifier: {before['perplexity']:.4g} before, {after['perplexity']:.4g} after",
        soft_wrap=True,
    )
    if _differs(after):
        console.print(
            "[red]An output differs from plain decoding in float32: that must not happen. Please report it.[/red]"
            if after["dtype"] == "float32"
            else f"Where an output differs, check the cause with --dtype float32: in {after['dtype']} a pass of several rows rounds"
            " otherwise than a single row, so near ties may fall otherwise.",
            soft_wrap=True,
        )
    changed = summary["plain_outputs_changed"]
    if summary["training"]["changes_the_model"]:
        share = (
            "" if changed is None else f": plain decoding answers {changed:.0%} of the prompts otherwise than before"
        )
        console.print(
            f"lora_D changes the model{share}. `same` compares with plain decoding of the changed model.",
            soft_wrap=True,
        )
    else:
        console.print("The model is what it was: only the drafter has learned.")
