"""Prompts for rollouts: the lines of a file in a new order each time round, without end; and the held-out ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from understudy.core.errors import UserError
from understudy.data.conversations import Conversation, Skipped
from understudy.data.encode import Rejected
from understudy.data.stream import Corpus, epoch_order
from understudy.target.target import Target
from understudy.training.streaming import prompt_ids, read_prompts


def endless_prompts(paths: list[Path], target: Target, skipped: Skipped, seed: int = 0) -> Iterator[list[int]]:
    """Token ids of prompt after prompt. Each time round, the order is another one, a function of (seed, round, number of lines).

    Lines that give no prompt are left out, and counted in `skipped` the first time round. Memory holds where lines begin, not what
    they say. UserError if a whole round gave nothing.
    """
    corpus, rounds = Corpus(paths), 0
    while True:
        count = 0
        for line in epoch_order(len(corpus), seed, rounds).tolist():
            try:
                row = corpus.row(line)
                if row is None:
                    continue
                assert isinstance(row, Conversation)
                ids = prompt_ids(target, row)
            except (Rejected, UserError) as reason:
                if rounds == 0:
                    skipped.add(corpus.where(line), str(reason))
                continue
            count += 1
            yield ids
        if not count:
            why = f": {skipped.first[0]}" if skipped.first else ""
            raise UserError(f"{', '.join(map(str, paths))} holds no prompt{why}")
        rounds += 1


def held_out_prompts(path: Path, target: Target, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts of a file, or of as many as it has. UserError if it has none."""
    skipped = Skipped(keep=1)
    found = list(islice(read_prompts(path, target, skipped), count))
    if not found:
        raise UserError(f"{path} holds no prompt{': ' + skipped.first[0] if skipped.first else ''}")
    return found
