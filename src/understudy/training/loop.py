"""THE offline training loop: every drafter is trained by it; what is special about a method is its `Objective`.

    ranks = Ranks(options, device)                        # first: it says on which device the target is to be loaded
    result = train(objective, batches, features, options, ranks=ranks, log=log, measure=measure, held_out=held_out)

A step draws `gradient_accumulation_steps` batches, and `training.step` turns them into one update. Every `eval_interval` steps
the held-out loss is taken and real decoding measures the accept length; `best` follows the latter, because loss keeps falling
after acceptance has peaked. Figures: `train/*`, `eval/*` (held-out, simulated), `measured/*` (decoding), `perf/*`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from understudy.core.errors import UserError
from understudy.drafting.objective import Batch, Objective
from understudy.training import evaluate
from understudy.training.distributed import Ranks
from understudy.training.figures import Window, peak_memory, zeros
from understudy.training.keeper import Keeper
from understudy.training.optimizer import learning_rate, total_steps
from understudy.training.options import TrainOptions
from understudy.training.progress import Bar
from understudy.training.protocols import Batches, FeatureSource, HeldOut, Log, Measure, Watcher
from understudy.training.rng import preserved_rng
from understudy.training.step import StepReport, take_step
from understudy.training.stops import StopRequest

FIRST = ("measured/tau", "measured/tau_replayed", "eval/tau_sim", "eval/loss")  # what an evaluation tells first
ASKED = {"max_minutes": "--max-minutes is over", "SIGTERM": "SIGTERM", "SIGINT": "interrupt"}


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended."""

    step: int  # optimizer steps of the whole run
    reason: str  # done | early_stop | max_minutes | SIGTERM | SIGINT
    checkpoint: Path  # the latest one
    best_tau: float | None  # highest measured accept length; None = never measured
    best_step: int | None


