"""An offline run from its options to its checkpoints: data, features, objective, measured acceptance, and the loop.

What is trained is named by a `Spec`; nothing here knows a method.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from understudy.core.checkpoints import find_checkpoint
from understudy.core.config import option
from understudy.core.errors import UserError
from understudy.data.options import DataOptions, corpus_paths
from understudy.data.prompts import load_prompts, render
from understudy.data.report import inspect
from understudy.data.stream import Stream, open_stream
from understudy.decoding.acceptance import measure_acceptance
from understudy.drafting.objective import Batch, Objective
from understudy.drafting.spec import Spec
from understudy.features.live import LiveFeatures
from understudy.features.store import StoredBatches, StoredFeatures
from understudy.target.fingerprint import fingerprint
from understudy.target.target import Target
from understudy.telemetry.run import RunFolder
from understudy.telemetry.trackers import trackers
from understudy.training.distributed import Ranks
from understudy.training.loop import Result, train
from understudy.training.options import TrainOptions
from understudy.training.protocols import Batches, FeatureSource, HeldOut
from understudy.training.rng import seed_all
from understudy.training.runlog import RunLog

REPORT_ROWS = 2000  # rows that the report at the start looks at
VOCABULARIES = (1024, 2048, 8192, 32768)  # draft vocabularies whose coverage it tells


class OfflineOptions(DataOptions, TrainOptions):
    """Options of every offline run."""

    init_from: Path | None = option(None, "start from the weights of this checkpoint or run")
    features: Path | None = option(
        None, "folder of `understudy data capture`: its batches and hidden states are trained on"
    )
    eval_batches: int = option(8, "held-out batches for the held-out loss", ge=1)
    eval_prompts: Path | None = option(
        None, "JSON Lines file of prompts that acceptance is measured on; default: the held-out conversations"
    )
    eval_num_prompts: int = option(16, "prompts that acceptance is measured on", ge=1)
    eval_max_new_tokens: int = option(64, "new tokens per prompt while acceptance is measured", ge=2)


class StreamBatches:
    """Packed rows of a corpus as the loop takes them."""

    def __init__(self, stream: Stream, count: bool) -> None:
        """`count`: how many batches an epoch has must be known; it takes one pass over the data."""
        self.stream = stream
        self.steps_per_epoch: int | None = stream.count() if count else None

    def __iter__(self) -> Iterator[Batch]:
        for packed in self.stream:
            yield Batch(*packed.tensors())

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state(state)


class Fixed:
    """The first few batches of held-out data, kept: the same at every evaluation."""

    def __init__(self, batches: Iterator[Batch], count: int) -> None:
        self.batches = list(itertools.islice(batches, count))

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def run(spec: Spec, config: OfflineOptions, target: Target, ranks: Ranks, console: Console | None = None) -> Result:
    """Train what `spec` names on `config`'s data; the last line on standard output is JSON. UserError before the first step."""
    assert spec.objective is not None and config.output_dir is not None
    if config.max_length > target.context:
        raise UserError(f"--max-length {config.max_length} is beyond the target's context of {target.context} tokens")
    console = console or Console(stderr=True, highlight=False)
    folder = RunFolder(config.output_dir, resume=config.resume) if ranks.main else None
    if folder is not None:
        folder.begin(config, config.seed)
    train_paths, eval_path = _paths(config, ranks)
    seed_all(config.seed, 0)  # new weights are the same for the same seed, on every rank
    start = None if config.init_from is None else find_checkpoint(config.init_from)
    objective = spec.objective(config, target, start)
    stream = _stream(config, target, train_paths, ranks)
    facts = _introduce(config, spec, objective, stream, ranks, console if ranks.main else None)
    batches, features = _data(config, target, objective, stream, ranks)
    prompts = _prompts(config, target, eval_path)

    def measure() -> Mapping[str, float]:
        return measure_acceptance(target, objective.drafter, prompts, config.eval_max_new_tokens).figures()

    log = _Nothing() if folder is None else RunLog(folder, _trackers(config))
    log.event("data", **facts)
    try:
        result = train(
            objective,
            batches,
            features,
            config,
            ranks=ranks,
            log=log,
            measure=measure if prompts else None,
            held_out=_held_out(config, target, eval_path, ranks),
            card=_card(spec, target, objective),
            console=console,
        )
    finally:
        log.close()
    if ranks.main:
        best = {"best_tau": result.best_tau, "best_step": result.best_step}
        print(json.dumps({"run": str(config.output_dir), "step": result.step, "reason": result.reason, **best}))
    return result


