"""Self-attention of a DFlash layer: the rows of a block look at the context and at each other.

Keys and values of the context are made of the target's fused states `c_t`, those of the block of its own rows:

    K, V = [W_k c_0 .. c_{A-1}, W_k x_0 .. x_{S-1}],   queries x_0 .. x_{S-1} at positions A .. A + S - 1

A full layer sees all of that: rows of a block see each other both ways. A causal one sees up to itself, and with a window only so
far back.

Two ways through it. While decoding: one block over a cache whose context rows were written before. In training: N blocks at once over
packed rows, each with a context of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from understudy.drafting.blocks import Norm, Rotary
from understudy.target.attention import Pass, PassHolder, attention
from understudy.target.cache import KVCache

WHOLE = 2**26  # scores that may exist at once; beyond, blocks go in chunks that the backward pass computes again


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

    def blocks(self, x: Tensor, rotary: Rotary, context: tuple[Tensor, Tensor], distance: Tensor) -> Tensor:
        """[B, N S, H] -> [B, N S, H]: N blocks of S rows, each over its own context.

        `context` = keys and values [B, Hkv, T, d]; `distance` [B, N, T] int64: how far token t lies before the anchor, 0 = not visible.
        """
        count = distance.shape[1]
        q = self.queries(x, rotary).unflatten(2, (count, -1))
        k, v = (part.unflatten(2, (count, -1)) for part in self.keys(x, rotary))
        most = max(1, WHOLE // (x.shape[0] * self.heads * q.shape[3] * distance.shape[2]))
        if most >= count:
            out = self._merged(q, k, v, distance, *context)
        else:
            parts = zip(q.split(most, 2), k.split(most, 2), v.split(most, 2), distance.split(most, 1), strict=True)
            out = torch.cat([checkpoint(self._merged, *part, *context, use_reentrant=False) for part in parts], dim=2)
        return self.o_proj(out.flatten(2, 3).transpose(1, 2).flatten(2))

    def _merged(self, q: Tensor, own_k: Tensor, own_v: Tensor, distance: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One softmax over context and block: q [B, H, C, S, d], own [B, Hkv, C, S, d], k and v [B, Hkv, T, d] -> [B, H, C, S, d]."""
        rows = q.shape[3]
        queries = q.unflatten(1, (self.kv_heads, -1)) * self.size**-0.5  # [B, Hkv, G, C, S, d]
        visible = (distance > 0)[:, :, None]  # [B, C, 1 or S, T]
        step = torch.arange(rows, device=q.device)
        if self.window is not None:
            visible = visible & (distance[:, :, None] + step[:, None] < self.window)
        far = torch.matmul(queries.flatten(2, 4), k.transpose(-1, -2)).view(*queries.shape[:-1], -1)
        far = far.masked_fill(~visible[:, None, None], float("-inf"))
        near = torch.matmul(queries, own_k[:, :, None].transpose(-1, -2))  # [B, Hkv, G, C, S, S]
        if self.causal:
            ahead = step[None, :] > step[:, None]
            if self.window is not None:
                ahead = ahead | (step[:, None] - step[None, :] >= self.window)
            near = near.masked_fill(ahead, float("-inf"))
        weights = torch.cat([far, near], dim=-1).softmax(-1, dtype=torch.float32).to(q.dtype)
        far, near = weights.split([k.shape[2], rows], dim=-1)
        out = torch.matmul(far.flatten(2, 4), v).view_as(queries) + torch.matmul(near, own_v[:, :, None])
        return out.flatten(1, 2)
