"""A run of training from rollouts: roll out, update, evaluate now and then, take the time at the end, all of it in one folder.

metrics/train.csv     one row per update         metrics/eval.csv     one row per evaluation and draft length
metrics/timing.csv    one row                    checkpoints/         step_########.pt, latest.pt, final.pt
telemetry/            alignment dumps of the phases train, eval and timing, whose blocks are counted through
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from understudy.decoding.stats import Stats
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.target.target import Target
from understudy.telemetry.run import Cell, RunFolder
from understudy.telemetry.trackers import Trackers
from understudy.training.rollouts.checkpoints import load, save
from understudy.training.rollouts.collect import Rollout, roll_out
from understudy.training.rollouts.evaluate import clock, evaluate
from understudy.training.rollouts.options import RolloutConfig
from understudy.training.rollouts.phases import PhasedTelemetry
from understudy.training.rollouts.prompts import EndlessPrompts
from understudy.training.rollouts.trainer import RolloutTrainer

LOG_EVERY = 10  # updates between lines

TRAIN = (
    "update",
    "loss",
    "kl",
    "ce",
    "pg",
    "beta",
    "positions",
    "reward",
    "baseline",
    "policy_mean_advantage",
    "policy_mean_kl",
    "grad_norm",
    "non_finite",
    "tau",
    "acceptance_rate",
    "rollout_s",
    "update_s",
)
EVAL = ("update", "k", "tau", "acceptance_rate", "acc", "ctar", "tokens")


class RolloutRun:
    """One run. `checkpoints`: the folder for them; `save_every`: updates between them, 0 = only the last; `start`: where to go on."""

    def __init__(
        self,
        target: Target,
        drafter: ExitDrafter,
        config: RolloutConfig,
        folder: RunFolder,
        trackers: Trackers,
        checkpoints: Path | None = None,
        save_every: int = 0,
        start: Path | None = None,
        console: Console | None = None,
    ) -> None:
        self.target, self.drafter, self.config, self.folder = target, drafter, config, folder
        self.console = console or Console(highlight=False)
        self.trackers, self.save_every = trackers, save_every
        self.checkpoints = checkpoints or folder.checkpoints
        self.trainer = RolloutTrainer(drafter, config, config.seed)
        if start is not None:
            load(start, self.trainer)
        self.telemetry = PhasedTelemetry(
            config,
            ("train", "eval", "timing") if config.time_prompts else ("train", "eval"),
            folder.path.resolve().name,
            self.trainer.policy,
            self.say,
            folder.telemetry,
        )
        self.rolled = Stats()  # of all rollouts

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def run(
        self,
        prompts: EndlessPrompts,
        held_out: Sequence[list[int]],
        timed: Sequence[list[int]],
        stop: Callable[[], str | None] = lambda: None,
    ) -> dict[str, Any]:
        """Train on `prompts`, evaluate on `held_out`, time on `timed`; the figures of the run, JSON-ready.

        A trainer that goes on leaves out the prompts that it had, if they are of these lines in this order. `stop()` gives a reason
        to end after the present update, or None. What was learned is then saved at once: nothing is evaluated or timed any more, and
        `last` is the evaluation before.
        """
        config, reason = self.config, None
        prompts.go_on(self.trainer.prompts)
        table, evals = self.folder.table("train", TRAIN), self.folder.table("eval", EVAL)
        timing = None
        try:
            first = last = self._evaluate(evals, held_out)
            for done in range(1, config.steps + 1):
                table.append(self._update(prompts, done))
                ended = done == config.steps
                if (reason := stop()) or ended:
                    save(self.checkpoints / "final.pt", self.trainer)
                if reason:
                    self.say(f"stopped after update {self.trainer.updates}: {reason}")
                    break
                if ended or (config.eval_every > 0 and done % config.eval_every == 0):
                    last = self._evaluate(evals, held_out)
            reason = reason or stop()
            if timed and not reason:
                timing = self._time(timed)
        finally:
            for file in (table, evals):
                file.close()
            self.telemetry.close()
        figures: dict[str, Any] = {
            "updates": self.trainer.updates,
            "ended": reason or "steps",
            "rollout_tokens": self.rolled.tokens,
            "first": first,
            "last": last,
            "timing": timing,
        }
        self.folder.event("end", step=self.trainer.updates, **figures)
        return figures

    def _roll_out(self, prompts: EndlessPrompts) -> list[Rollout]:
        config, made = self.config, []
        for _ in range(config.rollout):
            made.append(
                roll_out(
                    self.target,
                    self.drafter,
                    next(prompts),
                    config.max_new_tokens,
                    config.spec_train_greedy,
                    config.seed,
                    prompts.given - 1,  # each prompt has random streams of its own
                    self.telemetry.watching("train"),
                )
            )
        self.trainer.prompts = prompts.state()
        return made

    def _update(self, prompts: EndlessPrompts, done: int) -> dict[str, Cell]:
        """The `done`-th update of this run; its row."""
        began = time.perf_counter()
        rollouts = self._roll_out(prompts)
        middle = time.perf_counter()
        values = self.trainer.step(rollouts)
        stats = Stats()
        for rollout in rollouts:
            stats.merge(rollout.stats)
        self.rolled.merge(stats)
        values = {
            **values,
            "tau": stats.tau,
            "acceptance_rate": stats.acceptance_rate,
            "rollout_s": middle - began,
            "update_s": time.perf_counter() - middle,
        }
        update = self.trainer.updates
        self.trackers.log(update, {f"train/{name}": value for name, value in values.items()})
        if values["non_finite"]:
            self.folder.event("non_finite", step=update)
        if done == 1 or done % LOG_EVERY == 0:
            words = {"loss": ".4f", "kl": ".4f", "beta": ".3f", "reward": ".2f", "tau": ".2f"}
            self.say(f"update {update}: {', '.join(f'{n} {values[n]:{f}}' for n, f in words.items() if n in values)}")
        if self.save_every and done % self.save_every == 0:
            for name in (f"step_{update:08d}.pt", "latest.pt"):
                save(self.checkpoints / name, self.trainer)
        return {"update": update, **values}

    def _evaluate(self, table: Any, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
        config, update = self.config, self.trainer.updates
        rows = evaluate(
            self.target,
            self.drafter,
            prompts,
            config.spec_k_max,
            config.max_new_tokens,
            self.telemetry.watching("eval"),
        )
        for row in rows:
            table.append({"update": update, **row})
        flat = {f"eval/{name}@{row['k']}": value for row in rows for name, value in row.items() if name != "k"}
        self.trackers.log(update, {name: float(value) for name, value in flat.items() if value is not None})
        self.folder.event("evaluated", step=update, rows=rows)
        if config.quiet_eval:
            taus = ", ".join(f"tau@{row['k']} {row['tau']:.2f}" for row in rows)
            self.say(f"eval after update {update}: {taus}, ctar@{rows[-1]['k']} {_share(rows[-1]['ctar'])}")
        else:
            self._grid(update, rows)
        return rows

    def _grid(self, update: int, rows: Sequence[dict[str, Any]]) -> None:
        grid = Grid(title=f"after update {update}", box=box.SIMPLE, padding=(0, 1, 0, 0))
        for column in ("K", "tau", "accepted", "acc@K", "CTAR@K", "tokens"):
            grid.add_column(column, justify="right")
        for row in rows:
            shares = (_share(row[name]) for name in ("acceptance_rate", "acc", "ctar"))
            grid.add_row(str(row["k"]), f"{row['tau']:.2f}", *shares, str(row["tokens"]))
        self.console.print(grid)

    def _time(self, prompts: Sequence[list[int]]) -> dict[str, Any]:
        config = self.config
        found = clock(
            self.target,
            self.drafter,
            prompts,
            config.time_max_new_tokens,
            config.time_repeats,
            config.timing_greedy,
            self.telemetry.watching("timing"),
            config.seed,
        )
        table = self.folder.table("timing", found)
        table.append(found)
        table.close()
        self.trackers.log(self.trainer.updates, {"timing/speedup": found["speedup"]})
        self.say(
            f"timing: plain {found['plain_tokens_per_s']:.1f} tokens/s, drafted {found['tokens_per_s']:.1f}"
            f" ({found['speedup']:.2f}x), tau {found['tau']:.2f}, {found['same']} of {found['prompts']} texts the same"
        )
        return found


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
