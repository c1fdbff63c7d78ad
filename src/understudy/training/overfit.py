"""`--overfit N`: can this drafter learn a few texts by heart, and does decoding then show it?

N prompts are answered greedily by the target itself, the drafter is trained on exactly these texts again and again, and acceptance is
measured on the same prompts. Where objective, features, positions, masks and engine fit together, the accept length comes near the
most that it can be, the drafted tokens plus one, after a few hundred steps. Where it does not, no amount of data will help.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from understudy.assets import prompts_path
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.decoding.acceptance import evaluating, measure_acceptance
from understudy.drafting.objective import Batch, Objective
from understudy.drafting.spec import build
from understudy.features.live import LiveFeatures
from understudy.target.target import Target
from understudy.training.batches import Fixed
from understudy.training.datasets import OfflineOptions, TrainingData, fitting_prompts
from understudy.training.distributed import Ranks
from understudy.training.replay import Decoding, answered

# options of data and evaluation that have nothing to decide here
UNREAD = {"max_length", "pack", "last_turn_only", "is_preformatted", "eval_num_prompts", "eval_batches", "vocab_rows"}
STEPS = 300  # where neither steps nor epochs are given: an epoch would be a step or two

Options = TypeVar("Options", bound=OfflineOptions)


def with_steps(config: Options) -> Options:
    """The options with a number of steps that is long enough to learn a few texts, unless they say one."""
    if not config.overfit or config.max_steps is not None or config.num_epochs is not None:
        return config
    return config.model_copy(update={"max_steps": STEPS})


class Repeated:
    """The same few batches in every epoch."""

    def __init__(self, batches: Sequence[Batch], identity: str) -> None:
        """`identity` tells these batches from others."""
        self.batches, self.identity = list(batches), identity
        self.steps_per_epoch: int | None = len(self.batches)
        self.epoch = self.batch = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches[self.batch :]:
            self.batch += 1
            yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batch": self.batch, "of": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("of") != self.identity:
            raise UserError("cannot resume: that run did not learn these texts by heart; start a new one")
        self.epoch, self.batch = state["epoch"], state["batch"]


class OverfitData(TrainingData):
    """A few prompts and the target's own greedy answers: what is trained on, held out and measured, all in one."""

    def __init__(self, config: OfflineOptions, target: Target, ranks: Ranks) -> None:
        """Decodes. UserError if there are fewer prompts than were asked for, or no answer that could be drafted."""
        super().__init__(config, target, ranks)
        path = config.eval_prompts or config.eval_data_path or next(iter(config.train_data_path), prompts_path())
        self._prompts = fitting_prompts(config, target, path, 8 * config.overfit)[: config.overfit]
        if len(self._prompts) < config.overfit:
            raise UserError(f"--overfit {config.overfit}: only {len(self._prompts)} prompts of {path} can be taken")
        mine = None
        if ranks.main:
            mine = measure_acceptance(target, build("none", target), self._prompts, config.eval_max_new_tokens).outputs
        self.answers: list[list[int]] = ranks.of_main(mine)
        if all(len(answer) < 2 for answer in self.answers):
            raise UserError(f"the target ends its answers to {path} at once: there is nothing to draft")

    def token_counts(self) -> Tensor:
        ids = torch.tensor([token for answer in self.answers for token in answer])
        return torch.bincount(ids, minlength=self.target.vocab_size)

    def bind(self, needs: Needs) -> None:
        config, ranks, count = self.config, self.ranks, len(self.answers)
        # of every global batch this rank takes its share; what is missing at the end is filled up from the beginning
        mine = [(i * ranks.world + ranks.rank) % count for i in range(math.ceil(count / ranks.world))]
        batches = [
            answered([self._prompts[i] for i in part], [self.answers[i] for i in part])
            for part in (mine[at : at + config.batch_size] for at in range(0, len(mine), config.batch_size))
        ]
        texts = json.dumps([self._prompts, self.answers, config.batch_size, ranks.world])
        self.batches = Repeated(batches, hashlib.sha256(texts.encode()).hexdigest())
        self.features, self.held_out = LiveFeatures(self.target, needs), Fixed(iter(batches), len(batches))

    def first(self) -> Batch:
        assert isinstance(self.batches, Repeated)
        return self.batches.batches[0]

    def facts(self, console: Console | None) -> tuple[dict[str, Any], int]:
        supervised = sum(map(len, self.answers))
        told = {
            "overfit": len(self.answers),
            "tokens": supervised + sum(map(len, self._prompts)),
            "supervised": supervised,
        }
        if console is not None:
            console.print(
                f"overfit: {len(self.answers)} texts of {told['tokens']:,} tokens, {supervised:,} of them written by the"
                " target itself, are learned by heart",
                soft_wrap=True,
            )
        assert self.batches.steps_per_epoch is not None
        return told, self.batches.steps_per_epoch

    def prompts(self) -> list[list[int]]:
        return self._prompts


class ByHeart(Decoding):
    """What is measured of a drafter that learns by heart: acceptance, its replay, and the accuracy at every draft position."""

    def __init__(self, objective: Objective, data: OverfitData) -> None:
        super().__init__(objective, data.target, data.prompts(), data.config.eval_max_new_tokens)
        self.answers = data.answers
        self.latest: Mapping[str, float] = {}

    def __call__(self) -> dict[str, float]:
        accuracies = {f"accuracy_{k}": value for k, value in enumerate(self.accuracies(), start=1)}
        figures = {**super().__call__(), **accuracies, "tau_at_most": self.at_most()}
        self.latest = figures
        return figures

    def accuracies(self) -> list[float]:
        """Share of drafts that are the target's choice, given the true tokens before them, by position from 1 on."""
        sums: Tensor | int = 0
        with evaluating(self.objective), torch.no_grad():
            for prompt, answer in zip(self.prompts, self.answers, strict=True):
                found = self.objective.predictions(self.features(answered([prompt], [answer])))
                right = (found.predicted == found.target) & found.asked
                sums = sums + torch.stack([right.sum(1), found.asked.sum(1)])
        assert isinstance(sums, Tensor)
        return [right / asked for right, asked in zip(*sums.tolist(), strict=True) if asked]

    def at_most(self) -> float:
        """The accept length of a drafter that is always right: the last cycle of a text may be a short one."""
        after_first = [len(answer) - 1 for answer in self.answers]
        cycles = sum(math.ceil(tokens / (self.objective.drafter.steps + 1)) for tokens in after_first)
        return sum(after_first) / cycles

    def outcome(self) -> dict[str, Any] | None:
        """The latest figures, JSON-ready; None if nothing was measured in this process."""
        if not self.latest:
            return None
        accuracy = [value for name, value in self.latest.items() if name.startswith("accuracy_")]
        return {"accuracy": accuracy, "tau": self.latest["tau"], "tau_at_most": self.latest["tau_at_most"]}


def told(outcome: Mapping[str, Any]) -> str:
    """`ByHeart.outcome` in a line."""
    accuracy = " ".join(f"{value:.3f}" for value in outcome["accuracy"])
    return (
        f"overfit: accuracy {accuracy} per position,"
        f" measured accept length {outcome['tau']:.2f} of at most {outcome['tau_at_most']:.2f}"
    )
