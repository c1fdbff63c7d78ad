"""Documents into rows of fixed length, streamed, without splitting a document.

Best-fit over a bounded number of open rows: a document goes into the fullest open row with room for it; where there is
none, the fullest of all is closed and a new one opened. Memory is that of the open rows, however many documents come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from understudy.data.encode import Encoded

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
OPEN_ROWS = 32


class Packed(NamedTuple):
    """B rows of T slots. The four fields are those of `understudy.drafting.objective.Batch`: `Batch(*packed.tensors())`."""

    ids: NDArray[np.int64]  # [B, T]
    mask: NDArray[np.bool_]  # [B, T] the assistant wrote the token; False at padding
    documents: NDArray[np.int64]  # [B, T] which document of its row, from 0 on; -1 = padding
    positions: NDArray[np.int64]  # [B, T] position inside the document, from 0 on; 0 at padding

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same four as torch tensors, sharing memory."""
        import torch

        ids, mask, documents, positions = map(torch.from_numpy, self)
        return ids, mask, documents, positions


class Packer(Generic[T]):
    """Which items share a row of `capacity` slots. `rows` = most open rows; 0 = every item has a row for itself."""

    def __init__(self, capacity: int, rows: int = OPEN_ROWS) -> None:
        self.capacity, self.rows = capacity, rows
        self.open: list[list[T]] = []
        self._used: list[int] = []

    def add(self, item: T, length: int) -> list[T] | None:
        """Place an item of `length` slots. Returns the row that this closes, if it does: at most one."""
        assert 0 < length <= self.capacity, f"{length} slots do not fit into a row of {self.capacity}"
        if not self.rows or length == self.capacity:
            return [item]
        room = [i for i, used in enumerate(self._used) if used + length <= self.capacity]
        if room:
            i = max(room, key=self._used.__getitem__)
            self.open[i].append(item)
            self._used[i] += length
            return self._close(i) if self._used[i] == self.capacity else None
        closed = self._close(self._used.index(max(self._used))) if len(self.open) == self.rows else None
        self.restore([item], length)
        return closed

    def pop(self) -> list[T] | None:
        """Close the oldest open row. None = there is none."""
        return self._close(0) if self.open else None

    def restore(self, items: list[T], used: int) -> None:
        """Open a row that already holds `items`, `used` slots together."""
        self.open.append(items)
        self._used.append(used)

    def _close(self, i: int) -> list[T]:
        del self._used[i]
        return self.open.pop(i)


def collate(rows: Sequence[Sequence[Encoded]], pad_id: int, width: int | None = None) -> Packed:
    """Rows of documents as arrays, padded at their end to `width` slots, or to the longest row. A row may be empty: all padding."""
    if width is None:
        width = max(1, *(sum(len(document.ids) for document in row) for row in rows))
    shape = (len(rows), width)
    packed = Packed(
        np.full(shape, pad_id, np.int64),
        np.zeros(shape, np.bool_),
        np.full(shape, -1, np.int64),
        np.zeros(shape, np.int64),
    )
    for b, row in enumerate(rows):
        start = 0
        for d, document in enumerate(row):
            slots = (b, slice(start, start + len(document.ids)))
            packed.ids[slots] = document.ids
            packed.mask[slots] = document.mask
            packed.documents[slots] = d
            packed.positions[slots] = np.arange(len(document.ids))
            start += len(document.ids)
    return packed
