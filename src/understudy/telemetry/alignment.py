"""Alignment telemetry: do drafts line up with the verifier's tokens, or are they the right tokens one place off?

A listener for any drafter, chain or tree. It only looks: nothing that it does, auto-offset included, changes what is committed.

Draft i of a block stands at depth d = 1, 2, ... (in a chain, i + 1) and speaks about the d-th position after the block's start.
The *verifier's token* is the argmax of raw logits (`cycle.rows.logits`; the engine's choices are draws when sampling), in two forms:

- `verifier[r]`: what row r of the block says comes after it. Row 0 is the last committed token, row i + 1 draft i. After a wrong
  draft these rows answer a wrong text.
- `onwards[d]`: what the verifier said at the d-th position of the text as it went on, which after a rejection later blocks
  tell. A block therefore waits for as many tokens as it needs, one more than its deepest draft, or until the text ends.

Numbers of a block, with their denominators:

    match_0              share of drafts that equal `verifier` at the same position (of the row they continue); of all drafts
    match_p1             share of drafts that equal `onwards` one position later; of the drafts whose later position is known
    accept_len_default   drafts in a row that the engine accepted (before cutting at a stop)
    accept_len_best      (auto-offset) the longer of accept_len_default and the accepted prefix at offset +1: drafts in a row, from
                         the start, that equal `onwards` one position later
    best_offset          1 if the accepted prefix at +1 is longer than that at 0, or as long while match_p1 > match_0; else 0

A share without a denominator is null. A drafter that leaves out one token drafts the right ones shifted by one: best_offset 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.files import check_writable, replacing, write_json
from understudy.core.records import Cycle, Needs
from understudy.telemetry.options import AlignTelemetryParams
from understudy.telemetry.run import plain

Phase: TypeAlias = Literal["train", "eval", "timing", "serve"]
Extra: TypeAlias = Callable[[], Mapping[str, Any]]


@runtime_checkable
class HasStates(Protocol):
    """A trace that holds the states [K, D] that the drafter's head read."""

    hidden: Tensor


def as_dict(params: AlignTelemetryParams) -> dict[str, Any]:
    """The six resolved options, JSON-ready, for a run's settings; of a larger config only these."""
    values = params.model_dump(mode="json")
    return {name: values[name] for name in AlignTelemetryParams.model_fields}


def text_rows(cycle: Cycle) -> list[int]:
    """Per committed token the row that says what comes at its place: in a chain 0, 1, 2, ...

    A tree may hold the same path twice; both have the same text before them, so the first one answers for both.
    """
    if cycle.parents is None:
        return list(range(len(cycle.committed)))
    reached, rows = [0], [0]
    for token in cycle.committed[:-1]:
        pairs = enumerate(zip(cycle.drafted, cycle.parents, strict=True), 1)
        reached = [row for row, (draft, parent) in pairs if draft == token and parent + 1 in reached]
        rows.append(reached[0])
    return rows


