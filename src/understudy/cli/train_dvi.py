"""`understudy train dvi`: train a self-speculative head, from rollouts or from a stream of prompts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.cli.common import DraftOptions, ModelOptions, draft_defaults, load
from understudy.cli.options import config_command
from understudy.core.config import Config, option
from understudy.core.errors import UserError
from understudy.drafting.learning import LearnOptions
from understudy.training.rollouts.options import RolloutConfig, RolloutOptions

if TYPE_CHECKING:
    from understudy.drafters.early_exit.drafter import ExitDrafter
    from understudy.target.target import Target
    from understudy.telemetry.run import RunFolder
    from understudy.telemetry.trackers import Trackers

SHALLOW_RANK = 8  # of training from rollouts
K_SPEC = 4  # drafts in a row, and DVI's own (k_spec)


class StreamFileOptions(Config):
    """Which file is streamed, and how far."""

    train_data_path: Path | None = option(
        None,
        "JSON Lines file (ShareGPT, OpenAI) whose prompts are streamed through the online learner, instead of rollouts",
        "stream",
        "data-path",
        "train-data",
        "data",
    )
    num_prompts: int | None = option(None, "prompts of the stream; default: all", "num-samples", ge=1)
    skip_prompts: int = option(0, "prompts of the stream to leave out first: those that an earlier run had", ge=0)
    summary_every: int = option(100, "blocks (verify passes) between summary lines; 0 = only at the end", ge=0)


class TrainDviConfig(RolloutConfig, StreamFileOptions, DraftOptions, ModelOptions):
    """Options of `understudy train dvi`."""

    drafter: str = option("dvi", "the drafter whose head learns: dvi[:CHECKPOINT][,key=value...]")
    rank: int | None = option(None, "rank of the LoRA on the draft head; default: the drafter's own", "lora-rank", ge=1)
    alpha: float | None = option(None, "alpha of that LoRA; default: the drafter's own", "lora-alpha", gt=0)
    train_k_spec: int = option(K_SPEC, "most drafts in a row while training", ge=1)
    threshold: float | None = option(
        None,
        "drafting stops after a draft whose probability is below this; default: from rollouts 0 (never), in a stream the drafter's own",
        ge=0,
        le=1,
    )
    dvi_online: bool = option(True, "learn from the stream; false = decode it as it is, to compare with")


BOTH = {"load_lora", "save_lora_every", "save_lora_path"}
ONLY = {  # options that one way alone reads
    "training from rollouts": set(RolloutOptions.model_fields),
    "streaming a file (--train-data-path)": set(StreamFileOptions.model_fields) | set(LearnOptions.model_fields) - BOTH,
}


@config_command(TrainDviConfig, name="dvi")
def command(config: TrainDviConfig) -> None:
    """Train a self-speculative head: from rollouts, or with --train-data-path by streaming a file through the online learner.

    From rollouts: each update decodes --rollout prompts speculatively and lowers KL(verifier || drafter), cross-entropy on accepted
    drafts and, with --use-policy-grad, REINFORCE; the LoRA on the shallow layers trains as well. In a stream the learner is the one
    of `generate` and `bench`, with its --dvi-* options. The target stays as it is in both. The last line is JSON.
    """
    _check(config)
    from understudy.drafters.early_exit.saved import find
    from understudy.telemetry.run import RunFolder
    from understudy.training.stops import StopRequest

    if config.load_lora is not None:
        config = config.model_copy(update={"load_lora": find(config.load_lora)})
    folder = RunFolder(config.output_dir or Path("runs") / time.strftime("train-dvi-%Y%m%d-%H%M%S"))
    target = load(config)
    with StopRequest() as stop:
        run = _rollouts if config.train_data_path is None else _stream
        figures = run(config, target, folder, lambda: stop.reason)
    folder.close()
    print(json.dumps({"run": str(folder.path), **figures}))


def _check(config: TrainDviConfig) -> None:
    """Options that would be ignored are errors."""
    streams = config.train_data_path is not None
    for way, names in ONLY.items():
        if way.startswith("streaming") == streams:
            continue
        for name in sorted(names & config.model_fields_set - {"train_data_path"}):
            hint = "leave one of them out" if streams else "give --train-data-path, or leave it out"
            flag = f"--{name.replace('_', '-')}" + (" (here the number of updates)" if name == "steps" else "")
            raise UserError(f"{flag} belongs to {way}: {hint}")
    for name in ("rl_weight", "pg_baseline_ema"):
        if name in config.model_fields_set and not config.use_policy_grad:
            raise UserError(f"--{name.replace('_', '-')} goes with --use-policy-grad")
    if config.train_data_path is not None and not config.train_data_path.is_file():
        raise UserError(f"cannot read {config.train_data_path}: there is no such file")


def _drafter(config: TrainDviConfig, target: Target, **values: Any) -> ExitDrafter:
    """The drafter under training. `values` beside what was typed; UserError if it has no head that learns."""
    from understudy.drafters.early_exit.drafter import ExitDrafter
    from understudy.drafting.spec import build

    typed = draft_defaults(config, [config.drafter]) | {"rank": config.rank, "alpha": config.alpha}
    drafter = build(
        config.drafter, target, **{**typed, "steps": config.train_k_spec, "lora_seed": config.seed, **values}
    )
    if not isinstance(drafter, ExitDrafter) or drafter.learning is None:
        raise UserError(f"--drafter {config.drafter}: training needs a drafter whose head learns, such as dvi")
    return drafter


def _begin(config: TrainDviConfig, drafter: ExitDrafter, folder: RunFolder, checkpoints: Path) -> Trackers:
    """Write the settings as they turned out, and start the trackers."""
    from understudy.telemetry.trackers import trackers

    of_drafter = drafter.config.model_dump()
    resolved = {name: of_drafter[name] for name in type(config).model_fields if name in of_drafter}
    resolved |= {
        "steps": config.steps,
        "train_k_spec": drafter.steps,
        "output_dir": folder.path,
        "save_lora_path": checkpoints,
        "load_lora": config.load_lora,
        "telemetry_save_dir": config.telemetry_save_dir or (folder.telemetry if config.telemetry_debug else None),
    }
    other = next(
        names for way, names in ONLY.items() if way.startswith("streaming") == (config.train_data_path is None)
    )
    settings = config.model_copy(update=resolved).model_dump(mode="json", exclude=other)
    folder.begin(settings, config.seed)
    return trackers(config.report_to, config.wandb_project, config.wandb_run_name, folder.path, settings)


def _rollouts(
    config: TrainDviConfig, target: Target, folder: RunFolder, stop: Callable[[], str | None]
) -> dict[str, Any]:
    """Training from rollouts; the figures of the run."""
    from understudy.assets import prompts_path
    from understudy.data.conversations import Skipped
    from understudy.data.options import DataOptions, corpus_paths
    from understudy.drafters.early_exit.saved import find, read_saved
    from understudy.drafting.spec import parse
    from understudy.training.rollouts.prompts import EndlessPrompts, held_out_prompts
    from understudy.training.rollouts.run import RolloutRun

    held_out = held_out_prompts(
        config.eval_data_path or prompts_path(), target, max(config.eval_num_prompts, config.time_prompts)
    )
    _, path, text = parse(config.drafter)
    start = config.load_lora or (find(path) if path else None)
    trained = read_saved(start).settings if start else {}
    # an adapter reads the target's own states, and a checkpoint has what it was trained with
    bare = start is None and text.get("adapter_path", config.adapter_path) in (None, "none")
    values: dict[str, Any] = {"threshold": 0.0, "shallow_rank": SHALLOW_RANK if bare else 0, **trained}
    names = ("threshold", "exit_layer", "rank", "alpha", "shallow_rank", "shallow_alpha")
    values |= {name: value for name in names if (value := getattr(config, name)) is not None}
    drafter = _drafter(config, target, **values)
    checkpoints = config.save_lora_path or folder.checkpoints
    told = _begin(config, drafter, folder, checkpoints)
    paths = [config.rollout_data_path] if config.rollout_data_path else corpus_paths(DataOptions(), folder.path)[0]
    skipped = Skipped()
    prompts = EndlessPrompts(paths, target, skipped, config.seed)
    try:
        run = RolloutRun(target, drafter, config, folder, told, checkpoints, config.save_lora_every, start)
        figures = run.run(prompts, held_out[: config.eval_num_prompts], held_out[: config.time_prompts], stop)
    finally:
        told.close()
    return figures | {"checkpoint": str(checkpoints / "final.pt"), "skipped": skipped.count}


def _stream(
    config: TrainDviConfig, target: Target, folder: RunFolder, stop: Callable[[], str | None]
) -> dict[str, Any]:
    """A file through the online learner; the figures of the run."""
    from understudy.training.stream_file import stream_file

    assert config.train_data_path is not None
    checkpoints = config.save_lora_path or folder.checkpoints
    values = {"dvi_online": config.dvi_online, "save_lora_path": checkpoints, "load_lora": config.load_lora}
    drafter = _drafter(config, target, **values)
    told = _begin(config, drafter, folder, checkpoints)
    try:
        return stream_file(
            config.train_data_path,
            target,
            drafter,
            folder,
            config,
            limit=config.num_prompts,
            skip=config.skip_prompts,
            summary_every=config.summary_every,
            report=told.log,
            stop=stop,
        )
    finally:
        told.close()
