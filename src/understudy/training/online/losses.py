"""The five losses of DVI over a batch of judged drafts (Bhansali and Heck, 2510.05421).

p_tau = softmax(z / tau) softens the verifier only: the drafter drafts at temperature 1, and is trained there. There is no factor tau^2.
Where only the K largest verifier logits were kept, KD, KL and entropy are taken over those K with both laws renormalised there:
an approximation, by intention (see `ops.divergences`). Cross-entropy and policy gradient concern one token and are exact: their
log-softmax runs over the drafter's whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.ops.divergences import log_law, masked_mean
from understudy.training.online.buffer import Batch


class Losses(NamedTuple):
    """Means over a batch, scalars. `entropy` is raised, the others are lowered."""

    kd: Tensor  # KL(p_tau || q) over all positions
    ce: Tensor  # -log q(token) over accepted positions
    pg: Tensor  # -(reward - baseline) log q(token) over accepted positions and first rejects
    kl: Tensor  # KL(q || p_tau) over all positions
    entropy: Tensor  # H(q) over all positions


def field(batch: Batch, name: str) -> Tensor:
    value = batch[name]
    assert value is not None, f"this buffer does not store {name}"
    return value


def verifier_log_law(batch: Batch, tau: float) -> Tensor:
    """log p_tau, over the vocabulary [n, V] or over the K stored tokens [n, K]."""
    return log_law(field(batch, "z_val" if batch["z_phi"] is None else "z_phi"), tau)


def drafter_log_law(draft_logits: Tensor, batch: Batch) -> Tensor:
    """log q over the same tokens: [n, V] -> [n, V] or [n, K]."""
    if batch["z_idx"] is None:
        return log_law(draft_logits)
    return log_law(draft_logits.gather(1, batch["z_idx"].long()))


def on_policy(batch: Batch) -> Tensor:
    """[n] bool: accepted positions and first rejects. Where a draft was proposed after a reject, the reward says nothing."""
    return (field(batch, "reward") == 1) | field(batch, "is_first_reject")


@torch.no_grad()
def dvi_losses(
    draft_logits: Tensor, batch: Batch, tau: float, baseline: float, weights: Mapping[str, float]
) -> tuple[Losses, Tensor, Tensor]:
    """(losses, their weighted sum, the gradient [n, V] of that sum by `draft_logits`), in fp32.

    draft_logits: [n, V] of the learning head at `batch["hk"]`. baseline: a number, no gradient goes through it. weights: by the names
    of `Losses`; a loss of weight 0 adds nothing, were it infinite.
    The gradient is written out, which takes a third of autograd's time. With l the logits, over the n rows of a mean:
        d KL(p||q) / dl = q - p,   d KL(q||p) / dl = q (log q - log p - KL(q||p)),   -dH / dl = q (log q + H),
        -d log q(x) / dl = q - e_x   over the whole vocabulary.
    """
    n = draft_logits.shape[0]
    draft_logits = draft_logits.float()
    log_p, log_q = verifier_log_law(batch, tau), drafter_log_law(draft_logits, batch)
    q, gap = log_q.exp(), log_q - log_p
    kl, spread = (q * gap).sum(-1), -(q * log_q).sum(-1)
    token, reward = field(batch, "token"), field(batch, "reward")
    log_mass = draft_logits.logsumexp(-1, keepdim=True)
    chosen = (draft_logits.gather(1, token[:, None]) - log_mass).squeeze(1)
    accepted, judged = (reward == 1).float(), on_policy(batch).float()
    advantage = reward - baseline
    losses = Losses(
        kd=-(log_p.exp() * gap).sum(-1).mean(),
        ce=masked_mean(-chosen, accepted),
        pg=masked_mean(-advantage * chosen, judged),
        kl=kl.mean(),
        entropy=spread.mean(),
    )
    signed = {**weights, "entropy": -weights["entropy"]}
    total = torch.stack(
        [signed[name] * term for name, term in losses._asdict().items() if signed[name]] or [kl.sum() * 0]
    )
    # Cross-entropy and policy gradient, both of them -c log q(x) with a number c per row
    c = weights["ce"] * accepted / accepted.sum().clamp_min(1) + weights[
        "pg"
    ] * advantage * judged / judged.sum().clamp_min(1)
    if weights["ce"] or weights["pg"]:
        gradient = (draft_logits - log_mass).exp_().mul_(c[:, None])
        gradient.scatter_add_(1, token[:, None], -c[:, None])
    else:
        gradient = torch.zeros_like(draft_logits)
    # The divergences, over the tokens that were stored
    part = torch.zeros_like(q)
    if weights["kd"]:
        part.add_(q - log_p.exp(), alpha=weights["kd"] / n)
    if weights["kl"]:
        part.addcmul_(q, gap - kl[:, None], value=weights["kl"] / n)
    if weights["entropy"]:
        part.addcmul_(q, log_q + spread[:, None], value=weights["entropy"] / n)
    if batch["z_idx"] is None:
        return losses, total.sum(), gradient.add_(part)
    return losses, total.sum(), gradient.scatter_add_(1, batch["z_idx"].long(), part)
