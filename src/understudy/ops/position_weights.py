"""How much each draft of a block counts in a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def exponential(asked: Tensor, gamma: float) -> Tensor:
    """[M, K]: exp(-k / gamma) for draft k, from 0 on; 0 where `asked` [M, K] is false."""
    return torch.exp(-torch.arange(asked.shape[1], device=asked.device) / gamma) * asked


def dpace(probability: Tensor, asked: Tensor, alpha: float) -> Tensor:
    """D-PACE (arXiv 2605.18810): w_k = sum_{j >= k} P_j, P_j = prod_{i <= j} s_i, s = (1 - alpha) q + alpha; all [M, K].

    `probability` [M, K]: q, the drafter's of the token taught, detached. P_j stands for the chance that drafting gets past draft j:
    a draft counts for all that its being right makes possible. 0 where `asked` is false.
    """
    drawn = torch.where(asked, (1 - alpha) * probability + alpha, 1.0)
    reached = torch.where(asked, drawn.cumprod(1), 0.0)
    return reached.flip(1).cumsum(1).flip(1) * asked
