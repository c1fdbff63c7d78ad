"""DFlash checkpoints on disk. What we write is the public layout of z-lab, which SGLang, vLLM and transformers load as it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen3Config

from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.drafters.dflash.layout import SLIDING, causal
from understudy.drafters.dflash.model import DFlashModel
from understudy.drafting.weights import read_config, read_weights, renamed, write_weights
from understudy.target.target import Target

WRITTEN = (
    *("hidden_size", "target_hidden_size", "intermediate_size", "num_hidden_layers", "num_target_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "vocab_size", "max_position_embeddings"),
    *("rms_norm_eps", "attention_bias", "tie_word_embeddings", "layer_types", "sliding_window", "use_sliding_window"),
    *("block_size", "target_layer_ids", "mask_token_id", "sample_from_anchor"),
    *("markov_rank", "enable_confidence_head", "confidence_head_with_markov"),
)


def shape(model: DFlashModel) -> dict[str, Any]:
    """What weights mean, as `config.json` says it: sizes, taps, block, masks, positions. Much of it no weight tells."""
    return {
        **{key: getattr(model.config, key) for key in WRITTEN},
        "causal": causal(model.config),
        "rope_parameters": dict(model.config.rope_parameters),
    }


def write_drafter(model: DFlashModel, folder: Path) -> None:
    config = model.config
    rope = dict(config.rope_parameters)
    write_json(
        folder / "config.json",
        {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            **{key: getattr(config, key) for key in WRITTEN},
            "rope_parameters": rope,
            "rope_theta": rope["rope_theta"],
            "dflash_config": {
                "mask_token_id": config.mask_token_id,
                "target_layer_ids": config.target_layer_ids,
                "causal": SLIDING in config.layer_types,
            },
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    )
    write_weights(folder, model.state_dict())


def read_drafter(folder: Path, target: Target) -> DFlashModel:
    values = read_config(folder)
    layout = Qwen3Config(**values)
    weights = renamed(read_weights(folder), lambda name: name, folder)
    layout.causal = values["dflash_config"]["causal"]
    model = DFlashModel(
        layout,
        target.embed_tokens.weight,
        target.model.get_output_embeddings().weight,
        "embed_tokens.weight" in weights,
        "mask_embedding" in weights,
    )
    try:
        model.load_state_dict({k: v.float() for k, v in weights.items()})
    except RuntimeError as error:
        raise UserError(f"{folder}: {error}") from None
    return model.to(target.device)
