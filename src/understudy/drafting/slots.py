"""Which drafts decoding asks for: the exact mask of supervision, for every objective."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from understudy.drafting.objective import Batch


def asked(batch: Batch, drafts: int) -> Tensor:
    """[K, B, T] bool: decoding asks for draft k (from 0 on) of the cycle whose last committed token is the one at t.

    Draft k is x_{t+1+k}. It is asked for iff x_t .. x_{t+1+k} are all the assistant's and of one document: x_t is a token that the
    target chose, and the answer goes on that far.
    """
    mask, documents = batch.mask, batch.documents
    goes_on, found = mask & (documents >= 0), []
    for by in range(1, drafts + 1):
        by = min(by, mask.shape[1])
        same = F.pad(documents[:, by:], (0, by), value=-1) == documents
        goes_on = goes_on & F.pad(mask[:, by:], (0, by), value=False) & same
        found.append(goes_on)
    return torch.stack(found)
