"""Self-attention of a DFlash layer: the rows of a block look at the context and at each other.

Keys and values of the context are made of the target's fused states `c_t`, those of the block of its own rows:

    K, V = [W_k c_0 .. c_{A-1}, W_k x_0 .. x_{S-1}],   queries x_0 .. x_{S-1} at positions A .. A + S - 1

A full layer sees all of that: rows of a block see each other both ways. A causal one sees up to itself, and with a window only so
far back.

Two ways through it. While decoding: one block over a cache whose context rows were written before. In training: N blocks at once over
packed rows, each with a context of its own; neighbours share one masked call over the stretch of the row that they see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from understudy.drafting.blocks import Norm, Rotary
from understudy.target.attention import Pass, PassHolder, attention
from understudy.target.cache import KVCache

# Rows of blocks in one call of attention: with more there are fewer calls, which look at more that they do not see
TOGETHER = 128
# Numbers that the backward pass may keep of one layer's keys; if they are more, it makes them again
MOST = 2**27


@dataclass(frozen=True, slots=True)
class Group:
    """C neighbouring blocks of every row, and the stretch of context outside which none of them sees anything."""

    rows: slice  # of the N S rows of blocks
    context: slice  # of the T tokens
    distance: Tensor  # [B, C, t] int64: how far a token of the stretch lies before the anchor, 0 = not visible
    size: int  # S
    masks: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """Keys: of the stretch of context, and its own."""
        return self.context.stop - self.context.start + self.rows.stop - self.rows.start

    def mask(self, window: int | None, causal: bool, repeat: int, dtype: torch.dtype) -> Tensor:
        """What to add to scores [B, 1, repeat C S, t + C S]: 0 or -inf; made once for all layers of a kind."""
        key = (window, causal, repeat, dtype)
        if key not in self.masks:
            self.masks[key] = self._mask(window, causal).repeat(1, 1, repeat, 1).to(dtype)
        return self.masks[key]

    def _mask(self, window: int | None, causal: bool) -> Tensor:
        batch, count, _tokens = self.distance.shape
        step = torch.arange(self.size, device=self.distance.device)
        far = (self.distance > 0)[:, :, None].expand(-1, -1, self.size, -1)
        near = torch.ones(self.size, self.size, dtype=torch.bool, device=step.device)
        if causal:
            near = near.tril()
        if window is not None:
            far = far & (self.distance[:, :, None] + step[:, None] < window)
            near = near & (step[:, None] - step < window)
        same = torch.eye(count, dtype=torch.bool, device=step.device)
        own = torch.kron(same, near).expand(batch, -1, -1)
        visible = torch.cat([far.flatten(1, 2), own], dim=-1)[:, None]
        return torch.zeros(visible.shape, device=step.device).masked_fill_(~visible, float("-inf"))


def grouped(anchors: Tensor, distance: Tensor, size: int) -> list[Group]:
    """Groups of blocks of `size` rows at `anchors` [B, N]; those of neighbours are narrow, so anchors should be in order.

    `distance` [B, N, T]: how far token t lies before the anchor, 0 = not visible; what is visible ends at the anchor.
    """
    count, most = distance.shape[1], max(1, TOGETHER // size)
    begin = anchors - (distance > 0).sum(-1)
    anchored = zip(begin.split(most, 1), anchors.split(most, 1), strict=True)
    ends = torch.stack([torch.stack([b.min(), a.max()]) for b, a in anchored]).tolist()  # one wait for the device
    groups = []
    for i, (start, stop) in enumerate(ends):
        blocks = slice(i * most, min((i + 1) * most, count))
        rows = slice(blocks.start * size, blocks.stop * size)
        groups.append(Group(rows, slice(start, stop), distance[:, blocks, start:stop], size))
    return groups


class BlockAttention(nn.Module):
    """Grouped-query attention with norms on queries and keys (Qwen3), for layer `index` of a drafter."""

    def __init__(self, config: Any, index: int, window: int | None, causal: bool) -> None:
        super().__init__()
        assert causal or window is None, "engines differ in windows that look both ways: files with them are refused"
        width, bias, self.size = config.hidden_size, config.attention_bias, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, self.heads * self.size, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.size, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.size, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=bias)
        self.q_norm = Norm(self.size, config.rms_norm_eps)
        self.k_norm = Norm(self.size, config.rms_norm_eps)
        self.layer_idx, self.window, self.causal = index, window, causal
        self.understudy_pass = PassHolder()

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """[B, T, heads * d] -> [B, heads, T, d]."""
        return x.unflatten(-1, (heads, self.size)).transpose(1, 2)

    def keys(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hkv, T, d] of context states or rows [B, T, H]."""
        k = self.k_norm(self._heads(self.k_proj(x), self.kv_heads))
        k, _ = apply_rotary_pos_emb(k, k[:, :0], *rotary)
        return k, self._heads(self.v_proj(x), self.kv_heads)

    def queries(self, x: Tensor, rotary: Rotary) -> Tensor:
        """[B, T, H] -> [B, H, T, d]."""
        q = self.q_norm(self._heads(self.q_proj(x), self.heads))
        q, _ = apply_rotary_pos_emb(q, q[:, :0], *rotary)
        return q

    # While decoding

    def block(self, x: Tensor, rotary: Rotary, cache: KVCache) -> Tensor:
        """[1, S, H] -> [1, S, H]: the block's rows go into the cache behind the context, and look back."""
        q = self.queries(x, rotary)
        k, v = cache.update(*self.keys(x, rotary), self.layer_idx)
        rows = x.shape[1]
        if self.causal:
            self.understudy_pass.current = Pass(k.shape[2] - rows, rows)
            try:
                out, _ = attention(self, q, k, v, None, sliding_window=self.window)
            finally:
                self.understudy_pass.current = None
            return self.o_proj(out.flatten(2))
        packed = q.reshape(1, self.kv_heads, -1, self.size)  # everything is seen: a group's heads are more rows
        out = F.scaled_dot_product_attention(packed, k, v)
        return self.o_proj(out.reshape(1, self.heads, rows, self.size).transpose(1, 2).flatten(2))

    # In training

    def blocks(self, x: Tensor, rotary: Rotary, context: tuple[Tensor, Tensor], groups: list[Group]) -> Tensor:
        """[B, N S, H] -> [B, N S, H]: N blocks of S rows, each over its own context; `context` = keys and values [B, Hkv, T, d]."""
        q, (k, v) = self.queries(x, rotary), self.keys(x, rotary)
        kept = x.shape[0] * self.kv_heads * self.size * sum(group.seen for group in groups)
        parts, again = [], kept > MOST
        for group in groups:
            own = [part[:, :, group.rows] for part in (q, k, v)]
            mask = group.mask(self.window, self.causal, self.heads // self.kv_heads, q.dtype)
            given = (*own, *(part[:, :, group.context] for part in context), mask)
            parts.append(checkpoint(self._together, *given, use_reentrant=False) if again else self._together(*given))
        return self.o_proj(torch.cat(parts, dim=2).transpose(1, 2).flatten(2))

    def _together(self, q: Tensor, own_k: Tensor, own_v: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q [B, H, R, d], own [B, Hkv, R, d], k and v [B, Hkv, t, d], mask [B, 1, G R, t + R] -> [B, H, R, d]."""
        packed = q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3)
        keys, values = torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2)
        out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask)
        return out.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
