"""What an update lowers: KL to the verifier, cross-entropy on accepted drafts and, if asked for, REINFORCE on what happened."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from understudy.ops.divergences import forward_kl, log_law, masked_mean, token_log_prob


def kl_beta(updates: int, beta0: float, beta_min: float, anneal: int) -> float:
    """The weight of KL after `updates` updates: a straight line from beta0 to beta_min over `anneal` updates, then beta_min."""
    t = min(1.0, updates / anneal) if anneal else 1.0
    return beta0 + (beta_min - beta0) * t


class Losses(NamedTuple):
    """Means over n positions; scalars with gradient to the drafter's logits."""

    kl: Tensor  # KL(p || q), p the verifier at temperature 1, q the drafter
    ce: Tensor  # -log q(token) over accepted positions
    pg: Tensor  # -(reward - baseline) log q(token) over all positions: every one is an accept or a first reject


def losses(draft: Tensor, verifier: Tensor, tokens: Tensor, rewards: Tensor, baseline: float) -> Losses:
    """draft [n, V], verifier [n, V] raw logits; tokens [n] int64; rewards [n] 0 or 1. No gradient goes through `baseline`."""
    chosen = token_log_prob(draft, tokens)
    return Losses(
        kl=forward_kl(log_law(verifier), log_law(draft)).mean(),
        ce=masked_mean(-chosen, rewards),
        pg=(-(rewards.to(chosen.dtype) - baseline) * chosen).mean(),
    )
