"""Our attention against slow and literal ones: who sees whom in chains, trees and windows; soft-caps and sinks against transformers'."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from understudy.ops.trees import ancestors, depths
from understudy.target.attention import PACKED_ROWS, Pass, PassHolder, attention

INF = math.inf
TREE = [-1, 0, 0, 1, 2, 2, 4]  # rows of two branches interleaved


def tree_pass(start: int, parents: list[int]) -> Pass:
    return Pass(start, len(parents), ancestors(parents), torch.tensor(depths(parents)))


def slow_mask(start: int, parents: list[int], window: int | None) -> Tensor:
    """bool [W, start + W], entry by entry: row i sees the cache and its own ancestors, at distances below the window."""
    width = len(parents)
    depth = [0] * width
    line: list[set[int]] = []
    for i, parent in enumerate(parents):
        depth[i] = depth[parent] + 1 if i else 0
        line.append({i} | (line[parent] if i else set()))
    out = torch.zeros(width, start + width, dtype=torch.bool)
    for i, key in itertools.product(range(width), range(start + width)):
        position = key if key < start else start + depth[key - start]
        visible = key < start or key - start in line[i]
        out[i, key] = visible and (window is None or start + depth[i] - position < window)
    return out


def chain_of(width: int) -> list[int]:
    return list(range(-1, width - 1))


def visible(at: Pass, window: int | None, groups: int = 1) -> Tensor:
    """The mask as bool over all keys: what `first_key` leaves out is not seen."""
    mask = at.mask(window, groups, torch.zeros(1))
    assert set(mask.unique().tolist()) <= {0.0, -INF}
    left_out = torch.zeros(mask.shape[0], at.start + at.width - mask.shape[1], dtype=torch.bool)
    assert left_out.shape[1] == at.first_key(window)
    return torch.cat([left_out, mask == 0], dim=1)


# Masks, literally


def test_mask_of_a_chain() -> None:
    want = torch.tensor([
        [0, 0, 0, -INF, -INF],  # row 0, position 2: the two cached keys and itself
        [0, 0, 0, 0, -INF],
        [0, 0, 0, 0, 0],
    ])  # fmt: skip
    assert torch.equal(Pass(2, 3).mask(None, 1, torch.zeros(1)), want)


def test_mask_of_a_chain_in_a_window() -> None:
    # window 3: a query at position t sees keys t - 2, t - 1, t; key 0 and 1 are out of everyone's sight
    want = torch.tensor([
        [0, 0, 0, -INF, -INF],  # position 4 sees 2, 3, 4
        [-INF, 0, 0, 0, -INF],  # position 5 sees 3, 4, 5
        [-INF, -INF, 0, 0, 0],  # position 6 sees 4, 5, 6
    ])  # fmt: skip
    assert Pass(4, 3).first_key(3) == 2
    assert torch.equal(Pass(4, 3).mask(3, 1, torch.zeros(1)), want)


def test_mask_of_a_tree() -> None:
    # rows: 0 root; 1 and 2 its children; 3 child of 1; 4 child of 2
    at = tree_pass(2, [-1, 0, 0, 1, 2])
    want = torch.tensor([
        [0, 0, 0, -INF, -INF, -INF, -INF],  # the root sees the cache
        [0, 0, 0, 0, -INF, -INF, -INF],     # its first child
        [0, 0, 0, -INF, 0, -INF, -INF],     # its second child does not see the first
        [0, 0, 0, 0, -INF, 0, -INF],        # the grandchild under 1
        [0, 0, 0, -INF, 0, -INF, 0],        # the grandchild under 2
    ])  # fmt: skip
    assert torch.equal(at.mask(None, 1, torch.zeros(1)), want)


def test_mask_of_a_tree_in_a_window() -> None:
    # the same tree; window 2 counts depth, not rows: row 4 (position 4) sees itself and its parent, row 2 (position 3)
    at = tree_pass(2, [-1, 0, 0, 1, 2])
    want = torch.tensor([
        [0, 0, -INF, -INF, -INF, -INF],     # position 2 sees key 1 and itself; key 0 is left out for all
        [-INF, 0, 0, -INF, -INF, -INF],     # position 3: the root and itself
        [-INF, 0, -INF, 0, -INF, -INF],     # position 3 too
        [-INF, -INF, 0, -INF, 0, -INF],     # position 4: its parent, row 1, and itself
        [-INF, -INF, -INF, 0, -INF, 0],     # position 4: its parent, row 2, and itself
    ])  # fmt: skip
    assert at.first_key(2) == 1
    assert torch.equal(at.mask(2, 1, torch.zeros(1)), want)


# Masks against the slow builder


@pytest.mark.parametrize("window", [None, 1, 2, 3, 6, 50])
def test_chain_masks(window: int | None) -> None:
    """In an order that goes back and forth: the constants behind the views serve every start."""
    for start, width in itertools.product((900, 0, 1, 5, 2, 6, 40, 1100, 3), (2, 3, 5, 9)):
        want = slow_mask(start, chain_of(width), window)
        for groups in (1, 3):
            assert torch.equal(visible(Pass(start, width), window, groups), want.repeat(groups, 1)), (start, width)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 6, 50])
def test_tree_masks(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    trees = [TREE, chain_of(4), [-1, 0, 0, 0, 0]]
    for width in (1, 2, 6, 12):
        trees.append([-1] + [int(torch.randint(0, i, (1,), generator=generator)) for i in range(1, width)])
    for start, parents in itertools.product((0, 1, 4, 9, 300), trees):
        for groups in (1, 2):
            want = slow_mask(start, parents, window).repeat(groups, 1)
            assert torch.equal(visible(tree_pass(start, parents), window, groups), want), (start, parents)


def test_the_mask_of_a_chain_is_a_view() -> None:
    first, later = (Pass(start, 4).mask(None, 2, torch.zeros(1)) for start in (300, 317))
    assert first.untyped_storage().data_ptr() == later.untyped_storage().data_ptr()


def test_masks_follow_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for at in (Pass(3, 2), tree_pass(3, TREE)):
            assert at.mask(4, 1, torch.zeros(1, dtype=dtype)).dtype == dtype


# The whole attention


def qkv(start: int, width: int, heads: int, kv_heads: int, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(start * 100 + width)
    shape = [(1, heads, width, size), (1, kv_heads, start + width, size), (1, kv_heads, start + width, size)]
    query, key, value = (torch.randn(s, generator=generator) for s in shape)
    return query, key, value


def module_at(at: Pass) -> nn.Module:
    module = nn.Module()
    module.understudy_pass = PassHolder()  # type: ignore[assignment]
    module.understudy_pass.current = at
    return module


def slow_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[1, W, H, d], head by head and row by row."""
    _, heads, width, size = query.shape
    groups = heads // key.shape[1]
    out = torch.empty(1, width, heads, size, dtype=torch.float64)
    for head, row in itertools.product(range(heads), range(width)):
        keys, values = key[0, head // groups].double(), value[0, head // groups].double()
        scores = keys @ query[0, head, row].double() * scale
        out[0, row, head] = scores.masked_fill(~seen[row], -INF).softmax(-1) @ values
    return out


WIDTHS = (1, 2, 5, PACKED_ROWS, PACKED_ROWS + 1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("window", [None, 4])
def test_attention_of_chains(heads: int, kv_heads: int, window: int | None) -> None:
    for start, width in itertools.product((0, 3, 20), WIDTHS):
        at = Pass(start, width)
        query, key, value = qkv(start, width, heads, kv_heads)
        out, _ = attention(module_at(at), query, key, value, None, scaling=0.3, sliding_window=window)
        want = slow_attention(query, key, value, slow_mask(start, chain_of(width), window), 0.3)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5, msg=f"{start} {width}")


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 4)])
@pytest.mark.parametrize("window", [None, 3, 4])
def test_attention_of_trees(heads: int, kv_heads: int, window: int | None) -> None:
    for start, parents in itertools.product((0, 3, 20), ([-1], [-1, 0, 0], TREE)):
        query, key, value = qkv(start, len(parents), heads, kv_heads)
        at = tree_pass(start, parents)
        out, _ = attention(module_at(at), query, key, value, None, scaling=0.3, sliding_window=window)
        want = slow_attention(query, key, value, slow_mask(start, parents, window), 0.3)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5, msg=f"{start} {parents}")


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("parents", [[-1], chain_of(5), TREE], ids=["row", "chain", "tree"])
def test_soft_caps_and_sinks_are_those_of_transformers(parents: list[int], window: int | None) -> None:
    heads, kv_heads = 4, 2
    for start in (0, 3, 20):
        width = len(parents)
        query, key, value = qkv(start, width, heads, kv_heads)
        at = Pass(start, width) if parents == chain_of(width) else tree_pass(start, parents)
        seen = slow_mask(start, parents, window)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        module = module_at(at)
        theirs = SimpleNamespace(
            num_key_value_groups=heads // kv_heads,
            head_dim=8,
            training=False,
            sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]),
        )
        capped, _ = attention(module, query, key, value, None, scaling=0.3, sliding_window=window, softcap=1.5)
        want, _ = gemma2_attention(theirs, query, key, value, mask, scaling=0.3, softcap=1.5)
        torch.testing.assert_close(capped, want, atol=1e-5, rtol=1e-5)
        sunk, _ = attention(module, query, key, value, None, scaling=0.3, sliding_window=window, s_aux=theirs.sinks)
        want, _ = gpt_oss_attention(theirs, query, key, value, mask, scaling=0.3)
        torch.testing.assert_close(sunk, want, atol=1e-5, rtol=1e-5)
        both, _ = attention(
            module,
            query,
            key,
            value,
            None,
            scaling=0.3,
            sliding_window=window,
            softcap=1e6,
            s_aux=torch.full((4,), -1e9),
        )
        plain, _ = attention(module, query, key, value, None, scaling=0.3, sliding_window=window)
        torch.testing.assert_close(both, plain, atol=1e-5, rtol=1e-5)


def test_half_precision_of_a_single_row() -> None:
    """One half-precision row takes a detour on a CPU."""
    query, key, value = (x.bfloat16() for x in qkv(20, 1, 4, 4))
    out, _ = attention(module_at(Pass(20, 1)), query, key, value, None)
    want = slow_attention(query, key, value, torch.ones(1, 21, dtype=torch.bool), 8**-0.5)
    assert out.shape == want.shape and out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, atol=3e-2, rtol=3e-2)
