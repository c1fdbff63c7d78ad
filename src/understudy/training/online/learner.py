"""The online learner: a listener that turns cycles into samples, and samples into steps of the drafter's head.

    learner = OnlineLearner(drafter)                       # its options are the drafter's
    sequence = DecodeSequence(target, drafter, listeners=[learner])
    ...
    learner.close()

(DVI, Bhansali and Heck, 2510.05421.) It works between cycles and changes nothing but the head's A and B: drafts change, the output
law does not. The verifier's logits are the raw ones, before temperature, filters and penalties: the head learns the model, not one
request's settings. A reward is still what happened: whether the draft was kept, by whatever rule the request was verified.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.records import Cycle, Needs
from understudy.drafting.learning import LearnOptions, Trace
from understudy.drafting.lora import SUFFIXES, lora_parameters
from understudy.drafting.protocols import Drafter
from understudy.training.online.buffer import DVIRingBuffer
from understudy.training.online.checkpoints import CheckpointFolder, State, restore_head
from understudy.training.online.schedule import PiecewiseSchedule
from understudy.training.online.trainer import OnlineTrainer

HISTORY = 10_000  # updates whose milliseconds are remembered
POLICY = ("policy_mean_advantage", "policy_mean_kl")


class OnlineLearner:
    """Learns from every accept and first reject of chains, over any number of sequences, one after the other or in turn.

    options: the drafter's own unless given. metrics: called with the statistics of every due update. seed: of the replay.
    """

    needs = Needs()  # decode rows have logits anyway

    def __init__(
        self,
        drafter: Drafter,
        options: LearnOptions | None = None,
        metrics: Callable[[dict[str, float]], None] | None = None,
        seed: int = 0,
    ) -> None:
        options = options or drafter.learning
        if options is None:
            raise UserError("online learning needs a drafter whose head can learn: use --drafter dvi")
        if drafter.nodes is not None:
            raise UserError("online learning needs drafts in a row: this drafter proposes trees")
        if options.save_lora_every and options.save_lora_path is None:
            raise UserError("--save-lora-every needs a folder: give --save-lora-path")
        self.drafter, self.options, self.metrics, self.seed = drafter, options, metrics, seed
        self.schedule = PiecewiseSchedule(
            warmup=options.dvi_warmup_steps,
            kl0=options.dvi_kl_lambda0,
            klmin=options.dvi_kl_lambdamin,
            pgmax=options.dvi_pg_lambda_max,
            kd0=options.dvi_kd_lambda0,
            kdmin=options.dvi_kd_lambdamin,
            ce=options.dvi_ce_lambda,
            entropy=options.dvi_entropy_weight,
        )
        heads = [p for name, p in lora_parameters(drafter).items() if name.endswith(SUFFIXES[1])]
        self.trainer = OnlineTrainer(
            drafter,
            lr=options.dvi_lr,
            tau=options.dvi_tau,
            schedule=self.schedule,
            max_ms=options.max_online_train_ms,
            store_mode=options.dvi_store,
            topk=options.dvi_topk,
            vocab_size=heads[0].shape[0] if heads else 0,
            baseline_ema=options.dvi_baseline_ema,
            guard=options.dvi_guard,
        )
        if options.load_lora:
            trainer = self.trainer
            trainer.baseline = restore_head(options.load_lora, drafter, trainer.optimizer, self.schedule)
            trainer.guard.keep()
        self.global_step = self.schedule.step  # verify passes
        self.buffer: DVIRingBuffer | None = None  # made at the first block, which says how wide states are and where
        self.due = 0
        self.last: dict[str, float] = {}  # statistics of the last due update
        self.ms: deque[float] = deque(maxlen=HISTORY)
        self._policy: dict[str, float | None] = dict.fromkeys(POLICY)  # of the last update that ran
        self._checkpoints: CheckpointFolder | None = None
        if options.save_lora_path:
            self._checkpoints = CheckpointFolder(options.save_lora_path, options.save_lora_every)

    def on_cycle(self, cycle: Cycle) -> None:
        """Keep what a verify pass showed, and update when one is due. Prefill is no verify pass."""
        if cycle.index == 0:
            return
        # Whoever decodes may do so in inference mode; what is kept and learned may not be made there.
        with torch.inference_mode(False):
            self._capture(cycle)
            self.global_step += 1
            self.schedule.step = self.global_step
            buffer, options = self.buffer, self.options
            if (
                options.dvi_online
                and self.global_step % options.dvi_update_every == 0
                and buffer is not None
                and buffer.size >= options.dvi_batch_size
            ):
                self._update(buffer)

    def _capture(self, cycle: Cycle) -> None:
        if cycle.parents is not None:
            raise UserError("online learning needs drafts in a row: this drafter proposed a tree")
        count = 0
        if cycle.drafted:
            assert cycle.proposal is not None and cycle.rows.logits is not None
            trace = cycle.proposal.trace
            assert isinstance(trace, Trace), "a drafter with a head that learns puts a Trace into every proposal"
            logits = cycle.rows.logits  # row 0 predicts draft 0
            if self.buffer is None:
                self.buffer = self._make_buffer(trace.hidden.shape[1], logits)
            count = self.buffer.push_block(trace.hidden, cycle.drafted, logits, cycle.accepted)
        if self.options.dvi_debug:
            size = count * self.buffer.bytes_per_slot if self.buffer else 0
            held = self.buffer.size if self.buffer else 0
            print(f"dvi: block {self.global_step + 1}: {count} states, {size} bytes; {held} held", file=sys.stderr)

    def _make_buffer(self, width: int, logits: Tensor) -> DVIRingBuffer:
        options = self.options
        return DVIRingBuffer(
            capacity=options.dvi_buffer_size,
            d_model=width,
            vocab_size=logits.shape[1],
            store=options.dvi_store,
            topk=options.dvi_topk,
            logits_dtype=getattr(torch, options.dvi_logits_dtype),
            device=self.trainer.parameters[0].device,
            seed=self.seed,
        )

    def _update(self, buffer: DVIRingBuffer) -> None:
        self.due += 1
        began = time.perf_counter()
        trainer = self.trainer
        plan = trainer.plan(self.options.dvi_batch_size, buffer.unseen)
        if plan.n == 0:
            self.last = trainer.skip(self.global_step)
        else:
            # Taken before the batch is, which makes what it holds seen
            probe = buffer.take_unseen((plan.n + 1) // 2) if plan.watches else None
            self.last = trainer.step(buffer.sample(plan.n), self.global_step, probe, began, plan)
            self._policy = {name: self.last[name] for name in POLICY}
            self.ms.append(self.last["ms"])
            if self._checkpoints:
                self._checkpoints.updated(trainer.ran, self._state())
        if self.metrics:
            self.metrics(self.last)

    def _state(self) -> State:
        return self.drafter, self.trainer.optimizer, self.schedule, self.trainer.baseline

    def summary(self) -> dict[str, float]:
        """Counts since the learner was made, and milliseconds per update over its last 10,000."""
        trainer, buffer = self.trainer, self.buffer
        ms = torch.tensor(list(self.ms) or [0.0], dtype=torch.float64)
        return {
            "global_step": self.global_step,
            "samples": buffer.pushed if buffer else 0,
            "held": buffer.size if buffer else 0,
            "bytes_per_slot": buffer.bytes_per_slot if buffer else 0,
            "due": self.due,
            "ran": trainer.ran,
            "skipped": trainer.skipped,
            "restored": trainer.guard.restored,
            "ran_share": trainer.ran / self.due if self.due else 1.0,
            "ms_p50": ms.quantile(0.5).item(),
            "ms_p99": ms.quantile(0.99).item(),
            "baseline": trainer.baseline,
        }

    def policy(self) -> dict[str, float | None]:
        """Means over the last update's policy gradient, for telemetry: None before an update ran, nothing where none is in use."""
        return dict(self._policy) if self.options.dvi_online and self.options.dvi_pg_lambda_max else {}

    def close(self) -> None:
        """Write `final.pt`, if there is a folder for it."""
        if self._checkpoints:
            self._checkpoints.close(self._state())


def learner_of(
    drafter: Drafter, seed: int = 0, metrics: Callable[[dict[str, float]], None] | None = None
) -> OnlineLearner | None:
    """The learner that the drafter's options ask for: to learn, or only to show what would be learned from. None: neither.

    UserError where they ask for neither, and yet to save what is learned.
    """
    options = drafter.learning
    if options is None:
        return None
    if options.dvi_online or options.dvi_debug:
        return OnlineLearner(drafter, metrics=metrics, seed=seed)
    for name, wanted in (("path", options.save_lora_path is not None), ("every", options.save_lora_every > 0)):
        if wanted:
            raise UserError(f"--save-lora-{name}: nothing is learned, so nothing is saved: give --dvi-online true")
    return None
