"""A DFlash drafter inside transformers' own generation, by its real forward.

    model.generate(**inputs, assistant_model=assistant(drafter), speculation_type="dflash")

Each round, transformers 5.23 (`DFlashTokenCandidateGenerator`) hands over the taps of the rows that it committed and the embeddings of
a block, and takes the block's states after the norm; it applies the target's head itself. It makes a cache per call of `generate`, and
drops the block's rows from it before the next round. The drafter's own cache goes with that one: context rows are computed once, and
rows of a block are overwritten, so nothing is ever joined or cut.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from understudy.core.errors import UserError
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.drafters.dflash.layout import FULL, servable
from understudy.target.cache import KVCache


@dataclass(slots=True)
class Kept:
    """What belongs to one call of `generate`: `valid` context rows are in the cache."""

    cache: KVCache
    valid: int = 0


class DFlashAssistant(nn.Module):
    """What `assistant_model` has to be for `speculation_type="dflash"`: `config`, `device`, and the call below.

    `config.block_size` is the number of rows that `drafter` drafts with, so its `steps` hold here too. Raises UserError for drafters that
    transformers' round cannot serve: with embeddings of their own, a mask token of their own, or a Markov head.
    """

    def __init__(self, drafter: DFlashDrafter) -> None:
        super().__init__()
        model = drafter.model
        verdict = servable(model.config, model.embed_tokens is not None, model.mask_embedding is not None)
        if verdict["transformers"] != "ok":
            raise UserError(
                f"transformers' generation cannot draft with this DFlash drafter: {verdict['transformers']}"
            )
        self.model = model
        self.config = copy.copy(model.config)
        self.config.block_size = drafter.steps + model.first
        # only transformers' cache reads it, which stays empty, and one with windows cannot be cropped then
        self.config.layer_types = [FULL] * model.config.num_hidden_layers
        self.generation_config = GenerationConfig(speculation_type="dflash")
        # some families scale embeddings as they are looked up; a drafter was trained on the rows themselves
        self.scale = getattr(drafter.target.embed_tokens, "embed_scale", None)
        self._kept: WeakKeyDictionary[Any, Kept] = WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        return self.model.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def forward(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> BaseModelOutput:
        """One round: `last_hidden_state` [1, S, H] of a block, after the norm.

        `noise_embeds` [1, S, H]: embeddings of the last committed token and of mask tokens; `context_hidden_states` [1, n, taps D]: of
        the n tokens committed since the last round; `past_key_values`: tells one call of `generate` from another. Rows are counted from
        the first token, which is what `position_ids` say too where nothing is padded; UserError where `attention_mask` says otherwise.
        """
        kept = self._kept.get(past_key_values)
        if kept is None:
            if attention_mask is not None and not bool(attention_mask.all()):
                raise UserError(
                    "a padded prompt cannot be drafted for inside transformers' generation: give it unpadded"
                )
            kept = self._kept[past_key_values] = Kept(KVCache(len(self.model.layers)))
        if context_hidden_states.shape[1]:
            self.model.write(context_hidden_states[0], kept.valid, kept.cache)
            kept.valid += context_hidden_states.shape[1]
        x = noise_embeds.to(self.dtype)
        if self.scale is not None:
            x = x / torch.as_tensor(self.scale, dtype=x.dtype, device=x.device)
        return BaseModelOutput(last_hidden_state=self.model.fill(x, kept.valid, kept.cache)[None])
