"""DFlash checkpoints on disk. What we write is the public layout of z-lab, with a Markov head that of DSpark: engines load it as it lies.

`config.json` holds the keys that engines read and nothing else. Taps and mask token stand at the top level (transformers, DSpark)
and in `dflash_config` (SGLang, vLLM). A mask token's own embedding is a file beside the weights, where vLLM looks for it. What is read
back beside all that, and what is refused, is in `public`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.files import replacing, write_json
from understudy.drafters.dflash.layout import causal, taps_of, unfit_masks
from understudy.drafters.dflash.model import DFlashModel
from understudy.drafters.dflash.public import PLAIN, SPARK, check_tensors, flat, public_name
from understudy.drafting.objective import Batch
from understudy.drafting.weights import (
    check_written,
    fill,
    read_config,
    read_tensors,
    read_weights,
    renamed,
    write_weights,
)
from understudy.target.target import Target

WRITTEN = (
    *("hidden_size", "target_hidden_size", "intermediate_size", "num_hidden_layers", "num_target_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "vocab_size", "max_position_embeddings"),
    *("rms_norm_eps", "attention_bias", "tie_word_embeddings", "layer_types", "sliding_window", "use_sliding_window"),
    *("block_size", "target_layer_ids", "mask_token_id", "sample_from_anchor"),
)
HEADS = ("markov_rank", "enable_confidence_head", "confidence_head_with_markov")
MASK = "mask_embedding.pt"
ROWS = 6  # of the text that compares a written drafter with the one in memory


def write_drafter(model: DFlashModel, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, and compare what they read back as with `model`: UserError if it differs.

    Embeddings and head that are the target's own are left out: engines share them.
    """
    weights = model.state_dict()
    mask = weights.pop("mask_embedding", None)
    write_json(folder / "config.json", _config(model))
    write_weights(folder, weights)
    if mask is None:
        (folder / MASK).unlink(missing_ok=True)  # of a drafter that lay here before
    else:
        with replacing(folder / MASK) as path:
            torch.save({"embedding": mask.detach().cpu().clone(), "mask_token_id": model.config.mask_token_id}, path)
    _check_written(model, folder)


def read_drafter(folder: Path, target: Target) -> DFlashModel:
    """The drafter in `folder`, in fp32 on the target's device. UserError where it is none, or none for this target."""
    layout = read_layout(folder, target)
    weights = _tensors(folder, layout)
    if "mask_embedding" not in weights and layout.mask_token_id in unfit_masks(target):
        print(
            f"warning: {folder}: its mask token {layout.mask_token_id} is padding or a stop token of {target.name}",
            file=sys.stderr,
            flush=True,
        )
    shared = {"embed_tokens.weight": target.embed_tokens, "lm_head.weight": target.model.get_output_embeddings()}
    for name, module in shared.items():
        own = weights.get(name)
        if own is not None and own.shape == module.weight.shape and torch.equal(own.to(module.weight), module.weight):
            del weights[name]  # shared instead: a copy would cost as much as the target's
    if "lm_head.weight" in weights:
        raise UserError(
            f"{folder}: it has a head of its own (lm_head.weight): only the head of {target.name} is supported"
        )
    model = _model(layout, weights, target.embed_tokens.weight, shared["lm_head.weight"].weight, folder)
    return model.to(target.device)


def read_layout(folder: Path, target: Target) -> Any:
    """The configuration in `folder` as a flat one of ours. UserError for variants that are not supported, or another target."""
    layout = flat(read_config(folder), folder)
    if layout.vocab_size != target.vocab_size:
        raise UserError(
            f"{folder}: made for a vocabulary of {layout.vocab_size} tokens, {target.name} has {target.vocab_size}"
        )
    for what, width in (("states", layout.target_hidden_size), ("embeddings", layout.hidden_size)):
        if width != target.hidden_size:
            raise UserError(f"{folder}: made for {what} of width {width}, {target.name} has {target.hidden_size}")
    layout.num_target_layers = layout.num_target_layers or target.layers
    if layout.num_target_layers != target.layers:
        raise UserError(
            f"{folder}: made for a target of {layout.num_target_layers} layers, {target.name} has {target.layers}"
        )
    if wrong := [tap for tap in taps_of(layout) if not 1 <= tap < target.layers]:
        raise UserError(
            f"{folder}: reads layer {wrong[0] - 1}, counted from 0; those of {target.name} that can be read are 0 to"
            f" {target.layers - 2}"
        )
    if layout.mask_token_id >= layout.vocab_size:
        raise UserError(
            f"{folder}: its mask token {layout.mask_token_id} is no row of an embedding of {layout.vocab_size}"
        )
    return layout


def shape(model: DFlashModel) -> dict[str, Any]:
    """What weights mean, as `config.json` says it: sizes, taps, block, masks, positions. Much of it no weight tells."""
    heads = HEADS if model.config.markov_rank or model.config.enable_confidence_head else ()
    return {
        **{key: getattr(model.config, key) for key in (*WRITTEN, *heads)},
        "causal": causal(model.config),
        "rope_parameters": dict(model.config.rope_parameters),
    }


