"""Every verification rule gives the target's exact law, whatever drafts; and the test notices when one does not.

The target is a table: the law of a token depends on the token before it alone, so the law of three output tokens is known exactly.
A trial verifies one draft and then, if fewer than three tokens came out, goes on with plain draws from the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Generator, Tensor

from understudy.core import seeds
from understudy.ops import laws, trees, verify

V = 5
TRIALS = 100_000
_tables = torch.Generator().manual_seed(30)
P = (1.5 * torch.randn(V, V, generator=_tables)).softmax(-1)  # the target's law after each token
Q = (1.5 * torch.randn(V, V, generator=_tables)).softmax(-1)  # the drafter's
START = 3


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


EXACT = P[START][:, None, None] * P[:, :, None] * P[None, :, :]  # [V, V, V]


def chi_square_p(counts: Tensor, law: Tensor) -> float:
    """The probability of a worse fit. Cells that expect fewer than 5 make one: the statistic is not chi-square there."""
    expected = law.double().flatten() * counts.sum()
    counts, rare = counts.double(), expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    cells = expected > 0
    statistic = ((counts - expected)[cells] ** 2 / expected[cells]).sum()
    return torch.special.gammaincc((cells.sum().double() - 1) / 2, statistic / 2).item()


def fit(output: Tensor, size: Tensor, generator: Generator) -> float:
    """The p-value of three output tokens [trials, 3]: the first `size` [trials] by verification, the rest from the table."""
    for position in range(3):
        last = output[:, position - 1] if position else torch.full_like(size, START)
        output[:, position] = torch.where(size > position, output[:, position], laws.draw(P[last], generator))
    return chi_square_p((output @ torch.tensor([V * V, V, 1])).bincount(minlength=V**3), EXACT)


def holds(value: float) -> bool:
    return value > 1e-4


def is_noticed(value: float) -> bool:
    return value < 1e-8


def draw_chain(depth: int, generator: Generator) -> Tensor:
    """Row tokens [TRIALS, depth + 1], each draft from the drafter's law after the token before it."""
    tokens = [torch.full((TRIALS,), START)]
    for _ in range(depth):
        tokens.append(laws.draw(Q[tokens[-1]], generator))
    return torch.stack(tokens, dim=1)


