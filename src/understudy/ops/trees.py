"""Draft trees as parent lists. Row 0 is the last committed token, the root; every other row follows its parent.

Lists in, lists or CPU tensors out: N is at most a few hundred rows, and Python is faster than kernels there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _check(parents: Sequence[int]) -> None:
    if not parents or parents[0] != -1:
        raise ValueError(f"row 0 is the root: parents[0] must be -1, got {list(parents[:1])}")
    for row, parent in enumerate(parents):
        if row and not 0 <= parent < row:
            raise ValueError(f"the parent of row {row} must be a row before it, got {parent}")


def ancestors(parents: Sequence[int]) -> Tensor:
    """bool [N, N]: row i sees row j if j is i itself or an ancestor of i."""
    _check(parents)
    rows: list[bytearray] = []
    for row, parent in enumerate(parents):
        seen = bytearray(rows[parent]) if row else bytearray(len(parents))
        seen[row] = 1
        rows.append(seen)
    return torch.frombuffer(bytearray().join(rows), dtype=torch.bool).view(len(parents), len(parents))


def depths(parents: Sequence[int]) -> list[int]:
    """Steps from the root: 0 for row 0."""
    _check(parents)
    depth = [0] * len(parents)
    for row in range(1, len(parents)):
        depth[row] = depth[parents[row]] + 1
    return depth


def children(parents: Sequence[int]) -> list[list[int]]:
    """The children of each row, in row order."""
    _check(parents)
    out: list[list[int]] = [[] for _ in parents]
    for row in range(1, len(parents)):
        out[parents[row]].append(row)
    return out
