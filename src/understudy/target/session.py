"""One sequence in the target: its tokens, its cache, and what a pass keeps for whoever asked.

Invariant between cycles: every stage's cache length is `len(tokens) - 1`; the last committed token is in no cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from understudy.core.records import Needs, Proposal, Rows
from understudy.ops.trees import ancestors, depths
from understudy.target.attention import Pass
from understudy.target.target import Target


class TargetSession:
    """The state of one sequence. Also the view of the target that a draft session gets."""

    def __init__(self, target: Target, needs: Needs = Needs()) -> None:
        self.target, self.needs = target, needs
        self.cache = target.cache()
        self.tokens: list[int] = []  # committed, prompt included
        self.length = 0  # rows of the whole model in the cache
        self.written = 0  # rows in the cache after the latest pass, committed or not
        self.ahead = 0  # rows of layers [0, needs.exit) in the cache beyond `length`
        self._wanted = needs.taps | (frozenset({needs.exit}) if needs.exit is not None else frozenset())
        self._shallow_taps: dict[int, list[Tensor]] = {}  # taps of the rows run ahead

    @property
    def device(self) -> torch.device:
        return self.target.device

    def lengths(self) -> dict[str, int]:
        """Cache length per stage: `target` for all layers, `shallow` for those that drafting has run ahead."""
        if self.needs.exit is None:
            return {"target": self.length}
        return {"shallow": self.length + self.ahead, "target": self.length}

    # What a draft session may call

    def shallow(self, tokens: Tensor) -> Tensor:
        """Run [n] tokens through layers [0, exit), after those already run ahead, into the target's own cache: [n, D]."""
        assert self.needs.exit is not None, "a drafter that runs shallow layers needs an exit layer"
        at = Pass(self.length + self.ahead, tokens.shape[0])
        hidden, taps = self.target.forward(tokens, at, self.cache, 0, self.needs.exit, self.needs.taps)
        for tap, states in taps.items():
            self._shallow_taps.setdefault(tap, []).append(states)
        self.ahead += tokens.shape[0]
        return hidden

    # What the engine calls

    def prefill(self, tokens: Sequence[int], want_logits: bool) -> Rows:
        """Run prompt tokens, in order, after what the cache holds. Logits of the last row only, unless somebody asked for all."""
        ids = torch.tensor(tokens, dtype=torch.int64, device=self.device)
        return self._pass(ids, None, "all" if self.needs.logits else "last" if want_logits else "none", None)

    def verify(self, proposal: Proposal | None) -> Rows:
        """Run the last committed token and the drafts. With `resume`, layers [0, E) are not run again."""
        last = torch.tensor(self.tokens[-1:], dtype=torch.int64, device=self.device)
        if proposal is None or proposal.tokens.shape[0] == 0:
            return self._pass(last, None, "all", proposal.resume if proposal else None)
        ids = torch.cat([last, proposal.tokens.to(self.device)])
        parents = None if proposal.parents is None else [-1, *(p + 1 for p in proposal.parents)]
        return self._pass(ids, parents, "all", proposal.resume)

    def _pass(self, ids: Tensor, parents: list[int] | None, logits: str, resume: tuple[int, Tensor] | None) -> Rows:
        at = Pass(self.length, ids.shape[0])
        if parents is not None:
            at.ancestors = ancestors(parents).to(self.device)
            at.depths = torch.tensor(depths(parents), device=self.device)
        if resume is None:
            hidden, taps = self.target.forward(ids, at, self.cache, wanted=self._wanted)
        else:
            exit_layer, states = resume
            assert states.shape[0] == ids.shape[0], "resume holds a row per draft and one for the last committed token"
            hidden, taps = self.target.forward(states, at, self.cache, first=exit_layer, wanted=self._wanted)
            taps |= {tap: torch.cat(parts) for tap, parts in self._shallow_taps.items()}
            taps[exit_layer] = states
        self.written = at.start + at.width
        out = None
        if logits != "none":
            # under a device map the head may be elsewhere than the tokens that its logits are compared with
            out = self.target.head(hidden if logits == "all" else hidden[-1:]).to(self.device)
        return Rows(
            start=at.start,
            tokens=ids,
            parents=parents,
            taps={tap: taps[tap].to(self.device) for tap in self.needs.taps},  # of layers that may be elsewhere too
            exit=None if self.needs.exit is None else taps[self.needs.exit],
            last=hidden if self.needs.last else None,
            logits=out,
        )

    def commit(self, rows: Rows, path: Sequence[int], tokens: Sequence[int]) -> None:
        """Keep the rows on `path` (row indices, from row 0 on) and append the tokens that became part of the text."""
        kept = len(path)
        if path[-1] != kept - 1:
            self.cache.keep(rows.start, list(path))
        self.length = rows.start + kept
        self._drop_ahead()
        self.tokens.extend(tokens)

    def rewind(self, tokens: int) -> None:
        """Go back to the first `tokens` committed tokens. Costs nothing: rows beyond are overwritten by the next pass."""
        assert 0 <= tokens <= len(self.tokens)
        del self.tokens[tokens:]
        self.length = min(self.length, max(tokens - 1, 0))
        self._drop_ahead()

    def _drop_ahead(self) -> None:
        self.ahead = 0
        self._shallow_taps.clear()

    def fork(self) -> TargetSession:
        """A session of its own that continues from here. Cache rows are copied, those of a pass not yet committed too."""
        copy = TargetSession(self.target, self.needs)
        copy.cache = self.cache.fork(max(self.length, self.written))
        copy.tokens, copy.length, copy.written = list(self.tokens), self.length, self.written
        return copy
