"""Laws over the vocabulary: filters and penalties on logits, the softmax, and exact draws from it.

Filters and penalties follow transformers' `generation/logits_process.py` (presence and frequency: OpenAI, vLLM), on
fp32 logits with -inf for a removed token. Deviations:
1. All three filters keep a set of the form {v: logit_v >= floor}, so one floor per row serves them together, and the
   vocabulary is not sorted on a CPU unless the nucleus is wide.
2. Tokens that tie at the floor of top-p are all kept (as top-k and min-p do); transformers keeps those that its sort
   put last. The law is then a function of the row alone: neither the number of rows in a pass nor the device decides
   which of the tied tokens live.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

# Top-p on a CPU looks at this many of the largest logits before it looks at more; a wider nucleus costs a sort.
_WINDOWS = (256, 4096)
# Vocabularies up to this size are drawn from with one running sum, larger ones in blocks.
_DIRECT, _BLOCK = 8192, 256


def law(logits: Tensor) -> Tensor:
    """Logits [N, V] -> probabilities [N, V], fp32. Removed tokens (-inf) have exactly 0."""
    return logits.softmax(dim=-1, dtype=torch.float32)


def argmax(logits: Tensor) -> Tensor:
    """The first of the largest logits of each row: [N, V] -> [N]. On CPU four times as fast as torch.argmax in half precision."""
    return logits.max(dim=-1).indices


def uniforms(count: int, generator: Generator) -> Tensor:
    """[count] numbers in [0, 1) on the generator's device: float64, or float32 on mps, which has no float64."""
    dtype = torch.float32 if generator.device.type == "mps" else torch.float64
    return torch.rand(count, generator=generator, device=generator.device, dtype=dtype)


def inverse_cdf(weights: Tensor, points: Tensor) -> Tensor:
    """The token at quantile `points` [N] (as from `uniforms`) of each row of weights [N, V] -> [N] int64.

    y = min {v : F(v) > u F(V-1)}, F the running sum in the points' dtype. A token of weight 0 never comes out. A row that
    has no law (no mass, or NaN) gives an id >= V, which is no token.
    """
    vocabulary = weights.shape[1]
    at = points[:, None]
    if vocabulary <= _DIRECT:
        return _first_above(weights.cumsum(dim=1, dtype=at.dtype), at)[0].squeeze(1)
    # The same in two steps, a block and then a token in it: the running sum over a large vocabulary is slow to allocate.
    blocks = vocabulary // _BLOCK
    whole, rest = weights.split([blocks * _BLOCK, vocabulary - blocks * _BLOCK], dim=1)
    sums = whole.unflatten(1, (blocks, _BLOCK)).sum(dim=2, dtype=at.dtype)
    sums = torch.cat([sums, rest.sum(dim=1, keepdim=True, dtype=at.dtype)], dim=1)
    cdf = sums.cumsum(dim=1)
    block, point = _first_above(cdf, at)
    block = block.clamp_max(blocks)
    mass = sums.gather(1, block)
    share = ((point - cdf.gather(1, block) + mass) / mass).clamp_min(0.0)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp_max(vocabulary - 1)) * (columns < vocabulary)
    token, _ = _first_above(inside.cumsum(dim=1, dtype=at.dtype), share)
    return (block * _BLOCK + token).squeeze(1)


def _first_above(cdf: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Where each running sum [N, M] passes `points` [N, 1] of its total, a share in [0, 1]: (index [N, 1], point [N, 1]).

    Rounding may make a share 1, so the point is held just below the total: then neither it nor the strict comparison
    meets an entry without weight. A running sum without a total gives index M.
    """
    total = cdf[:, -1:]
    point = torch.minimum(points * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cdf, point, right=True), point


def draw(weights: Tensor, generator: Generator) -> Tensor:
    """One token per row: weights [N, V] (not negative, any positive sum) -> [N] int64. Takes N numbers from the generator."""
    return inverse_cdf(weights, uniforms(weights.shape[0], generator))


def truncate(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Top-k, then top-p on what is left, then min-p: logits [N, V] -> [N, V], -inf where removed. One token always stays.

    top_k: the k largest stay; 0 = off.
    top_p: v stays if the tokens before it, by falling probability, hold less than top_p; 1 = off (Holtzman et al. 1904.09751).
    min_p: v stays if p_v >= min_p max(p), which is l_v >= max(l) + log(min_p); 0 = off (Nguyen et al. 2407.01082).
    """
    floor = None
    if 0 < top_k < logits.shape[-1]:
        head = logits.topk(top_k, dim=-1).values
        floor = head[:, -1:]
        if top_p < 1.0:
            # What survives is the head and whatever ties with its last entry.
            tied = (logits >= floor).sum(dim=-1, keepdim=True) - top_k
            scaled = (head - head[:, :1]).exp()
            floor = _nucleus(head, scaled / (scaled.sum(dim=-1, keepdim=True) + tied * scaled[:, -1:]), top_p)
    elif top_p < 1.0:
        floor = _nucleus_floor(logits, top_p)
    if min_p > 0.0:
        ratio = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        floor = ratio if floor is None else torch.maximum(floor, ratio)
    return logits if floor is None else torch.where(logits < floor, -math.inf, logits)


def _nucleus(head: Tensor, probs: Tensor, top_p: float) -> Tensor:
    """The smallest logit of the nucleus [N, 1], from falling logits [N, W] and their probabilities [N, W]."""
    before = probs.cumsum(dim=-1) - probs
    size = (before < top_p).sum(dim=-1, keepdim=True).clamp_min(1)
    return head.gather(1, size - 1)


def _nucleus_floor(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit of each row's nucleus: [N, V] -> [N, 1].

    An accelerator sorts: to look whether a window suffices would wait for the device.
    """
    log_mass = logits.logsumexp(dim=-1, keepdim=True)
    vocabulary = logits.shape[-1]
    if logits.device.type != "cpu":
        head = logits.sort(dim=-1, descending=True).values
        return _nucleus(head, (head - log_mass).exp(), top_p)
    floor = torch.empty_like(log_mass)
    open_rows = torch.arange(logits.shape[0])
    for width in (*(w for w in _WINDOWS if w < vocabulary), vocabulary):
        head = logits[open_rows].topk(width, dim=-1).values
        probs = (head - log_mass[open_rows]).exp()
        floor[open_rows] = _nucleus(head, probs, top_p)
        open_rows = open_rows[probs.sum(dim=-1) < top_p]
        if not len(open_rows):
            break
    return floor


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """For seen tokens l_v / penalty where l_v >= 0, l_v * penalty where l_v < 0 (CTRL, Keskar et al. 1909.05858).

    logits [N, V], seen bool [N, V] (prompt and output) -> [N, V]. The smaller of the two products is the one meant when
    the penalty is above 1 (else the larger): that needs no look at signs, which a CPU would branch on.
    """
    pick = torch.minimum if penalty >= 1.0 else torch.maximum
    return torch.where(seen, pick(logits * penalty, logits / penalty), logits)


def presence_frequency(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """l_v - frequency n_v - presence [n_v > 0] (OpenAI, vLLM): logits [N, V], counts [N, V] of output tokens -> [N, V]."""
    if frequency:
        logits = (counts * -frequency).add_(logits)
    if presence:
        logits = (counts > 0).to(logits.dtype).mul_(-presence).add_(logits)
    return logits
