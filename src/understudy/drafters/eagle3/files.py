"""EAGLE-3 checkpoints on disk. What we write is the public layout of SafeAILab and SGLang, which raw vLLM loads as it lies.

`config.json` holds the keys that engines read and nothing else; every flag stands there, because their defaults differ. What is read
back beside it, and what is refused, is in `public`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.drafters.eagle3.layout import FLAGS, TAPS, default_taps, taps_of
from understudy.drafters.eagle3.model import Eagle3Model
from understudy.drafters.eagle3.public import ARCHITECTURES, check_tensors, flat, public_name
from understudy.drafters.eagle3.vocab import check_inverse, ids_of, membership
from understudy.drafting.objective import Batch
from understudy.drafting.weights import check_written, fill, read_config, read_weights, renamed, write_weights
from understudy.target.target import Target

WRITTEN = (
    *("hidden_size", "target_hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "vocab_size", "draft_vocab_size", "max_position_embeddings"),
    *("rms_norm_eps", "attention_bias", "mlp_bias", "bias", "tie_word_embeddings", *FLAGS, TAPS),
)
ROWS = 4  # of the pass that compares a written drafter with the one in memory


def write_drafter(model: Eagle3Model, folder: Path) -> None:
    """Write `config.json` and `model.safetensors`, and compare what they read back as with `model`: UserError if it differs.

    Embeddings that are the target's own are left out: engines share them.
    """
    write_json(folder / "config.json", _config(model))
    write_weights(folder, model.state_dict())
    _check_written(model, folder)


def read_drafter(folder: Path, target: Target) -> Eagle3Model:
    """The drafter in `folder`, in fp32 on the target's device. UserError where it is none, or none for this target."""
    layout = read_layout(folder, target)
    weights = _tensors(folder)
    embedding = target.embed_tokens.weight
    own = weights.get("embed_tokens.weight")
    if own is not None and own.shape == embedding.shape and torch.equal(own.to(embedding), embedding):
        del weights["embed_tokens.weight"]  # shared instead: a copy would cost as much as the target's
    elif own is None and layout.hidden_size != target.hidden_size:
        raise UserError(
            f"{folder}: width {layout.hidden_size} without embeddings of its own; {target.name} has {target.hidden_size}"
        )
    if "lm_head.weight" not in weights and (layout.draft_vocab_size, layout.hidden_size) == tuple(embedding.shape):
        weights["lm_head.weight"] = target.model.get_output_embeddings().weight.detach().cpu()  # engines take it, too
    return _model(layout, weights, embedding, folder).to(target.device)


def read_layout(folder: Path, target: Target) -> Any:
    """The configuration in `folder` as a flat one of ours. UserError for variants that are not supported, or another target."""
    layout = flat(read_config(folder), folder)
    if layout.vocab_size != target.vocab_size:
        raise UserError(
            f"{folder}: made for a vocabulary of {layout.vocab_size} tokens, {target.name} has {target.vocab_size}"
        )
    if layout.target_hidden_size != target.hidden_size:
        raise UserError(
            f"{folder}: made for states of width {layout.target_hidden_size}, {target.name} has {target.hidden_size}"
        )
    if getattr(layout, TAPS) is None:
        try:
            setattr(layout, TAPS, default_taps(target.layers))
        except UserError:
            raise UserError(
                f"{folder}: names no taps, and a target of {target.layers} layers has no default ones"
            ) from None
    if wrong := [tap for tap in taps_of(layout) if not 0 <= tap < target.layers]:
        raise UserError(
            f"{folder}: reads tap {wrong[0]}; those of {target.name} are 0 (embeddings) to {target.layers - 1}"
        )
    return layout


def shape(model: Eagle3Model) -> dict[str, Any]:
    """What weights mean, as `config.json` says it: sizes, flags, taps, positions. Much of it no weight tells."""
    return {
        **{key: getattr(model.config, key) for key in WRITTEN},
        "rope_parameters": dict(model.config.rope_parameters),
    }


