"""Head and loss in chunks of rows, so that logits of a whole batch never exist at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chunked_sums(function: Callable[..., Tensor], rows: int, *inputs: Tensor) -> Tensor:
    """Sum of `function(*chunk)` over chunks of at most `rows` rows of the inputs (all [N, ...], the same N).

    `function` returns a tensor of sums, [S]. With several chunks, logits inside it are made again for the backward pass instead of
    being kept; a single one is held whole anyway.
    """
    if len(inputs[0]) <= rows:
        return function(*inputs)
    parts = zip(*(x.split(rows) for x in inputs), strict=True)
    sums = [checkpoint(function, *part, use_reentrant=False) for part in parts]
    total: Tensor = torch.stack(sums).sum(0)
    return total
