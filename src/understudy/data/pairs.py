"""Question and answer as plain text, one pair per line of a file of conversations.

pairs = iter_sharegpt_jsonl("train.jsonl")
for prompt_text, target_text in pairs: ...
pairs.skipped.count, pairs.skipped.first      # lines left out so far, and the first of them as FILE:LINE: reason
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from understudy.core.errors import UserError
from understudy.data.conversations import Conversation, Malformed, Skipped, parse_conversation, parse_row


class Pairs(Iterator[tuple[str, str]]):
    """What `iter_sharegpt_jsonl` returns: the pairs, and in `skipped` the lines that gave none."""

    def __init__(self, path: Path, max_src_len: int, max_tgt_len: int) -> None:
        self.skipped = Skipped()
        self._limits = max_src_len, max_tgt_len
        self._pairs = self._read(path)

    def __next__(self) -> tuple[str, str]:
        return next(self._pairs)

    def _read(self, path: Path) -> Iterator[tuple[str, str]]:
        source, target = self._limits
        try:
            lines = path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        with lines:
            for number, raw in enumerate(lines, start=1):
                try:
                    if pair := _pair(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw):
                        yield pair[0][:source], pair[1][:target]
                except Malformed as reason:
                    self.skipped.add(f"{path}:{number}", str(reason))


def iter_sharegpt_jsonl(path: str | Path, max_src_len: int = 2048, max_tgt_len: int = 256) -> Pairs:
    """Yield (prompt_text, target_text) line by line: the first user turn of a conversation that is answered, and its answer.

    Every form of row that `understudy.data.conversations` reads is understood. The lengths are **characters**, not tokens, since no
    tokenizer takes part; what is longer keeps its beginning. Lines that are malformed or have no answered user turn are left
    out and counted in `skipped` of the result; blank lines are neither. Memory is that of one line. A length below 1, and (at the
    first pair) a file that cannot be opened, raise UserError.
    """
    for name, length in (("max_src_len", max_src_len), ("max_tgt_len", max_tgt_len)):
        if length < 1:
            raise UserError(f"{name} must be at least 1 character (got {length})")
    return Pairs(Path(path), max_src_len, max_tgt_len)


def first_pair(conversation: Conversation) -> tuple[str, str] | None:
    """The first user turn that is answered, and its answer; None without one."""
    for asked, answered in pairwise(conversation.messages):
        if (asked.role, answered.role) == ("user", "assistant"):
            return asked.content, answered.content
    return None


def _pair(raw: bytes) -> tuple[str, str] | None:
    """The pair of a line, None if it is blank."""
    if not raw.strip():
        return None
    if pair := first_pair(parse_conversation(parse_row(raw), "")):
        return pair
    raise Malformed("no user turn is answered")
