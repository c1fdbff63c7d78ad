"""What may happen to a sequence: turns, cancels, exceptions, rewinds, forks. After each of them the output is what it would have been."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import tiny
from contract.checks import PENALTIES, check_cache, check_cycles
from contract.runs import NEW, Listener, Maker, Run, decoded, finish, leave_after, open_run, same
from contract.scripted import Wrapped
from understudy.core.records import Proposal
from understudy.decoding.engine import decode
from understudy.decoding.stops import StopRule


def check_turns(family: str, maker: Maker) -> None:
    """A second and a third prefill on the same sequence equal a fresh sequence with the whole text as its prompt."""
    turns = [tiny.prompt(9, seed=s) for s in (2, 3, 4)]
    text: list[int] = []
    truth: list[int] = []
    for turn in turns:  # what scripted drafters must know
        text = [*text, *turn]
        truth = [*text, *tiny.reference(family, text, 18)]
        text = truth[: len(text) + 10]
    run, text = open_run(family, maker, turns[0], truth, max_new_tokens=10), []
    for i, turn in enumerate(turns):
        if i:
            run.sequence.prefill(turn)
        run.cycles.clear()
        text = [*text, *turn]
        want = tiny.reference(family, text, 10)
        finish(run)
        same(run.output, want, f"turn {i}")
        check_cycles(run, len(text))
        text = [*text, *want]
        assert run.sequence.tokens == text
    check_cache(family, run)


def check_cancel(family: str, maker: Maker) -> None:
    """Leaving the loop after any cycle and coming back changes nothing."""
    prompt = tiny.prompt()
    want = tiny.reference(family, prompt, 12)
    for after in (0, 1, 2, 4):
        run = open_run(family, maker, prompt, max_new_tokens=12)
        leave_after(run, after)
        same(run.output, want[: len(run.output)], f"closed after {after} cycles")
        finish(run)
        same(run.output, want, f"taken up again after {after} cycles")
        check_cache(family, run)


def check_cancel_then_stop(family: str, maker: Maker, limit: int = 4) -> None:
    """A stop inside the first block after coming back still ends the output."""
    prompt = tiny.prompt()
    whole = tiny.reference(family, prompt, NEW)
    for end in [i for i, token in enumerate(whole) if token not in whole[:i]][1 : limit + 1]:
        run = open_run(family, maker, prompt, stop=StopRule((whole[end],)))
        while run.sequence.finished is None:  # a new loop for each cycle
            leave_after(run, 1)
        same(run.output, whole[: end + 1], f"stop token at {end}, a new loop for each cycle")
        assert run.sequence.finished == "stop"
        check_cache(family, run)


class Broken(Exception):
    """Raised by a test inside a cycle."""


def check_exceptions(family: str, maker: Maker, places: Iterable[str] = ("propose", "verify", "listener")) -> None:
    """An exception in propose, in verify, in observe or in a listener leaves the sequence at a whole cycle; taking it up again gives
    the same output."""
    prompt = tiny.prompt()
    want = tiny.reference(family, prompt, 16)
    for where in places:
        for nth in (1, 3):
            run, fuse = _fused(family, maker, prompt, where, nth)
            failed = 0
            while run.sequence.finished is None:
                try:
                    run.cycles.extend(decode(run.sequence))
                except Broken:
                    failed += 1
                    done = run.output
                    same(done, want[: len(done)], f"right after a failure in {where}")
            assert failed == fuse.lit, f"{where} never failed"
            same(run.output, want, f"after a failure in {where}")
            check_cache(family, run)


class _Fuse:
    """Raises at the n-th call."""

    def __init__(self, nth: int) -> None:
        self.left, self.lit = nth, 0

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            self.lit = 1
            raise Broken


def _fused(family: str, maker: Maker, prompt: list[int], where: str, nth: int) -> tuple[Run, _Fuse]:
    fuse = _Fuse(nth)
    options: dict[str, Any] = {"max_new_tokens": 16}
    if where == "propose":
        options["wrap"] = lambda inner: Wrapped(inner, on_propose=fuse)
    if where == "observe":
        options["wrap"] = lambda inner: Wrapped(inner, on_observe=lambda _: fuse() if run else None)
    if where == "listener":
        options["listeners"] = [Listener(fuse)]
    run: Run | None = None  # prefilling observes too: the fuse burns from the first cycle on
    run = open_run(family, maker, prompt, **options)
    if where == "verify":
        verify = run.sequence.target.verify

        def failing(proposal: Proposal | None) -> Any:
            rows = verify(proposal)
            fuse()
            return rows

        run.sequence.target.verify = failing  # type: ignore[method-assign]
    return run, fuse


def check_rewind(family: str, maker: Maker, lengths: Iterable[int] = (29, 21, 20, 12, 1)) -> None:
    """Back to any length and on again: into the output, to its beginning, into the prompt."""
    prompt = tiny.prompt()
    want = tiny.reference(family, prompt, 10)
    for length in lengths:
        run = decoded(family, maker, prompt, max_new_tokens=10)
        run.sequence.rewind(length)
        assert run.sequence.tokens == [*prompt, *want][:length] and run.sequence.finished is None
        finish(run)
        if length >= len(prompt):
            same(run.output, want, f"rewound to {length} of {len(prompt)} prompt tokens")
        else:
            same(run.output, tiny.reference(family, prompt[:length], 10), f"rewound into the prompt, to {length}")
        check_cache(family, run)
    run.sequence.rewind(0)
    run.sequence.prefill(prompt)
    same(finish(run).output, want, "rewound to nothing and prefilled again")


def check_rewind_before_decoding(family: str, maker: Maker, lengths: Iterable[int] = (20, 19, 8)) -> None:
    """The same right after the prefill, before any cycle has committed the prompt's last rows."""
    prompt = tiny.prompt()
    for length in lengths:
        run = open_run(family, maker, prompt, max_new_tokens=10)
        run.sequence.rewind(length)
        same(finish(run).output, tiny.reference(family, prompt[:length], 10), f"prefilled, then rewound to {length}")
        check_cache(family, run)


def check_rewind_penalties(family: str, maker: Maker, lengths: Iterable[int] = (24, 20, 8)) -> None:
    """Penalties forget what was rewound, in the output and in the prompt."""
    prompt = tiny.prompt()
    for length in lengths:
        run = decoded(family, maker, prompt, max_new_tokens=10, sampling=PENALTIES)
        run.sequence.rewind(length)
        same(
            finish(run).output,
            tiny.reference(family, prompt[:length], 10, PENALTIES),
            f"with penalties, rewound to {length}",
        )


def check_fork(family: str, maker: Maker, count: int = 14) -> None:
    """A fork after the prefill or in mid-text and its original go on by themselves."""
    prompt = tiny.prompt()
    want = tiny.reference(family, prompt, count)
    for after in (0, 2):
        run = open_run(family, maker, prompt, max_new_tokens=count)
        leave_after(run, after)
        other, detour = Run(run.sequence.fork(1)), run.sequence.fork(2)
        leave_after(run, 1)
        leave_after(other, 2)
        # one fork goes another way from within the prompt on: if rows are shared by mistake, the others read its rows
        leave_after(Run(detour), 1)
        detour.rewind(len(prompt) - 4)
        finish(Run(detour))
        assert detour.tokens[: len(run.sequence.tokens)] != run.sequence.tokens
        for each in (other, run):
            same(finish(each).output, want, f"forked after {after} cycles")
            check_cache(family, each)
