"""The loop: continue a prompt, keep what was judged, step when enough is there. Whole at any moment, whenever it is killed.

    RUN/run.yaml, env.json, events.jsonl               what was asked, where, and what happened
    RUN/steps.jsonl                                    one line per step: step, loss_rl, loss_slow, accept_rate, ppl_sample, ...
    RUN/checkpoints/step_N/lora_S, lora_D              the adapters, as peft reads them; RUN/latest points to the newest
    RUN/corpus                                         the built-in corpus, where that is trained on

A checkpoint is the state after a step, when the buffer is empty, so it needs no buffer: whoever resumes continues the prompts after
it again and makes the very steps that were lost. What is left in the buffer at the end of the stream trains nothing, for the same reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from understudy.core.checkpoints import find_checkpoint
from understudy.core.errors import UserError
from understudy.core.files import replacing
from understudy.data.options import DataOptions, corpus_paths
from understudy.target.memory import memory_guard
from understudy.target.target import Target
from understudy.telemetry.run import RunFolder, plain, read_events
from understudy.training.checkpoints import Checkpoints
from understudy.training.dvi_rl.buffer import ReplayBuffer
from understudy.training.dvi_rl.config import DviRlConfig
from understudy.training.dvi_rl.learner import Learner, Progress
from understudy.training.dvi_rl.rollout import Prompts, collect
from understudy.training.stops import StopRequest

C = TypeVar("C", bound=DviRlConfig)
LOG = "steps.jsonl"
NOTICE = (
    "lora_D is on (--slow-every {every}): it changes the model. Output equals plain decoding of the changed model, not of {name};"
    " the changes are in lora_D alone, and without it the model is what it was"
)


@dataclass(frozen=True, slots=True)
class Trained:
    """How a run ended."""

    reason: str  # max_steps, num_prompts, end of data, SIGINT or SIGTERM
    progress: Progress  # of the last step, which is the last checkpoint
    left: int  # judged drafts that did not fill a batch any more
    checkpoint: Path
    changes_the_model: bool
    skipped: int  # malformed lines
    too_long: int  # prompts left out for their length

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        now = self.progress
        return {
            "reason": self.reason,
            "steps": now.step,
            "slow_steps": now.slow_steps,
            "prompts": now.prompts,
            "new_tokens": now.new_tokens,
            "accept_rate": now.accepted / now.judged if now.judged else None,
            "baseline": now.baseline,
            "left_in_buffer": self.left,
            "skipped_lines": self.skipped,
            "too_long_prompts": self.too_long,
            "changes_the_model": self.changes_the_model,
            "checkpoint": str(self.checkpoint),
        }


def check_data(*paths: Path | None) -> None:
    """UserError if a file that was named is not there. Worth asking before anything is written."""
    for path in paths:
        if path is not None and not path.is_file():
            raise UserError(f"cannot read {path}: there is no such file")


def data_options(config: DviRlConfig, held_out: Path | None = None) -> DataOptions:
    """What is trained and evaluated on, as `corpus_paths` takes it."""
    train = [] if config.train_data_path is None else [config.train_data_path]
    return DataOptions(train_data_path=train, eval_data_path=held_out)


def open_run(config: C, what: str) -> tuple[C, RunFolder]:
    """The folder of a run, and the config that names it. Without one, a new one under runs/ is named after `what` and the time."""
    if config.output_dir is None:
        if config.resume:
            raise UserError("--resume needs --output-dir: the folder of the run to continue")
        folder = Path("runs") / time.strftime(f"{what}-dvi-rl-%Y%m%d-%H%M%S")
        config = config.model_copy(update={"output_dir": folder})
    assert config.output_dir is not None
    return config, RunFolder(config.output_dir, config.resume)


def start(config: DviRlConfig, target: Target, run: RunFolder, say: Callable[[str], None]) -> Learner:
    """A learner as it is at the beginning, in a run folder that is open. What changes the model is said here."""
    learner = Learner(target, config)
    if newest := _newest(run):
        learner.check_same_run(newest)  # before run.yaml is written anew
    run.begin(config, config.seed)
    if config.slow_every:
        say(NOTICE.format(every=config.slow_every, name=target.name))
    return learner


def _newest(run: RunFolder) -> Path | None:
    """The checkpoint that a resumed run goes on from; None if it has none."""
    some = run.resumed and any(run.checkpoints.glob("step_*"))
    return find_checkpoint(run.path, prefer="latest") if some else None


def resume(learner: Learner, run: RunFolder) -> None:
    """Take over the latest checkpoint of the run, if it has one. Later lines of the log go: their steps are made again."""
    if newest := _newest(run):
        learner.load(newest)
        # it may have been written just before the run was killed
        Checkpoints(run.path, learner.config.keep).point("latest", newest)
    kept = [line for line in read_events(run.path / LOG) if line["step"] <= learner.progress.step]
    with replacing(run.path / LOG) as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def train(
    config: DviRlConfig, target: Target, say: Callable[[str], None] = lambda text: None
) -> tuple[Trained, Learner]:
    """Train in `config.output_dir`, or in a new folder. `say` gets lines for a person. UserError for what a user can get wrong."""
    check_data(config.train_data_path)
    config, run = open_run(config, "train")
    learner = start(config, target, run, say)
    resume(learner, run)
    trained = proceed(learner, target, run, say)
    return trained, learner


def proceed(learner: Learner, target: Target, run: RunFolder, say: Callable[[str], None]) -> Trained:
    """Train on from where `learner` stands, to the end that its config names, and save."""
    config, checkpoints = learner.config, Checkpoints(run.path, learner.config.keep)
    prompts = Prompts(
        corpus_paths(data_options(config), run.path)[0][0], target, config.max_prompt_tokens, config.max_new_tokens
    )
    buffer = ReplayBuffer(config.buffer_size, config.fast_batch)
    saved = learner.progress.step if _newest(run) else -1
    if learner.progress.step:
        say(f"continuing after step {learner.progress.step}, {learner.progress.prompts} prompts")

    def save() -> None:
        nonlocal saved
        if saved != learner.progress.step:
            saved = learner.progress.step
            run.event("checkpoint", saved, folder=str(checkpoints.save(saved, learner.save)))

    with StopRequest() as stop, memory_guard(target), (run.path / LOG).open("a", encoding="utf-8") as log:
        reason = _loop(learner, target, prompts, buffer, stop, lambda line: _log(line, log, say), save)
        save()
    trained = Trained(
        reason,
        learner.progress,
        len(buffer),
        find_checkpoint(run.path, prefer="latest"),
        config.slow_every > 0,
        prompts.skipped.count,
        prompts.too_long,
    )
    run.event("end", learner.progress.step, **trained.summary())
    return trained


def _loop(
    learner: Learner,
    target: Target,
    prompts: Prompts,
    buffer: ReplayBuffer,
    stop: StopRequest,
    log: Callable[[dict[str, Any]], None],
    save: Callable[[], None],
) -> str:
    """Returns why it ended. Adapters change between rollouts only."""
    config, now = learner.config, learner.progress
    read, done = now.position, now.prompts  # now.* is what the latest step has seen, these run ahead of it
    stream = prompts.after(read)
    while True:
        if stop.reason:
            return stop.reason
        if config.max_steps is not None and now.step >= config.max_steps:
            return "max_steps"
        if config.num_prompts is not None and done >= config.num_prompts:
            return "num_prompts"
        sample = next(stream, None)
        if sample is None:
            return "end of data"
        buffer.add(collect(target, learner.drafter, sample, config.max_new_tokens))
        read, done = sample.position + 1, done + 1
        if (cause := buffer.due) is None:
            continue
        began, rollouts = time.perf_counter(), buffer.take()
        line = learner.learn(rollouts)
        now.position, now.prompts = read, done
        now.judged, now.accepted = now.judged + line["judged"], now.accepted + line["accepted"]
        now.new_tokens += line["new_tokens"]
        log(
            {
                **line,
                "cause": cause,
                "prompts": done,
                "rollouts": len(rollouts),
                "update_s": time.perf_counter() - began,
            }
        )
        if now.step % config.save_every == 0:
            save()


def _log(line: dict[str, Any], log: Any, say: Callable[[str], None]) -> None:
    log.write(json.dumps(plain(line), allow_nan=False) + "\n")
    log.flush()
    slow = "" if line["loss_slow"] is None else f"  loss_slow {line['loss_slow']:.4f}"
    say(
        f"step {line['step']}  loss_rl {line['loss_rl']:+.4f}{slow}  accept_rate {line['accept_rate']:.3f}"
        f"  ppl_sample {line['ppl_sample']:.2f}  prompts {line['prompts']}"
    )
