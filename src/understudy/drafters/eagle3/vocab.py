"""The draft vocabulary: which tokens the drafter can say. It belongs to the checkpoint, and no training changes it.

On disk it is `d2t` [V_d] int64, offsets (column i says token i + d2t[i]), and `t2d` [V] bool, membership.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from understudy.core.errors import UserError


def most_frequent(counts: Tensor, size: int) -> Tensor:
    """[size] int64, increasing: the tokens with the highest counts [V]. Of equal ones the lower id comes first."""
    order = torch.sort(counts, descending=True, stable=True).indices
    return order[:size].sort().values


def offsets(ids: Tensor) -> Tensor:
    """`d2t` of increasing token ids [V_d]."""
    return ids - torch.arange(len(ids), dtype=ids.dtype, device=ids.device)


def membership(ids: Tensor, vocab_size: int) -> Tensor:
    """`t2d` [V] bool."""
    inside = torch.zeros(vocab_size, dtype=torch.bool)
    inside[ids.cpu()] = True
    return inside


def digest(ids: Tensor) -> str:
    """16 hex digits that tell one draft vocabulary from another."""
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]


def ids_of(d2t: Tensor, vocab_size: int, where: str) -> Tensor:
    """Token ids [V_d] of a map on disk. UserError unless they increase and lie in the vocabulary."""
    ids = d2t.long() + torch.arange(len(d2t))
    if len(ids) == 0 or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size or bool((ids[1:] <= ids[:-1]).any()):
        raise UserError(
            f"{where}: d2t is no map of offsets into {vocab_size} tokens (i + d2t[i] has to increase strictly); the checkpoint is damaged"
        )
    return ids


def check_inverse(ids: Tensor, t2d: Tensor, where: str) -> None:
    """UserError unless `t2d` [V] names exactly the tokens `ids`."""
    if not torch.equal(t2d.bool().nonzero()[:, 0].cpu(), ids.cpu()):
        raise UserError(f"{where}: t2d and d2t name different tokens; the checkpoint is damaged")