def _share(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


@dataclass
class Block:
    """What is kept of a block until enough of the text is known."""

    step: int
    phase: str
    cycle: int  # index of the cycle within its turn
    sequence: int
    drafted: list[int]  # [K]
    parents: list[int]  # [K] -1 = the last committed token
    tree: bool
    accepted: int
    verifier: list[int]  # [K + 1]
    kv_before: dict[str, int]
    kv_after: dict[str, int]
    extra: dict[str, Any]
    tensors: dict[str, Tensor]
    onwards: list[int] = field(default_factory=list)
    depths: list[int] = field(init=False)  # [K] 1 = a child of the last committed token

    def __post_init__(self) -> None:
        self.depths = []
        for parent in self.parents:
            self.depths.append(1 if parent < 0 else self.depths[parent] + 1)

    @property
    def missing(self) -> int:
        """Positions of the text that are not known yet."""
        return max(self.depths, default=0) + 1 - len(self.onwards)

    def shifted_prefix(self) -> int:
        """Drafts in a row, from the start, that equal `onwards` one position later."""
        reached, depth = {-1}, 0
        while depth + 1 < len(self.onwards):
            token = self.onwards[depth + 1]
            reached = {i for i, draft in enumerate(self.drafted) if draft == token and self.parents[i] in reached}
            if not reached:
                break
            depth += 1
        return depth

    def diag(self, auto_offset: bool) -> dict[str, Any]:
        """The numbers that the module's docstring defines, and what they were made of."""
        same = [draft == self.verifier[parent + 1] for draft, parent in zip(self.drafted, self.parents, strict=True)]
        placed = zip(self.drafted, self.depths, strict=True)
        later = [draft == self.onwards[depth] for draft, depth in placed if depth < len(self.onwards)]
        match_0, match_p1, shifted = _share(same), _share(later), self.shifted_prefix()
        ahead = shifted == self.accepted and (match_p1 or 0.0) > (match_0 or 0.0)
        out: dict[str, Any] = {
            "match_0": match_0,
            "match_p1": match_p1,
            "best_offset": int(shifted > self.accepted or ahead),
            "accept_len_default": self.accepted,
        }
        if auto_offset:
            out["accept_len_best"] = max(self.accepted, shifted)
        out |= {"kv_before": self.kv_before, "kv_after": self.kv_after, "drafted": self.drafted}
        if self.tree:
            out["parents"] = self.parents
        return out | {"verifier": self.verifier, "onwards": self.onwards}


class AlignTelemetry:
    """Prints and dumps the first blocks it sees: lines until `telemetry_prints_budget` is spent, files until `telemetry_max_blocks` is.

    Files are `{run_id}_{phase}_step####.json` in `folder`, #### = global step: one per verify pass of this listener, from `start` + 1
    on. `phase` may be changed between turns. A block is shown once the text has gone on far enough, the last ones at `close()`.

    `extra()` gives the learner's `policy_mean_advantage` and `policy_mean_kl` while policy gradient is in use, None (null in the dump)
    until there was an update; else nothing. When it gives something the dump has `diag_extra`: these, `eta` = accepted / drafted of
    the block (null without drafts) and `prefix_hist`: of all blocks so far, how many had an accepted prefix of length 0, 1, 2, ...
    """

    needs = Needs()  # logits of verify passes exist whoever asks; asking would keep those of the prompt as well

    def __init__(
        self,
        params: AlignTelemetryParams,
        run_id: str,
        phase: Phase,
        extra: Extra | None = None,
        write: Callable[[str], None] = print,
        folder: Path | None = None,
        start: int = 0,
    ) -> None:
        assert run_id and not set(run_id) & set("/\\"), "a run id is part of a file name"
        self.params, self.run_id, self.phase = params, run_id, phase
        self.step = start
        self._lines = params.telemetry_prints_budget
        self._files = 0 if folder is None else params.telemetry_max_blocks
        self._last = start + max(self._lines, self._files)  # the last step that is of interest
        self._folder, self._extra, self._write = folder, extra, write
        self._hist: list[int] = []
        self._waiting: dict[int, list[Block]] = {}  # by sequence, oldest first
        self._cached: dict[int, int] = {}  # by sequence: tokens in the cache when its next block begins
        if self._files and folder is not None:
            check_writable(folder / "dump")

    def on_cycle(self, cycle: Cycle) -> None:
        if cycle.index == 0:
            self._settle(cycle.sequence)
            return
        if self._cached.get(cycle.sequence, cycle.rows.start) != cycle.rows.start:  # the text was taken back
            self._settle(cycle.sequence)
        self.step += 1
        self._hist += [0] * (cycle.accepted + 1 - len(self._hist))
        self._hist[cycle.accepted] += 1
        if self.step > self._last and cycle.sequence not in self._waiting:
            return
        waiting = self._waiting.setdefault(cycle.sequence, [])
        assert cycle.rows.logits is not None
        # the first of the largest, as the engine chooses: torch.argmax may pick another one of equals
        verifier = cycle.rows.logits.max(dim=-1).indices.tolist()
        if self.step <= self._last:
            waiting.append(self._keep(cycle, verifier))
        said = [verifier[row] for row in text_rows(cycle)]
        for block in waiting:
            block.onwards += said[: block.missing]
        while waiting and not waiting[0].missing:
            self._show(waiting.pop(0))
        self._cached[cycle.sequence] = cycle.rows.start + len(cycle.committed)
        if cycle.stopped or not waiting:  # there may be any number of sequences: no entry without a waiting block
            self._settle(cycle.sequence)

    def close(self) -> None:
        """Show the blocks that still wait for text. Call it when decoding is over."""
        for sequence in list(self._waiting):
            self._settle(sequence)

    def _settle(self, sequence: int) -> None:
        """No more text will come after the blocks of this sequence."""
        self._cached.pop(sequence, None)
        for block in self._waiting.pop(sequence, []):
            self._show(block)

    def _keep(self, cycle: Cycle, verifier: list[int]) -> Block:
        count = len(cycle.drafted)
        policy = {} if self._extra is None else dict(self._extra())
        if policy:
            policy |= {"eta": cycle.accepted / count if count else None, "prefix_hist": list(self._hist)}
        return Block(
            step=self.step,
            phase=self.phase,
            cycle=cycle.index,
            sequence=cycle.sequence,
            drafted=list(cycle.drafted),
            parents=list(range(-1, count - 1) if cycle.parents is None else cycle.parents),
            tree=cycle.parents is not None,
            accepted=cycle.accepted,
            verifier=verifier,
            kv_before=dict(cycle.kv_before),
            kv_after=dict(cycle.kv_after),
            extra=policy,
            tensors=self._tensors(cycle) if self.params.telemetry_dump_tensors and self._files else {},
        )

    @staticmethod
    def _tensors(cycle: Cycle) -> dict[str, Tensor]:
        """Copies: `logits` [K + 1, V]; if there are any, states of the exit layer, `exit` [K + 1, D], and of the trace, `hidden` [K, D]."""
        logits, exits, proposal = cycle.rows.logits, cycle.rows.exit, cycle.proposal
        assert logits is not None
        found = {"logits": logits}
        if exits is None and proposal is not None and proposal.resume is not None:
            exits = proposal.resume[1]
        if exits is not None:
            found["exit"] = exits
        if proposal is not None and isinstance(proposal.trace, HasStates):
            found["hidden"] = proposal.trace.hidden
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}

    def _show(self, block: Block) -> None:
        diag = block.diag(self.params.telemetry_auto_offset)
        if self._lines:
            self._lines -= 1
            self._write(self._line(block, diag))
        if self._files:
            self._files -= 1
            self._dump(block, diag)

    def _line(self, block: Block, diag: dict[str, Any]) -> str:
        shares = [f"{key} {'-' if diag[key] is None else format(diag[key], '.2f')}" for key in ("match_0", "match_p1")]
        best = f" (best {diag['accept_len_best']})" if "accept_len_best" in diag else ""
        kv = ", ".join(f"{stage} {n}->{block.kv_after[stage]}" for stage, n in block.kv_before.items())
        return (
            f"telemetry {block.phase} step {block.step}: drafted {len(block.drafted)}, accept_len {block.accepted}{best}, "
            f"{', '.join(shares)}, best_offset {diag['best_offset']}, kv {kv}"
        )

    def _dump(self, block: Block, diag: dict[str, Any]) -> None:
        assert self._folder is not None
        name = f"{self.run_id}_{block.phase}_step{block.step:04d}"
        where = {"step": block.step, "sequence": block.sequence, "cycle": block.cycle}
        extra = {"diag_extra": block.extra} if block.extra else {}
        record = {"run_id": self.run_id, "phase": block.phase, **where, "diag": diag, **extra}
        write_json(self._folder / f"{name}.json", plain(record))
        if self.params.telemetry_dump_tensors:
            lists = [key for key in ("drafted", "parents", "verifier", "onwards") if key in diag]
            ids: dict[str, Tensor] = {key: torch.tensor(diag[key], dtype=torch.int64) for key in lists}
            with replacing(self._folder / f"{name}.pt") as temporary:
                torch.save({**ids, **block.tensors}, temporary)


def alignment(
    params: AlignTelemetryParams,
    run_id: str,
    phase: Phase,
    extra: Extra | None = None,
    write: Callable[[str], None] = print,
    folder: Path | None = None,
    start: int = 0,
) -> AlignTelemetry | None:
    """The listener that the options ask for, or None: then nothing is kept, computed or touched.

    `folder`: the run's `telemetry/`, where dumps go unless `telemetry_save_dir` says otherwise; without both, lines are printed only.
    UserError before anything is decoded when dumps cannot be written.
    """
    if not params.telemetry_debug:
        return None
    folder = params.telemetry_save_dir or folder
    if params.telemetry_dump_tensors and folder is None:
        raise UserError("--telemetry-dump-tensors needs a folder: give --telemetry-save-dir")
    return AlignTelemetry(params, run_id, phase, extra, write, folder, start)
