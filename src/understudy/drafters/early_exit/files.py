"""Kangaroo adapters on disk: the released layout, `config.json` and `pytorch_model.bin`, and the same tensors as safetensors."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig

from understudy.core.errors import UserError
from understudy.core.files import replacing, write_json
from understudy.drafters.early_exit.adapter import Adapter
from understudy.drafting.weights import PICKLED, llama_config, read_config, read_weights, renamed, write_weights
from understudy.target.target import Target

NEEDED = ("hidden_size", "num_attention_heads")


def read_adapter(folder: Path, target: Target) -> Adapter:
    """The adapter in `folder`, in fp32 and on the target's device. UserError where it is none, or none for this target."""
    config = _config(folder)
    if config.num_hidden_layers != 1:
        raise UserError(f"{folder}: an adapter has one layer, this one has {config.num_hidden_layers}")
    if config.hidden_size != target.hidden_size:
        raise UserError(
            f"{folder}: this adapter is for hidden size {config.hidden_size}, {target.name} has {target.hidden_size}"
        )
    adapter = Adapter(config)
    weights = {key: x.float() for key, x in renamed(read_weights(folder), str, folder).items()}
    wanted = adapter.state_dict()
    if missing := sorted(set(wanted) - set(weights)):
        raise UserError(f"{folder}: the adapter lacks {missing[0]}; it has {', '.join(sorted(weights)[:3])}, ...")
    if unknown := sorted(set(weights) - set(wanted)):
        raise UserError(f"{folder}: {unknown[0]} is no weight of a Kangaroo adapter")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(f"{folder}: {name} is {list(tensor.shape)}, expected {list(wanted[name].shape)}")
    adapter.load_state_dict(weights)
    return adapter.requires_grad_(False).to(target.device)


def exit_layer_of(folder: Path) -> int | None:
    """The exit layer that the adapter was trained at, where its config says so (released ones do not)."""
    layer = getattr(_config(folder), "exit_layer", None)
    return None if layer is None else int(layer)


def write_adapter(adapter: Adapter, folder: Path, released: bool = False) -> None:
    """Write `config.json` and the weights; with `released` also `pytorch_model.bin`, which Kangaroo's own code loads."""
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in adapter.state_dict().items()}
    config = adapter.config.to_dict() | {"architectures": ["KangarooAdapter"]}
    # transformers 5 keeps theta inside rope_parameters; older readers look at the top level
    config["rope_theta"] = adapter.config.rope_parameters["rope_theta"]
    write_json(folder / "config.json", config)
    write_weights(folder, tensors)
    if released:
        with replacing(folder / PICKLED) as path:
            torch.save(tensors, path)


def _config(folder: Path) -> LlamaConfig:
    values = read_config(folder)
    if lost := [key for key in NEEDED if key not in values]:
        raise UserError(f"{folder / 'config.json'} is no adapter's configuration: it has no {lost[0]}")
    return llama_config(values, folder)
