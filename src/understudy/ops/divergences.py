"""How far one law is from another, and how likely a token is: what heads are trained on.

All of it works on logs of laws, `[..., V]`, and gives one number per row `[...]` in fp32. V may be the whole vocabulary or K gathered
tokens of it: over gathered tokens both laws are renormalised (`log_law` of gathered logits), and then a divergence is that of the
laws given that the token is one of the K. That is an approximation of the divergence over the vocabulary; at K = V it is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_law(logits: Tensor, tau: float = 1.0) -> Tensor:
    """log softmax(logits / tau): finite logits [..., V] -> [..., V] fp32, normalised over what is there."""
    logits = logits.float()
    return torch.log_softmax(logits if tau == 1.0 else logits / tau, dim=-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v): [..., V], [..., V] -> [...]. With p the teacher, q has to cover all of p."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def token_log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token] over all of `logits`: [N, V], [N] int64 -> [N] fp32.

    log q_x = l_x - logsumexp(l): no second [N, V] is made.
    """
    logits = logits.float()
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of values [N] where mask [N] (0 or 1) is 1; 0 if it is nowhere."""
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp_min(1.0)
