"""What a run is made of, from a fresh start or from a checkpoint, and back into one: exact resume.

Weights, optimizer, schedule (a function of the step), data position, counters and every random stream come back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from understudy.core.checkpoints import find_checkpoint, steps_of
from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.core.provenance import environment
from understudy.core.seeds import derive
from understudy.drafting.objective import Objective
from understudy.training import checkpoints as disk
from understudy.training.distributed import Ranks
from understudy.training.optimizer import Masters, adamw, load_state, state_of, trained
from understudy.training.options import TrainOptions
from understudy.training.protocols import Batches, Log
from understudy.training.rng import rng_state, seed_all, set_rng_state


@dataclass(slots=True)
class Counters:
    """What the loop knows beside weights, optimizer and data; plain values, saved with every checkpoint."""

    step: int = 0  # updates that were due, the skipped ones too
    skipped: int = 0  # steps that left the weights as they were
    empty_batches: int = 0  # batches that supervised nothing
    supervised: int = 0  # supervised slots so far
    tokens: int = 0  # tokens read so far, without padding
    bad_in_row: int = 0  # steps in a row whose loss or gradient was not finite
    evaluated: int = -1  # the last step that was evaluated
    best_tau: float | None = None  # highest measured accept length
    best_step: int | None = None
    since_best: int = 0  # evaluations without a better one


class Keeper:
    """Model, optimizer and data of a run, and its checkpoints. `figures` = those of the last evaluation."""

    def __init__(
        self,
        objective: Objective,
        batches: Batches,
        options: TrainOptions,
        ranks: Ranks,
        log: Log,
        card: Mapping[str, Any],
    ) -> None:
        assert options.output_dir is not None, "the caller decides where a run goes"
        self.objective, self.batches, self.options = objective, batches, options
        self.ranks, self.log, self.card = ranks, log, card
        self.store = disk.Checkpoints(options.output_dir, options.keep)
        self.at = Counters()
        self.figures: dict[str, float] = {}
        self._saved: tuple[int, Path] | None = None
        source = self._source()
        state = None if source is None else disk.read_state(source)
        self.masters = Masters(objective)
        if source is not None and state is not None:
            disk.load_masters(objective, state.masters, source)
        self.model = ranks.wrap(objective)
        self.model.train()
        self.params = trained(objective)  # after wrapping: sharding replaces parameters
        self.optimizer = adamw(self.params.values(), options)
        seed_all(options.seed, ranks.rank)
        if source is not None and state is not None:
            self._continue(source, state)

    def _source(self) -> Path | None:
        """The checkpoint to continue. UserError if there is none, or if a new run would mix with an old one."""
        options = self.options
        if options.resume and steps_of(self.store.folder):
            return self._same(find_checkpoint(self.store.run, prefer="latest"))
        if options.resume and (self.store.run / "run.yaml").exists():
            return None  # the run began, and ended before its first checkpoint
        if options.resume:
            return find_checkpoint(self.store.run)  # which says what is missing
        source = None if options.resume_from is None else find_checkpoint(options.resume_from, prefer="latest")
        if self.ranks.main:
            self.store.claim()
        return None if source is None else self._same(source)

    def _same(self, source: Path) -> Path:
        """UserError unless the checkpoint is of the same drafter, of the same shape, on the same taps of the same target."""
        try:
            card = json.loads((source / "understudy.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"cannot resume from {source}: its understudy.json is missing or damaged") from None
        here = {key: self.card[key] for key in ("drafter", "taps", "target") if key in self.card}
        here |= self.objective.card()
        for key in here:
            if found := _difference(key, card.get(key), here[key]):
                name, was, now = found
                raise UserError(
                    f"cannot resume from {source}: its {name} was {was}, here it is {now}; give the data and options that it"
                    " began with, --init-from too, or start a new run"
                )
        return source

    def _continue(self, source: Path, state: disk.TrainerState) -> None:
        ranks, loop = self.ranks, state.loop
        self.at = Counters(**loop["counters"])
        self.figures = loop["figures"]
        if not self.options.resume:  # another folder: its `best` has to be in it
            self.at.best_tau, self.at.best_step, self.at.since_best, self.at.evaluated = None, None, 0, -1
        load_state(self.optimizer, self.params, state.optimizer)
        self.batches.load_state_dict(loop["data"])
        if ranks.accelerator.scaler is not None and loop["scaler"]:
            ranks.accelerator.scaler.load_state_dict(loop["scaler"])
        if len(state.rng) == ranks.world:
            set_rng_state(state.rng[ranks.rank])
        else:  # another number of processes: new streams, the same ones at every try
            seed_all(derive(self.options.seed, "continued", self.at.step), ranks.rank)
        if ranks.main:
            if self.options.resume and self.at.best_step == self.at.step:
                self.store.point("best", source)  # the run may have died between saving it and saying so
            before, now = loop["options"], self.options.model_dump(mode="json")
            changed = {name: [before.get(name), now[name]] for name in now if before.get(name) != now[name]}
            self.log.event("continue", step=self.at.step, checkpoint=str(source), changed=changed)

    def save(self) -> Path:
        """The checkpoint of the present step, written unless it is there. A collective."""
        if self._saved is not None and self._saved[0] == self.at.step:
            return self._saved[1]
        scaler = self.ranks.accelerator.scaler
        state = disk.TrainerState(
            masters=disk.masters_of(self.objective, self.params),
            optimizer=state_of(self.optimizer, self.params),
            rng=self.ranks.gather(rng_state()),
            loop={
                "counters": asdict(self.at),
                "data": self.batches.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "figures": self.figures,
                "processes": self.ranks.world,
                "options": self.options.model_dump(mode="json"),
            },
        )
        with self.ranks.whole(self.model):
            place = None
            if self.ranks.main:
                place = self.store.place(self.at.step)
                if place.is_dir():  # where this run was resumed: nothing but its figures can be new
                    disk.write_loop(place, state)
                    self._describe(place)
                else:
                    with self.masters.serving():
                        self.store.save(self.at.step, lambda folder: self._write(folder, state))
                self.log.event("checkpoint", step=self.at.step, path=str(place))
            place = self.ranks.of_main(place)
        self._saved = self.at.step, place
        return place

    def save_best(self) -> None:
        """The same, and `best` means it from now on. A collective."""
        place = self.save()
        if self.ranks.main:
            self.store.point("best", place)

    def _write(self, folder: Path, state: disk.TrainerState) -> None:
        self.objective.save(folder)
        disk.write_state(folder, state)
        self._describe(folder)

    def _describe(self, folder: Path) -> None:
        """`understudy.json`: what the formats of the weights cannot say."""
        training = {
            "step": self.at.step,
            "supervised": self.at.supervised,
            "figures": self.figures,
            "figures_step": self.at.evaluated if self.figures else None,
            "best_tau": self.at.best_tau,
        }
        write_json(
            folder / "understudy.json",
            {**self.card, **self.objective.card(), "training": training, "env": environment(self.options.seed)},
        )


def _difference(name: str, was: Any, now: Any) -> tuple[str, Any, Any] | None:
    """The first entry that differs, as (name, was, now), inside of objects of JSON; None = none does."""
    if isinstance(was, dict) and isinstance(now, dict):
        inner = (_difference(f"{name}.{key}", was.get(key), now.get(key)) for key in sorted({*was, *now}))
        return next((found for found in inner if found), None)
    return None if was == now else (name, was, now)
