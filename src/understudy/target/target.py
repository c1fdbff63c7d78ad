"""The target: a frozen causal LM whose passes, taps, splits and cache are ours to steer."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.target.attention import Pass
from understudy.target.cache import KVCache
from understudy.target.stages import Head, Stage


def stop_ids(*configs: Any) -> tuple[int, ...]:
    """Stop tokens (`eos_token_id`) by the first of the configs that names any; None stands for a config that is not there."""
    for config in configs:
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)
    return ()


class Target:
    """A frozen causal LM of transformers (or the language model inside a VLM), with its tokenizer if it has one.

    Stages are built when first asked for and share the model's tensors; `model` itself is never changed.
    """

    def __init__(self, model: Any, tokenizer: Any = None, name: str = "") -> None:
        decoder = model.get_decoder()
        if missing := [part for part in ("layers", "norm", "embed_tokens") if not hasattr(decoder, part)]:
            raise UserError(f"{type(model).__name__} is not supported: its decoder has no .{missing[0]}")
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.thinking: str | None = None  # the mode that prompts are rendered in: on, off, default; None = nobody says
        self.decoder, self.config = decoder, decoder.config
        self.layers = len(decoder.layers)
        self.hidden_size: int = self.config.hidden_size
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.embed_tokens = decoder.embed_tokens
        self.device = self.embed_tokens.weight.device
        if "meta" in (self.device.type, model.get_output_embeddings().weight.device.type):
            raise UserError(
                "embeddings and head must be in memory: keep them on a device (cpu, cuda, ...), not offloaded or meta"
            )
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.head = Head(model)
        self._stages: dict[tuple[int, int], Stage] = {}
        self.checked: set[tuple[str, int | None]] = set()  # features that the probe has passed

    @cached_property
    def context(self) -> int:
        """Most tokens of a text, prompt and answer together.

        LongRoPE changes all rotary factors at a length: keys that were cached before it would be wrong after it, so texts end there.
        """
        most = int(getattr(self.config, "max_position_embeddings", 0) or 2**31)
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            most = min(most, int(rope.get("original_max_position_embeddings", most)))
        return most

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Stop tokens by the model's generation config, else by its config."""
        generation = getattr(self.model, "generation_config", None)
        return stop_ids(generation, self.model.config, self.config)

    def stage(self, first: int, end: int) -> Stage:
        """Layers [first, end), built once."""
        key = (first, end)
        if key not in self._stages:
            self._stages[key] = Stage(self.decoder, first, end)
        return self._stages[key]

    def rebuild(self) -> None:
        """Forget all stages: modules inside the layers were replaced, and what was built before has the old ones."""
        self._stages.clear()

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm: [W, D] -> [W, D]."""
        out: Tensor = self.decoder.norm(hidden)
        return out

    def positions(self, at: Pass) -> Tensor:
        """Position ids [1, W] of a pass: depth from the end of the cache, not row index."""
        if at.depths is None:
            return torch.arange(at.start, at.start + at.width, device=self.device)[None]
        return (at.start + at.depths.to(self.device))[None]

    def cache(self) -> KVCache:
        return KVCache(self.layers)

    def forward(
        self,
        x: Tensor,
        at: Pass,
        cache: KVCache,
        first: int = 0,
        end: int | None = None,
        wanted: frozenset[int] = frozenset(),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run W rows through layers [first, end): (hidden [W, D], taps {id: [W, D]}).

        `x` is [W] token ids when `first` is 0, else the [W, D] output of layer `first`. The rows go into the cache at `at.start`.
        """
        end = self.layers if end is None else end
        stage = self.stage(first, end)
        cache.reserve(at.start + at.width)
        hidden = stage.run(x.to(self.device), at, self.positions(at), cache, wanted)
        return hidden, stage.taps
