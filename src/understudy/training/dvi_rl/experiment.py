"""Evaluate, train, evaluate: `understudy experiment dvi-rl`.

    RUN/results/before.json, after.json      what `evaluate` measured, before the first step and after the last one
    RUN/results/experiment.json              both side by side with what training did, the options and where it ran

All else in RUN is a training run's. An experiment that was interrupted goes on with `resume`: it does not evaluate the beginning again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.core.provenance import environment
from understudy.data.options import corpus_paths
from understudy.target.target import Target
from understudy.telemetry.run import plain
from understudy.training.dvi_rl.config import DviRlExperimentConfig
from understudy.training.dvi_rl.evaluate import evaluate, held_out
from understudy.training.dvi_rl.train import check_data, data_options, open_run, proceed, resume, start


def experiment(config: DviRlExperimentConfig, target: Target, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it in `config.output_dir`, or in a new folder; returns what experiment.json holds. UserError for what a user can get wrong."""
    if config.train_data_path is not None and config.eval_data_path is None:
        raise UserError("--train-data-path is given: give --eval-data-path too, prompts that are not trained on")
    check_data(config.train_data_path, config.eval_data_path)
    config, run = open_run(config, "experiment")
    learner = start(config, target, run, say)
    _, path = corpus_paths(data_options(config, config.eval_data_path), run.path)
    assert path is not None
    samples = held_out(config, path, target)
    results = run.path / "results"
    before = _read(results / "before.json") if run.resumed else None
    if before is None:
        say(f"evaluating before training, {len(samples)} prompts")
        before = plain(evaluate(learner, samples, config.max_new_tokens))
        write_json(results / "before.json", before)
    resume(learner, run)
    trained = proceed(learner, target, run, say)
    say("evaluating after training")
    after = plain(evaluate(learner, samples, config.max_new_tokens))
    write_json(results / "after.json", after)
    summary = {
        "training": trained.summary(),
        "before": _without_outputs(before),
        "after": _without_outputs(after),
        "plain_outputs_changed": _changed(before, after),
        "config": plain(config.model_dump(mode="json")),
        "env": environment(config.seed),
    }
    write_json(results / "experiment.json", summary)
    return summary


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not JSON: remove it, and start the experiment anew") from None
    return content


def _without_outputs(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "plain_outputs"}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """Share of prompts that plain decoding answers otherwise than before: 0 unless `lora_D` moved. None = other prompts then."""
    pairs = list(zip(before["plain_outputs"], after["plain_outputs"], strict=False))
    if len(before["plain_outputs"]) != len(after["plain_outputs"]):
        return None
    return sum(a != b for a, b in pairs) / len(pairs)
