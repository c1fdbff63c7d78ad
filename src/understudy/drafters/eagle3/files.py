"""EAGLE-3 checkpoints on disk. What we write is the public layout of SafeAILab and SGLang, which raw vLLM loads as it lies.

Read as well: the layout of vllm-project/speculators (`transformer_layer_config`, `layers.0.*`), names with a `model.` prefix, and the old
names of EAGLE-3.1's norms. A variant that we cannot run is refused by name: a wrong flag or a lost tensor shows only as low acceptance.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.drafters.eagle3.layout import FLAGS, STATIC_ROPE, TAPS, default_taps
from understudy.drafters.eagle3.model import Eagle3Model
from understudy.drafters.eagle3.vocab import check_inverse, ids_of
from understudy.drafting.weights import read_config, read_weights, write_weights
from understudy.target.target import Target

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "LlamaEagle3DraftModel")
OLD_NORMS = {"aux_norm_low": "fc_norm.0", "aux_norm_mid": "fc_norm.1", "aux_norm_high": "fc_norm.2"}
NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def write_drafter(model: Eagle3Model, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`. Embeddings that are the target's own are left out: engines share them."""
    config = model.config
    values = {key: value for key, value in config.to_dict().items() if value is not None or key in ("pad_token_id",)}
    theta = config.rope_parameters["rope_theta"]
    scaling = None if config.rope_parameters.get("rope_type", "default") == "default" else config.rope_parameters
    values |= {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "llama",
        "rope_theta": theta,  # older readers look here, newer ones at rope_parameters
        "rope_scaling": scaling,
        "num_aux_hidden_states": len(model.taps),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "eagle_config": {
            "use_aux_hidden_state": True,
            TAPS: [tap - 1 for tap in model.taps],  # SGLang counts layers from 0
            "norm_before_fc": config.norm_before_fc,
        },
    }
    write_json(folder / "config.json", values)
    write_weights(folder, model.state_dict())


def read_drafter(folder: Path, target: Target) -> Eagle3Model:
    """The drafter in `folder`, in fp32 on the target's device. UserError where it is none, or none for this target."""
    layout = read_layout(folder, target)
    weights = {key: value for raw, value in read_weights(folder).items() if (key := _renamed(raw)) is not None}
    embedding = target.embed_tokens.weight
    own = weights.get("embed_tokens.weight")
    if own is not None and own.shape == embedding.shape and torch.equal(own.to(embedding), embedding):
        del weights["embed_tokens.weight"]
        own = None
    if own is None and layout.hidden_size != target.hidden_size:
        raise UserError(f"{folder}: width {layout.hidden_size} without embeddings of its own; {target.name} has {target.hidden_size}")
    model = Eagle3Model(layout, embedding, own_embedding=own is not None)
    _fill(model, weights, folder)
    return model.to(target.device)


def _fill(model: Eagle3Model, weights: dict[str, Tensor], folder: Path) -> None:
    wanted = model.state_dict()
    for name in ("d2t", "t2d"):  # maps that say nothing at a full vocabulary, and a t2d that follows from d2t
        if name not in wanted:
            weights.pop(name, None)
    if "d2t" in wanted:
        if "d2t" not in weights:
            raise UserError(f"{folder}: {len(wanted['d2t'])} draft tokens without d2t, which says which; the checkpoint is incomplete")
        ids = ids_of(weights["d2t"], model.config.vocab_size, str(folder))
        inside = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        inside[ids] = True
        check_inverse(ids, weights.setdefault("t2d", inside), str(folder))
    if missing := sorted(set(wanted) - set(weights)):
        raise UserError(f"{folder}: the drafter lacks {missing[0]}; it has {', '.join(sorted(weights)[:3])}, ...")
    if unknown := sorted(set(weights) - set(wanted)):
        raise UserError(f"{folder}: {unknown[0]} is no weight of an EAGLE-3 drafter with these flags; refused, because it would be left out")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(f"{folder}: {name} is {list(tensor.shape)}, expected {list(wanted[name].shape)}")
    model.load_state_dict({k: v if v.dtype in (torch.bool, torch.int64) else v.float() for k, v in weights.items()})


