"""`understudy train dvi-rl`: policy gradient on an early exit, from what the verifier accepts and rejects."""

from __future__ import annotations

import json
from typing import Literal

import click

from understudy.cli.common import ModelOptions, load
from understudy.cli.options import config_command
from understudy.core.config import option
from understudy.training.dvi_rl.config import DviRlConfig


class TrainDviRlConfig(DviRlConfig, ModelOptions):
    """Options of `understudy train dvi-rl`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "bfloat16", "dtype of the weights; auto = as saved. Both LoRAs are float32 in any case"
    )


@config_command(TrainDviRlConfig, name="dvi-rl")
def command(config: TrainDviRlConfig) -> None:
    """Train a LoRA on the first layers by policy gradient: a draft that the verifier accepts is rewarded.

    The model itself stays as it is, and so does its output, unless --slow-every lets a second LoRA change its other layers. The run
    folder holds both as peft reads them (latest/lora_S, latest/lora_D), and steps.jsonl with one line per step. The last line
    printed is JSON.
    """
    from understudy.training.dvi_rl.train import train

    trained, learner = train(config, load(config), lambda text: click.echo(text, err=True))
    click.echo(json.dumps({"run": str(learner.config.output_dir), **trained.summary()}))
