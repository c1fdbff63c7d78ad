"""An offline run from its options to its checkpoints: data, features, objective, measured acceptance, and the loop.

What is trained is named by a `Spec`; nothing here knows a method.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from understudy.core.checkpoints import find_checkpoint, steps_of
from understudy.core.errors import UserError
from understudy.core.hashes import template_hash, tokenizer_hash
from understudy.drafting.objective import Batch, Objective
from understudy.drafting.spec import Spec
from understudy.drafting.weights import check_trained_for
from understudy.target.fingerprint import fingerprint
from understudy.target.target import Target
from understudy.telemetry.run import RunFolder
from understudy.telemetry.trackers import Trackers, trackers
from understudy.training.datasets import FIXED_BY_FEATURES, FileData, OfflineOptions, ShardData, TrainingData
from understudy.training.distributed import Ranks
from understudy.training.figures import peak_memory
from understudy.training.loop import Result, train
from understudy.training.optimizer import total_steps
from understudy.training.overfit import UNREAD, ByHeart, OverfitData, told, with_steps
from understudy.training.predictions import prediction_watchers
from understudy.training.progress import clock
from understudy.training.replay import Decoding
from understudy.training.rng import seed_all
from understudy.training.runlog import RunLog


def run(spec: Spec, config: OfflineOptions, target: Target, ranks: Ranks, console: Console | None = None) -> Result:
    """Train what `spec` names on `config`'s data; the last line on standard output is JSON. UserError before the first step.

    The run folder is begun after everything that can be wrong was looked at: a corrected command may name it again.
    """
    config = with_steps(config)
    assert spec.objective is not None and config.output_dir is not None
    _check(config, target)
    console = console or Console(stderr=True, highlight=False)
    folder = RunFolder(config.output_dir, resume=config.resume) if ranks.main else None
    if folder is not None and config.resume and not folder.resumed:
        raise UserError(f"--resume: {config.output_dir} holds no run; leave --resume out to begin one there")
    seed_all(config.seed, 0)  # new weights are the same for the same seed, on every rank
    start = _start(config, target)
    data = _data(config, target, ranks)
    objective = spec.objective(config, target, start, data.token_counts)
    _require(config.require, objective.servable())
    data.bind(objective.needs)
    prompts = data.prompts()
    facts = _introduce(spec, objective, data, ranks, bool(prompts), console if ranks.main else None)
    by_heart = ByHeart(objective, data) if isinstance(data, OverfitData) else None
    measure = by_heart or (Decoding(objective, target, prompts, config.eval_max_new_tokens) if prompts else None)

    log: RunLog | None = None
    if folder is not None:
        at = max(steps_of(config.output_dir / "checkpoints"), default=0) if config.resume else None
        folder.begin(config, config.seed)
        log = RunLog(folder, _trackers(config, at or 0), at)
        log.event("data", **facts)
    watchers = prediction_watchers(
        objective, data.features, _candidates(data), target.tokenizer, config, ranks, log, console
    )
    try:
        result = train(
            objective,
            data.batches,
            data.features,
            config,
            ranks=ranks,
            log=log or _Nothing(),
            measure=measure,
            held_out=data.held_out,
            watchers=watchers,
            card=_card(spec, target, objective, data.thinking),
            console=console,
        )
    finally:
        if log is not None:
            log.close()
    if ranks.main:
        _conclude(config, result, by_heart, console)
    return result


def _conclude(config: OfflineOptions, result: Result, by_heart: ByHeart | None, console: Console) -> None:
    """The last line on standard output, and before it how much was learned by heart where that was asked for."""
    last = {"run": str(config.output_dir), "step": result.step, "reason": result.reason}
    last |= {"best_tau": result.best_tau, "best_step": result.best_step}
    if by_heart is not None:
        last["overfit"] = outcome = by_heart.outcome()
        if outcome is not None:
            console.print(told(outcome), soft_wrap=True)
    print(json.dumps(last))


def _data(config: OfflineOptions, target: Target, ranks: Ranks) -> TrainingData:
    if config.overfit:
        return OverfitData(config, target, ranks)
    return (FileData if config.features is None else ShardData)(config, target, ranks)


def _candidates(data: TrainingData) -> Iterator[Batch]:
    """Batches that predictions may be looked at on, the best first."""
    yield from data.held_out or ()
    yield data.first()


def _require(engines: list[str], verdicts: Mapping[str, str]) -> None:
    """UserError unless every one of `engines` can serve what is to be trained."""
    for engine in engines:
        if engine not in verdicts:
            raise UserError(f"--require {engine}: no engine of that name is known; known: {', '.join(verdicts)}")
        if verdicts[engine] != "ok":
            raise UserError(f"--require {engine}: it cannot serve this drafter: {verdicts[engine]}")


def _check(config: OfflineOptions, target: Target) -> None:
    if config.features is None and not config.overfit and config.max_length > target.context:
        raise UserError(f"--max-length {config.max_length} is beyond the target's context of {target.context} tokens")
    if config.features is not None and (fixed := sorted(FIXED_BY_FEATURES & config.model_fields_set)):
        raise UserError(
            f"--{fixed[0].replace('_', '-')} is decided where features are captured: leave it out beside --features"
        )
    if config.overfit and (unread := sorted(UNREAD & config.model_fields_set)):
        raise UserError(
            f"--{unread[0].replace('_', '-')} has no meaning beside --overfit, which learns and measures whole answers to its prompts:"
            " leave it out"
        )


def _start(config: OfflineOptions, target: Target) -> Path | None:
    """The checkpoint whose weights training begins with. UserError if they are another target's and nobody insists."""
    if config.init_from is None:
        if config.any_target:
            raise UserError("--any-target is about the weights that --init-from names: give both, or neither")
        return None
    start = find_checkpoint(config.init_from)
    insist = "--any-target to start from it"
    check_trained_for(start, target, f"the drafter in {start}", config.any_target, insist)
    return start


