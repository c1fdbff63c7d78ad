"""Where training begins: a new drafter, or the weights of another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from understudy.core.errors import UserError
from understudy.drafters.eagle3.config import Eagle3Config, Eagle3ObjectiveConfig
from understudy.drafters.eagle3.drafter import Eagle3Drafter
from understudy.drafters.eagle3.files import read_drafter
from understudy.drafters.eagle3.layout import FLAGS, new_layout, taps_of
from understudy.drafters.eagle3.model import Eagle3Model
from understudy.drafters.eagle3.objective import Eagle3Objective
from understudy.drafters.eagle3.vocab import membership, most_frequent, offsets
from understudy.drafting.objective import TokenCounts
from understudy.target.target import Target


def train_eagle3(
    config: Eagle3ObjectiveConfig, target: Target, start: Path | None, counts: TokenCounts
) -> Eagle3Objective:
    """A new drafter, or the one in `start` with its taps, flags and vocabulary map, under training."""
    if start is None:
        model = new_model(target, config, new_layout(target, config), counts)
    else:
        model = read_drafter(start, target)
        _same(config, model, start)
    drafter = Eagle3Drafter(target, model.to(target.device, target.dtype), Eagle3Config(steps=config.draft_steps))
    return Eagle3Objective(drafter, config)


def new_model(target: Target, config: Eagle3ObjectiveConfig, layout: Any, counts: TokenCounts) -> Eagle3Model:
    """A drafter with new weights. Its state begins as the highest tap, its head and final norm as the target's.

    So its output begins in the space that the head reads; with targets whose final norm is no RMS norm it begins near there.
    """
    model = Eagle3Model(layout, target.embed_tokens.weight)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    with torch.no_grad():
        width = layout.hidden_size
        model.fc.weight[:, -width:] += torch.eye(width)
        if model.d2t is not None and model.t2d is not None:
            ids = most_frequent(counts(), len(model.d2t))
            model.d2t.copy_(offsets(ids))
            model.t2d.copy_(membership(ids, layout.vocab_size))
        if config.head_init == "target":
            rows = target.model.get_output_embeddings().weight.detach().float().cpu()
            model.lm_head.weight.copy_(rows if model.ids is None else rows[model.ids])
            # alternating signs have mean 0 and mean square 1, so RMS norms and layer norms alike return them times their weight
            signs = torch.ones(1, width, device=target.device, dtype=target.dtype)
            signs[:, 1::2] = -1
            model.norm.weight.copy_((target.norm(signs).to(signs.device) * signs)[0].float())
    return model


def _same(config: Eagle3ObjectiveConfig, model: Eagle3Model, start: Path) -> None:
    """UserError where an option asks for another shape than the checkpoint has: its weights would mean something else.

    Options that leave a shape open (no taps, no size) ask for nothing.
    """
    if "head_init" in config.model_fields_set and config.head_init != "target":
        raise UserError(f"{start} has a head, and a checkpoint keeps it: leave --head-init out")
    have = {
        "taps": list(taps_of(model.config)),
        "draft_vocab_size": model.config.draft_vocab_size,
        **{flag: getattr(model.config, flag) for flag in FLAGS},
    }
    for name, value in have.items():
        asked = getattr(config, name)
        if name not in config.model_fields_set or asked is None or asked == []:
            continue
        if (sorted(asked) if isinstance(asked, list) else asked) != value:
            raise UserError(
                f"{start} has {name} {value}, and a checkpoint keeps it: leave --{name.replace('_', '-')} out"
            )
