"""The layouts of public DFlash and DSpark checkpoints: their configuration as a flat one of ours, their tensors under our names.

    z-lab, SGLang, SpecForge   flat; `dflash_config` holds taps, mask token and more; layers counted from 0
    DeepSpec                   flat, all at the top level; `markov_head.*`, `confidence_head.*`
    ModelOpt                   the same; `markov_w1.*`, `markov_w2.*`, `confidence_proj.*`
    speculators                the layers in `transformer_layer_config`; layers counted from 1; full layers always see both ways

What cannot run here is refused by name: a wrong flag or a lost tensor would show only as low acceptance. So is what engines
would read in different ways, and what they would guess.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import Qwen3Config
from transformers.activations import ACT2FN

from understudy.drafters.dflash.layout import FULL, SLIDING
from understudy.drafting.public import refuse, rotary, whole
from understudy.drafting.weights import checked_config

PLAIN, SPARK = "DFlashDraftModel", "Qwen3DSparkModel"
ARCHITECTURES = (PLAIN, SPARK, "DSparkDraftModel", "DFlashSpeculator", "DSparkSpeculator")
VARIANTS = (  # of an architecture, or a type of speculators
    (r"(?i)^dflash-?2", "a DFlash-2 drafter"),
    (r"(?i)lilicorr", "a LiLiCorr drafter"),
    (r"(?i)domino", "a Domino drafter"),
    (r"(?i)xpress", "an XPress drafter"),
    (r"(?i)eagle", "an EAGLE drafter"),
    (r"(?i)medusa", "a Medusa drafter"),
    (r"(?i)mtp|nextn", "a multi-token-prediction head"),
)
SIGNS = (  # of a variant, in the names of tensors
    (r"(^|\.)(prefix_gru|embed_proj)\.", VARIANTS[2][1]),
    (r"(^|\.)(conv|selector)\w*\.", VARIANTS[0][1]),
    (r"attention_sink_bias$|\.sinks$", "a drafter with attention sinks"),
    (r"(^|\.)mask_hidden$", "a P-EAGLE drafter"),
    (r"^(markov_head\.)?(gate_proj|joint_proj)\.", "a DSpark drafter whose Markov head is gated or recurrent"),
    (r"\.(experts|router)\.", "a drafter with a mixture of experts"),
    (r"(scale|scale_inv|qweight|qzeros|weight_packed)$", "a quantised drafter"),
)
NEUTRAL = {  # keys that change what is computed, and the values at which they do not
    "attention_sink_bias": False,
    "add_swa_attention_sink_bias": False,
    "attention_value_scale": 1,
    "logit_scale": 1,
    "final_logit_softcapping": 0,
    "output_multiplier": 1,
    "is_neox_style": True,
    "use_aux_hidden_state": True,
    "markov_head_type": "vanilla",
}
DFLASH_2 = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
OLD = (
    (r"^encoder\.fc\.", "fc."),
    (r"^encoder\.output_norm_enc\.", "hidden_norm."),
    (r"^(markov_w[12])\.", r"markov_head.\1."),
    (r"^confidence_proj\.", "confidence_head.proj."),
)


def public_name(key: str) -> str:
    """Our name of a tensor, given without prefixes of wrappers."""
    for old, new in OLD:
        key = re.sub(old, new, key)
    return key


def check_tensors(names: Collection[str], folder: Path) -> None:
    """UserError if these tensors, by our names, are those of a variant, or of no drafter."""
    for pattern, variant in SIGNS:
        if found := next((name for name in sorted(names) if re.search(pattern, name)), None):
            refuse(folder, f"{variant} (it has {found}): not supported")
    if missing := next((name for name in ("fc.weight", "hidden_norm.weight") if name not in names), None):
        some = ", ".join(sorted(names)[:3]) or "nothing"
        refuse(folder, f"no DFlash drafter: it has no {missing}; it has {some}, ...")


def flat(values: Mapping[str, Any], folder: Path) -> Any:
    """A public configuration as a flat `Qwen3Config` with every key that `new_layout` sets. UserError for variants.

    What it does not say is None: `num_target_layers`, and `confidence_head_with_markov`, which the head's width tells.
    """
    values = {key: value for key, value in values.items() if value is not None}
    spark = _check_kind(values, folder)
    if "transformer_layer_config" in values:
        values = _from_speculators(values, folder)
    nested = values.get("dflash_config", {})
    if not isinstance(nested, dict):
        refuse(folder, "dflash_config is no object")
    said = _Said(values, {key: value for key, value in nested.items() if value is not None}, folder)
    _check_supported(said)
    width, heads = whole(values, "hidden_size", folder), whole(values, "num_attention_heads", folder)
    kv_heads = whole(values, "num_key_value_heads", folder, heads)
    size = whole(values, "head_dim", folder)
    if heads % kv_heads or size % 2:
        refuse(folder, f"{heads} heads, {kv_heads} of keys, with head_dim {size} do not fit together")
    vocab, layers = whole(values, "vocab_size", folder), whole(values, "num_hidden_layers", folder)
    if (reduced := said.number("draft_vocab_size", 1, vocab)) != vocab:
        refuse(folder, f"a draft vocabulary of {reduced} tokens: only the whole one, {vocab}, is supported")
    rank, confidence = (
        said.number("markov_rank", 0, 0),
        said.flag("enable_confidence_head", said.flag("use_confidence_head", None)),
    )
    if confidence and not rank:
        refuse(folder, "a confidence head without a Markov head (markov_rank): not supported")
    anchor = _from_anchor(said, spark or rank > 0)
    kinds, window, causal = _attention(said, layers)
    return checked_config(
        Qwen3Config,
        {
            "hidden_size": width,
            "target_hidden_size": whole(values, "target_hidden_size", folder, width),
            "intermediate_size": whole(values, "intermediate_size", folder),
            "num_hidden_layers": layers,
            "num_target_layers": said.number("num_target_layers", 1, None),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": size,
            "hidden_act": values.get("hidden_act", "silu"),
            "vocab_size": vocab,
            "max_position_embeddings": whole(values, "max_position_embeddings", folder, 32768),
            "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
            "rope_parameters": rotary(values, folder),
            "attention_bias": said.flag("attention_bias", False),
            "tie_word_embeddings": False,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": kinds,
            "causal": causal,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
            "block_size": said.number("block_size", 1 if anchor else 2),
            "target_layer_ids": _layer_ids(said),
            "mask_token_id": said.number("mask_token_id", 0),
            "sample_from_anchor": anchor,
            "markov_rank": rank,
            "enable_confidence_head": confidence,
            "confidence_head_with_markov": said.flag("confidence_head_with_markov", None),
        },
        folder,
    )


class _Said:
    """What a configuration says, in `dflash_config` or at the top level; UserError where the two differ."""

    def __init__(self, top: Mapping[str, Any], nested: Mapping[str, Any], folder: Path) -> None:
        self.top, self.nested, self.folder = top, nested, folder

    def get(self, key: str, default: Any = None) -> Any:
        found = [place[key] for place in (self.nested, self.top) if key in place]
        if any(value != found[0] for value in found):
            one, two = found
            refuse(self.folder, f"{key} stands twice, {one} in dflash_config and {two} at the top: make them one")
        return found[0] if found else default

    def number(self, key: str, least: int, default: Any = ...) -> Any:
        """A whole number, `least` or more; UserError for something else, or if it is not there and has no default."""
        value = self.get(key, default)
        if value is ...:
            refuse(self.folder, f"it has no {key}, and engines would guess one: write it into config.json")
        return value if value is default else whole({key: value}, key, self.folder, least=least)

    def flag(self, key: str, default: bool | None) -> Any:
        value = self.get(key, default)
        if value is not default and not isinstance(value, bool):
            refuse(self.folder, f"{key} is neither true nor false")
        return value


def _check_kind(values: Mapping[str, Any], folder: Path) -> bool:
    """Whether it says that it is a DSpark. UserError if it says that it is neither that nor a DFlash."""
    named = values.get("architectures", [])
    named = [str(name) for name in (named if isinstance(named, list) else [named])]
    nested = values.get("dflash_config", {})
    places = (nested if isinstance(nested, dict) else {}, values)
    projector = str(next((place["projector_type"] for place in places if "projector_type" in place), ""))
    kinds = [*named, projector, *(str(values.get(key, "")) for key in ("speculators_model_type", "model_type"))]
    for kind in kinds:
        for pattern, variant in VARIANTS:
            if re.search(pattern, kind):
                refuse(folder, f"{variant} ({kind}): not supported")
    if projector not in ("", "dflash", "dspark"):
        refuse(folder, f"projector_type {projector} is not supported: dflash and dspark are")
    if "transformer_layer_config" in values:
        if (kind := values.get("speculators_model_type")) not in ("dflash", "dspark"):
            refuse(folder, f"a speculators checkpoint of type {kind}: dflash and dspark are supported")
    elif named and named[0] not in ARCHITECTURES:
        refuse(folder, f"{named[0]} is no DFlash drafter that is supported here ({', '.join(ARCHITECTURES[:3])})")
    return any("dspark" in kind.lower() for kind in kinds)


def _check_supported(said: _Said) -> None:
    """UserError for what would need other code."""
    for key in DFLASH_2:
        if said.get(key):
            refuse(said.folder, f"{VARIANTS[0][1]} ({key} {said.get(key)}): not supported")
    for key, plain in NEUTRAL.items():
        if said.get(key, plain) != plain:
            refuse(said.folder, f"{key} {said.get(key)}: only {plain} is supported")
    if said.get("quantization_config") or said.get("compression_config"):
        refuse(said.folder, "a quantised drafter: not supported")
    if (act := said.get("hidden_act", "silu")) not in ACT2FN:
        refuse(said.folder, f"activation {act} is not known")


def _from_speculators(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The flat form of a speculators configuration, which counts layers from 1 and has other defaults."""
    inner = values["transformer_layer_config"]
    if not isinstance(inner, dict):
        refuse(folder, "transformer_layer_config is no object")
    inner = {key: value for key, value in inner.items() if value is not None}
    kinds = inner.get("layer_types", [])
    if SLIDING in kinds and values.get("sliding_window_non_causal", True):
        refuse(folder, "sliding layers that see both ways (sliding_window_non_causal): not supported")
    if "aux_hidden_state_layer_ids" not in values:
        refuse(
            folder, "it has no aux_hidden_state_layer_ids, and engines would guess them: write them into config.json"
        )
    ids = _layers(values["aux_hidden_state_layer_ids"], "aux_hidden_state_layer_ids", folder)
    skip = ("transformer_layer_config", "speculators_config", "aux_hidden_state_layer_ids", "architectures")
    kept = {key: value for key, value in values.items() if key not in skip}
    return {"sample_from_anchor": False, **inner, **kept, "target_layer_ids": [layer - 1 for layer in ids]}


