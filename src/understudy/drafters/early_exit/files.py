"""Kangaroo adapters on disk: the released layout, `config.json` and `pytorch_model.bin`, and the same tensors as safetensors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from understudy.core.errors import UserError
from understudy.core.files import replacing, write_json
from understudy.drafters.early_exit.adapter import Adapter
from understudy.target.target import Target

SAFE, RELEASED = "model.safetensors", "pytorch_model.bin"
BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")  # some releases carry them
KEYS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "rms_norm_eps", "vocab_size")


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
    weights = {k: v.float() for k, v in _weights(folder).items() if not k.endswith(BUFFERS)}
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


def made_for(folder: Path) -> str | None:
    """The fingerprint of the target that the adapter was trained for, where `understudy.json` beside it says so."""
    try:
        card = json.loads((folder / "understudy.json").read_text(encoding="utf-8"))
        return str(card["target"]["fingerprint"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"cannot read {folder / 'understudy.json'}: it is damaged, or no drafter's") from None


def write_adapter(adapter: Adapter, folder: Path, released: bool = False) -> None:
    """Write `config.json` and the weights; with `released` also `pytorch_model.bin`, which Kangaroo's own code loads."""
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in adapter.state_dict().items()}
    config = adapter.config.to_dict() | {"architectures": ["KangarooAdapter"]}
    # transformers 5 keeps theta inside rope_parameters; older readers look at the top level
    config["rope_theta"] = adapter.config.rope_parameters["rope_theta"]
    write_json(folder / "config.json", config)
    with replacing(folder / SAFE) as path:
        save_file(tensors, path, metadata={"format": "pt"})
    if released:
        with replacing(folder / RELEASED) as path:
            torch.save(tensors, path)


def _config(folder: Path) -> LlamaConfig:
    try:
        values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise UserError(f"cannot read the adapter's {folder / 'config.json'}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{folder / 'config.json'} is not JSON") from None
    if lost := [key for key in KEYS[:2] if key not in values]:
        raise UserError(f"{folder / 'config.json'} is no adapter's configuration: it has no {lost[0]}")
    return LlamaConfig(**values)


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        if (folder / SAFE).exists():
            return load_file(folder / SAFE)
        loaded = torch.load(folder / RELEASED, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no adapter: neither {SAFE} nor {RELEASED} is there") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise UserError(f"cannot read the adapter in {folder}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise UserError(f"{folder / RELEASED} holds no weights")
    return loaded
