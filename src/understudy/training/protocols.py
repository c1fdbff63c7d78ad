"""What the loop asks of others: where batches and features come from, where figures go, how acceptance is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from understudy.drafting.objective import Batch, Features


class Batches(Protocol):
    """The training data of this rank, in a fixed order per epoch.

    Every rank has equally many batches per epoch: a rank without one would leave the others waiting.
    """

    @property
    def steps_per_epoch(self) -> int | None:
        """Batches of this rank in one epoch; None when that is not known before it was read."""

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch, from the current position on. At its end the state is the start of the next epoch."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready, with at least `epoch`. It counts a batch as read once it was yielded, and none that was only prefetched."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class HeldOut(Protocol):
    """Held-out batches of this rank, the same ones at every iteration, equally many on every rank."""

    def __iter__(self) -> Iterator[Batch]: ...


class FeatureSource(Protocol):
    """The frozen target's part: live, or from stored shards. Called without gradient, once per batch."""

    def __call__(self, batch: Batch) -> Features: ...


class Log(Protocol):
    """Where figures and events go; only rank 0 calls it."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def event(self, kind: str, /, **fields: Any) -> None: ...


class Measure(Protocol):
    """Real decoding of held-out prompts with the drafter as it is now. The result holds `tau`. Called on rank 0 only."""

    def __call__(self) -> Mapping[str, float]: ...


class Watcher(Protocol):
    """Somebody who looks at the model now and then: prediction tables, hidden-state statistics.

    Called on every rank after each step that is a multiple of `interval`, in evaluation mode, without gradient, with whole
    weights (also under FSDP) and with the random state restored afterwards. Figures go to the watcher's own log, on rank 0.
    """

    interval: int

    def __call__(self, step: int) -> None: ...
