"""Prompts for rollouts: the lines of a file in a new order each time round, without end; and the held-out ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from understudy.core.errors import UserError
from understudy.data.conversations import Conversation, Skipped
from understudy.data.encode import Rejected
from understudy.data.stream import Corpus, epoch_order
from understudy.target.target import Target
from understudy.training.streaming import prompt_ids, read_prompts


class EndlessPrompts(Iterator[list[int]]):
    """Token ids of prompt after prompt. Each time round, the order is another one, a function of (seed, round, number of lines).

    Lines that give no prompt are left out, and counted in `skipped` the first time round. Memory holds where lines begin, not what
    they say. UserError if a whole round gave nothing. `state` and `go_on` are for a run that continues another one.
    """

    def __init__(self, paths: Sequence[Path], target: Target, skipped: Skipped, seed: int = 0) -> None:
        self.corpus, self.target, self.skipped, self.seed = Corpus(paths), target, skipped, seed
        self.read = 0  # lines, over all rounds
        self.given = 0  # prompts
        self._prompts = self._walk()

    def __next__(self) -> list[int]:
        return next(self._prompts)

    def state(self) -> dict[str, int]:
        """Where the prompts stand, and what their order follows from."""
        return {"read": self.read, "given": self.given, **self._identity()}

    def go_on(self, state: Mapping[str, int]) -> None:
        """Leave out what was given when `state` was taken. One of other lines or of another seed says nothing of these, and is ignored."""
        if all(state.get(name) == value for name, value in self._identity().items()):
            self.read, self.given = state["read"], state["given"]

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "lines": len(self.corpus), "bytes": self.corpus.bytes}

    def _walk(self) -> Iterator[list[int]]:
        corpus = self.corpus
        while True:
            rounds, first = divmod(self.read, len(corpus)) if len(corpus) else (0, 0)
            before = self.given
            for line in epoch_order(len(corpus), self.seed, rounds)[first:].tolist():
                self.read += 1
                try:
                    row = corpus.row(line)
                    if row is None:
                        continue
                    assert isinstance(row, Conversation)
                    ids = prompt_ids(self.target, row)
                except (Rejected, UserError) as reason:
                    if rounds == 0:
                        self.skipped.add(corpus.where(line), str(reason))
                    continue
                self.given += 1
                yield ids
            if first == 0 and self.given == before:
                why = f": {self.skipped.first[0]}" if self.skipped.first else ""
                raise UserError(f"{', '.join(map(str, corpus.paths))} holds no prompt{why}")


def held_out_prompts(path: Path, target: Target, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts of a file, or of as many as it has. UserError if it has none."""
    skipped = Skipped(keep=1)
    found = list(islice(read_prompts(path, target, skipped), count))
    if not found:
        raise UserError(f"{path} holds no prompt{': ' + skipped.first[0] if skipped.first else ''}")
    return found
