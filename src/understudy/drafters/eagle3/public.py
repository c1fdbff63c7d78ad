"""The layouts of public EAGLE-3 checkpoints: their configuration as a flat one of ours, their tensors under our names.

    SafeAILab, SpecForge, SGLang   flat; `midlayer.*`; taps, if named at all, in `eagle_config`, counted from the first layer's output on
    vLLM                           the same, taps at the top level, counted as ours
    ModelOpt                       flat, more flags in `eagle_config`; `layers.0.*`
    AutoModel                      flat; all names but the head's begin with `model.`
    speculators                    the layer in `transformer_layer_config`; `layers.0.*`; norm_before_residual is on unless it says no

What cannot run here is refused by name: a wrong flag or a lost tensor would show only as low acceptance. So is what engines
would read in different ways.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from understudy.drafters.eagle3.layout import FLAGS, TAPS
from understudy.drafting.public import refuse, rotary, whole
from understudy.drafting.weights import llama_config

ARCHITECTURES = (
    "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM",
    "LlamaEagle3DraftModel",
    "Eagle3MiniMaxM2ForCausalLM",  # to vLLM these three are the first one
    "Eagle3Qwen2_5vlForCausalLM",
    "Eagle3Qwen3vlForCausalLM",
    "LlamaForCausalLM",  # what SafeAILab's trainer writes, for EAGLE-1 too: the weights tell them apart
    "Eagle3Speculator",
    "Eagle3DraftModel",
)
VARIANTS = (  # of an architecture, or a type of speculators
    (r"(?i)^p-?eagle", "a P-EAGLE drafter, which drafts in parallel"),
    (r"^Eagle3Deepseek", "an EAGLE-3 drafter with DeepSeek's latent attention (MLA)"),
    (r"^Eagle3Qwen3ForCausalLM", "an EAGLE-3 drafter whose layer is Qwen3's, with norms on queries and keys"),
    (r"(?i)^eagle(?!3)", "an EAGLE-1 or EAGLE-2 drafter"),
    (r"(?i)medusa", "a Medusa drafter"),
    (r"(?i)hydra", "a Hydra drafter"),
    (r"(?i)dflash", "a DFlash drafter"),
    (r"(?i)dspark", "a DSpark drafter"),
    (r"(?i)mtp|nextn", "a multi-token-prediction head"),
)
SIGNS = (  # of a variant, in the names of tensors
    (r"(^|\.)mask_hidden$", VARIANTS[0][1]),
    (r"medusa|^\d+\.\d+\.(linear\.)?weight$", VARIANTS[4][1]),
    (r"\.(q_a_proj|kv_a_proj_with_mqa|kv_b_proj)\.", VARIANTS[1][1]),
    (r"\.[qk]_norm\.", VARIANTS[2][1]),
    (r"\.(experts|router)\.", "a drafter with a mixture of experts"),
    (r"^layers\.[1-9]", "a drafter of several layers"),
    (r"(scale|scale_inv|qweight|qzeros|weight_packed)$", "a quantised drafter"),
)
PLAIN = {  # of `eagle_config` (ModelOpt): the only value that is an EAGLE-3 of this kind
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
}
OLD_NORMS = {"aux_norm_low": "fc_norm.0", "aux_norm_mid": "fc_norm.1", "aux_norm_high": "fc_norm.2"}


def public_name(key: str) -> str:
    """Our name of a tensor, given without prefixes of wrappers."""
    key = re.sub(r"^layers\.0\.", "midlayer.", key)
    for old, new in OLD_NORMS.items():
        key = key.replace(old, new)
    return key


def check_tensors(names: Collection[str], folder: Path) -> None:
    """UserError if these tensors, by our names, are those of a variant, or of no drafter."""
    for pattern, variant in SIGNS:
        if found := next((name for name in sorted(names) if re.search(pattern, name)), None):
            refuse(folder, f"{variant} (it has {found}): not supported")
    if "fc.weight" not in names:
        some = ", ".join(sorted(names)[:3]) or "nothing"
        refuse(folder, f"no EAGLE-3 drafter: it has no fc.weight; it has {some}, ...")
    if "midlayer.hidden_norm.weight" not in names:
        refuse(folder, f"{VARIANTS[3][1]}, or a damaged one (it has no midlayer.hidden_norm): EAGLE-3 is supported")


def flat(values: Mapping[str, Any], folder: Path) -> Any:
    """A public configuration as a flat `LlamaConfig` with every flag. Its taps are None where it names none. UserError for variants."""
    values = {key: value for key, value in values.items() if value is not None}
    _check_kind(values, folder)
    if "transformer_layer_config" in values:
        values = _from_speculators(values, folder)
    nested = values.get("eagle_config", {})
    if not isinstance(nested, dict):
        refuse(folder, "eagle_config is no object")
    nested = {key: value for key, value in nested.items() if value is not None}
    _check_supported(values, nested, folder)
    width, heads = whole(values, "hidden_size", folder), whole(values, "num_attention_heads", folder)
    kv_heads = whole(values, "num_key_value_heads", folder, heads)
    size = whole(values, "head_dim", folder, width // heads)
    if heads % kv_heads or size % 2 or ("head_dim" not in values and width % heads):
        refuse(
            folder, f"{heads} heads, {kv_heads} of keys, in a width of {width} with head_dim {size} do not fit together"
        )
    vocab = whole(values, "vocab_size", folder)
    flags = {flag: _flag(values, nested, flag, folder) for flag in (*FLAGS, "use_aux_norm")}
    flags["fc_norm"] |= flags.pop("use_aux_norm")
    if flags["fc_norm"] and flags["norm_before_fc"]:
        refuse(folder, "both fc_norm and norm_before_fc, which engines apply in different orders: not supported")
    taps = _taps(values, nested, folder)
    if (many := values.get("num_aux_hidden_states")) is not None and taps is not None and many != len(taps):
        refuse(folder, f"num_aux_hidden_states is {many}, and {len(taps)} taps are named")
    return llama_config(
        {
            "hidden_size": width,
            "target_hidden_size": whole(values, "target_hidden_size", folder, width),
            "intermediate_size": whole(values, "intermediate_size", folder),
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": size,
            "hidden_act": values.get("hidden_act", "silu"),
            "vocab_size": vocab,
            "draft_vocab_size": whole(values, "draft_vocab_size", folder, vocab),
            "max_position_embeddings": whole(values, "max_position_embeddings", folder, 2048),
            "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
            "rope_parameters": rotary(values, folder, default=1e4),
            **{name: _flag(values, {}, name, folder) for name in ("attention_bias", "mlp_bias", "bias")},
            "tie_word_embeddings": False,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            TAPS: taps,
            **flags,
        },
        folder,
    )


def _check_kind(values: Mapping[str, Any], folder: Path) -> None:
    """UserError unless it says that it is an EAGLE-3, or nothing against it."""
    named = values.get("architectures", [])
    named = [str(name) for name in (named if isinstance(named, list) else [named])]
    kinds = [*named, *(str(values[key]) for key in ("speculators_model_type", "model_type") if key in values)]
    if any(key.startswith("medusa_") for key in values):
        kinds.append("medusa")
    if values.keys() & {"q_lora_rank", "kv_lora_rank"}:
        kinds.append("Eagle3Deepseek")
    if values.get("parallel_drafting") or values.keys() & {"ptd_token_id", "pard_token"}:
        kinds.append("peagle")
    for kind in kinds:
        for pattern, variant in VARIANTS:
            if re.search(pattern, kind):
                refuse(folder, f"{variant} ({kind}): not supported")
    if "transformer_layer_config" in values:
        if (kind := values.get("speculators_model_type")) != "eagle3":
            refuse(folder, f"a speculators checkpoint of type {kind}: eagle3 is supported")
    elif named and named[0] not in ARCHITECTURES:
        refuse(folder, f"{named[0]} is no EAGLE-3 drafter that is supported here ({', '.join(ARCHITECTURES[:3])})")


def _check_supported(values: Mapping[str, Any], nested: Mapping[str, Any], folder: Path) -> None:
    """UserError for what would need other code."""
    if (layers := values.get("num_hidden_layers", 1)) != 1:
        refuse(
            folder,
            f"{layers} layers: a whole model, or a drafter of several layers; EAGLE-3 with one layer is supported",
        )
    for key, plain in PLAIN.items():
        if nested.get(key, plain) != plain:
            refuse(folder, f"eagle_config has {key} {nested[key]}: only {plain} is supported")
    kinds = values.get("layer_types", [])
    if any(kind != "full_attention" for kind in (kinds if isinstance(kinds, list) else [kinds])):
        refuse(folder, "a draft layer with a sliding window is not supported")
    if values.get("tie_word_embeddings"):
        refuse(
            folder,
            "tie_word_embeddings is not supported: an EAGLE-3 drafter has a head of its own (false, if lm_head is there)",
        )
    if values.get("quantization_config") or values.get("compression_config"):
        refuse(folder, "a quantised drafter: not supported")
    if values.get("logit_scale", 1) != 1:
        refuse(folder, f"logit_scale {values['logit_scale']} is not supported")
    if values.get("hidden_act", "silu") not in ACT2FN:
        refuse(folder, f"activation {values['hidden_act']} is not known")


def _from_speculators(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The flat form of a speculators configuration, whose defaults differ."""
    inner = values["transformer_layer_config"]
    if not isinstance(inner, dict):
        refuse(folder, "transformer_layer_config is no object")
    if (kind := inner.get("model_type", "llama")) != "llama":
        refuse(folder, f"a draft layer of type {kind}; llama is supported")
    kept = {key: values[key] for key in ("draft_vocab_size", "target_hidden_size", TAPS) if key in values}
    flags = {flag: values.get(flag, flag == "norm_before_residual") for flag in FLAGS}
    inner = {key: value for key, value in inner.items() if value is not None}
    return {**inner, "tie_word_embeddings": values.get("tie_word_embeddings", False), **kept, **flags}


