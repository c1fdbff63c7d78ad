"""Parts that draft models have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

Rotary = tuple[Tensor, Tensor]  # cos, sin: [B, T, d]


class Norm(nn.RMSNorm):
    """An RMS norm in the dtype of its rows: under autocast these are bf16, and torch's fast kernel wants the fp32 weight to match."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class DraftRotary(LlamaRotaryEmbedding):
    """Rotary factors whose frequencies stay fp32 in a model of any dtype, as in every engine.

    Rounded to bf16 they would be off by up to 0.2 %: at a distance of 100 tokens, by a fifth of a radian.
    """

    inv_freq: Tensor  # [d / 2]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._table: Rotary | None = None  # cos, sin [1, rows, d] of positions from 0 on

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = exact.to(self.inv_freq.device)
        self._table = None
        return self

    def rows(self, start: int, stop: int, like: Tensor) -> Rotary:
        """Factors [1, n, d] of positions start .. stop - 1, in the dtype and on the device of `like`, from a table that is kept."""
        if self._table is None or self._table[0].shape[1] < stop or self._table[0].dtype != like.dtype:
            where = torch.arange(max(512, 2 * stop), device=like.device)[None]
            self._table = self(like, where)
        cos, sin = self._table
        return cos[:, start:stop], sin[:, start:stop]
