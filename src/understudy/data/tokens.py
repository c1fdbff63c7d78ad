"""Rows that hold token ids: what a target wrote, as it wrote it, so that nothing is tokenised again when it is trained on.

    {"id": ..., "input_ids": [INT, ...], "loss_mask": [0 | 1, ...], "messages": [...], "made": {"tokenizer": HASH, ...}}

`messages` is for people, and for whoever wants prompts. `made` says where the row comes from (`understudy data regenerate` writes it);
rows of other programs may lack it. A row with ids of another tokenizer is another text, so reading one is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from understudy.core.errors import UserError
from understudy.core.hashes import tokenizer_hash
from understudy.data.conversations import Malformed, Rejected

KEYS = ("input_ids", "loss_mask")
BEYOND = "a token id is beyond the tokenizer's vocabulary"
UNSUPERVISED = "the row's loss_mask supervises nothing"


@dataclass(frozen=True, slots=True)
class TokenRow:
    """T token ids, and for each whether predicting it is supervised."""

    ids: list[int]  # [T]
    mask: list[bool]  # [T]
    made: dict[str, Any] = field(default_factory=dict)  # target, tokenizer, template, ...: empty = it does not say

    @property
    def author(self) -> str:
        """The target that wrote the row: its fingerprint, or its name at the server that answered."""
        made = self.made.get("target") or self.made.get("endpoint_model")
        return str(made or "nobody knows whom")


def has_tokens(row: dict[str, Any]) -> bool:
    """Whether a row holds ids with their mask. Ids alone do not say what is supervised: such a row is read by its other keys."""
    return all(key in row for key in KEYS)


def parse_tokens(row: dict[str, Any]) -> TokenRow:
    """The ids of a row that `has_tokens`. Raises `Malformed`."""
    ids, mask = (row[key] for key in KEYS)
    for key, values in zip(KEYS, (ids, mask), strict=True):
        if not isinstance(values, list) or not values:
            raise Malformed(f"{key} is no list of numbers")
    if len(ids) != len(mask):
        raise Malformed(f"input_ids has {len(ids)} numbers, loss_mask {len(mask)}")
    if wrong := [token for token in ids if type(token) is not int or token < 0]:
        raise Malformed(f"input_ids holds {wrong[0]!r:.40}, which is no token id")
    if wrong := [value for value in mask if value not in (0, 1)]:
        raise Malformed(f"loss_mask holds {wrong[0]!r:.40}, expected 0 or 1")
    made = row.get("made", {})
    if not isinstance(made, dict):
        raise Malformed("made is no object")
    return TokenRow(ids, [bool(value) for value in mask], made)


class TokenReader:
    """Checks rows of ids against a tokenizer, whose vocabulary is looked at when the first one comes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def hash(self) -> str | None:
        return tokenizer_hash(self.tokenizer)

    @cached_property
    def vocabulary(self) -> int:
        return max(self.tokenizer.get_vocab().values()) + 1

    def __call__(self, row: TokenRow) -> list[tuple[int, int]]:
        """[start, end) of each run of supervised tokens. Raises `Rejected`; UserError for ids that another tokenizer made."""
        made = row.made.get("tokenizer")
        if made not in (None, self.hash):
            raise UserError(
                f"rows with token ids were made with another tokenizer than this model's (their `made.tokenizer` is {made!r:.40}, this"
                f" one's {self.hash!r}): train the model that wrote them, or let this one write its own (understudy data regenerate)"
            )
        if max(row.ids) >= self.vocabulary:
            raise Rejected(BEYOND, f"{max(row.ids)} of {self.vocabulary}")
        mask = [False, *row.mask[1:]]  # nothing predicts a text's first token
        edges = [i for i, (a, b) in enumerate(pairwise([False, *mask, False])) if a != b]
        if not edges:
            raise Rejected(UNSUPERVISED)
        return list(zip(edges[::2], edges[1::2], strict=True))
