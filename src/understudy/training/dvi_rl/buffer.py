"""What rollouts leave behind for learning: one record per judged draft, in a buffer that is emptied by every step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Record:
    """One draft that was judged: every one of a cycle up to and including the first reject.

    The state alone carries no gradient into the layers that made it, so `row` says where it stood: the step runs the rollout's text
    through those layers again.
    """

    exit_hidden: Tensor  # [D] fp32 on the CPU: what the head read when it drafted
    draft_token: int
    reward: float  # 1.0 = the verifier chose the same token, 0.0 = another one
    verifier_confidence: float  # the verifier's probability of the draft: softmax of its raw logits
    row: int  # index in the rollout's text of the token after which it was drafted


@dataclass(slots=True)
class Rollout:
    """One prompt, continued."""

    tokens: list[int]  # prompt and committed text
    prompt: int  # tokens of the prompt
    reference: list[int]  # the answer in the data; empty where it has none
    records: list[Record] = field(default_factory=list)
    nll: float = 0.0  # of the committed new tokens under the verifier, summed, nats
    seconds: float = 0.0  # prefill and decoding

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt


class ReplayBuffer:
    """Rollouts since the latest step. A rollout without a judged draft teaches nothing and is not kept.

    `capacity` counts records. A rollout goes in whole, so the buffer holds fewer than `capacity` records and one more rollout.

    A batch is used once, and then dropped: its gradient is that of the policy which drafted it. After a step the policy is another
    one, under which the same drafts would need importance weights, and a greedy rollout has no probabilities to weight with.
    """

    def __init__(self, capacity: int, fast_batch: int) -> None:
        self.capacity, self.fast_batch = capacity, fast_batch
        self._rollouts: list[Rollout] = []

    def add(self, rollout: Rollout) -> None:
        if rollout.records:
            self._rollouts.append(rollout)

    def __len__(self) -> int:
        """Records."""
        return sum(len(rollout.records) for rollout in self._rollouts)

    @property
    def accepted(self) -> int:
        return sum(int(record.reward) for rollout in self._rollouts for record in rollout.records)

    @property
    def due(self) -> Literal["accepted", "full"] | None:
        """Why a step is due: enough accepted drafts, or no more room. None = not yet."""
        if self.accepted >= self.fast_batch:
            return "accepted"
        return "full" if len(self) >= self.capacity else None

    def take(self) -> list[Rollout]:
        """Everything; the buffer is empty afterwards."""
        taken, self._rollouts = self._rollouts, []
        return taken