def joined(tokens: Tensor, accepted: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """Row tokens of chains, accepted counts and next tokens -> output [trials, 3 or more] and its size."""
    output = torch.nn.functional.pad(tokens[:, 1:], (0, 4 - tokens.shape[1]))
    return output.scatter(1, accepted[:, None], following[:, None])[:, :3], accepted + 1


def chains_by_rejection(tokens: Tensor, q: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """`reject_chain` itself on every trial at once: torch.vmap gives each its own random numbers."""
    each = torch.vmap(lambda p, q, drafts: verify.reject_chain(p, q, drafts, generator), randomness="different")
    out = each(P[tokens], q, tokens[:, 1:])
    return out[:, 0], out[:, 1]


# --- sample-and-match -----------------------------------------------------------------------------------------------


def by_matching(
    tokens: Tensor, parents: list[int] | None, generator: Generator, choices: Tensor | None = None
) -> float:
    """The fit of `walk` on row tokens [trials, rows]."""
    if choices is None:
        choices = laws.draw(P[tokens].flatten(0, 1), generator).view_as(tokens)
    emitted = []
    for row_tokens, row_choices in zip(tokens.tolist(), choices.tolist(), strict=True):
        path = verify.walk(row_choices, row_tokens, parents)
        emitted.append([row_tokens[i] for i in path[1:]] + [row_choices[path[-1]]])
    size = torch.tensor([len(e) for e in emitted])
    output = torch.tensor([e + [0] * (3 - len(e)) for e in emitted])
    assert (size.bincount() > len(tokens) / 100).sum() >= 2, "several numbers of accepted drafts must occur"
    return fit(output, size, generator)


def test_matching_a_chain() -> None:
    generator = seeds.generator("cpu", 1)
    tokens = draw_chain(2, generator)
    assert holds(by_matching(tokens, None, generator))
    # A verifier that takes the first draft unseen is noticed.
    choices = laws.draw(P[tokens].flatten(0, 1), generator).view_as(tokens)
    choices[:, 0] = tokens[:, 1]
    assert is_noticed(by_matching(tokens, None, generator, choices))


def test_matching_a_tree() -> None:
    generator = seeds.generator("cpu", 2)
    first = torch.rand(TRIALS, V, generator=generator).argsort(1)[:, :2]  # two different children of the root
    second = torch.rand(TRIALS, V, generator=generator).argsort(1)[:, :3]
    tokens = torch.cat([torch.full((TRIALS, 1), START), first, second], dim=1)
    assert holds(by_matching(tokens, [-1, 0, 0, 2, 1, 2], generator))


# --- rejection on a chain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_rejecting_a_chain(depth: int) -> None:
    generator = seeds.generator("cpu", 3, depth)
    tokens = draw_chain(depth, generator)
    accepted, following = chains_by_rejection(tokens, Q[tokens[:, :-1]], generator)
    assert holds(fit(*joined(tokens, accepted, following), generator))
    if depth:  # alpha = sum_v min(p_v, q_v): a rule that rejects more would be lossless too, and slow
        alpha = torch.minimum(P[START], Q[START]).sum().item()
        assert (accepted > 0).double().mean().item() == pytest.approx(alpha, abs=5 * (0.25 / TRIALS) ** 0.5)


def test_rejecting_a_chain_with_another_q_than_the_drawn_one_is_noticed() -> None:
    generator = seeds.generator("cpu", 4)
    tokens = draw_chain(2, generator)
    tempered = Q[tokens[:, :-1]] ** 0.8
    accepted, following = chains_by_rejection(tokens, tempered / tempered.sum(-1, keepdim=True), generator)
    assert is_noticed(fit(*joined(tokens, accepted, following), generator))


def test_rejecting_a_chain_of_chosen_drafts() -> None:
    """One-hot q: the drafter's argmax. Accepted with probability p(x), the optimum for a draft that is not drawn."""
    generator = seeds.generator("cpu", 5)
    best = Q.argmax(-1)
    row = [START, int(best[START]), int(best[best[START]])]
    tokens = torch.tensor(row).expand(TRIALS, -1)
    q = torch.eye(V)[tokens[:, 1:]]
    accepted, following = chains_by_rejection(tokens, q, generator)
    assert holds(fit(*joined(tokens, accepted, following), generator))
    share = (accepted > 0).double().mean().item()
    assert share == pytest.approx(P[START, row[1]].item(), abs=5 * (0.25 / TRIALS) ** 0.5)


def with_an_exit(stops: Callable[[Tensor, Tensor], Tensor], seed: int) -> float:
    """Chains of up to two drafts that end where `stops`(last token, its draft) says so; the draft there is not verified."""
    generator = seeds.generator("cpu", 6, seed)
    tokens = draw_chain(2, generator)
    go = ~torch.stack([stops(tokens[:, i], tokens[:, i + 1]) for i in range(2)], dim=1)
    depth = go.long().cumprod(1).sum(1)
    assert (depth.bincount(minlength=3) > TRIALS / 50).sum() >= 2, "the exit must be taken, and not always"
    outputs, sizes = [], []
    for drafts in range(3):
        part = tokens[depth == drafts][:, : drafts + 1]
        accepted, following = chains_by_rejection(part, Q[part[:, :-1]], generator)
        output, size = joined(part, accepted, following)
        outputs.append(output)
        sizes.append(size)
    return fit(torch.cat(outputs), torch.cat(sizes), generator)


def test_an_exit_may_look_at_the_drafting_law_but_not_at_the_draft() -> None:
    assert holds(with_an_exit(lambda last, draft: Q[last].amax(-1) < 0.53, 0))
    assert is_noticed(with_an_exit(lambda last, draft: Q[last, draft] < 0.3, 1))


# --- rejection on a tree ----------------------------------------------------------------------------------------------

PARENTS = [-1, 0, 0, 1, 1, 2]  # two children of the root, two of the first of them, one of the second
KINDS = {"iid": 20_000, "without replacement": 20_000, "one-hot": 20_000, "mixed": TRIALS}


def siblings(kind: str, after: Tensor, count: int, generator: Generator) -> tuple[list[Tensor], list[Tensor]]:
    """`count` children of tokens `after` [trials] -> their tokens [trials] and the laws [trials, V] they are drawn from."""
    law = Q[after]
    if kind == "one-hot":
        best = law.argsort(-1, descending=True)
        return [best[:, i] for i in range(count)], [torch.eye(V)[best[:, i]] for i in range(count)]
    tokens, qs = [], []
    for _ in range(count):
        tokens.append(laws.draw(law, generator))
        qs.append(law)
        if kind == "without replacement":
            law = law.scatter(1, tokens[-1][:, None], 0.0)
            law = law / law.sum(-1, keepdim=True)
    return tokens, qs


def draw_tree(kinds: tuple[str, str, str], trials: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Row tokens [trials, 6] and q [trials, 5, V] of trees shaped like PARENTS; one kind for each parent's children."""
    root = torch.full((trials,), START)
    top, q_top = siblings(kinds[0], root, 2, generator)
    left, q_left = siblings(kinds[1], top[0], 2, generator)
    right, q_right = siblings(kinds[2], top[1], 1, generator)
    return torch.stack([root, *top, *left, *right], dim=1), torch.stack([*q_top, *q_left, *q_right], dim=1)


def by_tree_rejection(tokens: Tensor, q: Tensor, generator: Generator) -> float:
    emitted = []
    for p_row, q_row, row in zip(P[tokens].unbind(), q.unbind(), tokens.tolist(), strict=True):
        path, following = verify.reject_tree(p_row, q_row, row, PARENTS, generator)
        emitted.append([row[j] for j in path[1:]] + [following])
    size = torch.tensor([len(e) for e in emitted])
    assert (size.bincount() > len(tokens) / 100).sum() >= 2, "several numbers of accepted drafts must occur"
    return fit(torch.tensor([e + [0] * (3 - len(e)) for e in emitted]), size, generator)


@pytest.mark.parametrize("kind", KINDS)
def test_rejecting_a_tree(kind: str) -> None:
    generator = seeds.generator("cpu", 7, kind)
    kinds = ("iid", "without replacement", "one-hot") if kind == "mixed" else (kind,) * 3
    tokens, q = draw_tree(kinds, KINDS[kind], generator)
    assert holds(by_tree_rejection(tokens, q, generator))


def test_children_without_replacement_need_their_own_q() -> None:
    generator = seeds.generator("cpu", 8)
    tokens, q = draw_tree(("without replacement",) * 3, 10_000, generator)
    q[:, 1], q[:, 3] = q[:, 0], q[:, 2]  # the second child's law is taken for that of an independent draw
    assert is_noticed(by_tree_rejection(tokens, q, generator))


@pytest.mark.parametrize("merged", [False, True])
def test_equal_siblings_may_not_be_merged(merged: bool) -> None:
    """An i.i.d. child dropped because it equals its sibling is a draft dropped because of its own value."""
    generator, last = seeds.generator("cpu", 9), 1
    counts = torch.zeros(V)
    for drafts in laws.draw(Q[last].expand(20_000, -1), generator).view(-1, 2).tolist():
        row = [last, *(drafts[:1] if merged and drafts[0] == drafts[1] else drafts)]
        children = len(row) - 1
        path, following = verify.reject_tree(
            P[row], Q[last].expand(children, -1), row, [-1, 0, 0][: len(row)], generator
        )
        counts[row[path[1]] if len(path) > 1 else following] += 1
    value = chi_square_p(counts, P[last])
    assert is_noticed(value) if merged else holds(value)


# --- edges ------------------------------------------------------------------------------------------------------------


def test_a_chain_is_a_tree_without_branches() -> None:
    """The same random numbers accept the same drafts of a chain under both rules."""
    for seed in range(200):
        tokens = laws.draw(Q[:3], seeds.generator("cpu", seed, "tokens"))
        rows = [START, *tokens.tolist()]
        choices = laws.draw(P[rows], seeds.generator("cpu", seed, "choices")).tolist()
        assert verify.walk(choices, rows, None) == verify.walk(choices, rows, [-1, 0, 1, 2])
    p = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    q = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    out = verify.reject_chain(p, q, torch.tensor([1, 1]), seeds.generator("cpu", 0))
    assert out.tolist() == [1, 0]  # the second draft is impossible for the target, and 0 is all that is left
    assert out.dtype == torch.int64
    assert verify.reject_tree(p, q, [0, 1, 1], [-1, 0, 1], seeds.generator("cpu", 0)) == ([0, 1], 0)
    assert verify.reject_tree(p, q, torch.tensor([0, 1, 1]), [-1, 0, 1], seeds.generator("cpu", 0)) == ([0, 1], 0)


def test_no_drafts() -> None:
    p, none = torch.tensor([[0.0, 1.0]]), torch.zeros(0, 2)
    assert verify.walk([1], [0], None) == [0]
    assert verify.walk([1], [0], [-1]) == [0]
    assert verify.reject_chain(p, none, torch.zeros(0, dtype=torch.int64), seeds.generator("cpu", 0)).tolist() == [0, 1]
    assert verify.reject_tree(p, none, [0], [-1], seeds.generator("cpu", 0)) == ([0], 1)


def test_a_residual_without_mass_falls_back_to_p(monkeypatch: pytest.MonkeyPatch) -> None:
    """p <= q everywhere, as rounding can make it, and numbers that reject: the next token is a draw from p."""
    monkeypatch.setattr(laws, "uniforms", lambda count, generator: torch.full((count,), 1 - 2**-53).double())
    p, q = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.6, 0.0]])
    assert verify.reject_chain(p, q, torch.tensor([1]), seeds.generator("cpu", 0)).tolist() == [0, 1]
    assert verify.reject_tree(p, q, [0, 1], [-1, 0], seeds.generator("cpu", 0)) == ([0], 1)


