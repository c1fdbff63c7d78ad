"""Updates of a draft head's LoRA and of the shallow layers' LoRA from rollouts.

    loss = beta KL + ce_weight CE (+ rl_weight PG with --use-policy-grad)

beta falls by `kl_beta`. AdamW with two groups: the head at `lr_exit`, the shallow layers at `lr_lora`; weight decay and clipping
as in the online trainer. The target is read, never written, and no parameter but those of the two LoRAs gets a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from understudy.core.errors import UserError
from understudy.core.seeds import generator
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafting.lora import lora_parameters
from understudy.training.online.trainer import CLIP, WEIGHT_DECAY
from understudy.training.rollouts.collect import Rollout
from understudy.training.rollouts.losses import kl_beta, losses
from understudy.training.rollouts.options import RolloutOptions

BAD_STEPS = 10  # updates in a row with a loss or gradient that is no number before the run ends


class RolloutTrainer:
    """Holds the optimizer, the running mean of rewards, how many updates were made, and where the prompts of a run stand.

    UserError if the drafter has no head that learns.
    """

    def __init__(self, drafter: ExitDrafter, options: RolloutOptions, seed: int = 0) -> None:
        self.drafter, self.options = drafter, options
        self.head: list[nn.Parameter] = list(lora_parameters(drafter).values())
        if not self.head:
            raise UserError("training from rollouts needs a drafter whose head learns: use --drafter dvi")
        self.shallow: list[nn.Parameter] = [] if drafter.shallow is None else list(drafter.shallow.lora.values())
        groups = [{"params": self.head, "lr": options.lr_exit}, {"params": self.shallow, "lr": options.lr_lora}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=WEIGHT_DECAY)
        self.updates = 0
        self.baseline = 0.0  # running mean of rewards
        self.prompts: dict[str, int] = {}  # `EndlessPrompts.state` after the last rollouts; empty = at their beginning
        self.last: dict[str, float] = {}  # statistics of the last update
        self._bad = 0
        self._seed = seed

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.head, *self.shallow]

    def step(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """One update from at most `batch_size` of the positions of `rollouts`; its statistics. Without positions nothing changes.

        A loss or gradient that is no number leaves everything as it is (`non_finite` 1); after ten in a row it is a UserError.
        """
        options = self.options
        beta = kl_beta(self.updates, options.kl_beta0, options.kl_beta_min, options.kl_anneal_steps)
        chosen = self._choose(rollouts)
        count = sum(map(len, chosen))
        stats = {"positions": float(count), "beta": beta, "baseline": self.baseline, "non_finite": 0.0}
        if count:
            with torch.inference_mode(False), torch.enable_grad():
                stats |= self._update(rollouts, chosen, beta)
            self._bad = self._bad + 1 if stats["non_finite"] else 0
            if self._bad == BAD_STEPS:
                raise UserError(
                    f"{BAD_STEPS} updates in a row gave a loss or gradient that is no number: lower --lr-exit and --lr-lora"
                )
        self.updates += 1
        self.last = stats
        return stats

    def _choose(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Per rollout the positions that this update takes, in order."""
        total = sum(map(len, rollouts))
        # by update, so that a run that goes on draws as one that never stopped
        random = generator("cpu", self._seed, "positions", self.updates)
        picked = sorted(torch.randperm(total, generator=random)[: self.options.batch_size].tolist())
        chosen, first = [], 0
        for rollout in rollouts:
            chosen.append([i - first for i in picked if first <= i < first + len(rollout)])
            first += len(rollout)
        return chosen

    def states(self, rollout: Rollout, chosen: Sequence[int]) -> Tensor:
        """What the head reads at the chosen positions, [n, D].

        With a LoRA on the shallow layers they run again over the text, since stored states would give it no gradient.
        """
        if self.drafter.shallow is None:
            return torch.cat(rollout.hidden)[list(chosen)]
        rows = [rollout.rows[i] for i in chosen]
        ids = torch.tensor(rollout.ids[: max(rows) + 1], device=self.drafter.target.device)
        return self.drafter.norm(self.drafter.shallow(ids)[rows])

    def _update(self, rollouts: Sequence[Rollout], chosen: list[list[int]], beta: float) -> dict[str, float]:
        options = self.options
        used = [(rollout, picked) for rollout, picked in zip(rollouts, chosen, strict=True) if picked]
        logits = self.drafter.head_logits(torch.cat([self.states(*pair) for pair in used]))
        device = logits.device
        verifier = torch.cat([torch.cat(r.logits)[picked] for r, picked in used]).to(device)
        tokens = torch.tensor([r.tokens[i] for r, picked in used for i in picked], device=device)
        rewards = torch.tensor([r.rewards[i] for r, picked in used for i in picked], device=device)
        terms = losses(logits, verifier, tokens, rewards, self.baseline)
        weights = {"kl": beta, "ce": options.ce_weight, "pg": options.rl_weight if options.use_policy_grad else 0.0}
        # a term of weight 0 stays out of the sum: it may be infinite
        kept = [weight * getattr(terms, name) for name, weight in weights.items() if weight]
        loss = torch.stack(kept).sum() if kept else 0.0 * logits.sum()
        for p, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            p.grad = gradient
        norm = clip_grad_norm_(self.parameters, CLIP)
        reward = rewards.float().mean()
        values = torch.stack([x.detach().float() for x in (loss, *terms, norm, reward)]).tolist()
        stats = dict(zip(("loss", *terms._fields, "grad_norm", "reward"), values, strict=True))
        good = math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])
        if good:
            self.optimizer.step()
        for p in self.parameters:
            p.grad = None
        stats |= {"policy_mean_advantage": stats["reward"] - self.baseline, "policy_mean_kl": stats["kl"]}
        if good:
            ema = options.pg_baseline_ema
            self.baseline = ema * self.baseline + (1 - ema) * stats["reward"]
        return stats | {"baseline": self.baseline, "non_finite": float(not good)}

    def policy(self) -> dict[str, float | None]:
        """What telemetry adds to a dump: averages of the last update, null before there is one. Nothing without policy gradient."""
        if not self.options.use_policy_grad:
            return {}
        return {name: self.last.get(name) for name in ("policy_mean_advantage", "policy_mean_kl")}

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "baseline": float(self.baseline),
            "prompts": self.prompts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Learning rates and weight decay stay those of the options."""
        groups = self.optimizer.state_dict()["param_groups"]
        try:
            self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
            self.updates, self.baseline = int(state["updates"]), float(state["baseline"])
            self.prompts = {str(name): int(value) for name, value in dict(state.get("prompts", {})).items()}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the trainer's state in the checkpoint does not fit: {error}") from None
