"""What drafting costs on this machine, and the speed-up that follows from it: decoding.md's model with measured times.

    speed-up = tau * t(1) / (t_draft + t_verify(K + 1))

t(W) is a pass of the whole target over W rows. `measure_cost` times t(W) for a few widths, norm and head alone, and the first E
layers over one row for a few depths E; `Cost` puts any cycle together from that: linear between measured widths, and in depth (layers
of one model cost alike; what a pass costs whatever its layers is found by a line through the depths).

Two things are left out: what the engine does between passes (a few per cent of decode time), and that a longer text makes attention
dearer than at `context` tokens, in plain decoding and in drafting alike. On one CPU thread the times are processor time, so that a
busy machine does not change them much.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from understudy.analysis.clock import busy, medians, now, undisturbed
from understudy.core.errors import UserError
from understudy.core.records import Needs, Proposal
from understudy.target.memory import memory_guard
from understudy.target.probe import probe
from understudy.target.session import TargetSession
from understudy.target.target import Target

WIDTHS = (1, 2, 4, 8, 16)  # rows of a pass
CONTEXT = 256  # tokens of the text that the passes continue
TRIES = range(5, 102)  # rounds: as many as fit into ...
SECONDS = 8.0  # ... this time, or the fewest


class Exit(NamedTuple):
    """Drafting from layer `layer` with the number of drafts that gains most."""

    layer: int
    agreement: float  # per drafted token
    steps: int  # K
    tau: float
    cycle: float  # seconds
    speedup: float


class Block(NamedTuple):
    """A drafter that drafts a block in one pass of its own."""

    draft_layers: int
    rows: int  # of its pass; verification has as many
    draft: float  # seconds
    verify: float  # seconds
    breakeven: float  # tau from which on it is faster than plain decoding


def expected_tau(agreement: float, steps: int) -> float:
    """Tokens per cycle if each draft is right with probability a, whatever the others: 1 + a + ... + a^K (Leviathan et al., 2023)."""
    return steps + 1.0 if agreement >= 1 else (1 - agreement ** (steps + 1)) / (1 - agreement)


@dataclass(frozen=True)
class Cost:
    """Measured medians in seconds. Widths and depths in between are interpolated."""

    layers: int
    context: int  # tokens before the timed rows
    passes: Mapping[int, float]  # W -> all layers, norm and head over W rows
    heads: Mapping[int, float]  # W -> norm and head over W rows
    first: Mapping[int, float]  # E -> layers [0, E) over one row; empty if the target cannot be split

    def rows(self, width: int) -> float:
        """t(W)."""
        return _between(self.passes, width)

    def head(self, width: int) -> float:
        return _between(self.heads, width)

    @cached_property
    def fixed(self) -> float:
        """What a pass over one row costs before its first layer: embeddings, rotary tables, entering the model. 0 if not known.

        The f for which f + E / L (R - f) is nearest to the measured first E layers (least squares); R = all layers over one row.
        """
        whole = self.rows(1) - self.head(1)
        left = {depth: 1 - depth / self.layers for depth in self.first}
        if not left:
            return 0.0
        found = sum((self.first[depth] - whole * (1 - part)) * part for depth, part in left.items())
        return min(max(found / sum(part**2 for part in left.values()), 0.0), whole)

    def some(self, count: float, width: int) -> float:
        """A pass of `count` layers of the target's kind over W rows, without norm and head."""
        return self.fixed + count / self.layers * (self.rows(width) - self.head(width) - self.fixed)

    def exit_cycle(self, exit_layer: int, steps: int) -> float:
        """A cycle of K drafts from the first E layers, whose rows verification does not run again.

        As the engine does it: K + 1 rows one by one through the first layers (the last draft's too, verification needs its state),
        K heads, then K + 1 rows together through the other layers and the head.
        """
        drafting = (steps + 1) * self.some(exit_layer, 1) + steps * self.head(1)
        return drafting + self.some(self.layers - exit_layer, steps + 1) + self.head(steps + 1)

    def best_exit(self, exit_layer: int, agreement: float) -> Exit:
        """The number of drafts that gains most at this exit; the widest pass that was timed is the limit."""

        def with_steps(steps: int) -> Exit:
            tau, cycle = expected_tau(agreement, steps), self.exit_cycle(exit_layer, steps)
            return Exit(exit_layer, agreement, steps, tau, cycle, tau * self.rows(1) / cycle)

        return max(map(with_steps, range(1, max(self.passes))), key=lambda found: found.speedup)

    def block(self, draft_layers: int, rows: int) -> Block:
        """A block drafter with layers like the target's and the target's head: one pass over `rows` rows, then as many verified."""
        draft, verify = self.some(draft_layers, rows) + self.head(rows), self.rows(rows)
        return Block(draft_layers, rows, draft, verify, (draft + verify) / self.rows(1))

    def as_json(self) -> dict[str, Any]:
        """Milliseconds, by width or depth."""
        tables = {"pass_ms": self.passes, "head_ms": self.heads, "first_layers_ms": self.first}
        return {
            "layers": self.layers,
            "context": self.context,
            **{name: {str(key): 1000 * value for key, value in table.items()} for name, table in tables.items()},
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Cost:
        """What `as_json` gave. Raises KeyError, TypeError, ValueError or AttributeError for anything else."""
        tables = (
            {int(key): float(ms) / 1000 for key, ms in value[name].items()}
            for name in ("pass_ms", "head_ms", "first_layers_ms")
        )
        return Cost(int(value["layers"]), int(value["context"]), *tables)


def _between(table: Mapping[int, float], at: int) -> float:
    """The value at `at`, linear between the known ones and constant beyond them."""
    known = sorted(table)
    return float(np.interp(at, known, [table[key] for key in known]))


def depths(layers: int) -> list[int]:
    """Exit layers that are timed: the first, the last one possible, and two between."""
    return sorted({max(1, min(layers - 1, round(layers * part))) for part in (0, 0.25, 0.5, 1)} if layers > 1 else ())


def measure_cost(target: Target, text: Sequence[int], seconds: float = SECONDS) -> tuple[Cost, str | None]:
    """(times on this machine, why the target cannot be split or None). `text`: token ids of a real text, repeated if it is short.

    Each part once per round, in turns, after a round that is not counted; `seconds`: about how long all rounds may take.
    """
    most = max(WIDTHS)
    context = max(1, min(CONTEXT, target.context - most - 1))
    ids = list(islice(_forever(text), context + most))
    refused, exits = None, list[int]()
    try:
        for depth in depths(target.layers):
            probe(target, "split", depth)
            exits.append(depth)
    except UserError as reason:
        refused, exits = str(reason), []
    with memory_guard(target), undisturbed():
        whole = _opened(target, Needs(last=True), ids, context)
        parts: dict[str, Callable[[], object]] = {}
        undo: dict[str, Callable[[], None]] = {}
        for width in WIDTHS:
            proposal = Proposal(torch.tensor(ids[context + 1 : context + width], dtype=torch.int64))
            parts[f"pass {width}"] = partial(whole.verify, proposal)
            states = whole.verify(proposal).last
            assert states is not None
            parts[f"head {width}"] = partial(_norm_and_head, target, states.clone())
        for depth in exits:
            session = _opened(target, Needs(exit=depth), ids, context)
            row = torch.tensor(ids[context : context + 1], device=target.device)
            parts[f"first {depth}"] = partial(session.shallow, row)
            undo[f"first {depth}"] = partial(session.rewind, len(session.tokens))
        medians(parts, 1, target.device, undo)  # buffers grow, kernels are chosen
        began = now(target.device)
        medians(parts, 1, target.device, undo)
        once = now(target.device) - began
        tries = min(max(int(seconds / once), TRIES.start), TRIES.stop - 1)
        found = medians(parts, tries, target.device, undo, random.Random(0), busy)
    tables = ({key: found[f"{kind} {key}"] for key in keys} for kind, keys in
              (("pass", WIDTHS), ("head", WIDTHS), ("first", exits)))  # fmt: skip
    return Cost(target.layers, context, *tables), refused


def _forever(text: Sequence[int]) -> Iterable[int]:
    assert text
    while True:
        yield from text


def _opened(target: Target, needs: Needs, ids: Sequence[int], context: int) -> TargetSession:
    """A session that has read `context` tokens and committed one more."""
    session = TargetSession(target, needs)
    rows = session.prefill(ids[:context], want_logits=False)
    session.commit(rows, range(context), ids[: context + 1])
    return session


def _norm_and_head(target: Target, hidden: Tensor) -> Tensor:
    return target.head(target.norm(hidden))
