"""The shape of an EAGLE-3 drafter, as one flat configuration: that of public checkpoints (SafeAILab, SGLang, raw vLLM).

Every flag is written out, because engines' defaults differ. Taps stand at the top level as we count them (vLLM too: i = output
of the i-th layer counted from 1), and once more in `eagle_config` as SGLang counts (layers from 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlamaConfig

from understudy.core.errors import UserError
from understudy.drafters.eagle3.config import Eagle3ObjectiveConfig
from understudy.drafting.taps import check_measured
from understudy.target.target import Target

FLAGS = ("fc_norm", "norm_before_fc", "norm_output", "norm_before_residual")
MOST = 32_000  # tokens of a draft vocabulary, unless more are asked for
TAPS = "eagle_aux_hidden_state_layer_ids"


def default_taps(layers: int) -> list[int]:
    """A low, a middle and a high layer: 2, L/2, L-3 (EAGLE-3, section 3.1, as every public trainer has it)."""
    taps = [2, layers // 2, layers - 3]
    if sorted(set(taps)) != taps or taps[0] < 0:
        raise UserError(f"a target of {layers} layers has no default taps: name them, --taps 1 --taps 2 ...")
    return taps


def chosen_taps(target: Target, taps: Sequence[int]) -> list[int]:
    """The taps of the options, or the default ones. UserError for one that is not there."""
    if not taps:
        return default_taps(target.layers)
    check_measured(taps, target)
    if wrong := [tap for tap in taps if not 0 <= tap < target.layers]:
        raise UserError(
            f"--taps {wrong[0]}: taps are 0 (embeddings) to {target.layers - 1}; what the last layer puts out is read after the norm"
        )
    if len(set(taps)) != len(taps):
        raise UserError(f"--taps {', '.join(map(str, taps))}: each tap once")
    return sorted(taps)  # vLLM sorts them: the columns of fc have to follow the layers


def draft_vocab(target: Target, asked: int | None) -> int:
    """Size of the draft vocabulary. UserError if it is more than the target has."""
    if asked is not None and asked > target.vocab_size:
        raise UserError(f"--draft-vocab-size {asked}: the target's vocabulary has {target.vocab_size} tokens")
    return min(target.vocab_size, MOST) if asked is None else asked


def new_layout(target: Target, config: Eagle3ObjectiveConfig) -> LlamaConfig:
    """The configuration of a new drafter: the target's widths and heads, what the options say, plain rotary positions."""
    own = target.config
    taps = chosen_taps(target, config.taps)
    heads = own.num_attention_heads
    rope = getattr(own, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or next((v["rope_theta"] for v in rope.values() if isinstance(v, dict)), 1e4)
    return LlamaConfig(
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        intermediate_size=getattr(own, "intermediate_size", None) or 4 * target.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=getattr(own, "num_key_value_heads", None) or heads,
        head_dim=getattr(own, "head_dim", None) or target.hidden_size // heads,
        hidden_act="silu",
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab(target, config.draft_vocab_size),
        max_position_embeddings=min(target.context, 2**20),
        rms_norm_eps=getattr(own, "rms_norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attention_bias=False,
        bias=False,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **{TAPS: taps},
        **{flag: getattr(config, flag) for flag in FLAGS},
    )


def taps_of(layout: Any) -> tuple[int, ...]:
    return tuple(getattr(layout, TAPS))


def servable(layout: Any, own_embedding: bool = False) -> dict[str, str]:
    """Engine -> "ok", or why it cannot serve a drafter of this shape. `own_embedding`: its embeddings are not the target's.

    Read from the loaders of vLLM 0.32 and SGLang 0.5.23. They load some of what is named here without a word, and then draft noise.
    """
    taps = taps_of(layout)
    vllm = {
        "its fc has no bias": layout.bias,
        "its draft layer knows no activation but silu": layout.hidden_act != "silu",
        "it applies input_norm before fc_norm, we after": layout.fc_norm and layout.norm_before_fc,
    }
    sglang = {
        "its EAGLE-3 layer adds the state before the norm: train without --norm-before-residual": layout.norm_before_residual,
        "it counts taps from the first layer's output on and has none for the embeddings": 0 in taps,
        "it takes states as wide as an embedding for a drafter's own and skips fc: take more than one tap": (
            len(taps) * layout.target_hidden_size == layout.hidden_size
        ),
        "it puts the target's embeddings in the place of the drafter's own": (
            own_embedding and layout.target_hidden_size == layout.hidden_size
        ),
        "its queries, keys and values have no bias": layout.attention_bias,
        "its MLP has no bias": layout.mlp_bias,
        "its draft layer knows no activation but silu": layout.hidden_act != "silu",
        "it has one norm before fc, not two": layout.fc_norm and layout.norm_before_fc,
    }
    return {
        "understudy": "ok",
        "vllm": _verdict(vllm),
        "sglang": _verdict(sglang),
        "transformers": "it has no EAGLE-3 class",
    }


def _verdict(obstacles: dict[str, bool]) -> str:
    return "; ".join(why for why, there in obstacles.items() if there) or "ok"