def _renamed(key: str) -> str | None:
    """Our name of a tensor; None = not a weight."""
    key = key.removeprefix("model.")
    if key.endswith((".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")):
        return None
    key = re.sub(r"^layers\.0\.", "midlayer.", key)
    for old, new in OLD_NORMS.items():
        key = key.replace(old, new)
    return key


def read_layout(folder: Path, target: Target) -> Any:
    """The configuration in `folder` as a flat one of ours. UserError for variants that are not supported."""
    values = read_config(folder)
    architecture = (values.get("architectures") or ["?"])[0]
    if "transformer_layer_config" in values:
        values = _from_speculators(values, folder)
    if architecture not in ARCHITECTURES:
        raise UserError(f"{folder}: {architecture} is no EAGLE-3 drafter that is supported here ({', '.join(ARCHITECTURES)})")
    if lost := [key for key in NEEDED if key not in values]:
        raise UserError(f"{folder / 'config.json'} is no drafter's configuration: it has no {lost[0]}")
    if values.get("num_hidden_layers", 1) != 1:
        raise UserError(f"{folder}: {values['num_hidden_layers']} draft layers (P-EAGLE or another variant); one is supported")
    if values.get("tie_word_embeddings"):
        raise UserError(f"{folder}: tie_word_embeddings is not supported: an EAGLE-3 drafter has a head of its own")
    if values["vocab_size"] != target.vocab_size:
        raise UserError(f"{folder}: made for a vocabulary of {values['vocab_size']} tokens, {target.name} has {target.vocab_size}")
    nested = values.pop("eagle_config", None) or {}
    taps = values.get(TAPS) or [layer + 1 for layer in nested.get(TAPS) or ()] or default_taps(target.layers)
    if max(taps) >= target.layers:
        raise UserError(f"{folder}: reads tap {max(taps)}, {target.name} has {target.layers} layers")
    source = values.get("target_hidden_size") or values["hidden_size"]
    if source != target.hidden_size:
        raise UserError(f"{folder}: made for states of width {source}, {target.name} has {target.hidden_size}")
    flags = {flag: bool(values.get(flag, nested.get(flag, False))) for flag in FLAGS}
    flags["fc_norm"] = flags["fc_norm"] or bool(values.pop("use_aux_norm", False))
    own = {key: value for key, value in values.items() if key not in ("architectures", "model_type", "torch_dtype", "dtype")}
    if own.get("rope_parameters"):
        own.pop("rope_theta", None), own.pop("rope_scaling", None)
    own |= {
        TAPS: list(taps),
        "target_hidden_size": source,
        "draft_vocab_size": values.get("draft_vocab_size") or values["vocab_size"],
        "bias": bool(values.get("bias", False)),
        **flags,
    }
    layout = LlamaConfig(**own)
    kind = (layout.rope_parameters or {}).get("rope_type", "default")
    if kind not in STATIC_ROPE:
        raise UserError(f"{folder}: rotary positions of type {kind} are not supported; supported are {', '.join(STATIC_ROPE)}")
    return layout


def _from_speculators(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The flat form of a speculators configuration, whose defaults differ."""
    kind = values.get("speculators_model_type")
    if kind != "eagle3":
        raise UserError(f"{folder}: a speculators checkpoint of type {kind}, not eagle3")
    inner = values["transformer_layer_config"]
    if inner.get("model_type", "llama") != "llama":
        raise UserError(f"{folder}: a draft layer of type {inner['model_type']}; llama is supported")
    if any(kind != "full_attention" for kind in inner.get("layer_types") or ()):
        raise UserError(f"{folder}: a draft layer with sliding-window attention is not supported")
    kept = {key: values[key] for key in ("draft_vocab_size", "target_hidden_size", TAPS) if values.get(key) is not None}
    flags = {flag: values.get(flag, flag == "norm_before_residual") for flag in FLAGS}
    return {**inner, "tie_word_embeddings": False, **kept, **flags}
