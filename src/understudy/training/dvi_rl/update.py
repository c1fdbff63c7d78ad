"""The two gradient steps: policy gradient on `lora_S`, cross-entropy with a leash on `lora_D`.

Every rollout is run and differentiated by itself, so memory is that of one text; gradients add up to those of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.ops.divergences import forward_kl, log_law, token_log_prob
from understudy.target.attention import Pass
from understudy.training.dvi_rl.adapters import DualLoRA
from understudy.training.dvi_rl.buffer import Rollout


@dataclass(frozen=True, slots=True)
class FastStep:
    """What a step of `lora_S` was."""

    loss: float
    grad_norm: float  # before clipping
    stepped: bool  # False: loss or gradient was no number, and nothing moved
    hidden_error: float  # largest |state made again - state that drafted|; rounding, where the policy is still the same


@dataclass(frozen=True, slots=True)
class SlowStep:
    """What a step of `lora_D` was. Means per token, nats."""

    loss: float
    ce: float
    kl: float
    tokens: int
    grad_norm: float
    stepped: bool


def policy(drafter: ExitDrafter, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """(log pi(draft | state) [n] with gradient into `lora_S`, the states [n, D] that the head read) at a rollout's n records."""
    assert drafter.shallow is not None
    device = drafter.target.device
    rows = torch.tensor([record.row for record in rollout.records], device=device)
    drafts = torch.tensor([record.draft_token for record in rollout.records], device=device)
    text = torch.tensor(rollout.tokens[: int(rows.max()) + 1], device=device)
    states = drafter.norm(drafter.shallow(text)[rows])
    return token_log_prob(drafter.head_logits(states), drafts), states


def fast_step(
    drafter: ExitDrafter, optimizer: Optimizer, rollouts: Sequence[Rollout], baseline: float, max_norm: float
) -> FastStep:
    """loss_rl = -(1/N) sum (r - baseline) log pi(draft | state), N records. The baseline is a number: no gradient goes through it."""
    count = sum(len(rollout.records) for rollout in rollouts)
    total, worst = 0.0, 0.0
    for rollout in rollouts:
        log_pi, states = policy(drafter, rollout)
        reward = torch.tensor([record.reward for record in rollout.records], device=log_pi.device)
        loss = -((reward - baseline) * log_pi).sum() / count
        loss.backward()
        total += float(loss.detach())
        drafted_from = torch.stack([record.exit_hidden for record in rollout.records])
        worst = max(worst, float((states.detach().cpu().float() - drafted_from).abs().max()))
    norm, stepped = _apply(optimizer, total, max_norm)
    return FastStep(total, norm, stepped, worst)


def observed_text(rollout: Rollout, observed: str) -> list[int]:
    """The text that `lora_D` learns from, its prompt first: with the data's answer (auto, where there is one), or as committed."""
    if observed == "auto" and rollout.reference:
        return rollout.tokens[: rollout.prompt] + rollout.reference
    return rollout.tokens


def slow_step(
    adapters: DualLoRA,
    optimizer: Optimizer,
    rollouts: Sequence[Rollout],
    beta_kl: float,
    observed: str,
    max_norm: float,
) -> SlowStep:
    """loss_slow = (1/N) sum [-log p(x) + beta_kl KL(p || p_frozen)] over the N observed tokens x of these rollouts.

    p is the verifier's law with `lora_D`, p_frozen the law without it. The model's own greedy text has each x as its argmax: on
    such text cross-entropy only sharpens p, and says nothing that the model did not know. The data's answers do.
    """
    texts = [(observed_text(rollout, observed), rollout.prompt) for rollout in rollouts]
    count = sum(len(text) - prompt for text, prompt in texts)
    ce = kl = 0.0
    for text, prompt in texts:
        ce_sum, kl_sum = _slow_sums(adapters, text, prompt)
        loss = (ce_sum + beta_kl * kl_sum) / count
        loss.backward()
        ce, kl = ce + float(ce_sum.detach()) / count, kl + float(kl_sum.detach()) / count
    loss_slow = ce + beta_kl * kl
    norm, stepped = _apply(optimizer, loss_slow, max_norm)
    return SlowStep(loss_slow, ce, kl, count, norm, stepped)


def _slow_sums(adapters: DualLoRA, text: list[int], prompt: int) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy and KL over the tokens of `text` after the first `prompt` ones."""
    target, layer = adapters.target, adapters.exit_layer
    ids = torch.tensor(text, device=target.device)
    at, cache, apart = Pass(0, len(text) - 1), target.cache(), target.cache()
    with torch.no_grad():
        entry, _ = target.forward(ids[:-1], at, cache, 0, layer)
        apart.reserve(at.width)
        still = adapters.frozen.run(entry, at, target.positions(at), apart, frozenset())
        log_frozen = log_law(target.head(still[prompt - 1 :]))
    moved, _ = target.forward(entry, at, cache, layer)
    log_p = log_law(target.head(moved[prompt - 1 :]))
    following = ids[prompt:].to(log_p.device)
    return F.nll_loss(log_p, following, reduction="sum"), forward_kl(log_p, log_frozen).sum()


def _apply(optimizer: Optimizer, loss: float, max_norm: float) -> tuple[float, bool]:
    """Clip and step. A loss or gradient that is no number moves nothing."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf))
    stepped = math.isfinite(loss) and math.isfinite(norm)
    if stepped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, stepped