def _config(model: Eagle3Model) -> dict[str, Any]:
    config, rope = model.config, dict(model.config.rope_parameters)
    dtype = str(model.dtype).removeprefix("torch.")
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": [ARCHITECTURES[0]],
        "model_type": "llama",
        **shape(model),
        "num_aux_hidden_states": len(model.taps),
        "eagle_config": {
            "use_aux_hidden_state": True,
            TAPS: [tap - 1 for tap in model.taps],  # SGLang counts layers from 0
            "norm_before_fc": config.norm_before_fc,
        },
        "rope_theta": rope["rope_theta"],  # older readers look here, newer ones at rope_parameters
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in `folder` by our names. UserError for those of another kind of drafter."""
    weights = renamed(read_weights(folder), public_name, folder)
    check_tensors(weights, folder)
    return weights


def _model(layout: Any, weights: dict[str, Tensor], embedding: Tensor, folder: Path) -> Eagle3Model:
    """A drafter of this shape with these weights, in fp32 on the CPU; `embedding` [V, H] is what it shares if it has none."""
    with torch.random.fork_rng(devices=[]):  # saving may not change what training draws next
        model = Eagle3Model(layout, embedding, own_embedding="embed_tokens.weight" in weights)
    wanted = model.state_dict()
    _check_maps(wanted, weights, folder)
    fill(model, weights, folder, "an EAGLE-3 drafter", len(model.taps))
    return model


def _check_maps(wanted: dict[str, Tensor], weights: dict[str, Tensor], folder: Path) -> None:
    """Check the draft vocabulary, and complete it: t2d follows from d2t. UserError for a map that is missing or cannot be meant."""
    d2t, t2d = weights.get("d2t"), weights.get("t2d")
    if "d2t" not in wanted:  # all tokens: some makers write maps all the same, and engines read d2t only
        if d2t is not None and bool(d2t.any()):
            raise UserError(
                f"{folder}: d2t moves tokens, and the draft vocabulary is the whole one; draft_vocab_size is wrong"
            )
        weights.pop("d2t", None), weights.pop("t2d", None)
        return
    size, vocab = len(wanted["d2t"]), len(wanted["t2d"])
    if d2t is None:
        raise UserError(f"{folder}: {size} draft tokens without d2t, which says which; the checkpoint is incomplete")
    for name, tensor in (("d2t", d2t), ("t2d", t2d)):
        if tensor is not None and (tensor.shape != wanted[name].shape or tensor.is_floating_point()):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{folder}: {name} is {list(tensor.shape)} of {kind}, expected {list(wanted[name].shape)} of whole numbers"
            )
    ids = ids_of(d2t, vocab, str(folder))
    if t2d is not None:
        check_inverse(ids, t2d, str(folder))
        return
    for what, values in (("all zeros", torch.zeros(size)), ("0, 1, 2, ..., ids and not offsets", torch.arange(size))):
        if torch.equal(d2t.float(), values.float()):
            raise UserError(f"{folder}: d2t is {what}, and no t2d bears it out: a map that was never filled in")
    weights["t2d"] = membership(ids, vocab)


def _check_written(model: Eagle3Model, folder: Path) -> None:
    """Read what was written: all tensors, taps, and the logits of two draft steps have to be those of `model`."""
    weights = _tensors(folder)
    again = _model(flat(read_config(folder), folder), weights, model._shared[0], folder)
    check_written(model, again, weights, folder, _trial, again.taps == model.taps)


def _trial(model: Eagle3Model) -> Tensor:
    """Logits [2, ROWS, V_d] in fp32 of two draft steps over random taps and tokens, the same for every drafter of this shape."""
    generator = torch.Generator().manual_seed(0)
    device, width = model.fc.weight.device, len(model.taps) * model.config.target_hidden_size
    ids = torch.randint(model.config.vocab_size, (1, ROWS), generator=generator)
    taps = torch.randn(1, ROWS, width, generator=generator).to(device, model.dtype)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), torch.arange(ROWS)[None]).to(
        device
    )
    return torch.cat([model.logits(out) for out in model.unroll(taps, batch, 2)]).float()
