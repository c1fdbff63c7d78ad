"""The equations of the DFlash draft model, a block at a time, row by row, in float64, with every mask asked pair by pair.

plain = equations.plain(drafter)
context = plain.context(taps)                    # [D] per tap for each token of a text
plain.block(token, context, start=7, rows=4)     # states of the block behind the first 7 tokens
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from eagle3.reference import rms, rotate
from understudy.drafters.dflash.drafter import DFlashDrafter

Weights = dict[str, Tensor]


class Model:
    """The equations of the draft model, a block at a time."""

    def __init__(self, weights: Weights, config: Any, embedding: Tensor, head: Tensor) -> None:
        self.w, self.config, self.head = weights, config, head.double()
        self.embedding = weights.get("embed_tokens.weight", embedding.double())
        self.mask = weights.get("mask_embedding")
        if self.mask is None:
            self.mask = self.embedding[config.mask_token_id]
        self.eps, self.theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]

    def fuse(self, taps: list[Tensor]) -> Tensor:
        """One [D] per tap -> the context state [H]."""
        return rms(self.w["fc.weight"] @ torch.cat(taps), self.w["hidden_norm.weight"], self.eps)

    def sees(self, layer: int, query: int, key: int, own: bool) -> bool:
        """Whether the row at position `query` sees position `key`: of its context, or of its `own` block."""
        c = self.config
        sliding = c.layer_types[layer] == "sliding_attention"
        causal = sliding if c.causal is None else c.causal
        if not own and key >= query:
            raise AssertionError("the context lies before the block")
        if causal and key > query:
            return False
        return not sliding or abs(query - key) < c.sliding_window

    def _row(self, layer: int, kind: str, x: Tensor, position: int) -> Tensor:
        """Query, key or value of one row: [heads, d]."""
        made = (self.w[f"layers.{layer}.self_attn.{kind}_proj.weight"] @ x).view(-1, self.config.head_dim)
        if kind == "v":
            return made
        return rotate(rms(made, self.w[f"layers.{layer}.self_attn.{kind}_norm.weight"], self.eps), position, self.theta)

    def context(self, taps: list[list[Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
        """Per layer, keys and values [kv heads, d] of each token of a text; `taps`: one [D] per tap for each token."""
        states = [self.fuse(each) for each in taps]
        return [
            [(self._row(n, "k", row, p), self._row(n, "v", row, p)) for p, row in enumerate(states)]
            for n in range(self.config.num_hidden_layers)
        ]

    def block(self, token: int, context: list[list[tuple[Tensor, Tensor]]], start: int, rows: int) -> list[Tensor]:
        """Normed states [H] of a block of `rows` rows whose first one is `token`, behind the first `start` tokens of a context."""
        x = [self.embedding[token], *[self.mask] * (rows - 1)]
        for n in range(self.config.num_hidden_layers):
            name = f"layers.{n}."
            entered = [rms(row, self.w[name + "input_layernorm.weight"], self.eps) for row in x]
            own = [
                (self._row(n, "k", row, start + i), self._row(n, "v", row, start + i)) for i, row in enumerate(entered)
            ]
            pairs, after = [*context[n][:start], *own], []
            for i, row in enumerate(x):
                q = self._row(n, "q", entered[i], start + i)
                seen = [pairs[p] for p in range(start + rows) if self.sees(n, start + i, p, p >= start)]
                groups = q.shape[0] // pairs[0][0].shape[0]  # query heads of a key head
                keys, values = (torch.stack(part).repeat_interleave(groups, 1) for part in zip(*seen, strict=True))
                share = ((q * keys).sum(-1) / math.sqrt(q.shape[1])).softmax(0)  # [seen, heads]
                joined = (share[..., None] * values).sum(0)
                h = row + self.w[name + "self_attn.o_proj.weight"] @ joined.flatten()
                y = rms(h, self.w[name + "post_attention_layernorm.weight"], self.eps)
                gate, up, down = (self.w[name + f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
                after.append(h + down @ (torch.nn.functional.silu(gate @ y) * (up @ y)))
            x = after
        return [rms(row, self.w["norm.weight"], self.eps) for row in x]

    def logits(self, out: Tensor, before: int) -> Tensor:
        """Of a state [H], for the draft after the token `before`: [V]."""
        found = self.head @ out
        if self.config.markov_rank:
            found = found + self.w["markov_head.markov_w2.weight"] @ self.w["markov_head.markov_w1.weight"][before]
        return found

    def confidence(self, out: Tensor, before: int) -> Tensor:
        """The logit of being accepted."""
        x = torch.cat([out, self.w["markov_head.markov_w1.weight"][before]])
        return (self.w["confidence_head.proj.weight"] @ x + self.w["confidence_head.proj.bias"])[0]

    @property
    def first(self) -> int:
        """The row that predicts the token after the block's first one."""
        return 0 if self.config.sample_from_anchor else 1


def plain(drafter: DFlashDrafter, grad: bool = False) -> Model:
    weights = {name: p.detach().double().requires_grad_(grad) for name, p in drafter.model.named_parameters()}
    target = drafter.target
    head = target.model.get_output_embeddings().weight
    return Model(weights, drafter.model.config, target.embed_tokens.weight.detach(), head.detach())