def _flag(values: Mapping[str, Any], nested: Mapping[str, Any], key: str, folder: Path) -> bool:
    """False unless it says otherwise, in one of two places; engines differ in which one they read."""
    found = [place[key] for place in (values, nested) if key in place]
    if not all(isinstance(value, bool) for value in found):
        refuse(folder, f"{key} is neither true nor false")
    if len(set(found)) > 1:
        refuse(folder, f"{key} stands twice, at the top and in eagle_config, and differs")
    return True in found


def _taps(values: Mapping[str, Any], nested: Mapping[str, Any], folder: Path) -> list[int] | None:
    """Taps as we count them (vLLM too): 0 = embeddings. `eagle_config` counts from the first layer's output on."""
    top, low = values.get(TAPS) or None, nested.get(TAPS) or None
    for taps in (top, low):
        if taps is not None and not (isinstance(taps, list) and all(type(tap) is int for tap in taps)):
            refuse(folder, f"{TAPS} is no list of layers")
    shifted = None if low is None else [layer + 1 for layer in low]
    if top is not None and shifted is not None and top != shifted:
        refuse(
            folder,
            f"vLLM would read taps {top} and SGLang {shifted} ({TAPS}, which eagle_config counts from 0 on); make them one",
        )
    taps = top or shifted
    if taps is not None and taps != sorted(set(taps)):
        refuse(folder, f"taps {taps}: engines read every tap once, and in the order of the layers")
    return taps