class _Nothing:
    """The log of a process that has none."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def event(self, kind: str, /, **fields: Any) -> None: ...


def _introduce(
    spec: Spec, objective: Objective, data: TrainingData, ranks: Ranks, measured: bool, console: Console | None
) -> dict[str, Any]:
    """Show what is about to happen, and refuse what would supervise nothing."""
    config = data.config
    report, batches = data.facts(console)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    covered = None if objective.says is None else _coverage(data.token_counts(), objective.says)
    seconds = _seconds(objective, data, ranks)
    steps = total_steps(config, data.batches.steps_per_epoch or batches)
    sizes = {
        "trained_weights": trained,
        **({} if covered is None else {"draft_vocab_coverage": round(covered, 4)}),
        "optimizer_mb": round(trained * 16 / 2**20, 1),  # fp32 weights, gradients and two moments
        "disk_mb": round(trained * 16 * (config.keep + 1) / 2**20, 1),
        "memory_gb": round(peak_memory(ranks.device), 2),
        "batches_per_epoch": batches,
        "steps": steps,
        "hours": round(seconds * config.gradient_accumulation_steps * steps / 3600, 3),
    }
    if console is not None:
        lines = [
            f"{spec.name}: {trained:,} weights to train; weights, gradients and optimizer take {sizes['optimizer_mb']} MB,"
            f" checkpoints up to {sizes['disk_mb']} MB on disk; memory after a first batch {sizes['memory_gb']} GB",
            f"{steps:,} steps, about {batches:,} batches per epoch, about {clock(3600 * sizes['hours'])} without evaluations",
            *(
                f"servable by {engine}" if verdict == "ok" else f"not servable by {engine}: {verdict}"
                for engine, verdict in objective.servable().items()
            ),
        ]
        if covered is not None and objective.says is not None:
            lines.append(f"the drafter can say {len(objective.says):,} tokens: {covered:.2%} of what is supervised")
        if not measured:
            lines.append(
                "acceptance is not measured, so there will be no `best`: give --eval-prompts or --eval-data-path"
            )
        for line in lines:
            console.print(line, soft_wrap=True)
    return {"report": report, **sizes}


def _coverage(counts: Tensor, ids: Tensor) -> float:
    """Share of the supervised tokens that are among `ids`."""
    return float(counts[ids.cpu()].sum() / counts.sum().clamp_min(1))


def _seconds(objective: Objective, data: TrainingData, ranks: Ranks) -> float:
    """Seconds of one forward and backward pass on this machine, with all that the target does for it."""
    objective.to(ranks.device)
    batch = data.first().to(ranks.device)
    began = time.perf_counter()
    with torch.no_grad():
        features = data.features(batch)
    objective(features).loss.backward()
    spent = time.perf_counter() - began
    objective.zero_grad(set_to_none=True)
    return spent


def _card(spec: Spec, target: Target, objective: Objective, thinking: str) -> dict[str, Any]:
    """What `understudy.json` says besides figures."""
    return {
        "drafter": spec.name,
        "target": {"name": target.name, "fingerprint": fingerprint(target), "layers": target.layers},
        "taps": sorted(objective.needs.taps),
        "text": {
            "tokenizer": tokenizer_hash(target.tokenizer),
            "chat_template": template_hash(target.tokenizer),
            "thinking": "template default" if thinking == "default" else thinking,
        },
        "servable": objective.servable(),
    }


def _trackers(config: OfflineOptions, start: int) -> Trackers:
    assert config.output_dir is not None
    return trackers(
        config.report_to,
        project=config.wandb_project,
        run_name=config.wandb_run_name,
        folder=config.output_dir,
        config=config.model_dump(mode="json"),
        start=start,
    )