def test_walk_examples() -> None:
    # choices, tokens, parents -> path
    assert verify.walk([7, 8, 9], [0, 7, 8], None) == [0, 1, 2]  # all accepted, 9 follows
    assert verify.walk([7, 5, 9], [0, 7, 8], None) == [0, 1]  # 5 replaces 8
    assert verify.walk([6, 8, 9], [0, 7, 8], None) == [0]  # 8 after a rejected draft does not count
    assert verify.walk([7, 0, 3, 9], [0, 5, 7, 3], [-1, 0, 0, 2]) == [0, 2, 3]  # the second branch
    assert verify.walk([7, 3, 4, 9], [0, 7, 7, 4], [-1, 0, 0, 2]) == [0, 1]  # the first of equal children
    assert verify.walk([7, 8, 8], [0, 7, 8], [-1, 0, 0]) == [0, 1]  # a sibling is no child


random_parents = st.lists(st.integers(0, 10**6), max_size=12).map(
    lambda xs: [-1] + [x % (i + 1) for i, x in enumerate(xs)]
)


@settings(max_examples=200, deadline=None)
@given(random_parents, st.data())
def test_walk_finds_the_matching_branch(parents: list[int], data: st.DataObject) -> None:
    small = st.lists(st.integers(0, 2), min_size=len(parents), max_size=len(parents))
    tokens, choices = data.draw(small), data.draw(small)
    branches, expected = trees.children(parents), [0]
    while match := [c for c in branches[expected[-1]] if tokens[c] == choices[expected[-1]]]:
        expected.append(match[0])
    assert verify.walk(choices, tokens, parents) == expected


@settings(max_examples=100, deadline=None)
@given(random_parents)
def test_trees(parents: list[int]) -> None:
    def path(row: int) -> set[int]:
        return {row} if row == 0 else {row} | path(parents[row])

    seen = trees.ancestors(parents)
    assert seen.dtype == torch.bool
    assert [set(row.nonzero().flatten().tolist()) for row in seen] == [path(i) for i in range(len(parents))]
    assert trees.depths(parents) == [len(path(i)) - 1 for i in range(len(parents))]
    assert trees.children(parents) == [
        [c for c in range(1, len(parents)) if parents[c] == i] for i in range(len(parents))
    ]


@pytest.mark.parametrize("parents", [[], [0], [-1, 1], [-1, 0, 2], [-1, -1], [-1, 0, -2]])
def test_a_list_that_is_no_tree(parents: list[int]) -> None:
    for use in (trees.ancestors, trees.depths, trees.children):
        with pytest.raises(ValueError, match="row"):
            use(parents)
