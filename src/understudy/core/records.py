"""The records that cross rooms. Symbols: W rows of a pass, K drafts, D width, V vocabulary; batch is always one sequence.

The invariant of decoding: the last committed token is in no KV cache; it is row 0 of the next verify.
Taps count as in Hugging Face `hidden_states`: 0 = embeddings, i = output of the i-th layer counted from 1 (before the final norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Needs:
    """What somebody wants kept of a pass. What nobody asks for is not computed or not kept."""

    taps: frozenset[int] = frozenset()
    exit: int | None = None  # exit layer E whose output is wanted in `Rows.exit`
    last: bool = False  # last hidden state, after the final norm
    logits: bool = False  # raw logits; outside prefill they exist anyway, in prefill this keeps those of every row

    def __or__(self, other: Needs) -> Needs:
        exits = {e for e in (self.exit, other.exit) if e is not None}
        assert len(exits) <= 1, f"one sequence has one exit layer, not {sorted(exits)}"
        return Needs(
            taps=self.taps | other.taps,
            exit=exits.pop() if exits else None,
            last=self.last or other.last,
            logits=self.logits or other.logits,
        )


@dataclass(slots=True)
class Rows:
    """W rows that went through the target in one pass. Raw, before processors. Tensors are views: to keep one, copy it."""

    start: int  # tokens in the KV cache before the pass
    tokens: Tensor  # [W] int64
    parents: Sequence[int] | None  # row index of each row's parent, -1 for row 0; None = a chain
    taps: dict[int, Tensor]  # tap id -> [W, D]
    exit: Tensor | None  # [W, D] output of the exit layer
    last: Tensor | None  # [W, D] last hidden state, after the final norm
    logits: Tensor | None  # [W, V]; [1, V] for the last row of a prefill chunk; None for the other chunks

    @property
    def width(self) -> int:
        return self.tokens.shape[0]


@dataclass(slots=True)
class Commit:
    """The rows that became part of the sequence. A prefill chunk is one too: its path is all its rows.

    `next` is the token that follows the path: the next prompt token, or the one that the target added. It is in no cache.
    """

    rows: Rows
    path: Sequence[int]  # [a + 1] row indices from row 0 to the last accepted row
    next: int
    stopped: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """The most a drafter may propose: `depth` tokens in a row, `nodes` tokens in all."""

    depth: int
    nodes: int


@dataclass(slots=True)
class Proposal:
    """Drafted tokens. Proposing nothing is legal.

    `parents[i]` is the index of the draft that draft i continues, -1 for the last committed token; None = a chain.
    `resume` = (E, hidden [K + 1, D]): layers [0, E) already ran on the last committed token and on these drafts, and into the
    target's own cache, so verification runs only the rest.
    """

    tokens: Tensor  # [K] int64
    parents: Sequence[int] | None = None
    resume: tuple[int, Tensor] | None = None
    trace: object = None  # for the drafter's own learner; the engine never reads it


@dataclass(slots=True)
class Cycle:
    """One draft, verify, commit round. Cycle 0 is the prefill: it commits the first new token and counts in no mean."""

    index: int
    committed: list[int]  # new tokens of this cycle, after cutting at a stop: accepted drafts, then the target's own
    accepted: int  # drafts that agreed with the target, before cutting at a stop
    drafted: list[int]  # the drafts, in row order
    parents: Sequence[int] | None
    choices: list[int]  # [K + 1] the target's own choice after each row (its argmax when greedy)
    rows: Rows  # valid until the next cycle begins
    proposal: Proposal | None
    stopped: bool  # a stop token or stop string was met
    kv_before: dict[str, int]  # cache length per stage at the start of the round
    kv_after: dict[str, int]
    sequence: int = 0  # which of several sequences decoded together: the index of its random streams
    seconds: dict[str, float] = field(
        default_factory=dict
    )  # of this round, by section: draft, verify, sample, cache, listen (what listeners did after it), other
