"""One update of a head from judged drafts: losses, a bounded step, and a way back (DVI, Bhansali and Heck, 2510.05421)."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_

from understudy.core.errors import UserError
from understudy.drafting.lora import lora_parameters
from understudy.drafting.protocols import Drafter
from understudy.ops.divergences import masked_mean
from understudy.training.online.buffer import Batch
from understudy.training.online.guard import Guard, finite
from understudy.training.online.losses import Losses, dvi_losses, field, on_policy
from understudy.training.online.pace import Pace
from understudy.training.online.schedule import PiecewiseSchedule

WEIGHT_DECAY = 0.01
CLIP = 1.0
WATCH = 4  # updates from one that watches to the next: comparing with the frozen head costs two more passes of a head
STATS = ("loss", *Losses._fields, "grad_norm", "reward", "advantage")  # in the order of their one transfer to the host


class Plan(NamedTuple):
    """What a due update does."""

    n: int  # samples; 0 = it is skipped
    watches: bool  # whether it also compares the head with the frozen one


class OnlineTrainer:
    """Trains the A and B of a drafter's head, in fp32, in place, between cycles.

    loss = kd KD + ce CE + pg PG + kl KL - entropy H, by the schedule's weights; AdamW, gradients clipped to norm 1.
    """

    def __init__(
        self,
        drafter: Drafter,
        lr: float,
        tau: float,  # softens the verifier
        schedule: PiecewiseSchedule,
        max_ms: float,  # most milliseconds of an update; 0 = no cap, and then updates do not depend on time
        store_mode: str,  # full | topk, of the batches
        topk: int,
        vocab_size: int,
        baseline_ema: float = 0.9,
        guard: int = 256,  # positions per window; 0 = the head is not compared with the frozen one
    ) -> None:
        self.drafter, self.tau, self.schedule = drafter, tau, schedule
        self.width = vocab_size if store_mode == "full" else min(topk, vocab_size)
        self.logits_field = "z_phi" if store_mode == "full" else "z_val"
        self.parameters = list(lora_parameters(drafter).values())
        if not self.parameters:
            raise UserError("online learning needs a drafter whose head can learn: use --drafter dvi")
        assert all(p.dtype == torch.float32 and p.requires_grad for p in self.parameters)
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=WEIGHT_DECAY, fused=fused)
        self.baseline = 0.0  # running mean of rewards
        self.baseline_ema = baseline_ema
        self.guard = Guard(drafter, self.optimizer, guard)
        # Updates that also compare with the frozen head cost more: each kind has its own size.
        self._paces = (Pace(max_ms), Pace(max_ms))
        self._unwatched = 0  # updates since one watched, or would have if it had fitted
        self.ran = self.skipped = 0

    def plan(self, batch: int, unseen: int) -> Plan:
        """What the due update does within its time, with `batch` samples and `unseen` positions for the guard.

        To be asked once per due update: it counts. One update in `WATCH` watches. Where watching does not fit the time, an ordinary
        update takes its place; where nothing is unseen, the next one watches.
        """
        ordinary, watching = self._paces
        n = ordinary.size(batch)
        if not n:  # one that watches takes longer still
            ordinary.skip()
            return Plan(0, False)
        self._unwatched += 1
        if self.guard.window and self._unwatched >= WATCH and unseen:
            self._unwatched = 0
            if watched := watching.size(batch):
                return Plan(watched, True)
            watching.skip()
        return Plan(n, False)

    def skip(self, global_step: int) -> dict[str, float]:
        """The plan of a due update was to skip it: even the smallest does not fit its time."""
        self.schedule.step = global_step
        self.skipped += 1
        return {"global_step": global_step, "n": 0, "ms": 0.0, "skipped": 1.0, "non_finite": 0.0, "restored": 0.0}

    def step(
        self,
        batch: Batch,
        global_step: int,
        probe: Batch | None = None,
        began: float | None = None,
        plan: Plan | None = None,
    ) -> dict[str, float]:
        """Update once; the statistics of it, `ms` among them, which run from `began` (perf_counter) if it is given.

        batch: fields of `DVITrainSample`, each [n, ...]; of more samples than the plan allows, the first are taken.
        probe: positions for the guard, which no update has seen, used where the plan is to watch; without them nothing is compared.
        plan: what `plan` said of this update; asked here unless given.
        A loss, gradient or weight that is not finite, or a head worse than the frozen one, brings the last good weights back.
        """
        began = time.perf_counter() if began is None else began
        given = field(batch, "token").shape[0]
        n, watches = plan or self.plan(given, 0 if probe is None else field(probe, "token").shape[0])
        if n == 0:
            return self.skip(global_step)
        if n < given:
            batch = _first(batch, n)
        assert field(batch, self.logits_field).shape[1] == self.width, "the batch comes from another kind of buffer"
        self.schedule.step = global_step
        with torch.inference_mode(False), torch.enable_grad():
            worse = watches and probe is not None and self.guard.watch(probe)
            stats = self._update(batch)
        restored = worse or bool(stats["non_finite"])
        stats |= {"global_step": global_step, "n": n, "skipped": 0.0, "restored": float(restored)}
        stats |= {f"guard_{name}": value for name, value in self.guard.verdict.items()}
        stats["ms"] = (time.perf_counter() - began) * 1e3
        self._paces[watches].record(n, stats["ms"])
        self.ran += 1
        return stats

    def _update(self, batch: Batch) -> dict[str, float]:
        weights = self.schedule.weights()
        logits = self.drafter.head_logits(field(batch, "hk").float())
        losses, loss, gradient = dvi_losses(logits, batch, self.tau, self.baseline, weights)
        learns = any(weights.values())
        if learns:  # else weight decay would be all that moves
            for p, g in zip(self.parameters, torch.autograd.grad(logits, self.parameters, gradient), strict=True):
                p.grad = g
        # Without a gradient `clip_grad_norm_` gives a number on the CPU, wherever the head is.
        norm = clip_grad_norm_(self.parameters, CLIP) if learns else torch.zeros_like(loss)
        reward = masked_mean(field(batch, "reward").float(), on_policy(batch))
        scalars = (loss, *losses, norm, reward, reward - self.baseline)
        stats = dict(zip(STATS, torch.stack(scalars).tolist(), strict=True))
        good = math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])
        if good and learns:
            self.optimizer.step()
            good = finite(self.parameters)
        for p in self.parameters:
            p.grad = None
        if good:
            self.guard.updated()
            self.baseline = self.baseline_ema * self.baseline + (1 - self.baseline_ema) * stats["reward"]
        else:
            self.guard.restore()
        stats |= {f"weight_{name}": value for name, value in weights.items()}
        stats |= {"baseline": self.baseline, "non_finite": float(not good)}
        stats |= {"policy_mean_advantage": stats.pop("advantage"), "policy_mean_kl": stats["kl"]}
        return stats


def _first(batch: Batch, n: int) -> Batch:
    return {name: None if value is None else value[:n] for name, value in batch.items()}
