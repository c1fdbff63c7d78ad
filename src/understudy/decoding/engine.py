"""The loop: draft, verify, commit.

    sequence = DecodeSequence(target, drafter)
    sequence.prefill(ids)
    for cycle in decode(sequence):
        ...  # cycle.committed are new tokens

Leaving the loop early, or an exception inside a cycle, leaves the sequence at its last whole cycle: iterate again to go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from understudy.core.records import Budget, Cycle, Proposal
from understudy.decoding.sequence import DecodeSequence
from understudy.ops.trees import depths


def decode(sequence: DecodeSequence) -> Iterator[Cycle]:
    """Yield cycles until the turn ends. Cycle 0 commits the prompt's last rows and the first new token."""
    while sequence.finished is None:
        with torch.inference_mode():
            tokens = len(sequence.tokens)
            try:
                cycle = _first(sequence) if sequence.pending is not None else _cycle(sequence)
            except BaseException:
                if sequence.pending is None:
                    sequence.rewind(tokens)
                raise
        sequence.cycles += 1
        if sequence.listeners:
            sequence.watch.start()
            for listener in sequence.listeners:
                listener.on_cycle(cycle)
            cycle.seconds["listen"] += sequence.watch.stop()["other"]
        yield cycle


def _first(sequence: DecodeSequence) -> Cycle:
    rows = sequence.pending
    assert rows is not None and rows.logits is not None
    sequence.watch.start()
    before = sequence.target.lengths()
    new = [sequence.chooser.first(rows.logits[-1:], rows, len(sequence.tokens))]
    sequence.watch.lap("sample")
    return _finish(sequence, Cycle(0, new, 0, [], None, list(new), rows, None, False, before, {}), range(rows.width))


def _cycle(sequence: DecodeSequence) -> Cycle:
    watch = sequence.watch
    watch.start()
    before = sequence.target.lengths()
    proposal, q = None, None
    budget = sequence.budget()
    if budget.depth:
        proposal = sequence.draft.propose(budget, sequence.recorder.begin())
        assert _within(budget, proposal), f"a drafter proposed more than its budget of {budget}"
        q = sequence.recorder.settle(proposal)
    watch.lap("draft")
    rows = sequence.target.verify(proposal)
    watch.lap("verify")
    path, choices, tokens = sequence.chooser.judge(rows, q, len(sequence.tokens))
    new = [tokens[row] for row in path[1:]] + [choices[path[-1]]]
    watch.lap("sample")
    parents = None if proposal is None else proposal.parents
    index = max(sequence.cycles, 1)  # 0 is the prefill's, also where its first token was rewound
    cycle = Cycle(index, new, len(path) - 1, tokens[1:], parents, choices, rows, proposal, False, before, {})
    return _finish(sequence, cycle, path)


def _within(budget: Budget, proposal: Proposal) -> bool:
    if proposal.parents is None:
        return proposal.tokens.shape[0] <= budget.depth
    if proposal.tokens.shape[0] > budget.nodes:
        return False
    return max(depths([-1, *(p + 1 for p in proposal.parents)])) <= budget.depth


def _finish(sequence: DecodeSequence, cycle: Cycle, path: Sequence[int]) -> Cycle:
    """Cut at a stop, commit, and note the time."""
    end = sequence.stop.cut(sequence.output, cycle.committed)
    if end is not None:
        cycle.stopped = True
        if cycle.index:  # the path has a row per new token; that of the prefill does not lead to drafts
            cycle.committed, path = cycle.committed[:end], path[:end]
    if cycle.stopped or len(cycle.committed) >= sequence.room:
        sequence.finished = "stop" if cycle.stopped else "length"
    sequence.pending = None
    sequence.commit(cycle.rows, path, cycle.committed, cycle.stopped)
    if sequence.chooser.history is not None:
        sequence.chooser.history.extend(cycle.committed)
    cycle.kv_after, cycle.sequence = sequence.target.lengths(), sequence.index
    sequence.watch.lap("cache")
    cycle.seconds = sequence.watch.stop()
    if cycle.index:
        sequence.length.update(cycle)
    else:
        for section, seconds in sequence.prefill_seconds.items():
            cycle.seconds[section] += seconds
    return cycle
