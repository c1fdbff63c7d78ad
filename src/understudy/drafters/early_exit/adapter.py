"""Kangaroo's adapter (Liu et al., 2024): one attention block without an MLP, and a norm, between the exit layer and the frozen head.

    y = x + Attn(RMSNorm(x));  the head reads RMSNorm(y)

Modules and weights are named as in the released adapters (`layers.0.self_attn.q_proj.weight`, `layers.0.input_layernorm.weight`,
`norm.weight`). Two deviations: attention may have grouped heads and a head size of its own, as the target's has, and a new adapter
begins as the identity (its output projection is zero, its norm the target's own), so training starts where the bare exit stands; with
targets whose final norm is no RMS norm (Cohere) it starts near there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from understudy.target.attention import Pass, PassHolder, attention
from understudy.target.cache import KVCache
from understudy.target.target import Target


def new_config(target: Target, exit_layer: int) -> LlamaConfig:
    """The configuration of an adapter with the target's width and heads. `exit_layer` is a key of ours, which others ignore."""
    own = target.config
    heads = own.num_attention_heads
    rope = copy.deepcopy(getattr(own, "rope_parameters", None) or {})
    theta = rope.get("rope_theta") or next((v["rope_theta"] for v in rope.values() if isinstance(v, dict)), 1e4)
    return LlamaConfig(
        hidden_size=target.hidden_size,
        intermediate_size=getattr(own, "intermediate_size", 4 * target.hidden_size),
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=getattr(own, "num_key_value_heads", None) or heads,
        head_dim=getattr(own, "head_dim", None) or target.hidden_size // heads,
        vocab_size=target.vocab_size,
        max_position_embeddings=target.context,
        rms_norm_eps=getattr(own, "rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        exit_layer=exit_layer,
    )


class Attention(nn.Module):
    """Causal self-attention with rotary positions, over a cache or over whole packed rows."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, self.size = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(width, self.heads * self.size, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(self.heads * self.size, width, bias=False)
        self.understudy_pass = PassHolder()

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """[B, T, heads * d] -> [B, heads, T, d]."""
        return x.unflatten(-1, (heads, self.size)).transpose(1, 2)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, d], keys and values [B, Hkv, T, d] of [B, T, D]."""
        q, k = self._split(self.q_proj(x), self.heads), self._split(self.k_proj(x), self.kv_heads)
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        return q, k, self._split(self.v_proj(x), self.kv_heads)

    def cached(self, x: Tensor, rotary: tuple[Tensor, Tensor], at: Pass, cache: KVCache) -> Tensor:
        """[1, W, D] at the rows of `at`, over the cache, which they join."""
        q, k, v = self.project(x, rotary)
        k, v = cache.update(k, v, 0)
        self.understudy_pass.current = at
        try:
            out, _ = attention(self, q, k, v, None)
        finally:
            self.understudy_pass.current = None
        return self.o_proj(out.flatten(2))

    def whole(self, x: Tensor, rotary: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        """[B, T, D] with the rows in `visible` [B, 1, T, T] (row sees column)."""
        q, k, v = self.project(x, rotary)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=self.heads != self.kv_heads)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + Attn(RMSNorm(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Adapter(nn.Module):
    """From states of the exit layer to what the frozen head reads. Computes in the dtype of its own weights."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([Block(config)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = LlamaRotaryEmbedding(config)

    @property
    def block(self) -> Any:
        return self.layers[0]

    @staticmethod
    def identity(target: Target, exit_layer: int) -> Adapter:
        """An adapter that changes nothing yet: the head reads what it reads at the bare exit, if the final norm is an RMS norm."""
        adapter = Adapter(new_config(target, exit_layer))
        for linear in (m for m in adapter.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(adapter.block.self_attn.o_proj.weight)
        # alternating signs have mean 0 and mean square 1, so RMS norms and layer norms alike return them times their weight
        signs = torch.ones(1, target.hidden_size, device=target.device, dtype=target.dtype)
        signs[:, 1::2] = -1
        with torch.no_grad():
            adapter.norm.weight.copy_((target.norm(signs) * signs)[0].float())
        return adapter.to(target.device)

    def cache(self) -> KVCache:
        return KVCache(1)

    def _rotary(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        out: tuple[Tensor, Tensor] = self.rotary(x, positions)
        return out

    def _placed(self, states: Tensor, start: int, cache: KVCache) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Make room for [n, D] states from row `start` on: (states [1, n, D] in our dtype, their rotary factors)."""
        x = states[None].to(self.norm.weight.dtype)
        positions = torch.arange(start, start + x.shape[1], device=x.device)[None]
        cache.reserve(start + x.shape[1])
        cache.start = start
        return x, self._rotary(x, positions)

    def write(self, states: Tensor, start: int, cache: KVCache) -> None:
        """Put [n, D] exit states into the cache at row `start`, and nothing more: nobody asks what follows them."""
        x, rotary = self._placed(states, start, cache)
        _, k, v = self.block.self_attn.project(self.block.input_layernorm(x), rotary)
        cache.update(k, v, 0)

    def read(self, states: Tensor, start: int, cache: KVCache) -> Tensor:
        """Exit states [n, D] of rows from `start` on -> what the head reads, [n, D]. They join the cache."""
        x, rotary = self._placed(states, start, cache)
        at = Pass(start, x.shape[1])
        y = x + self.block.self_attn.cached(self.block.input_layernorm(x), rotary, at, cache)
        out: Tensor = self.norm(y)[0]
        return out

    def forward(self, states: Tensor, positions: Tensor, documents: Tensor) -> Tensor:
        """Packed rows [B, T, D] with positions [B, T] and documents [B, T] (-1 = padding) -> what the head reads, [B, T, D]."""
        x = states.to(self.norm.weight.dtype)
        length = x.shape[1]
        visible = documents[:, :, None] == documents[:, None, :]  # padding sees padding, so that no row sees nothing
        visible = (visible & torch.ones(length, length, dtype=torch.bool, device=x.device).tril())[:, None]
        y = x + self.block.self_attn.whole(self.block.input_layernorm(x), self._rotary(x, positions), visible)
        out: Tensor = self.norm(y)
        return out
