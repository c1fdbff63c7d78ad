"""The EAGLE-3 draft model (Li et al., 2025): fused taps of the target, one decoder layer on (embedding, state), a norm, a head.

    state_t = fc(taps_t);   out_t = layer(embedding(x_{t+1}), state_t);   head(norm(out_t)) predicts x_{t+2}

and for the draft after that the layer reads (embedding(x_{t+2}), out_t). Modules and weights are named as in public checkpoints
(`fc`, `midlayer.self_attn.q_proj`, `norm`, `lm_head`). Embeddings are the target's own and frozen, unless the checkpoint has others.
Computes in the dtype of `fc`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaMLP

from understudy.drafters.eagle3.attention import DraftAttention
from understudy.drafters.eagle3.layout import taps_of
from understudy.drafting.blocks import DraftRotary, Norm, Rotary
from understudy.drafting.objective import Batch
from understudy.target.cache import KVCache


class DraftLayer(nn.Module):
    """A decoder layer whose attention reads (embedding, state) and whose residual stream is the state."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = DraftAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = Norm(width, eps)
        self.hidden_norm = Norm(width, eps)
        self.post_attention_layernorm = Norm(width, eps)
        self.normed_residual: bool = config.norm_before_residual

    def enter(self, embeddings: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """[.., H], [.., H] -> (what attention reads [.., 2 H], the residual stream [.., H])."""
        normed = self.hidden_norm(states)
        return torch.cat([self.input_layernorm(embeddings), normed], -1), normed if self.normed_residual else states

    def leave(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer: [.., H]."""
        x = residual + attended
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Eagle3Model(nn.Module):
    """The drafter's weights. `ids` [V_d] int64, the tokens it can say, or None = all; `embedding` [V, H], the target's."""

    d2t: Tensor | None
    t2d: Tensor | None

    def __init__(self, config: Any, embedding: Tensor, own_embedding: bool = False) -> None:
        super().__init__()
        self.config, self.taps = config, taps_of(config)
        width, source, eps = config.hidden_size, config.target_hidden_size, config.rms_norm_eps
        many = len(self.taps)
        self.fc = nn.Linear(many * source, width, bias=config.bias)
        self.fc_norm = nn.ModuleList([Norm(source, eps) for _ in self.taps]) if config.fc_norm else None
        self.input_norm = Norm(many * source, eps) if config.norm_before_fc else None
        self.midlayer = DraftLayer(config)
        self.norm = Norm(width, eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        reduced = config.draft_vocab_size != config.vocab_size
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64) if reduced else None)
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool) if reduced else None)
        self.embed_tokens = nn.Embedding(config.vocab_size, width) if own_embedding else None
        self._shared = [embedding]  # in a list: it is the target's
        self.rotary = DraftRotary(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def ids(self) -> Tensor | None:
        """[V_d] int64: the token of every column of the head; None = the target's own vocabulary."""
        if self.d2t is None:
            return None
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """[..] int64 -> [.., H], as stored: what some families multiply embeddings with on entry is not part of it."""
        weight = self._shared[0] if self.embed_tokens is None else self.embed_tokens.weight
        return F.embedding(tokens, weight).to(self.dtype)

    def fuse(self, taps: Tensor) -> Tensor:
        """Taps [.., n D] -> states [.., H]."""
        taps = taps.to(self.dtype)
        if self.fc_norm is not None:
            parts = taps.split(self.config.target_hidden_size, -1)
            taps = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        if self.input_norm is not None:
            taps = self.input_norm(taps)
        out: Tensor = self.fc(taps)
        return out

    def feedback(self, out: Tensor) -> Tensor:
        """What the next draft's layer reads of this one's output [.., H]."""
        fed: Tensor = self.norm(out) if self.config.norm_output else out
        return fed

    def logits(self, out: Tensor) -> Tensor:
        """[.., H] -> [.., V_d]."""
        logits: Tensor = self.lm_head(self.norm(out).to(self.lm_head.weight.dtype))
        return logits

    # While decoding: rows of one sequence

    def rotations(self, start: int, stop: int) -> Rotary:
        """Rotary factors [1, n, d] of positions start .. stop - 1."""
        return self.rotary.rows(start, stop, self.fc.weight)

    def write(self, tokens: Tensor, states: Tensor, start: int, cache: KVCache) -> None:
        """Put rows from `start` on into the cache: tokens [n], the states before them [n, H]."""
        x, _, rotary = self._enter(tokens, states, start, cache)
        self.midlayer.self_attn.write(x, rotary, cache)

    def last(self, tokens: Tensor, states: Tensor, start: int, cache: KVCache) -> Tensor:
        """The same, and what the layer puts out at the last of them: [1, H]."""
        x, residual, rotary = self._enter(tokens, states, start, cache)
        attended = self.midlayer.self_attn.last(x, rotary, cache)
        return self.midlayer.leave(residual[:, -1:], attended)[0]

    def branches(
        self, tokens: Tensor, states: Tensor, start: int, position: int, cache: KVCache, seen: Tensor
    ) -> Tensor:
        """Nodes of one depth of a tree, tokens [n] after states [n, H], all at `position`, in cache rows from `start` on: [n, H].

        They see all rows of the text, and of the last k rows, n of them their own, what the mask `seen` [n, k] (0 or -inf) leaves.
        """
        cache.reserve(start + len(tokens))
        cache.start = start
        x, residual = self.midlayer.enter(self.embed(tokens)[None], states[None])
        attended = self.midlayer.self_attn.branches(x, self.rotations(position, position + 1), cache, seen)
        return self.midlayer.leave(residual, attended)[0]

    def _enter(self, tokens: Tensor, states: Tensor, start: int, cache: KVCache) -> tuple[Tensor, Tensor, Rotary]:
        stop = start + len(tokens)
        cache.reserve(stop)
        cache.start = start
        x, residual = self.midlayer.enter(self.embed(tokens)[None], states[None])
        return x, residual, self.rotations(start, stop)

    # In training: packed rows

    def unroll(self, taps: Tensor, batch: Batch, steps: int, checkpointed: bool = False) -> list[Tensor]:
        """The layer's output [B, T, H] at each of `steps` unrolled steps: at step k, slot t drafts x_{t+2+k}.

        Taps [B, T, n D]. Tokens are the true ones at every step (teacher forcing). Beyond a document's end slots hold nothing sensible.
        """
        length = batch.ids.shape[1]
        visible = (
            batch.documents[:, :, None] == batch.documents[:, None, :]
        )  # padding sees padding: no row sees nothing
        visible = (visible & torch.ones(length, length, dtype=torch.bool, device=taps.device).tril())[:, None]

        def step(
            states: Tensor, tokens: Tensor, rotary: Rotary, past: Sequence[tuple[Tensor, Tensor]]
        ) -> tuple[Tensor, Tensor, Tensor]:
            x, residual = self.midlayer.enter(self.embed(tokens), states)
            attended, keys, values = self.midlayer.self_attn.unrolled(x, rotary, visible, past)
            return self.midlayer.leave(residual, attended), keys, values

        states, outs, past = self.fuse(taps), list[Tensor](), list[tuple[Tensor, Tensor]]()
        for k in range(steps):
            tokens = F.pad(batch.ids[:, 1 + k :], (0, min(1 + k, length)))
            rotary = self.rotary(states, batch.positions + k)
            if checkpointed:
                out, keys, values = checkpoint(step, states, tokens, rotary, past, use_reentrant=False)
            else:
                out, keys, values = step(states, tokens, rotary, past)
            past = [*past, (keys, values)]
            outs.append(out)
            states = self.feedback(out)
        return outs
