"""Random drafters of every shape, and their checkpoints in the layouts of other makers.

folder = written(drafter(norm_output=True), tmp_path)       # ours
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
from understudy.drafters.eagle3.config import Eagle3ObjectiveConfig
from understudy.drafters.eagle3.files import write_drafter
from understudy.drafters.eagle3.layout import new_layout
from understudy.drafters.eagle3.model import Eagle3Model
from understudy.drafters.eagle3.vocab import membership, offsets
from understudy.drafting.objective import Batch
from understudy.target.target import Target

TAPS = "eagle_aux_hidden_state_layer_ids"
DEFAULT = [2, 4, 5]  # of eight layers


@cache
def target() -> Target:
    return Target(tiny.fresh_model("llama", num_hidden_layers=8), name="eight")


def drafter(
    seed: int = 0,
    own_embedding: bool = False,
    width: int | None = None,
    layout: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Eagle3Model:
    """A drafter for `target()`, every weight random. `width`: its own; None = the target's. `layout`: keys that no option sets."""
    on = target()
    config = Eagle3ObjectiveConfig(**{"taps": DEFAULT, "draft_vocab_size": 40, **options})
    made = new_layout(on, config)
    for key, value in layout.items():
        setattr(made, key, value)
    if width is not None:
        made.hidden_size = width
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Eagle3Model(made, on.embed_tokens.weight, own_embedding)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + float(parameter.ndim == 1))
        if model.d2t is not None:
            ids = torch.randperm(on.vocab_size, generator=generator)[: len(model.d2t)].sort().values
            model.d2t.copy_(offsets(ids))
            model.t2d.copy_(membership(ids, on.vocab_size))
    return model


@torch.no_grad()
def logits(model: Eagle3Model) -> Tensor:
    """[3, 6, V_d]: what it says in three unrolled steps over fixed taps and tokens."""
    generator = torch.Generator().manual_seed(9)
    taps = torch.randn(1, 6, len(model.taps) * model.config.target_hidden_size, generator=generator)
    ids = torch.randint(0, model.config.vocab_size, (1, 6), generator=generator)
    batch = Batch(ids, torch.ones_like(ids).bool(), torch.zeros_like(ids), torch.arange(6)[None])
    return torch.cat([model.logits(out) for out in model.unroll(taps, batch, 3)])


def written(model: Eagle3Model, folder: Path) -> Path:
    write_drafter(model, folder)
    return folder


def edit(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Change `config.json`."""
    path = folder / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(values | changes))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def store(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file({name: x.contiguous() for name, x in weights.items()}, folder / "model.safetensors")


def convert(layout: str, folder: Path) -> None:
    """Store the drafter in `folder` as other makers do. Written from descriptions of their formats, not with our reader in mind."""
    config, weights = json.loads((folder / "config.json").read_text()), tensors(folder)
    nested = config["eagle_config"]
    layer = {
        k: v
        for k, v in config.items()
        if k.startswith(("num_", "rms", "rope_t", "rope_s", "head", "max", "inter", "hidden"))
    }
    layer |= {"vocab_size": config["vocab_size"], "num_hidden_layers": 1, "attention_bias": False, "mlp_bias": False}
    del layer["num_aux_hidden_states"]
    common = {**layer, "model_type": "llama", "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": [2, 3]}
    flags = {k: config[k] for k in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")}
    if layout == "safeailab":  # no taps, no flags; EAGLE-1's architecture
        config = common | {
            "architectures": ["LlamaForCausalLM"],
            "draft_vocab_size": config["draft_vocab_size"],
            "pad_token_id": 0,
        }
    elif layout == "specforge":  # taps nested only, counted from the first layer's output on
        config = (
            common
            | flags
            | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config["draft_vocab_size"]}
        )
        config["eagle_config"] = {"use_aux_hidden_state": True, TAPS: nested[TAPS]}
    elif layout == "old_norms":
        config = {k: v for k, v in config.items() if k != "fc_norm"} | {"use_aux_norm": True}
        for new, old in enumerate(("low", "mid", "high")):
            weights[f"aux_norm_{old}.weight"] = weights.pop(f"fc_norm.{new}.weight")
    elif layout == "modelopt":
        config = common | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": config["draft_vocab_size"]}
        config["eagle_config"] = {
            TAPS: nested[TAPS], "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True,
            "use_mtp_layernorm": False, "next_layer_regular": True, "parallel_draft_step": 1, "parallel_draft_heads_num_layers": None,
        }  # fmt: skip
        weights = {k.replace("midlayer.", "layers.0."): v for k, v in weights.items() if k != "t2d"}
    elif layout == "automodel":
        config["architectures"] = ["LlamaEagle3DraftModel"]
        bare = ("lm_head.weight", "d2t", "t2d")
        weights = {k if k in bare else f"model.{k.replace('midlayer.', 'layers.0.')}": v for k, v in weights.items()}
    elif layout == "speculators":
        layer |= {
            "model_type": "llama",
            "layer_types": ["full_attention"],
            "sliding_window": None,
            "hidden_act": "silu",
        }
        config = {
            "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.7.0",
            "draft_vocab_size": config["draft_vocab_size"], "target_hidden_size": None, "tie_word_embeddings": False, **flags,
            TAPS: config[TAPS], "transformer_layer_config": layer,
            "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "Qwen/Qwen3-8B"}},
        }  # fmt: skip
        weights = {k.replace("midlayer.", "layers.0."): v for k, v in weights.items()}
        weights["embed_tokens.weight"] = target().embed_tokens.weight.clone()
    else:
        raise KeyError(layout)
    (folder / "config.json").write_text(json.dumps(config))
    store(folder, weights)