def _from_anchor(said: _Said, spark: bool) -> bool:
    """Whether the first row of a block drafts: in DSpark it does, unless it says otherwise."""
    anchor: bool = said.flag("sample_from_anchor", spark)
    if said.flag("dspark_bonus_anchor", not anchor) == anchor:
        refuse(said.folder, f"sample_from_anchor {anchor} and dspark_bonus_anchor {anchor} contradict each other")
    return anchor


def _layers(ids: Any, key: str, folder: Path) -> list[int]:
    if not (isinstance(ids, list) and ids and all(type(layer) is int for layer in ids)):
        refuse(folder, f"{key} is no list of layers")
    return ids


def _layer_ids(said: _Said) -> list[int]:
    """Target layers, counted from 0. UserError where none are named: engines guess, wrongly for most checkpoints."""
    found = []
    for key, shift in (
        ("target_layer_ids", 0),
        ("dspark_target_layer_ids", 0),
        ("eagle_aux_hidden_state_layer_ids", 1),
    ):
        if (ids := said.get(key)) is not None:
            found.append((key, [layer - shift for layer in _layers(ids, key, said.folder)]))
    if not found:
        refuse(said.folder, "it has no target_layer_ids, and engines would guess them: write them into config.json")
    first, ids = found[0]
    for key, others in found:
        if others != ids:
            refuse(said.folder, f"{first} names the layers {ids} and {key} {others}, counted from 0: make them one")
    if ids != sorted(set(ids)):
        refuse(said.folder, f"target_layer_ids {ids}: engines read every layer once, and in order")
    return ids


