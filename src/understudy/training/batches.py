"""Batches of a corpus as the loop takes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from understudy.data.stream import Stream
from understudy.drafting.objective import Batch


def trimmed(batch: Batch) -> Batch:
    """A batch without the rows and columns at its end that are nothing but padding; one row and column stay at least."""
    real = batch.documents >= 0
    rows, columns = (1 + int(where.max()) if len(where) else 1 for where in real.nonzero().T)
    return Batch(*(x[:rows, :columns] for x in (batch.ids, batch.mask, batch.documents, batch.positions)))


class StreamBatches:
    """Packed rows of a corpus as the loop takes them."""

    def __init__(self, stream: Stream, count: bool) -> None:
        """`count`: how many batches an epoch has must be known; it takes one pass over the data."""
        self.stream = stream
        self.steps_per_epoch: int | None = stream.count() if count else None

    def __iter__(self) -> Iterator[Batch]:
        for packed in self.stream:
            yield trimmed(Batch(*packed.tensors()))

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state(state)


class Fixed:
    """The first few batches of held-out data, kept: the same at every evaluation."""

    def __init__(self, batches: Iterator[Batch], count: int) -> None:
        self.batches = list(itertools.islice(batches, count))

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)