class _Nothing:
    """The log of a process that has none."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def event(self, kind: str, /, **fields: Any) -> None: ...

    def close(self) -> None: ...


def _paths(config: OfflineOptions, ranks: Ranks) -> tuple[list[Path], Path | None]:
    """Where the data are; the first process writes the built-in corpus, the others then find it."""
    assert config.output_dir is not None
    if ranks.main:
        corpus_paths(config, config.output_dir)
    ranks.gather(True)
    return corpus_paths(config, config.output_dir)


def _stream(config: OfflineOptions, target: Target, paths: list[Path], ranks: Ranks, shuffle: bool = True) -> Stream:
    return open_stream(
        config,
        paths,
        target.tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        shuffle=shuffle,
        stop_ids=target.eos_ids,
        rank=ranks.rank,
        world_size=ranks.world,
    )


def _data(
    config: OfflineOptions, target: Target, objective: Objective, stream: Stream, ranks: Ranks
) -> tuple[Batches, FeatureSource]:
    """Batches and the target's part of them: live, or from stored shards."""
    if config.features is not None:
        stored = StoredFeatures(config.features, objective.needs)
        stored.check(target)
        return StoredBatches(stored, config.seed, ranks.rank, ranks.world), stored
    return StreamBatches(stream, count=config.max_steps is None), LiveFeatures(target, objective.needs)


def _held_out(config: OfflineOptions, target: Target, path: Path | None, ranks: Ranks) -> HeldOut | None:
    if path is None or config.features is not None:
        return None
    stream = _stream(config, target, [path], ranks, shuffle=False)
    return Fixed(iter(StreamBatches(stream, count=False)), config.eval_batches)


def _prompts(config: OfflineOptions, target: Target, eval_path: Path | None) -> list[list[int]]:
    """Held-out prompts; without any, nothing is measured."""
    path = config.eval_prompts or (None if config.is_preformatted else eval_path)
    if path is None or not config.eval_interval:
        return []
    room = target.context - config.eval_max_new_tokens
    rendered = [render(target.tokenizer, p.messages) for p in load_prompts(path, 8 * config.eval_num_prompts)]
    fitting = [ids for ids in rendered if len(ids) < room]
    if not fitting:
        raise UserError(f"no prompt of {path} leaves room for {config.eval_max_new_tokens} new tokens")
    step = max(1, len(fitting) // config.eval_num_prompts)  # spread: neighbours in a file resemble each other
    return fitting[::step][: config.eval_num_prompts]


def _introduce(
    config: OfflineOptions, spec: Spec, objective: Objective, stream: Stream, ranks: Ranks, console: Console | None
) -> dict[str, Any]:
    """Show what is about to happen, and refuse what would supervise nothing."""
    report = inspect(stream.corpus, stream.encoder, REPORT_ROWS, VOCABULARIES)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    share = len(stream.corpus) / max(report.rows, 1) if report.sampled else 1.0
    rows = (report.packed_rows(config.max_length) if config.pack else report.documents) * share
    sizes = {
        "trained_weights": trained,
        "optimizer_mb": round(trained * 16 / 2**20, 1),  # fp32 weights, gradients and two moments
        "disk_mb": round(trained * 16 * (config.keep + 1) / 2**20, 1),
        "batches_per_epoch": max(1, round(rows / (config.batch_size * ranks.world))),
    }
    if console is not None:
        console.print(report)
        console.print(
            f"{spec.name}: {trained:,} weights to train; weights, gradients and optimizer take {sizes['optimizer_mb']} MB,"
            f" checkpoints up to {sizes['disk_mb']} MB on disk; about {sizes['batches_per_epoch']:,} batches per epoch",
            soft_wrap=True,
        )
        for engine, verdict in objective.servable().items():
            console.print(f"servable by {engine}: {verdict}", soft_wrap=True)
    report.check()
    return {"report": report.as_dict(), **sizes}


def _card(spec: Spec, target: Target, objective: Objective) -> dict[str, Any]:
    """What `understudy.json` says besides figures."""
    return {
        "drafter": spec.name,
        "target": {"name": target.name, "fingerprint": fingerprint(target), "layers": target.layers},
        "taps": sorted(objective.needs.taps),
        "servable": objective.servable(),
    }


def _trackers(config: OfflineOptions) -> Any:
    assert config.output_dir is not None
    return trackers(
        config.report_to,
        project=config.wandb_project,
        run_name=config.wandb_run_name,
        folder=config.output_dir,
        config=config.model_dump(mode="json"),
    )
