"""The shape of a DFlash drafter, as one flat configuration with the keys of public checkpoints (z-lab; SGLang, vLLM, transformers).

Public files count the target's layers from 0 for the first layer's output (`target_layer_ids`); we count taps as everywhere here,
one higher. `taps_of` converts. What the public form leaves to each engine's rules is settled once, per layer, by `causal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Qwen3Config

from understudy.core.errors import UserError
from understudy.drafters.dflash.config import DFlashObjectiveConfig
from understudy.drafting.taps import check_measured, even
from understudy.target.target import Target

SLIDING, FULL = "sliding_attention", "full_attention"
MOST_TAPS = 5
DEPTH = 7  # layers of the target for one of the drafter: five of them on a twelve-layer target cost half a plain step


def default_taps(layers: int, count: int = MOST_TAPS) -> list[int]:
    """Up to `count` taps spread evenly. UserError for a target that is too shallow to have them."""
    if layers < 4:
        raise UserError(f"a target of {layers} layers has no default taps: name them, --taps 1,2")
    return even(layers, count)


def chosen_taps(target: Target, taps: Sequence[int]) -> list[int]:
    """The taps asked for, in the order of the layers, or the default ones. UserError for one that is not there."""
    if not taps:
        return default_taps(target.layers)
    check_measured(taps, target)
    if wrong := [tap for tap in taps if not 1 <= tap < target.layers]:
        raise UserError(
            f"tap {wrong[0]} (layer {wrong[0] - 1} counted from 0): a DFlash drafter reads the outputs of layers 1 to"
            f" {target.layers - 1}, counted from 1; what the last layer puts out is read after the norm"
        )
    if len(set(taps)) != len(taps):
        raise UserError(f"taps {', '.join(map(str, taps))}: each one once")
    return sorted(taps)


def mask_token(target: Target, asked: int | None) -> int | None:
    """The token whose embedding stands for a draft to come; None = no row is free, the drafter needs one of its own.

    In order: what was asked for; the tokenizer's mask token; the first row beyond the tokenizer's tokens; a token that is called
    reserved or unused. Never padding or a stop token, which texts hold and whose embedding means something else.
    """
    tokenizer, rows, taken = target.tokenizer, target.embed_tokens.weight.shape[0], unfit_masks(target)
    if asked is not None:
        if asked >= rows:
            raise UserError(f"--mask-token-id {asked}: the target's embedding has {rows} rows")
        if asked in taken:
            raise UserError(f"--mask-token-id {asked} is padding or a stop token, which texts hold: choose another row")
        return asked
    if tokenizer is None:
        return None
    own = getattr(tokenizer, "mask_token_id", None)
    names = tokenizer.get_vocab()
    beyond = max(names.values(), default=-1) + 1
    spare = sorted(i for name, i in names.items() if "reserved" in name.lower() or name.lower().startswith("<unused"))
    candidates = [own, beyond, *spare]
    return next((i for i in candidates if i is not None and i < rows and i not in taken), None)


def unfit_masks(target: Target) -> set[int]:
    """Padding and stop tokens: texts hold them, so their embeddings mean something else than a mask."""
    pads = (getattr(target.config, "pad_token_id", None), getattr(target.tokenizer, "pad_token_id", None))
    return {*target.eos_ids, *(pad for pad in pads if isinstance(pad, int) and pad >= 0)}


def borrowed_mask(target: Target) -> int:
    """The token id of a mask whose embedding is the drafter's own: a row that exists, because engines look it up before they replace it.

    vLLM replaces it at the head of a block, too, so it is a token after which no block begins: a stop token, or else padding.
    """
    rows = target.embed_tokens.weight.shape[0]
    fitting = [*sorted(target.eos_ids), *sorted(unfit_masks(target)), rows - 1]
    return next(token for token in fitting if token < rows)


def new_layout(target: Target, config: DFlashObjectiveConfig) -> Any:
    """The configuration of a new drafter: the target's widths and heads, what the options say, plain rotary positions."""
    own, taps = target.config, chosen_taps(target, config.asked_taps)
    heads = own.num_attention_heads
    rope = getattr(own, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or next((v["rope_theta"] for v in rope.values() if isinstance(v, dict)), 1e4)
    layers = config.num_draft_layers or max(1, round(target.layers / DEPTH))
    return Qwen3Config(
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=getattr(own, "intermediate_size", None) or 4 * target.hidden_size,
        num_hidden_layers=layers,
        num_target_layers=target.layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(own, "num_key_value_heads", None) or heads,
        head_dim=getattr(own, "head_dim", None) or target.hidden_size // heads,
        hidden_act="silu",
        vocab_size=target.vocab_size,
        max_position_embeddings=min(target.context, 2**20),
        rms_norm_eps=getattr(own, "rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attention_bias=False,
        tie_word_embeddings=False,
        use_sliding_window=config.sliding_window is not None,
        sliding_window=config.sliding_window,
        max_window_layers=0,
        layer_types=[FULL if config.sliding_window is None else SLIDING] * layers,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        block_size=config.block_size,
        target_layer_ids=[tap - 1 for tap in taps],
        mask_token_id=mask_token(target, config.mask_token_id),
        causal=None,
        sample_from_anchor=config.markov_rank > 0,
        markov_rank=config.markov_rank,
        enable_confidence_head=config.confidence_head,
        confidence_head_with_markov=config.confidence_head,
    )


def taps_of(layout: Any) -> tuple[int, ...]:
    """Taps as we count them: i = output of the i-th layer."""
    return tuple(layer + 1 for layer in layout.target_layer_ids)


def windows(layout: Any) -> list[int | None]:
    """How far back each layer sees, itself included; None = to the beginning."""
    return [layout.sliding_window if kind == SLIDING else None for kind in layout.layer_types]


def causal(layout: Any) -> list[bool]:
    """Whether rows of a block see only those before them, per layer: as the checkpoint says, else where the layer has a window.

    The rule of vLLM and SGLang: `causal` holds for all layers; without it sliding layers are causal, and full ones are not.
    """
    if layout.causal is not None:
        return [bool(layout.causal)] * layout.num_hidden_layers
    return [kind == SLIDING for kind in layout.layer_types]


def drafts_of(layout: Any) -> int:
    """Most drafts of a block: its first row holds the last committed token, and drafts only where the checkpoint says so (DSpark)."""
    return int(layout.block_size) - (not layout.sample_from_anchor)


def servable(layout: Any, own_embedding: bool = False, own_mask: bool = False) -> dict[str, str]:
    """Engine -> "ok", or why it cannot serve a drafter of this shape, or only where.

    `own_embedding`: its embeddings are not the target's; `own_mask`: the embedding of its mask token is not a row of the target's.
    Read from the loaders of vLLM 0.32 and SGLang 0.5, and from the DFlash generation of transformers 5.23, where `DFlashAssistant` runs.
    They load some of what is named here without a word, and then draft noise.
    """
    mixed, spark, anchor = len(set(layout.layer_types)) > 1, layout.markov_rank > 0, layout.sample_from_anchor
    gpu_only = "only its V2 model runner, which CPUs have not, serves"
    plain_anchor = {"it takes no draft from the first row of a block but with a Markov head": anchor and not spark}
    activation = {"its draft layers know no activation but silu": layout.hidden_act != "silu"}
    borrowed = {
        "it takes embeddings from the target: train without --train-embeddings": own_embedding,
        "its mask token has to be a row of the target's embedding": own_mask,
    }
    vllm = {
        f"{gpu_only} sliding beside full layers": mixed,
        f"{gpu_only} drafters with a Markov head": spark,
        "with a Markov head, its mask token has to be a row of the embedding": spark and own_mask,
        **plain_anchor,
        **activation,
    }
    sglang = {
        **borrowed,
        "with a Markov head, it takes a draft from the first row of a block": spark and not anchor,
        **plain_anchor,
        **activation,
    }
    transformers = {**borrowed, "it knows no Markov head": spark, **plain_anchor}
    return {
        "understudy": "ok",
        "vllm": _verdict(vllm),
        "sglang": _verdict(sglang),
        "transformers": _verdict(transformers),
    }


def _verdict(obstacles: dict[str, bool]) -> str:
    return "; ".join(why for why, there in obstacles.items() if there) or "ok"
