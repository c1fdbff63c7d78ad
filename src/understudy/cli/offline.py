"""`understudy train NAME` for every drafter whose Spec has an offline objective."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from understudy.cli.common import ModelOptions, load
from understudy.cli.options import config_command
from understudy.training.datasets import OfflineOptions
from understudy.training.offline import run


def offline_command(name: str) -> click.Command:
    """The command that trains drafter `name`: its objective's options, those of the loop, of data and of the model."""
    from understudy.drafting.spec import specs

    spec = specs()[name]
    assert spec.objective_config is not None
    options: Any = type(
        "TrainOptions_", (spec.objective_config, OfflineOptions, ModelOptions), {"__module__": __name__}
    )

    def train(config: Any) -> int:
        from understudy.training.distributed import Ranks

        ranks = Ranks(config, config.device)
        if config.output_dir is None:
            new = ranks.of_main(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
            config = config.model_copy(update={"output_dir": new})
        target = load(config.model_copy(update={"device": str(ranks.device)}))
        run(spec, config, target, ranks)
        ranks.close()
        ranks.leave(0)
        return 0

    train.__name__ = name
    train.__doc__ = f"""Train {name}: {spec.summary}.

    Without --train-data-path the built-in corpus is trained on. The run folder holds settings, events, metrics and checkpoints;
    `best` is the checkpoint with the highest measured accept length. The last line is JSON. SIGTERM and Ctrl-C save and stop
    cleanly, --resume goes on. torchrun starts it on several devices.
    """
    return config_command(options)(train)
