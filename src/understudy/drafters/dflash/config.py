"""Options of DFlash: of drafting with it, and of training it."""

from __future__ import annotations

from typing import Literal, Self

import pydantic

from understudy.core.config import CommaList, Config, option
from understudy.drafting.spec import DrafterConfig
from understudy.drafting.taps import Taps


class DFlashConfig(DrafterConfig):
    """Options of `dflash`."""

    steps: int | None = option(  # type: ignore[assignment]  # its own default is the checkpoint's
        None, "most tokens drafted per cycle; default: all of a block", "num-speculative-tokens", ge=1
    )
    threshold: float = option(
        0.0,
        "with a confidence head: of the drafts after the first, only those are verified that are at least this likely to be accepted with"
        " all before; 0 = all",
        ge=0,
        le=1,
    )
    any_target: bool = option(
        False, "take weights that were trained for another target; the output stays the target's own"
    )


class DFlashObjectiveConfig(Config):
    """Options of `train dflash`: the drafter's shape, its objective, and how it drafts while acceptance is measured."""

    num_draft_layers: int | None = option(
        None, "decoder layers of the drafter; default: one for every seven of the target", ge=1
    )
    block_size: int = option(
        8,
        "rows of a block: the last committed token and the drafts behind it; with --markov-rank its first row drafts too",
        ge=2,
    )
    taps: Taps = option(
        [],
        "hidden states that the drafter reads, separated by commas: i = output of the i-th layer; or a folder of `understudy layers`, for"
        " what was proposed there; default: up to five, spread evenly",
        "layers",
    )
    target_layer_ids: CommaList = option(
        [], "the same as --taps, counted from 0 for the first layer's output and separated by commas: 24,30,31"
    )
    mask_token_id: int | None = option(
        None,
        "token whose embedding stands for a draft to come; default: the tokenizer's mask token, else a row that no text uses",
        ge=0,
    )
    train_embeddings: bool = option(False, "give the drafter embeddings of its own, and train them")
    sliding_window: int | None = option(
        None, "the drafter's layers see only so many tokens back, and inside a block only those before", ge=2
    )
    markov_rank: int = option(
        0, "DSpark: rank of a correction of each draft's logits by the draft before it; 0 = none", ge=0
    )
    confidence_head: bool = option(
        False, "DSpark: train a head that says how likely each draft is to be accepted; needs --markov-rank"
    )

    anchors: int = option(512, "blocks per row of text, at random places of the answers", "num-anchors", ge=1)
    loss_type: Literal["ce", "kl", "ce+kl"] = option(
        "ce", "ce: cross-entropy of the teacher's token; kl: divergence from the target's law; ce+kl: their sum"
    )
    teacher: Literal["data", "target"] = option(
        "data", "whose token the cross-entropy takes: the text's own, or the target's likeliest one"
    )
    full_vocab: bool = option(
        False, "kl over the whole vocabulary; else over the target's 64 likeliest tokens, renormalised"
    )
    position_weights: Literal["none", "exp", "dpace"] = option(
        "exp",
        "weight of a draft by its place in the block: none; exp: exp(-k / gamma), k from 0; dpace: by the drafter's own"
        " chance to get there and go on (D-PACE)",
    )
    gamma: float | None = option(
        None, "of exp; default: 1 + 3 B / 8 for blocks of B rows, so 4 for 8 and 7 for 16", gt=0
    )
    dpace_alpha: float = option(0.5, "of dpace: how far probabilities are drawn towards 1", ge=0, lt=1)
    loss_chunk: int = option(1024, "rows whose logits exist at the same time", ge=1)

    draft_steps: int | None = option(
        None,
        "most drafts per cycle while acceptance is measured; default: all of a block",
        "num-speculative-tokens",
        ge=1,
    )

    @pydantic.field_validator("target_layer_ids", mode="after")
    @classmethod
    def _numbers(cls, ids: list[str]) -> list[str]:
        if wrong := [i for i in ids if not i.isdigit()]:
            raise ValueError(f"must be layers counted from 0, separated by commas (got {wrong[0]!r})")
        return ids

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.taps and self.target_layer_ids:
            raise ValueError("--taps and --target-layer-ids name the same layers in two ways; give one")
        if self.confidence_head and not self.markov_rank:
            raise ValueError("--confidence-head reads the drafts of a Markov head: give --markov-rank with it")
        for name, there, where in (
            ("gamma", self.position_weights == "exp", "--position-weights exp"),
            ("dpace_alpha", self.position_weights == "dpace", "--position-weights dpace"),
            ("full_vocab", "kl" in self.loss_type, "--loss-type kl or ce+kl"),
            ("teacher", "ce" in self.loss_type, "--loss-type ce or ce+kl"),
        ):
            if name in self.model_fields_set and not there:
                raise ValueError(f"--{name.replace('_', '-')} belongs to {where}")
        return self

    @property
    def asked_taps(self) -> list[int]:
        """Taps as asked for, in our count; none = the default ones."""
        return self.taps or [int(i) + 1 for i in self.target_layer_ids]
