"""Self-attention of the draft layer, whose input is the token's embedding beside the state (width 2 H).

Two ways through it. While decoding: few rows over a cache. In training: whole packed rows, unrolled K times (the training-time test
of EAGLE-3, section 3.2). At unrolled step k the query of slot t stands at position t + k and sees

    the keys of step 0 at slots j <= t of its document      what decoding has in the cache: true tokens, the target's states
    the keys of steps 1 .. k at slot t itself               the drafts of this very chain

so the second part is a diagonal: one key per step and slot, and no [T, k T] mask is needed for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from understudy.drafting.blocks import Rotary
from understudy.target.attention import Pass, PassHolder, attention
from understudy.target.cache import KVCache

WHOLE = (
    2**26
)  # scores of a step that may exist at once; beyond, queries go in chunks that the backward pass computes again


class DraftAttention(nn.Module):
    """Grouped-query attention with rotary positions; queries, keys and values are read from [.., 2 H]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, bias, self.size = config.hidden_size, config.attention_bias, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(2 * width, self.heads * self.size, bias=bias)
        self.k_proj = nn.Linear(2 * width, self.kv_heads * self.size, bias=bias)
        self.v_proj = nn.Linear(2 * width, self.kv_heads * self.size, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=bias)
        self.understudy_pass = PassHolder()

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """[B, T, heads * d] -> [B, heads, T, d]."""
        return x.unflatten(-1, (heads, self.size)).transpose(1, 2)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, d], keys and values [B, Hkv, T, d] of [B, T, 2 H]."""
        q, k = self._split(self.q_proj(x), self.heads), self._split(self.k_proj(x), self.kv_heads)
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        return q, k, self._split(self.v_proj(x), self.kv_heads)

    # While decoding

    def write(self, x: Tensor, rotary: Rotary, cache: KVCache) -> None:
        """Put keys and values of [1, n, 2 H] into the cache; nobody asks what follows these rows."""
        _, k, v = self.project(x, rotary)
        cache.update(k, v, 0)

    def last(self, x: Tensor, rotary: Rotary, cache: KVCache) -> Tensor:
        """[1, n, 2 H] -> [1, 1, H]: all rows join the cache, the last one looks back."""
        q, k, v = self.project(x, rotary)
        k, v = cache.update(k, v, 0)
        self.understudy_pass.current = Pass(k.shape[2] - 1, 1)
        try:
            out, _ = attention(self, q[:, :, -1:], k, v, None)
        finally:
            self.understudy_pass.current = None
        return self.o_proj(out.flatten(2))

    def branches(self, x: Tensor, rotary: Rotary, cache: KVCache, seen: Tensor) -> Tensor:
        """[1, n, 2 H] -> [1, n, H]: rows of a tree. The mask `seen` [n, k] (0 or -inf) is for the last k keys; all see those before."""
        q, k, v = self.project(x, rotary)
        k, v = cache.update(k, v, 0)
        groups = self.heads // self.kv_heads
        packed = q.reshape(1, self.kv_heads, groups * x.shape[1], self.size)
        mask = F.pad(seen.repeat(groups, 1), (k.shape[2] - seen.shape[1], 0))
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask)
        return self.o_proj(out.reshape(1, self.heads, x.shape[1], self.size).transpose(1, 2).flatten(2))

    # In training

    def unrolled(
        self, x: Tensor, rotary: Rotary, visible: Tensor, past: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step k: [B, T, 2 H] -> ([B, T, H], its keys, its values [B, Hkv, T, d]).

        `past` = keys and values of the k steps before, `visible` [B, 1, T, T]: row sees column.
        """
        q, k, v = self.project(x, rotary)
        if not past:
            # expanded: of CUDA's kernels, the one that takes a mask in every dtype wants a key head per query head, and without it
            # all T^2 scores would be kept
            keys, values = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
            return self.o_proj(out.transpose(1, 2).flatten(2)), k, v
        prefix, *chain = past
        own_k, own_v = (torch.stack(parts, dim=3) for parts in zip(*chain, (k, v), strict=True))  # [B, Hkv, T, k, d]
        rows = x.shape[1]
        most = max(1, WHOLE // (x.shape[0] * self.heads * rows))
        if most >= rows:
            out = self._merged(q, visible, own_k, own_v, *prefix)
        else:
            parts = zip(
                q.split(most, 2), visible.split(most, 2), own_k.split(most, 2), own_v.split(most, 2), strict=True
            )
            out = torch.cat([checkpoint(self._merged, *part, *prefix, use_reentrant=False) for part in parts], dim=2)
        return self.o_proj(out.transpose(1, 2).flatten(2)), k, v

    def _merged(self, q: Tensor, visible: Tensor, own_k: Tensor, own_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One softmax over both parts: q [B, H, C, d], visible [B, 1, C, T], own [B, Hkv, C, k, d], k and v [B, Hkv, T, d]."""
        queries = q.unflatten(1, (self.kv_heads, -1)) * self.size**-0.5  # [B, Hkv, G, C, d]
        far = torch.matmul(queries, k[:, :, None].transpose(-1, -2))
        far = far.masked_fill(~visible[:, :, None], float("-inf"))
        near = (queries[..., None, :] * own_k[:, :, None]).sum(-1)  # [B, Hkv, G, C, k]
        weights = torch.cat([far, near], dim=-1).softmax(-1, dtype=torch.float32).to(q.dtype)
        far, near = weights.split([k.shape[2], own_k.shape[3]], dim=-1)
        out = torch.matmul(far, v[:, :, None]) + (near[..., None] * own_v[:, :, None]).sum(-2)
        return out.flatten(1, 2)
