"""New tokens as text, while they come: accepted drafts in colour, the target's own tokens plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from tokenizers.decoders import DecodeStream

from understudy.core.records import Cycle
from understudy.decoding.stats import Stats
from understudy.decoding.stops import StopRule

DRAFTED = "green"


class Pieces:
    """Text piece by piece: a character that is spread over tokens comes with its last one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.fast = getattr(tokenizer, "backend_tokenizer", None)
        self.stream = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.shown = ""

    def push(self, token: int) -> str:
        """The text that `token` adds."""
        if self.fast is not None:
            return self.stream.step(self.fast, token) or ""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        piece, self.shown = text[len(self.shown) :], text
        return piece


class Printer:
    """Prints cycles as they come. Text that may turn out to belong to a stop string is held back."""

    def __init__(self, console: Console, tokenizer: Any, stop: StopRule) -> None:
        self.console, self.stop = console, stop
        self.pieces = Pieces(tokenizer)
        self.held: list[tuple[str, bool]] = []
        self.margin = max((len(s) for s in stop.strings), default=0)

    def show(self, cycle: Cycle) -> None:
        for i, token in enumerate(cycle.committed):
            self.held.append((self.pieces.push(token), i < cycle.accepted))
        if not cycle.stopped:  # where a stop string begins, `end` finds out
            self._flush(self.margin)

    def end(self) -> None:
        """Print what is held, up to a stop string."""
        left = self.stop.trim("".join(piece for piece, _ in self.held))
        kept: list[tuple[str, bool]] = []
        for piece, drafted in self.held:
            kept.append((piece[: len(left)], drafted))
            left = left[len(piece) :]
        self.held = kept
        self._flush(0)
        self.console.print()

    def _flush(self, margin: int) -> None:
        waiting = sum(len(piece) for piece, _ in self.held)
        out = Text()
        while self.held and waiting - len(self.held[0][0]) >= margin:
            piece, drafted = self.held.pop(0)
            waiting -= len(piece)
            out.append(piece, style=DRAFTED if drafted else None)
        self.console.print(out, end="", soft_wrap=True, highlight=False)


def statistics(stats: Stats, name: str) -> str:
    """One line on what decoding did."""
    return (
        f"{name}: {stats.tokens + stats.turns} tokens, {stats.tokens_per_s:.0f} tokens/s, "
        f"tau {stats.tau:.2f} ({stats.cycles} cycles), {stats.acceptance_rate:.0%} of {stats.drafted} drafts accepted, "
        f"prefill {1000 * stats.prefill_s:.0f} ms"
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens `a` and `b` share."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def learned(summary: Mapping[str, float]) -> str:
    """What an online learner did, in one line."""
    return (
        f"learned: {summary['samples']:.0f} judged drafts, {summary['ran']:.0f} of {summary['due']:.0f} due updates run"
        f" ({summary['skipped']:.0f} skipped, {summary['restored']:.0f} taken back),"
        f" {summary['ms_p50']:.1f} ms each (p99 {summary['ms_p99']:.1f}), {summary['bytes_per_slot']:.0f} bytes per position"
    )
