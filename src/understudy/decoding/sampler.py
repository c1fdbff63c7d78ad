"""Where tokens are chosen: the target's by its processed law, the drafts' with their law recorded.

Two random streams per sequence. Sharing one would make a draw depend on whether something was drafted before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.records import Proposal, Rows
from understudy.core.seeds import generator
from understudy.ops import laws
from understudy.ops.trees import ancestors, depths
from understudy.ops.verify import reject_chain, reject_tree, walk
from understudy.target.processors import History, Processors

POINTS = (
    1024  # numbers taken from the stream at a time; constant, so that the stream does not depend on what is asked for
)


class RecordingSampler:
    """What a drafter draws its tokens with. Under `sample` the engine keeps each draw and its law, and verifies exactly those."""

    def __init__(self, processors: Processors, random: torch.Generator, sample: bool, tree: bool = False) -> None:
        """`tree`: the drafter's tree is the same whatever is drawn."""
        self.processors, self.random, self.tree = processors, random, tree
        self.sample = sample and not processors.greedy
        self.draws: list[Tensor] = []
        self.laws: list[Tensor] = []

    def draw(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Draft tokens [n] from raw logits [n, V], or [n, V_d] of the tokens `ids`: what has no column has no probability."""
        if not self.sample:
            best = laws.argmax(logits)
            return best if ids is None else ids[best]
        if ids is not None:
            wide = logits.new_full((logits.shape[0], self.processors.vocab_size), float("-inf"))
            logits = wide.index_copy_(1, ids, logits)
        q = laws.law(self.processors.warp(logits))
        tokens = laws.draw(q, self.random)
        self.draws.append(tokens)
        self.laws.append(q)
        return tokens

    def begin(self) -> RecordingSampler:
        self.draws.clear()
        self.laws.clear()
        return self

    def settle(self, proposal: Proposal) -> Tensor | None:
        """The recorded q [K, V] of the proposal, or None when drafts are verified by matching.

        What was drawn stands: the drawn tokens are the drafts, whatever the drafter says they are, and it may not leave one out:
        which rule verifies, and what, must not depend on a draw's value. Laws over another vocabulary than the target's go to matching.
        """
        if not self.draws:
            return None
        tokens = torch.cat(self.draws)
        assert tokens.shape[0] == proposal.tokens.shape[0], (
            "a drafter must propose every token that it drew, and no other"
        )
        assert proposal.parents is None or self.tree, "a drafter that draws a tree must declare static_tree"
        proposal.tokens = tokens.to(proposal.tokens.device)
        return torch.cat(self.laws) if self.laws[0].shape[-1] == self.processors.vocab_size else None


class Chooser:
    """The target's side of one sequence: choices after rows, and which drafts they accept."""

    def __init__(self, processors: Processors, device: torch.device, seed: int, index: int) -> None:
        self.processors = processors
        self.random = generator(device, seed, index, "target")
        self.history: History | None = None
        self.points = laws.uniforms(0, self.random)  # numbers that draws are made with, by position of the text

    def begin(self, prompt: list[int]) -> None:
        """A turn starts: everything before its first new token counts as prompt."""
        self.history = self.processors.history(prompt)

    def processed(self, logits: Tensor, rows: Rows) -> Tensor:
        """[n, V] raw logits of the last n rows -> [n, V] processed, fp32."""
        if self.history is None:
            return self.processors.apply(logits)
        seen = None if rows.parents is None else ancestors(rows.parents).to(logits.device)
        return self.processors.apply(logits, self.history.rows(rows.tokens[-logits.shape[0] :], seen))

    def first(self, logits: Tensor, rows: Rows, position: int) -> int:
        """The first new token, from the last prompt row's logits [1, V]. That row is committed: it is counted already."""
        return self._real(int(self._choose(logits, rows, position).item()))

    def _real(self, token: int) -> int:
        """A row without a law (NaN logits, no mass) draws no token."""
        if token >= self.processors.vocab_size:
            raise UserError("the model computed logits that are no numbers (NaN or all -inf): try --dtype float32")
        return token

    def _points(self, rows: Rows, width: int, position: int) -> Tensor:
        """One number per row, the same for every row that predicts the same position of the text.

        So a draw depends on the seed, the position and the law there, not on what was drafted before: with one seed every drafter
        gives the text that plain decoding gives.
        """
        while len(self.points) < position + width:
            self.points = torch.cat([self.points, laws.uniforms(POINTS, self.random)])
        if rows.parents is None or width == 1:
            return self.points[position : position + width]
        return self.points[[position + depth for depth in depths(rows.parents)]]

    def _choose(self, logits: Tensor, rows: Rows, position: int) -> Tensor:
        """What the target says after each row. `position` of the text is what the first row predicts."""
        if self.processors.identity and self.processors.greedy:
            return laws.argmax(logits)
        processed = self.processed(logits, rows)
        if self.processors.greedy:
            return laws.argmax(processed)
        return laws.inverse_cdf(laws.law(processed), self._points(rows, logits.shape[0], position))

    def judge(self, rows: Rows, q: Tensor | None, position: int) -> tuple[list[int], list[int], list[int]]:
        """(path of accepted rows, the target's choice after each row, the token of each row). One transfer to the host.

        With `q` drafts are accepted by rejection; the choice after the last accepted row then is the token that follows, and the
        choices after accepted rows are the drafts themselves.
        """
        assert rows.logits is not None
        if q is None:
            choices, tokens = torch.stack([self._choose(rows.logits, rows, position), rows.tokens]).tolist()
            path = walk(choices, tokens, rows.parents)
            self._real(choices[path[-1]])
            return path, choices, tokens
        p = laws.law(self.processed(rows.logits, rows))
        if rows.parents is None:
            outcome = reject_chain(p, q.to(p.device), rows.tokens[1:], self.random)
            accepted, after, *tokens = torch.cat([outcome, rows.tokens]).tolist()
            return list(range(accepted + 1)), [*tokens[1 : accepted + 1], self._real(after)], tokens
        path, after = reject_tree(p, q.to(p.device), rows.tokens, rows.parents, self.random)
        tokens = rows.tokens.tolist()
        choices = [-1] * len(tokens)
        for row, child in zip(path, path[1:], strict=False):
            choices[row] = tokens[child]
        choices[path[-1]] = self._real(after)
        return path, choices, tokens
