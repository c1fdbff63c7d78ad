"""Where training begins: a new drafter, or the weights of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from understudy.core.errors import UserError
from understudy.drafters.dflash.config import DFlashConfig, DFlashObjectiveConfig
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.drafters.dflash.files import read_drafter
from understudy.drafters.dflash.layout import borrowed_mask, chosen_taps, new_layout, taps_of
from understudy.drafters.dflash.model import DFlashModel
from understudy.drafters.dflash.objective import DFlashObjective
from understudy.drafting.objective import TokenCounts
from understudy.target.target import Target


def train_dflash(
    config: DFlashObjectiveConfig, target: Target, start: Path | None, counts: TokenCounts
) -> DFlashObjective:
    """A new drafter, or the one in `start` with its shape, under training."""
    if start is None:
        model = new_model(target, new_layout(target, config), config.train_embeddings)
    else:
        model = read_drafter(start, target)
        _same(config, target, model, start)
    drafter = DFlashDrafter(target, model.to(target.device, target.dtype), DFlashConfig(steps=config.draft_steps))
    return DFlashObjective(drafter, config)


def new_model(target: Target, layout: Any, own_embedding: bool = False) -> DFlashModel:
    """A drafter with new weights. Its final norm begins as the target's, so that its output begins on the scale that the head reads."""
    embedding, head = target.embed_tokens.weight, target.model.get_output_embeddings().weight
    own_mask = layout.mask_token_id is None
    if own_mask:
        layout.mask_token_id = borrowed_mask(target)
    model = DFlashModel(layout, embedding, head, own_embedding, own_mask)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    with torch.no_grad():
        if model.embed_tokens is not None:
            model.embed_tokens.weight.copy_(embedding.float())
        if model.mask_embedding is not None:
            model.mask_embedding.copy_(embedding.float().mean(0))
        if model.markov_head is not None:
            nn.init.normal_(model.markov_head.markov_w1.weight, std=0.02)
            nn.init.zeros_(model.markov_head.markov_w2.weight)  # it begins by correcting nothing
        # alternating signs have mean 0 and mean square 1, so RMS norms and layer norms alike return them times their weight
        signs = torch.ones(1, layout.hidden_size, device=target.device, dtype=target.dtype)
        signs[:, 1::2] = -1
        model.norm.weight.copy_((target.norm(signs).to(signs.device) * signs)[0].float())
    return model


def _same(config: DFlashObjectiveConfig, target: Target, model: DFlashModel, start: Path) -> None:
    """UserError where an option asks for another shape than the checkpoint has: its weights would mean something else."""
    layout = model.config
    have = {
        "num_draft_layers": layout.num_hidden_layers,
        "block_size": layout.block_size,
        "mask_token_id": layout.mask_token_id,
        "sliding_window": layout.sliding_window,
        "markov_rank": layout.markov_rank,
        "confidence_head": layout.enable_confidence_head,
        "train_embeddings": model.embed_tokens is not None,
    }
    for name, value in have.items():
        asked = getattr(config, name)
        if name in config.model_fields_set and asked is not None and asked != value:
            raise UserError(
                f"{start} has {name} {value}, and a checkpoint keeps it: leave --{name.replace('_', '-')} out"
            )
    if config.asked_taps and chosen_taps(target, config.asked_taps) != list(taps_of(layout)):
        raise UserError(f"{start} has taps {list(taps_of(layout))}, and a checkpoint keeps them: leave --taps out")
