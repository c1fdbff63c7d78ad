"""The contract between a drafter's folder and the one offline training loop.

The loop (`understudy.training`) pulls batches from `data`, features from the frozen target, calls the objective, accumulates, steps,
logs, measures real acceptance and saves. What is special about a method is its `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from understudy.core.records import Needs
from understudy.drafting.protocols import Drafter


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows of text. A row holds several documents one after another; rows are padded at their end."""

    ids: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool: the token at t is one that the assistant wrote, so predicting it is supervised
    documents: Tensor  # [B, T] int64: which document of its row a token belongs to, from 0 on; -1 = padding
    positions: Tensor  # [B, T] int64: position inside the document, from 0 on

    def to(self, device: object) -> Batch:
        return Batch(*(x.to(device) for x in (self.ids, self.mask, self.documents, self.positions)))  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class Features:
    """A batch and what the frozen target says of it, computed once. No gradient flows into the target."""

    batch: Batch
    taps: Mapping[int, Tensor]  # tap id -> [B, T, D]: 0 = embeddings, i = output of the i-th layer counted from 1
    last: (
        Tensor | None
    )  # [B, T, D] last hidden state, after the final norm; `target.head` makes logits of it, in chunks


@dataclass(slots=True)
class StepOutput:
    """What an objective says of a batch. Everything is a sum with its count; ratios are taken after all ranks are added up."""

    loss: Tensor  # scalar: sum over supervised slots, with gradient
    count: Tensor  # scalar: number of supervised slots
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # name -> (sum, count), detached scalars
    divisor: Tensor | None = None  # what the loss sum is divided by; None = `count`


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a drafter believes in P draft positions, at N slots of a batch where decoding would begin a cycle. All detached.

    The first position drafts the token after the slot, the next one the token after that, each given the true tokens before it.
    """

    slots: Tensor  # [N] int64 into the flattened batch: the last committed token of the cycle
    predicted: Tensor  # [P, N] int64 token ids: the drafter's argmax
    target: Tensor  # [P, N] int64 token ids: the target's argmax over its whole vocabulary
    pred_conf: Tensor  # [P, N] the drafter's probability of `predicted`
    target_conf: Tensor  # [P, N] the drafter's probability of `target`; 0 if it cannot say that token
    asked: Tensor  # [P, N] bool: decoding would ask for it, because the answer goes on that far
    hidden: Tensor  # [N, D] the drafter's last state at the first position


TokenCounts = Callable[
    [], Tensor
]  # [V] int64: how often each token is supervised in the training data. Counting takes time


class Objective(nn.Module):
    """A drafter under offline training. `forward(features) -> StepOutput`. Parameters with `requires_grad` are what is trained.

    Calling the module (not `forward` of a part of it) is what the loop does, so that data-parallel wrappers work.
    """

    needs: Needs  # taps and last hidden states that `forward` reads; logits are made by the objective itself
    drafter: Drafter  # the very weights under training, ready to decode: the loop measures acceptance with it

    @property
    def says(self) -> Tensor | None:
        """[V_d] int64: the tokens that it can say, where those are not all of the target's."""
        return None

    def forward(self, features: Features) -> StepOutput:
        raise NotImplementedError

    def predictions(self, features: Features) -> Predictions:
        """What the drafter says where, for people to read. Every slot that decoding could begin a cycle at, in order."""
        raise NotImplementedError

    def lengths(self, features: Features) -> Tensor:
        """[B, T] int64: greedy drafts that would be accepted in a row in a cycle whose last committed token is the one there.

        At most `drafter.steps`, and only as far as the text goes on in the mask; 0 where no cycle can begin. If training and
        decoding agree, walking a decoded text by these numbers meets the very cycles that decoding had.
        """
        raise NotImplementedError

    def servable(self) -> dict[str, str]:
        """Engine -> "ok", or why it cannot serve what is trained here."""
        raise NotImplementedError

    def card(self) -> dict[str, Any]:
        """What `understudy.json` shall say of the drafter, JSON-ready: all that its trained weights mean nothing without.

        It stays what it is while the drafter is trained, and a run goes on only where it is the same.
        """
        return {}

    def save(self, folder: Path) -> None:
        """Write the drafter as a servable checkpoint: `config.json` and `model.safetensors` (the loop adds `understudy.json`)."""
        raise NotImplementedError
