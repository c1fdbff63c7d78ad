"""Options of EAGLE-3: of drafting with it, and of training it."""

from __future__ import annotations

from typing import Literal, Self

import pydantic

from understudy.core.config import Config, option
from understudy.drafting.spec import DrafterConfig
from understudy.drafting.taps import Taps


class Eagle3Config(DrafterConfig):
    """Options of `eagle3`."""

    threshold: float = option(
        0.0, "of a chain: drafting stops after a draft whose probability is below this; 0 = never", ge=0, le=1
    )
    tree: bool = option(False, "draft a tree of the likeliest continuations instead of a chain")
    top_k: int = option(8, "of a tree: branches per node, and nodes expanded per depth", ge=1, le=256)
    nodes: int = option(24, "of a tree: drafts that are verified in one pass", "num-nodes", ge=1, le=1024)
    any_target: bool = option(
        False, "take weights that were trained for another target; the output stays the target's own"
    )

    def unread(self) -> dict[str, str]:
        if self.tree:
            return {"threshold": "belongs to chains: leave it out, or leave tree=true out"}
        return dict.fromkeys(("top_k", "nodes"), "shapes trees: give tree=true with it, or leave it out")


class Eagle3ObjectiveConfig(Config):
    """Options of `train eagle3`: the drafter's shape, its objective, and how it drafts while acceptance is measured."""

    taps: Taps = option(
        [],
        "hidden states that the drafter reads, separated by commas: 0 = embeddings, i = output of the i-th layer; or a folder of"
        " `understudy layers`, for what was proposed there; default: 2, L/2, L-3",
        "layers",
    )
    draft_vocab_size: int | None = option(
        None,
        "tokens that the drafter can say, the most frequent ones of the training data; default: all, but at most 32,000",
        ge=1,
    )
    head_init: Literal["target", "random"] = option(
        "target", "where the drafter's head starts: the target's rows, or random"
    )
    train_head: bool = option(True, "train the head")
    fc_norm: bool = option(False, "EAGLE-3.1: an RMS norm on every tap")
    norm_before_fc: bool = option(False, "one RMS norm over all taps together")
    norm_output: bool = option(False, "EAGLE-3.1: feed the drafter's state back after its final norm")
    norm_before_residual: bool = option(False, "the residual stream starts from the normed state")

    ttt_length: int = option(7, "draft positions that training unrolls (training-time test)", "ttt-steps", ge=1)
    ttt_decay: float = option(0.8, "weight of draft position k in the loss: decay ** k", "step-decay", gt=0, le=1)
    loss_type: Literal["ce", "kl", "tv", "lk"] = option(
        "ce",
        "ce: soft cross-entropy; kl: the same less the target's entropy; tv: total variation; lk: -log of the acceptance rate",
    )
    loss_normalizer: Literal["valid", "all"] = option(
        "valid", "what summed losses are divided by: slots where a cycle can begin, or all tokens"
    )
    out_of_vocab: Literal["drop", "keep"] = option(
        "drop",
        "slots whose likeliest token of the target is outside the draft vocabulary: left out of the loss, or in it",
    )
    loss_chunk: int = option(1024, "rows whose logits exist at the same time", ge=1)
    checkpoint_steps: bool = option(
        False, "compute each unrolled step again in the backward pass: less memory, more time"
    )

    draft_steps: int = option(6, "most drafts per cycle while acceptance is measured", "num-speculative-tokens", ge=1)

    @pydantic.model_validator(mode="after")
    def _one_norm(self) -> Self:
        if self.fc_norm and self.norm_before_fc:
            raise ValueError("--fc-norm and --norm-before-fc are two ways of the same thing; give one")
        return self