def _attention(said: _Said, layers: int) -> tuple[list[str], int | None, bool | None]:
    """(Kind of each layer, window, causal for all layers; None = sliding layers are, full ones are not).

    The rules are vLLM's: `is_causal`, then `dflash_config.causal`, then the kind of the layer.
    """
    folder = said.folder
    window = [said.number(key, 2, None) for key in ("swa_window_size", "sliding_window")]
    sizes = [size for size in window if size is not None]
    kinds = said.get("layer_types")
    if kinds is None and said.flag("use_sliding_window", False) and sizes:
        refuse(folder, "use_sliding_window without layer_types: write into config.json which layers are sliding ones")
    kinds = [FULL] * layers if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        refuse(folder, f"layer_types is {kinds}, expected {layers} times {FULL} or {SLIDING}")
    marks = {key: said.flag(key, None) for key in ("is_causal", "causal")}
    told = {mark for mark in marks.values() if mark is not None}
    if len(told) > 1:
        refuse(folder, f"is_causal {marks['is_causal']} and causal {marks['causal']} contradict each other")
    causal = told.pop() if told else None
    if said.flag("use_swa", False) and SLIDING not in kinds:
        kinds, causal = [SLIDING] * layers, bool(causal)
    if SLIDING not in kinds:
        return kinds, None, causal or None
    if causal is False:
        refuse(folder, "sliding layers that see both ways (not causal): not supported, and engines differ in them")
    if not sizes:
        refuse(folder, "sliding layers without a sliding_window")
    if len(set(sizes)) > 1:
        refuse(folder, f"swa_window_size {sizes[0]} and sliding_window {sizes[1]}: engines would read different ones")
    return kinds, sizes[0], causal if FULL in kinds else None
