"""Draft trees whose shape follows the drafter's confidence (EAGLE-2, Li et al., 2024; with EAGLE-3's layer).

A node's score is its path's log probability by the drafter. At each depth the `top_k` likeliest nodes are expanded, in one pass, and each
gets its `top_k` likeliest continuations. All continuations of all depths are candidates, and the likeliest `nodes` are proposed.

A score never exceeds its parent's, though it may equal it (log probabilities round to 0). Candidates are sorted by score, equal ones in
the order they were made: so no node is ever chosen without its parent.

Tokens are chosen here, not drawn: the tree's shape depends on them, which rejection sampling does not allow, so the engine matches them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.core.records import Budget, Proposal
from understudy.drafters.eagle3.drafter import Eagle3Session
from understudy.drafting.protocols import DraftSampler
from understudy.drafting.stateless import nothing


class TreeSession(Eagle3Session):
    """Drafts a tree."""

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        nodes, top_k = min(self.drafter.config.nodes, budget.nodes), self.drafter.config.top_k
        depth = min(self._depth(budget), nodes)  # a node at depth d brings the d - 1 before it
        if depth < 1:
            return nothing(self.view.device)
        model = self.model
        row = position = len(self.view.tokens) - 1  # of the first draft, in the cache
        out = self._begin()
        candidates = Candidates(nodes, out.device)
        path = out.new_zeros(1, 1, dtype=torch.float32)  # scores of the rows at hand [m, 1]
        seen = out.new_zeros(1, 0)  # the expanded rows that they see, as a mask [m, rows of the tree so far]
        while True:
            likely, said = self._likeliest(out, top_k)
            candidates.add(path + likely, said)
            depth -= 1
            count = candidates.worth(top_k) if depth else 0
            if not count:
                return candidates.proposal()
            path, tokens, parents = candidates.expand(count)
            count = len(tokens)
            seen = torch.cat([seen[parents], _alone(count, seen)], dim=1)
            out = model.branches(tokens, model.feedback(out)[parents], row, position, self.cache, seen)
            row, position = row + count, position + 1

    def _likeliest(self, out: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The layer's output [m, H] -> log probabilities and tokens [m, b] of the likeliest continuations, b = top_k or all there are."""
        logits = self.model.logits(out).float()
        likely, columns = logits.log_softmax(-1).topk(min(top_k, logits.shape[1]))
        return likely, columns if self.ids is None else self.ids[columns]


class Candidates:
    """All continuations so far, by depth. Of the rows that were expanded, 0 is the text and every other one a candidate; each has b
    candidates, so candidate c continues row c // b."""

    def __init__(self, nodes: int, device: torch.device) -> None:
        self.nodes = nodes
        self.made = 0  # candidates before the latest depth
        self.branches = 0  # b
        self.scores: list[Tensor] = []  # per depth [m b], rows one after the other
        self.tokens: list[Tensor] = []
        self.rows = [torch.full((1,), -1, device=device)]  # the candidate of each expanded row

    def add(self, scores: Tensor, tokens: Tensor) -> None:
        """A depth: [m, b] each. What has no score (a drafter gone wrong) comes last."""
        self.made += len(self.scores[-1]) if self.scores else 0
        self.branches = scores.shape[1]
        self.scores.append(scores.flatten().nan_to_num(nan=float("-inf"), neginf=float("-inf")))
        self.tokens.append(tokens.flatten())

    def worth(self, top_k: int) -> int:
        """How many of the latest depth to expand: those likelier than the `nodes`-th of all so far, which children of others never are.

        Looking costs a transfer. On a CPU it is free and rows are dear; elsewhere it is the other way round.
        """
        latest = self.scores[-1]
        if latest.device.type != "cpu" or self.made + len(latest) < self.nodes:
            return min(top_k, len(latest))
        bar = torch.cat(self.scores).topk(self.nodes).values[-1]
        return min(top_k, int((latest > bar).sum()))

    def expand(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest of the latest depth: scores [count, 1], tokens [count], which of the depth's rows they continue [count]."""
        scores, order = (x[:count] for x in self.scores[-1].sort(descending=True, stable=True))
        self.rows.append(order + self.made)
        return scores[:, None], self.tokens[-1][order], order // self.branches

    def proposal(self) -> Proposal:
        """The likeliest `nodes` of all, in the order they were made: parents before their children."""
        order = torch.cat(self.scores).sort(descending=True, stable=True).indices
        picked = order[: self.nodes].sort().values
        parents = torch.cat(self.rows)[picked // self.branches]
        parents = torch.searchsorted(picked, parents).masked_fill(parents < 0, -1)
        return Proposal(torch.cat(self.tokens)[picked], parents.tolist())


def _alone(rows: int, like: Tensor) -> Tensor:
    """Mask of rows that see themselves and not each other [rows, rows]."""
    return torch.full((rows, rows), float("-inf"), dtype=like.dtype, device=like.device).fill_diagonal_(0)
