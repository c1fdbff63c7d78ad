"""Which drafts are accepted, and which token follows them. Every rule leaves the law of the output the target's own.

p = the target's law after all processors, q = the law a draft was really drawn from. Two families:
- sample-and-match (`walk`): the target draws (greedy: argmax) at every row, and the path follows the drafts that equal
  its draws. Each emitted token is a fresh draw from p given its prefix, so drafts may come from anywhere and form any
  tree. The default.
- rejection (`reject_chain`, `reject_tree`): needs the recorded q; accepts more when drafts are drawn from a wide q.

Which drafts exist may depend on the tokens before them, never on a draft's own value: dropping a drawn token because of
what it is changes the law under rejection (stopping on max(q) is legal, on q(x) is not; nor may equal siblings drawn
i.i.d. be merged).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from understudy.ops import laws, trees


def walk(choices: Sequence[int], tokens: Sequence[int], parents: Sequence[int] | None) -> list[int]:
    """Sample-and-match: the rows from row 0 along drafts that equal the target's choices. Next token: choices[path[-1]].

    choices [W]: the target's own draw or argmax after each row. tokens [W]: the token of each row (row 0: the last
    committed token). parents [W]: row of each row's parent, -1 for row 0, a parent before its children; None = a chain.
    """
    if parents is None:
        last, end = 0, len(tokens) - 1
        while last < end and tokens[last + 1] == choices[last]:
            last += 1
        return list(range(last + 1))
    path, here, want = [0], 0, choices[0]
    # A child stands after its parent, so one pass over the rows finds the whole path, and the first of equal children.
    for row in range(1, len(tokens)):
        if parents[row] == here and tokens[row] == want:
            path.append(row)
            here, want = row, choices[row]
    return path


def reject_chain(p: Tensor, q: Tensor, tokens: Tensor, generator: Generator) -> Tensor:
    """Speculative sampling (Leviathan et al. 2211.17192, Chen et al. 2302.01318) -> [2] int64: accepted a, next token.

    p [K+1, V], q [K, V] fp32, tokens [K] the drafts, x_i ~ q_i. Draft i is accepted iff u_i < p_i(x_i) / q_i(x_i),
    written u_i q_i(x_i) < p_i(x_i). The first rejected one, a, is replaced by a draw from norm(max(p_a - q_a, 0)); if
    none is, the next token is drawn from p_K. A residual without mass means p_a = q_a up to rounding: then p_a itself.
    One-hot q is the rule of greedy drafts. The K numbers that accept and the one that draws are taken from the
    generator one after the other, so they are independent. Nothing comes to the host.
    """
    drafts = q.shape[0]
    if not drafts:
        return torch.cat([tokens.new_zeros(1), laws.draw(p, generator)])
    at = tokens[:, None]
    u = laws.uniforms(drafts, generator)
    kept = u * q.gather(1, at).squeeze(1) < p[:drafts].gather(1, at).squeeze(1)
    accepted = kept.long().cumprod(0).sum(0, keepdim=True)  # [1]
    here = p.index_select(0, accepted)  # [1, V]
    drawn_from = q.index_select(0, accepted.clamp_max(drafts - 1)) * (accepted < drafts)
    residual = (here - drawn_from).clamp_min_(0.0)
    weights = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, here)
    return torch.cat([accepted, laws.draw(weights, generator)])


def reject_tree(
    p: Tensor, q: Tensor, tokens: Sequence[int] | Tensor, parents: Sequence[int], generator: Generator
) -> tuple[list[int], int]:
    """Recursive rejection (multi-step speculative sampling of SpecInfer, Miao et al. 2305.09781) -> (path, next token).

    p [N+1, V] after each row, q [N, V] of rows 1..N, fp32; tokens [N+1] and parents [N+1] of the rows, row 0 the last
    committed token. At a row with law p, each child c in order: accept it iff u_c q_c(x_c) < p(x_c), else p <-
    norm(max(p - q_c, 0)). When no child is accepted the next token is drawn from what p has become. q_c is the law that
    child c was drawn from given the siblings before it: the same for i.i.d. siblings, renormalised without them when
    drawn without replacement, one-hot when chosen. Tensors come to the host once, and the walk is there.
    """
    rows = torch.as_tensor(tokens, device=p.device)
    branches = trees.children(parents)
    u = laws.uniforms(len(parents), generator).cpu()
    p, q, rows = p.cpu(), q.cpu(), rows.cpu()
    at = rows[1:, None]
    bars = (u[1:] * q.gather(1, at).squeeze(1)).tolist()  # u_c q_c(x_c) of rows 1..N
    drafts = rows.tolist()
    path = [0]
    while True:
        law = p[path[-1]]
        for child in branches[path[-1]]:
            if bars[child - 1] < law[drafts[child]].item():
                path.append(child)
                break
            law = _residual(law, q[child - 1])
        else:
            return path, int(laws.inverse_cdf(law[None], u[:1]))


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(p - q, 0)) [V]; p itself where that has no mass, because then p = q up to rounding."""
    left = (p - q).clamp_min_(0.0)
    mass = left.sum()
    return left.div_(mass) if mass > 0 else p