def train(
    objective: Objective,
    batches: Batches,
    features: FeatureSource,
    options: TrainOptions,
    *,
    ranks: Ranks,
    log: Log,
    measure: Measure | None = None,
    held_out: HeldOut | None = None,
    watchers: Sequence[Watcher] = (),
    card: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Result:
    """Train until the data, the steps or the time are over, or somebody asks to stop; save, and say how it ended.

    `options.output_dir` is set. `card` = what `understudy.json` shall say of target, tokenizer and vocabulary map; `console` =
    where the bar goes, stderr by default. UserError: nothing to train, a folder that holds a run, a checkpoint that does not fit,
    losses that are not finite `max_bad_steps` times in a row, or nothing supervised in all of the data.
    """
    evaluate.require_measure(measure, options.early_stop)
    total = total_steps(options, batches.steps_per_epoch)
    with StopRequest(options.max_minutes) as stops:
        keeper = Keeper(objective, batches, options, ranks, log, card or {})
        with Bar(total, keeper.at.step, ranks.main, console) as bar:
            return _Loop(keeper, features, measure, held_out, watchers, total, bar, stops).run()


class _Loop:
    def __init__(
        self,
        keeper: Keeper,
        features: FeatureSource,
        measure: Measure | None,
        held_out: HeldOut | None,
        watchers: Sequence[Watcher],
        total: int,
        bar: Bar,
        stops: StopRequest,
    ) -> None:
        self.keeper, self.features, self.measure, self.held_out = keeper, features, measure, held_out
        self.watchers, self.total, self.bar, self.stops = watchers, total, bar, stops
        self.options, self.ranks, self.log, self.at = keeper.options, keeper.ranks, keeper.log, keeper.at
        self.sums, self.window = evaluate.Sums(), Window()
        self.told_zero = False

    def run(self) -> Result:
        options, at = self.options, self.at
        self._introduce()
        if at.evaluated != at.step and options.eval_interval and at.step % options.eval_interval == 0:
            self._evaluate()  # where the drafter starts from, or what a stop came before
        reason, stream = "done", self._stream()
        while at.step < self.total and reason == "done":
            group = list(itertools.islice(stream, options.gradient_accumulation_steps))
            if not group:  # the data ended before the steps did
                if at.step % options.log_interval:
                    self._log_window()
                break
            report = self._step(group)
            early = self._after(report)
            if report.stop:
                reason = next(r for r in self.ranks.gather(self.stops.reason) if r)
            elif early:
                reason = "early_stop"
        if at.step and not at.supervised:
            raise UserError(
                "nothing was supervised, every loss mask is empty: check chat template, --is-preformatted, data"
            )
        if reason in ("done", "max_minutes") and at.evaluated != at.step:
            self._evaluate()
        return self._finish(reason)

    def _finish(self, reason: str) -> Result:
        place, at = self.keeper.save(), self.at
        if self.ranks.main:
            self.log.event("end", reason=reason, step=at.step, best_tau=at.best_tau, best_step=at.best_step)
        if reason in ASKED:
            self.bar.say(
                f"stopped after step {at.step} ({ASKED[reason]}) and saved {place}; "
                f"to go on: the same command with --output-dir {self.options.output_dir} --resume"
            )
        return Result(at.step, reason, place, at.best_tau, at.best_step)

    # -- one step

    def _stream(self) -> Iterator[Batch]:
        """Batches over epochs. Steps do not end with an epoch: the next one fills them up."""
        options, batches = self.options, self.keeper.batches
        limit = options.num_epochs or (None if options.max_steps else 1)
        while limit is None or batches.state_dict()["epoch"] < limit:
            yield from batches

    def _step(self, group: list[Batch]) -> StepReport:
        keeper, at = self.keeper, self.at
        rate = learning_rate(at.step, self.total, self.options)
        for part in keeper.optimizer.param_groups:
            part["lr"] = rate
        began = time.perf_counter()
        report = take_step(
            group,
            keeper.model,
            self.features,
            keeper.params,
            keeper.optimizer,
            self.ranks,
            max_norm=self.options.max_grad_norm,
            sums=self.sums,
            stop=lambda: self.stops.reason is not None,
        )
        self.window.add(report, rate, time.perf_counter() - began)
        at.step += 1
        at.supervised += report.count
        at.tokens += report.tokens
        at.empty_batches += report.empty
        at.skipped += report.skipped is not None
        at.bad_in_row = at.bad_in_row + 1 if report.skipped == "not finite" else 0
        self._complain(report)
        return report

    def _complain(self, report: StepReport) -> None:
        at = self.at
        if report.empty:
            self._event("empty_batch", f"WARNING: Empty loss_mask at step {at.step}!", batches=report.empty)
        if report.skipped == "not finite":
            text = f"WARNING: loss or gradient is not finite at step {at.step}: the step is skipped"
            self._event("not_finite", text, in_row=at.bad_in_row)
        if at.bad_in_row >= self.options.max_bad_steps:
            raise UserError(
                f"loss or gradient was not finite in {at.bad_in_row} steps in a row, up to step {at.step}: lower --learning-rate"
                " or choose another --mixed-precision, and go on with --resume"
            )
        why = zeros(report)
        if why and report.count and not self.told_zero:
            self.told_zero = True  # once: a loss of 0 looks like a good one
            self._event("zero_gradient", f"WARNING: step {at.step} taught nothing: {why}")
        if self.options.verbose:
            self.bar.say(
                f"step {at.step}: mask sum {report.masked}, supervised {report.count}, gradient norm {report.grad_norm:.4g}"
                + (f"; {why}" if why else "")
            )

    def _after(self, report: StepReport) -> bool:
        """Log, look, evaluate, save, each when it is due. True = stop early."""
        options, keeper, step = self.options, self.keeper, self.at.step
        self.bar.advance(step)
        if step % options.log_interval == 0 or step == self.total or report.stop:
            self._log_window()
        for watcher in self.watchers:
            if step % watcher.interval == 0:
                with self.ranks.whole(keeper.model), preserved_rng(), torch.no_grad():
                    keeper.model.eval()
                    watcher(step)
                    keeper.model.train()
        if options.eval_interval and step % options.eval_interval == 0 and not report.stop:
            self._evaluate()
            if options.early_stop and self.at.since_best >= options.early_stop:
                self._event("early_stop", f"no better accept length in {self.at.since_best} evaluations: stop")
                return True
        if options.save_interval and step % options.save_interval == 0:
            keeper.save()
        return False

    # -- figures

    def _introduce(self) -> None:
        params = self.keeper.params
        trainable = sum(p.numel() for p in params.values())
        frozen = sum(p.numel() for p in self.keeper.objective.parameters() if not p.requires_grad)
        if self.ranks.main:
            self.log.event(
                "train", step=self.at.step, steps=self.total, trainable=trainable, frozen=frozen, ranks=self.ranks.world
            )
        if self.options.verbose:
            self.bar.say(
                f"{trainable:,} trainable weights in {len(params)} tensors, {frozen:,} frozen; {self.total} steps"
            )

    def _event(self, kind: str, text: str, **fields: Any) -> None:
        if self.ranks.main:
            self.log.event(kind, step=self.at.step, text=text, **fields)
        self.bar.say(text)

    def _show(self, values: dict[str, float], line: bool = True) -> None:
        if self.ranks.main:
            self.log.log(self.at.step, values)
        self.bar.show(self.at.step, values, line)

    def _log_window(self) -> None:
        at = self.at
        values = {f"train/{name}": value for name, value in self.sums.ratios(self.ranks).items()}
        for name in ("skipped", "empty_batches", "supervised", "tokens"):
            values[f"train/{name}"] = float(getattr(at, name))
        values["perf/peak_memory_gb"] = max(self.ranks.gather(peak_memory(self.ranks.device)))
        self._show(values | self.window.figures())
        self.sums, self.window = evaluate.Sums(), Window()

    def _evaluate(self) -> None:
        """Held-out loss, then real acceptance; the best one so far is saved and called `best`."""
        keeper, at = self.keeper, self.at
        at.evaluated = at.step
        if not self.options.eval_interval or (self.held_out is None and self.measure is None):
            return
        values: dict[str, float] = {}
        if self.held_out is not None:
            found = evaluate.held_out(self.ranks, keeper.model, self.features, self.held_out)
            values |= {f"eval/{name}": value for name, value in found.items()}
        if self.measure is not None:
            found = evaluate.measured(self.ranks, keeper.model, keeper.masters, self.measure)
            values |= {f"measured/{name}": value for name, value in found.items()}
        real, replayed = values.get("measured/tau"), values.get("measured/tau_replayed")
        simulated = values.get("eval/tau_sim")
        if simulated is not None and real is not None:
            values["measured/tau_gap"] = simulated - real
        if real is not None and (differs := evaluate.mismatch(real, replayed, simulated)):
            figures = {"measured": real, "replayed": replayed, "simulated": simulated}
            self._event("mismatch", f"WARNING: {differs[1]}", cause=differs[0], **figures)
        keeper.figures = values
        self._show(values, line=False)
        told = [*(name for name in FIRST if name in values), *(name for name in values if name not in FIRST)]
        # figures per draft position are in the log; a line that nobody can read hides the one that matters
        self.bar.say(f"step {at.step}: " + "  ".join(f"{n} {values[n]:.4g}" for n in told if not n[-1].isdigit()))
        if real is not None:
            self._follow(real)

    def _follow(self, tau: float) -> None:
        """`best` goes to a higher measured accept length, and of equal ones to the later step, which learned more."""
        at = self.at
        better = at.best_tau is None or tau > at.best_tau
        at.since_best = 0 if better else at.since_best + 1
        if at.best_tau is not None and tau < at.best_tau:
            return
        at.best_tau, at.best_step = tau, at.step
        self.keeper.save_best()
