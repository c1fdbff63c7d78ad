"""Random drafters of every shape, and their checkpoints in the layouts of other makers.

folder = written(drafter(sliding_window=5), tmp_path)       # ours
convert("speculators", folder)                              # the same drafter as speculators stores it, in place
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from understudy.drafters.dflash.config import DFlashObjectiveConfig
from understudy.drafters.dflash.files import write_drafter
from understudy.drafters.dflash.layout import new_layout
from understudy.drafters.dflash.model import DFlashModel
from understudy.drafters.dflash.start import new_model
from understudy.drafting.objective import Batch
from understudy.target.target import Target

TAPS = [2, 4, 6]  # of eight layers
MASK = 90


@cache
def target() -> Target:
    return Target(tiny.fresh_model("llama", num_hidden_layers=8), name="eight")


def drafter(
    seed: int = 0,
    own_mask: bool = False,
    layout: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> DFlashModel:
    """A drafter for `target()`, every weight random. `layout`: keys that no option sets."""
    config = DFlashObjectiveConfig(
        **{"taps": TAPS, "num_draft_layers": 2, "block_size": 5, "mask_token_id": MASK, **options}
    )
    made = new_layout(target(), config)
    for key, value in layout.items():
        setattr(made, key, value)
    if own_mask:
        made.mask_token_id = None
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = new_model(target(), made, config.train_embeddings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + float(parameter.ndim == 1))
    return model


@torch.no_grad()
def said(model: DFlashModel) -> Tensor:
    """What two blocks over fixed taps and tokens say: corrected logits, and confidence."""
    generator = torch.Generator().manual_seed(9)
    taps = torch.randn(1, 9, len(model.taps) * model.config.target_hidden_size, generator=generator)
    ids = torch.randint(0, model.config.vocab_size, (1, 9), generator=generator)
    batch = Batch(ids, torch.ones_like(ids).bool(), torch.zeros_like(ids), torch.arange(9)[None])
    states = model.blocks(taps, batch, torch.tensor([[3, 8]]), model.config.block_size)[0, :, model.first :]
    logits = model.logits(states)
    if model.markov_head is None:
        return logits
    before = model.markov_head.embed(torch.arange(states.shape[1]).expand(states.shape[:2]))
    logits = logits + model.markov_head.correction(before)
    if model.confidence_head is None:
        return logits
    return torch.cat([logits, model.confidence_head(states, before)[..., None]], -1)


def written(model: DFlashModel, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_drafter(model, folder)
    return folder


def values(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def edit(folder: Path, drop: tuple[str, ...] = (), nested: Mapping[str, Any] | None = None, **changes: Any) -> None:
    """Change `config.json`: keys of the top level, and of `dflash_config` (None there = gone)."""
    config = {key: value for key, value in values(folder).items() if key not in drop} | changes
    if nested is not None:
        inside = config.get("dflash_config", {}) | dict(nested)
        config["dflash_config"] = {key: value for key, value in inside.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, weights: Mapping[str, Tensor | None]) -> None:
    kept = {name: x.contiguous() for name, x in weights.items() if x is not None}
    save_file(kept, folder / "model.safetensors")


def convert(layout: str, folder: Path) -> None:
    """Store the drafter in `folder` as other makers do. Written from descriptions of their formats, not with our reader in mind."""
    config, weights = values(folder), tensors(folder)
    layer = {
        key: config[key]
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                    "hidden_act", "vocab_size", "max_position_embeddings", "rms_norm_eps", "attention_bias", "layer_types",
                    "sliding_window", "use_sliding_window")
    }  # fmt: skip
    ids, mask, block = config["target_layer_ids"], config["mask_token_id"], config["block_size"]
    common = {**layer, "model_type": "qwen3", "rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "bfloat16", "use_cache": True,
              "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_window_layers": 2}  # fmt: skip
    heads = {
        key: config[key]
        for key in ("markov_rank", "enable_confidence_head", "confidence_head_with_markov")
        if key in config
    }
    if layout in ("z-lab", "encoder"):
        config = common | {
            "architectures": ["DFlashDraftModel"], "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "block_size": block,
            "num_target_layers": 8, "dflash_config": {"mask_token_id": mask, "target_layer_ids": ids},
            "tie_word_embeddings": True,  # copied from a tied target; it has neither embedding nor head
        }  # fmt: skip
        if layout == "encoder":
            weights = {
                "model." + k.replace("fc.", "encoder.fc.").replace("hidden_norm.", "encoder.output_norm_enc."): v
                for k, v in weights.items()
            }
    elif layout == "deepspec":
        config = common | heads | {"architectures": ["Qwen3DSparkModel"], "target_layer_ids": ids, "mask_token_id": mask,
                                   "block_size": block, "markov_head_type": "vanilla"}  # fmt: skip
    elif layout == "specforge":
        config = common | {"architectures": ["DSparkDraftModel"], "block_size": block, "num_target_layers": 8}
        config["dflash_config"] = {"projector_type": "dspark", "mask_token_id": mask, "target_layer_ids": ids,
                                   "markov_head_type": "vanilla", "confidence_head_alpha": 1.0, **heads}  # fmt: skip
    elif layout == "modelopt":
        config = common | {"architectures": ["DFlashDraftModel"], "block_size": block, "markov_rank": heads["markov_rank"],
                           "use_confidence_head": heads["enable_confidence_head"],
                           "dflash_config": {"mask_token_id": mask, "target_layer_ids": ids}}  # fmt: skip
        weights = {
            k.replace("markov_head.", "").replace("confidence_head.proj", "confidence_proj"): v
            for k, v in weights.items()
        }
    elif layout == "speculators":
        spark = "markov_rank" in heads
        config = {
            "architectures": ["DSparkSpeculator" if spark else "DFlashSpeculator"], "speculators_version": "0.7.0",
            "speculators_model_type": "dspark" if spark else "dflash", "block_size": block, "mask_token_id": mask, "max_anchors": 512,
            "aux_hidden_state_layer_ids": [layer + 1 for layer in ids], "draft_vocab_size": layer["vocab_size"],
            "target_hidden_size": None, "sliding_window_non_causal": False, "sample_from_anchor": config["sample_from_anchor"],
            "tie_word_embeddings": False, "transformer_layer_config": {**layer, "model_type": "qwen3", "rope_theta": 1e4}, **heads,
            "speculators_config": {"algorithm": "dflash", "verifier": {"name_or_path": "Qwen/Qwen3-8B"}},
        }  # fmt: skip
        weights |= {
            "embed_tokens.weight": target().embed_tokens.weight.clone(),
            "lm_head.weight": target().model.get_output_embeddings().weight.clone(),
            "t2d": torch.ones(layer["vocab_size"], dtype=torch.bool),
            "d2t": torch.zeros(layer["vocab_size"], dtype=torch.int64),
        }
    else:
        raise KeyError(layout)
    (folder / "config.json").write_text(json.dumps(config))
    store(folder, weights)
