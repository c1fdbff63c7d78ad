"""Where a text ends: stop tokens and stop strings, anywhere in a block. The engine asks one question of the new tokens only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Decode = Callable[[list[int]], str]


class StopRule:
    """Finds the first token that ends the text, among newly committed ones.

    Stop strings need `decode` (ids -> text). A stop string may span tokens and cycles; the token that completes it is kept, and
    whoever shows the text cuts it before the string.
    """

    def __init__(self, ids: Iterable[int] = (), strings: Sequence[str] = (), decode: Decode | None = None) -> None:
        assert decode is not None or not strings, "stop strings need a decoder"
        self.ids = frozenset(ids)
        self.strings = tuple(strings)
        self.decode = decode
        # a character takes at most four byte-level tokens; a few more for tokens that decode to nothing
        self._window = 4 * max((len(s) for s in self.strings), default=0) + 8

    def cut(self, output: Sequence[int], new: Sequence[int]) -> int | None:
        """How many of `new` to keep, the ending token included; None if the text goes on. `output` = what came before."""
        end = next((i + 1 for i, token in enumerate(new) if token in self.ids), None)
        if self.strings:
            by_text = self._cut_by_text(output, new[:end])
            end = end if by_text is None else by_text
        return end

    def _cut_by_text(self, output: Sequence[int], new: Sequence[int]) -> int | None:
        assert self.decode is not None
        before = list(output[max(0, len(output) - self._window) :])
        # token by token, as without drafts: what a token says may depend on the one after it
        for end in range(1, len(new) + 1):
            if self._found(self.decode([*before, *new[:end]])):
                return end
        return None

    def _found(self, text: str) -> bool:
        return any(s in text for s in self.strings)

    def trim(self, text: str) -> str:
        """`text` up to the first stop string."""
        ends = [at for s in self.strings if (at := text.find(s)) >= 0]
        return text[: min(ends)] if ends else text
