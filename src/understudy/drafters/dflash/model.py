"""The DFlash draft model (z-lab): a few decoder layers that fill in a whole block in one pass.

    c_t = hidden_norm(fc(taps_t))                                    the target's states, fused; the context of all layers
    block = [embedding(x_A), embedding(mask), ..., embedding(mask)]  x_A: the last committed token
    out = norm(layers(block | c_0 .. c_{A-1}));  head(out_k) predicts x_{A+k}, k = 1, 2, ...

Embedding and head are the target's own and frozen, unless the checkpoint has others. With `sample_from_anchor` (DSpark) row 0 predicts
too, and row k drafts x_{A+1+k}. Modules and weights are named as in public checkpoints. Computes in the dtype of `fc`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import rotate_half
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from understudy.drafters.dflash.attention import BlockAttention, Group, grouped
from understudy.drafters.dflash.heads import ConfidenceHead, MarkovHead
from understudy.drafters.dflash.layout import causal, drafts_of, taps_of, windows
from understudy.drafting.blocks import DraftRotary, Norm, Rotary
from understudy.drafting.objective import Batch
from understudy.target.cache import KVCache


class DraftLayer(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.self_attn = BlockAttention(config, index, windows(config)[index], causal(config)[index])
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)

    def decode(self, x: Tensor, rotary: Rotary, cache: KVCache) -> Tensor:
        """One block [1, S, H] over the cache, which its rows join: [1, S, H]."""
        return self._leave(x, self.self_attn.block(self.input_layernorm(x), rotary, cache))

    def unrolled(self, x: Tensor, rotary: Rotary, context: Tensor, past: Rotary, groups: list[Group]) -> Tensor:
        """All blocks [B, N S, H] over context states [B, T, H] with rotary factors `past`."""
        keys = self.self_attn.keys(context, past)
        return self._leave(x, self.self_attn.blocks(self.input_layernorm(x), rotary, keys, groups))

    def _leave(self, residual: Tensor, attended: Tensor) -> Tensor:
        x = residual + attended
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DFlashModel(nn.Module):
    """The drafter's weights. `embedding`, `head` [V, H]: the target's.

    `own_embedding`: it has embeddings of its own; `own_mask`: of its mask token only.
    """

    def __init__(
        self, config: Any, embedding: Tensor, head: Tensor, own_embedding: bool = False, own_mask: bool = False
    ) -> None:
        super().__init__()
        self.config, self.taps, self.drafts = config, taps_of(config), drafts_of(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(len(self.taps) * config.target_hidden_size, width, bias=False)
        self.hidden_norm = Norm(width, eps)
        self.layers = nn.ModuleList([DraftLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Norm(width, eps)
        self.embed_tokens = nn.Embedding(config.vocab_size, width) if own_embedding else None
        self.mask_embedding = nn.Parameter(torch.zeros(width)) if own_mask else None
        rank = config.markov_rank
        self.markov_head = MarkovHead(config.vocab_size, rank) if rank else None
        with_markov = rank if config.confidence_head_with_markov else 0
        self.confidence_head = ConfidenceHead(width, with_markov) if config.enable_confidence_head else None
        self._shared = [embedding, head]  # in a list: they are the target's
        self.rotary = DraftRotary(config)
        self._fused: tuple[list[tuple[Tensor, int, int]], Tensor, Tensor | None, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def attentions(self) -> list[BlockAttention]:
        return [cast(DraftLayer, layer).self_attn for layer in self.layers]

    @property
    def first(self) -> int:
        """The block's first row that drafts."""
        return 0 if self.config.sample_from_anchor else 1

    def fuse(self, taps: Tensor) -> Tensor:
        """Taps [.., n D] -> context states [.., H]."""
        fused: Tensor = self.hidden_norm(self.fc(taps.to(self.dtype)))
        return fused

    def embed(self, tokens: Tensor, rows: int) -> Tensor:
        """Last committed tokens [..] int64 -> blocks [.., S, H]: their embedding, then the mask token's."""
        table = self._shared[0] if self.embed_tokens is None else self.embed_tokens.weight
        first = F.embedding(tokens, table).to(self.dtype)
        mask = table[self.config.mask_token_id] if self.mask_embedding is None else self.mask_embedding
        masks = mask.to(self.dtype).expand(*first.shape[:-1], rows - 1, -1)
        return torch.cat([first[..., None, :], masks], dim=-2)

    def logits(self, out: Tensor) -> Tensor:
        """Normed states [.., H] -> logits [.., V], without a Markov head's correction."""
        head = self._shared[1]  # under a device map it is elsewhere
        dtype = head.dtype if torch.is_autocast_enabled(out.device.type) else out.dtype
        return F.linear(out.to(head.device), head.to(dtype)).to(out.device)

    # While decoding: one sequence

    def _fused_weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Key and value projections of all layers as one matrix, its bias, and the norms of keys [n, 1, d]; made again when they change."""
        attentions = self.attentions
        parts = [p for a in attentions for m in (a.k_proj, a.v_proj, a.k_norm) for p in m.parameters()]
        # the parameters themselves are kept: an address alone may be another one's by now
        key: list[tuple[Tensor, int, int]] = [(p, p.data_ptr(), -1 if p.is_inference() else p._version) for p in parts]
        old = None if self._fused is None else self._fused[0]
        if old is None or not all(a is b and seen == now for (a, *seen), (b, *now) in zip(old, key, strict=True)):
            weight = torch.cat([p for a in attentions for p in (a.k_proj.weight, a.v_proj.weight)])
            bias: Tensor | None = None
            if attentions[0].k_proj.bias is not None:
                bias = torch.cat([p for a in attentions for p in (a.k_proj.bias, a.v_proj.bias)])
            self._fused = (key, weight, bias, torch.stack([a.k_norm.weight for a in attentions])[:, None])
        assert self._fused is not None
        return self._fused[1:]

    def write(self, taps: Tensor, start: int, cache: KVCache) -> None:
        """Put context rows of taps [n, n D] into the cache of every layer, from row `start` on: one matrix product for all layers."""
        weight, bias, norms = self._fused_weights()
        rows, attention = len(taps), self.attentions[0]
        flat = F.linear(self.fuse(taps), weight, bias)
        both = flat.view(rows, len(self.layers), 2, attention.kv_heads, attention.size)
        keys = F.rms_norm(both[:, :, 0], (attention.size,), None, attention.k_norm.eps) * norms
        cos, sin = (part[0, :, None, None] for part in self.rotary.rows(start, start + rows, flat))
        keys = keys * cos + rotate_half(keys) * sin
        cache.reserve(start + rows)
        cache.start = start
        for i in range(len(self.layers)):
            cache.update(keys[:, i].transpose(0, 1)[None], both[:, i, 1].transpose(0, 1)[None], i)

    def block(self, token: Tensor, rows: int, start: int, cache: KVCache) -> Tensor:
        """States [S, H] of the block that begins with `token` [1] at position `start`, behind as many context rows; after the norm.

        Its rows go into the cache behind the context, where the next context rows overwrite them.
        """
        return self.fill(self.embed(token, rows), start, cache)

    def fill(self, x: Tensor, start: int, cache: KVCache) -> Tensor:
        """The same for the embeddings [1, S, H] of a block."""
        rows = x.shape[1]
        cache.reserve(start + rows)
        cache.start = start
        rotary = self.rotary.rows(start, start + rows, self.fc.weight)
        for layer in self.layers:
            x = cast(DraftLayer, layer).decode(x, rotary, cache)
        out: Tensor = self.norm(x)[0]
        return out

    # In training: packed rows

    def blocks(self, taps: Tensor, batch: Batch, anchors: Tensor, rows: int) -> Tensor:
        """States [B, N, S, H] of the blocks that begin at the tokens `anchors` [B, N] (indices into rows of the batch), after the norm.

        Taps [B, T, n D]; `rows` = S. A block sees the tokens before its anchor in the anchor's document, and its own rows: nothing else.
        """
        context, device = self.fuse(taps), taps.device
        x = self.embed(batch.ids.gather(1, anchors), rows).flatten(1, 2)
        positions = batch.positions.gather(1, anchors)[..., None] + torch.arange(rows, device=device)
        rotary = self.rotary(context, positions.flatten(1))
        past = self.rotary(context, batch.positions)
        distance = anchors[:, :, None] - torch.arange(batch.ids.shape[1], device=device)
        same = batch.documents.gather(1, anchors)[:, :, None] == batch.documents[:, None]
        groups = grouped(anchors, (distance * same).clamp_min(0), rows)
        for layer in self.layers:
            x = cast(DraftLayer, layer).unrolled(x, rotary, context, past, groups)
        out: Tensor = self.norm(x).unflatten(1, anchors.shape[1:] + (rows,))
        return out