def _config(model: DFlashModel) -> dict[str, Any]:
    config, values = model.config, shape(model)
    rope, dtype = values["rope_parameters"], str(model.dtype).removeprefix("torch.")
    nested = {key: values[key] for key in ("mask_token_id", "target_layer_ids")}
    sees = set(values.pop("causal"))
    if len(sees) == 1:  # it holds for all layers: where they differ, engines go by their types
        nested["causal"] = sees == {True}
    if sees == {True} and "full_attention" in config.layer_types:
        values["is_causal"] = True  # SGLang asks for nothing else
    if config.sample_from_anchor:
        nested["sample_from_anchor"] = True
    if "markov_rank" in values:
        values["markov_head_type"] = "vanilla"
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": [SPARK if config.markov_rank else PLAIN],
        "model_type": "qwen3",
        **values,
        "dflash_config": nested,
        "rope_theta": rope["rope_theta"],  # older readers look here, newer ones at rope_parameters
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _tensors(folder: Path, layout: Any) -> dict[str, Tensor]:
    """The tensors in `folder` by our names. UserError for those of another kind of drafter."""
    weights = renamed(read_weights(folder), public_name, folder)
    check_tensors(weights, folder)
    for name in ("d2t", "t2d"):  # at the whole vocabulary some makers write them all the same; engines read d2t only
        maps = weights.pop(name, None)
        if name == "d2t" and maps is not None and bool(maps.any()):
            raise UserError(f"{folder}: d2t moves tokens: a reduced draft vocabulary is not supported")
    if "mask_embedding" in weights:
        raise UserError(f"{folder}: mask_embedding lies among the weights, where engines drop it: its place is {MASK}")
    if (folder / MASK).exists():
        weights["mask_embedding"] = _mask(folder / MASK, layout)
    return weights


def _mask(path: Path, layout: Any) -> Tensor:
    """The embedding [H] of a mask token that is no row of the target's, as vLLM reads it."""
    found = read_tensors(path)
    token = layout.mask_token_id
    if isinstance(found, dict):
        token, found = found.get("mask_token_id", token), found.get("embedding")
    if not isinstance(found, Tensor):
        raise UserError(f"{path} holds no embedding")
    if token != layout.mask_token_id:
        raise UserError(f"{path} is for mask token {token}, and config.json says {layout.mask_token_id}")
    return found.reshape(-1)


def _model(layout: Any, weights: dict[str, Tensor], embedding: Tensor, head: Tensor, folder: Path) -> DFlashModel:
    """A drafter of this shape with these weights, in fp32 on the CPU; `embedding`, `head` [V, H] are what it shares."""
    proj = weights.get("confidence_head.proj.weight")
    if layout.enable_confidence_head is None:
        layout.enable_confidence_head = proj is not None
    if layout.confidence_head_with_markov is None:
        layout.confidence_head_with_markov = proj is not None and proj.shape[-1] != layout.hidden_size
    with torch.random.fork_rng(devices=[]):  # saving may not change what training draws next
        model = DFlashModel(layout, embedding, head, "embed_tokens.weight" in weights, "mask_embedding" in weights)
    fill(model, weights, folder, "a DFlash drafter", len(model.taps))
    return model


def _check_written(model: DFlashModel, folder: Path) -> None:
    """Read what was written: all tensors, the shape, and what one block says have to be those of `model`."""
    layout = flat(read_config(folder), folder)
    weights = _tensors(folder, layout)
    again = _model(layout, weights, model._shared[0], model._shared[1], folder)
    check_written(model, again, weights, folder, _trial, shape(again) == shape(model))


def _trial(model: DFlashModel) -> Tensor:
    """What two blocks over fixed random taps and tokens say, in fp32: corrected logits, and confidence."""
    generator = torch.Generator().manual_seed(0)
    device, width = model.fc.weight.device, len(model.taps) * model.config.target_hidden_size
    ids = torch.randint(model.config.vocab_size, (1, ROWS), generator=generator)
    taps = torch.randn(1, ROWS, width, generator=generator).to(device, model.dtype)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), torch.arange(ROWS)[None])
    anchors = torch.tensor([[1, ROWS - 1]], device=device)
    states = model.blocks(taps, batch.to(device), anchors, model.config.block_size)[0, :, model.first :]
    said = [model.logits(states)]
    before = torch.randint(model.config.vocab_size, states.shape[:2], generator=generator).to(device)
    if model.markov_head is not None:
        embedded = model.markov_head.embed(before)
        said[0] = said[0] + model.markov_head.correction(embedded)
    if model.confidence_head is not None:
        said.append(model.confidence_head(states, embedded)[..., None])  # there is none without a Markov head
    return torch.cat([part.float() for part in said], -1)
