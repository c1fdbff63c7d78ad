"""Drafters to test with, and one run of a sequence.

run = decoded("gemma2", MAKERS["ragged-tree"], tiny.prompt())
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import tiny
from contract.scripted import Pattern, RandomDrafter, Scripted, chain
from understudy.core.records import Cycle, Needs
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import specs
from understudy.target.target import Target

NEW = 32  # new tokens of a usual run
NO_STOP = StopRule()


@dataclass(frozen=True)
class Maker:
    """How a drafter is made for a target and the right text (prompt and continuation)."""

    name: str
    make: Callable[[Target, list[int]], Drafter]


RAGGED: Pattern = [chain(2, 2), chain(0, 3), chain(4), chain(1, 1), [], chain(3, 2), chain(1, 4)]
TREES: Pattern = [
    # first a sibling that would be right one later; the right token under it, then under the right one
    [(9, "next"), (9, "right"), (1, "right"), (1, "right"), (0, "wrong")],
    # a wrong sibling first, then the right branch, rows interleaved
    [(0, "wrong"), (9, "right"), (1, "wrong"), (1, "right"), (9, "wrong"), (1, "right")],
    # the right one twice: the first of the twins is followed, the second has the children
    [(0, "right"), (9, "twin"), (0, "right"), (0, "wrong")],
    # only wrong ones, wide
    [(9, "wrong"), (9, "wrong"), (0, "wrong"), (2, "wrong"), (9, "twin")],
    [],
    # a deep right branch under a late row, and wrong leaves at each depth
    [(9, "wrong"), (9, "wrong"), (9, "right"), (2, "wrong"), (1, "right"), (3, "wrong"), (1, "wrong"), (2, "right")],
    # a chain as a tree
    [(0, "right"), (0, "right"), (0, "wrong")],
]


def scripted(name: str, pattern: Pattern, *, tree: bool = False, exit_layer: int | None = None) -> Maker:
    return Maker(
        name, lambda target, truth: Scripted(truth, pattern, tree=tree, vocab=target.vocab_size, exit_layer=exit_layer)
    )


CHAINS = (
    scripted("right", [chain(4)]),
    scripted("wrong", [chain(0, 4)]),
    scripted("ragged", RAGGED),
    scripted("ragged-resumed", RAGGED, exit_layer=2),
    Maker("random", lambda target, truth: RandomDrafter(target.vocab_size, tree=False)),
)
BRANCHED = (
    scripted(
        "right-tree", [[(0, "wrong"), (9, "right"), (0, "wrong"), (1, "right"), (0, "right"), (0, "right")]], tree=True
    ),
    scripted("wrong-tree", [[(0, "wrong"), (9, "wrong"), (1, "wrong"), (1, "wrong"), (9, "twin")]], tree=True),
    scripted("ragged-tree", TREES, tree=True),
    Maker("random-tree", lambda target, truth: RandomDrafter(target.vocab_size, tree=True)),
)


def registered() -> list[Maker]:
    """Every tiny instance of every drafter in the folder."""
    return [
        Maker(f"{name}-{i}", lambda target, truth, name=name, i=i: tiny.drafters(name, target)[i])
        for name in specs()
        for i in range(len(tiny.drafters(name, tiny.target("llama"))))
    ]


MAKERS: dict[str, Maker] = {maker.name: maker for maker in (*CHAINS, *BRANCHED, *registered())}


# One run


@dataclass
class Run:
    """A sequence and what its cycles were."""

    sequence: DecodeSequence
    cycles: list[Cycle] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.sequence.output

    @property
    def rejected(self) -> int:
        """Drafts that are not in the text."""
        return sum(len(cycle.drafted) - cycle.accepted for cycle in self.cycles)

    @property
    def accepted(self) -> int:
        return sum(cycle.accepted for cycle in self.cycles)


def truth_of(family: str, prompt: Sequence[int], length: int = NEW + 8) -> list[int]:
    return [*prompt, *tiny.reference(family, prompt, length)]


def open_run(family: str, maker: Maker, prompt: Sequence[int], truth: list[int] | None = None, **options: Any) -> Run:
    """A prefilled sequence. Options: those of DecodeParams, and `sampling`, `stop`, `listeners`, `index`, `wrap`."""
    target = tiny.target(family)
    drafter = maker.make(target, truth_of(family, prompt) if truth is None else truth)
    if wrap := options.pop("wrap", None):
        drafter = wrap(drafter)
    named = {key: options.pop(key) for key in ("sampling", "listeners", "index") if key in options}
    stop = options.pop("stop", NO_STOP)
    params = DecodeParams(**{"max_new_tokens": NEW, "prefill_chunk": 7, **options})
    sequence = DecodeSequence(target, drafter, params, stop=stop, **named)
    sequence.prefill(list(prompt))
    return Run(sequence)


def finish(run: Run) -> Run:
    run.cycles.extend(decode(run.sequence))
    return run


def decoded(family: str, maker: Maker, prompt: Sequence[int], **options: Any) -> Run:
    return finish(open_run(family, maker, prompt, **options))


def same(got: Sequence[int], want: Sequence[int], what: str) -> None:
    first = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    assert list(got) == list(want), f"{what}: differs from token {first} on: {list(got)} is not {list(want)}"


def close(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)} is not {tuple(want.shape)}"
    worst = (got.float() - want.float()).abs().max().item() if got.numel() else 0.0
    limit = 2e-4 * max(1.0, want.float().abs().max().item() if want.numel() else 0.0)
    assert worst <= limit, f"{what}: differs by {worst:.3g} (at most {limit:.3g})"


def leave_after(run: Run, cycles: int) -> None:
    loop = decode(run.sequence)
    for _ in range(cycles):
        if next(loop, None) is None:
            break
    loop.close()


class Listener:
    def __init__(self, call: Callable[[Cycle], Any], needs: Needs = Needs()) -> None:
        self.needs, self.call = needs, call

    def on_cycle(self, cycle: Cycle) -> None:
        self.call(cycle)
