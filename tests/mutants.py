"""Plants faults in the code, one at a time, and asks whether the contract's checks notice: `python tests/mutants.py`.

Prints "mutant | killed by" and exits with 1 if one survives. A test that no fault can fail proves nothing; these are the faults
that speculative decoding is known for. The same runs under pytest in `contract/test_mutants.py`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent))  # when run as a script

import faults
import tiny
from contract import checks, histories, laws
from contract.runs import MAKERS
from contract.scripted import DrawingDrafter
from faults import Plant
from understudy.decoding import sampler, sequence
from understudy.decoding.sampler import RecordingSampler
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.target import attention as attention_module
from understudy.target.attention import Pass
from understudy.target.cache import KVCache
from understudy.target.processors import History, RowHistory
from understudy.target.session import TargetSession
from understudy.target.stages import Entry, Head, Stage
from understudy.target.target import Target

Check = Callable[[], Any]


@dataclass(frozen=True)
class Mutant:
    name: str
    plant: Plant
    checks: tuple[str, ...]  # tried in this order; the first that fails has killed it


def _of(check: Callable[..., Any], family: str, maker: str, **options: Any) -> Check:
    return partial(check, family, MAKERS[maker], **options)


def _law(parents: list[int]) -> Check:
    table = torch.randn(len(parents), laws.V, generator=torch.Generator().manual_seed(4))
    return lambda: laws.check_law(lambda _: DrawingDrafter(table, parents), laws.PLAIN, 1200, "sample")


CHECKS: dict[str, Check] = {
    "greedy, ragged chains": _of(checks.check_greedy, "qwen3", "ragged", count=16),
    "greedy, ragged trees": _of(checks.check_greedy, "qwen3", "ragged-tree", count=20),
    "greedy, trees across a window": _of(checks.check_greedy, "gemma3", "ragged-tree", count=24),
    "greedy, trees and a soft-cap": _of(checks.check_greedy, "gemma2", "ragged-tree", count=16),
    "greedy, chains resumed at a layer": _of(checks.check_greedy, "llama", "ragged-resumed", count=16),
    "greedy, resumed where embeddings are scaled": _of(checks.check_greedy, "granite", "ragged-resumed", count=16),
    "states, chains": _of(checks.check_states, "llama", "ragged", count=12),
    "states, trees": _of(checks.check_states, "cohere2", "ragged-tree", count=12),
    "states, trees across a window": _of(checks.check_states, "gemma3", "ragged-tree", count=16),
    "states, soft-cap": _of(checks.check_states, "gemma2", "ragged", count=8),
    "states, logit scale": _of(checks.check_states, "cohere2", "ragged", count=8),
    "states, resumed": _of(checks.check_states, "granite", "ragged-resumed", count=12),
    "stop tokens": _of(checks.check_stop_token, "llama", "right", limit=4),
    "stop strings": _of(checks.check_stop_string, "llama", "ragged"),
    "max_new_tokens": _of(checks.check_max_new_tokens, "llama", "right", counts=(2, 3, 7)),
    "rewind": _of(histories.check_rewind, "llama", "ragged", lengths=(25, 21, 12)),
    "rewind with penalties": _of(histories.check_rewind_penalties, "llama", "ragged", lengths=(24,)),
    "fork": _of(histories.check_fork, "llama", "ragged", count=10),
    "turns": _of(histories.check_turns, "llama", "ragged"),
    "penalties, chains": _of(checks.check_penalties, "llama", "ragged"),
    "penalties, trees": _of(checks.check_penalties, "llama", "ragged-tree"),
    "law of rejection, chains": _law([-1, 0]),
    "law of rejection, siblings": _law([-1, -1, -1]),
}


MUTANTS: tuple[Mutant, ...] = (
    # design, section 4 (d)
    Mutant("commit leaves the cache one row long", faults.move_length(1), ("greedy, ragged chains",)),
    Mutant("commit leaves the cache one row short", faults.move_length(-1), ("greedy, ragged chains",)),
    Mutant("rewind off by one", faults.instead(TargetSession, "rewind", faults.rewind_keeps_a_row), ("rewind",)),
    Mutant(
        "stale KV rows: a tree's path is not moved",
        faults.instead(KVCache, "keep", lambda *_: None),
        ("greedy, ragged trees",),
    ),
    Mutant(
        "stale KV rows in the upper layers",
        faults.instead(KVCache, "keep", faults.keep_lower_layers),
        ("greedy, ragged trees", "states, trees"),
    ),
    Mutant(
        "position + 1 after the prompt",
        faults.after(Target, "positions", lambda self, out, at: out + 1 if at.start else out),
        ("greedy, ragged chains",),
    ),
    Mutant("the token that the target adds is dropped", faults.drop_bonus(False), ("greedy, ragged chains",)),
    Mutant("it is dropped with its row, and found again", faults.drop_bonus(True), ("greedy, ragged chains",)),
    Mutant("tap off by one", faults.instead(Stage, "_hook", faults.hook_one_below), ("states, chains",)),
    Mutant(
        "logit soft-cap removed",
        faults.instead(Head, "forward", lambda self, hidden: self._projection[0](hidden)),
        ("states, soft-cap",),
    ),
    Mutant(
        "logit scale removed",
        faults.instead(Head, "forward", lambda self, hidden: self._projection[0](hidden)),
        ("states, logit scale",),
    ),
    Mutant(
        "q other than the law drawn from",
        faults.after(RecordingSampler, "settle", faults.other_law),
        ("law of rejection, chains",),
    ),
    Mutant("stop inside a block ignored", faults.instead(StopRule, "cut", faults.last_token_only), ("stop tokens",)),
    # and more of the kind
    Mutant(
        "stop keeps the whole block",
        faults.after(StopRule, "cut", lambda self, end, output, new: None if end is None else len(new)),
        ("stop tokens",),
    ),
    Mutant(
        "stop strings are sought in new tokens only",
        lambda: patch.object(
            StopRule, "_cut_by_text", lambda self, output, new, original=StopRule._cut_by_text: original(self, [], new)
        ),
        ("stop strings",),
    ),
    Mutant(
        "window by row instead of depth",
        faults.instead(Pass, "_own_mask", faults.window_by_row),
        ("greedy, trees across a window", "states, trees across a window"),
    ),
    Mutant(
        "positions of a tree by row",
        faults.instead(Target, "positions", lambda self, at: torch.arange(at.start, at.start + at.width)[None]),
        ("greedy, ragged trees",),
    ),
    Mutant(
        "mask triangle off by one",
        faults.instead(attention_module, "_chain_mask", faults.sees_the_next_row),
        ("greedy, ragged chains",),
    ),
    Mutant(
        "score soft-cap removed",
        faults.instead(attention_module, "_explicit", faults.without_cap),
        ("greedy, trees and a soft-cap", "states, soft-cap"),
    ),
    Mutant(
        "embeddings are scaled again at the split",
        faults.instead(Entry, "forward", lambda self, hidden_states, *_, **__: hidden_states),
        ("greedy, resumed where embeddings are scaled",),
    ),
    Mutant(
        "drafting runs one layer less than verification leaves out",
        faults.instead(TargetSession, "shallow", faults.shallow_short_of_a_layer),
        ("greedy, chains resumed at a layer",),
    ),
    Mutant(
        "rows run ahead are not dropped",
        faults.instead(TargetSession, "_drop_ahead", lambda self: None),
        ("greedy, chains resumed at a layer",),
    ),
    Mutant(
        "taps of rows run ahead are not dropped",
        faults.instead(TargetSession, "_drop_ahead", faults.taps_of_all_rows),
        ("states, resumed",),
    ),
    Mutant(
        "a draft is followed under another parent",
        faults.instead(sampler, "walk", faults.walk_anywhere),
        ("greedy, ragged trees", "states, trees"),
    ),
    Mutant(
        "one draft too many is accepted",
        faults.instead(sampler, "walk", faults.walk_too_far),
        ("greedy, ragged chains",),
    ),
    Mutant(
        "max_new_tokens leaves room for one draft more",
        faults.instead(DecodeSequence, "budget", faults.budget_to_the_end),
        ("max_new_tokens",),
    ),
    Mutant(
        "drafters are told the wrong next token",
        faults.instead(sequence, "Commit", faults.names_first_new),
        ("states, chains",),
    ),
    Mutant("forks share their rows", faults.instead(KVCache, "fork", faults.fork_shares), ("fork",)),
    Mutant(
        "penalties ignore the drafts before a row",
        faults.instead(RowHistory, "drafts", lambda self: torch.zeros(2 * self.tokens.shape)),
        ("penalties, chains",),
    ),
    Mutant(
        "penalties count siblings",
        faults.instead(
            RowHistory,
            "drafts",
            lambda self: torch.ones(2 * self.tokens.shape).tril().index_fill(1, torch.tensor([0]), 0.0),
        ),
        ("penalties, trees",),
    ),
    Mutant(
        "penalties remember what was rewound",
        faults.instead(History, "truncate", lambda *_: None),
        ("rewind with penalties",),
    ),
    Mutant(
        "drafts and target draw from one stream",
        lambda: faults.both(
            patch.object(sampler, "generator", faults.same_stream),
            patch.object(sequence, "generator", faults.same_stream),
        ),
        ("law of rejection, chains", "law of rejection, siblings"),
    ),
    Mutant(
        "a rejected draft is replaced by a draw from p itself",
        faults.instead(sampler, "reject_chain", faults.target_law_after_rejection),
        ("law of rejection, chains",),
    ),
)


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The fault is in place, and no target or mask from before it, nor stays one from under it."""
    tiny.forget_targets()
    attention_module._chain_masks.clear()
    try:
        with mutant.plant():
            yield
    finally:
        tiny.forget_targets()
        attention_module._chain_masks.clear()


def killer(mutant: Mutant) -> str | None:
    """The first of the mutant's checks that fails, with the reason; None if it survives."""
    with planted(mutant):
        for name in mutant.checks:
            try:
                CHECKS[name]()
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                return f"{name}: {reason[:90]}"
    return None


def main() -> int:
    torch.set_num_threads(1)
    for name, check in CHECKS.items():
        check()
        print(f"passes without a fault: {name}")
    survivors, start = 0, time.perf_counter()
    width = max(len(mutant.name) for mutant in MUTANTS)
    print(f"\n{'mutant':{width}} | killed by")
    for mutant in MUTANTS:
        by = killer(mutant)
        survivors += by is None
        print(f"{mutant.name:{width}} | {by or 'NOTHING: it survives'}")
    print(f"\n{len(MUTANTS) - survivors} of {len(MUTANTS)} killed in {time.perf_counter() - start:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
