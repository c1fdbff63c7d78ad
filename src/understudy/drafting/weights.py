"""Reading a drafter's checkpoint, however its maker stored it, and writing ours."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from understudy.assets import drafter_path
from understudy.core.checkpoints import find_checkpoint
from understudy.core.errors import UserError
from understudy.core.files import replacing
from understudy.core.hashes import template_hash
from understudy.target.fingerprint import check_made_for, fingerprint
from understudy.target.target import Target

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
INDICES = (f"{SAFE}.index.json", f"{PICKLED}.index.json")
PREFIXES = ("module.", "draft_model.", "model.")  # of wrappers that a drafter was inside of when it was saved
BUFFERS = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")  # some releases carry them
POINTER = b"version https://git-lfs"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint. UserError if it is not there or no JSON object."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; a drafter's folder has config.json and {SAFE}"
        ) from None
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no configuration")
    return values


def llama_config(values: Mapping[str, Any], folder: Path) -> Any:
    """`values` as a `LlamaConfig`. UserError if transformers refuses them."""
    return checked_config(LlamaConfig, values, folder)


def checked_config(kind: Callable[..., Any], values: Mapping[str, Any], folder: Path) -> Any:
    """`values` as a configuration of transformers' class `kind`. UserError if that refuses them."""
    try:
        return kind(**values)
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise UserError(f"{folder / 'config.json'} is refused: {' '.join(str(error).split())[:200]}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, on the CPU: one safetensors file, several with an index, or torch files of plain tensors.

    UserError if there are none, or if a file is not whole.
    """
    if (folder / SAFE).exists():
        return _file(folder / SAFE)
    for name in INDICES:
        if (folder / name).exists():
            return _indexed(folder, folder / name)
    if (folder / PICKLED).exists():
        return _file(folder / PICKLED)
    raise UserError(f"{folder} holds no weights: neither {SAFE} nor {INDICES[0]} nor {PICKLED} is there")


def renamed(tensors: Mapping[str, Tensor], name: Callable[[str], str], where: Path) -> dict[str, Tensor]:
    """Tensors by `name` of their names without wrappers' prefixes; rotary tables are left out. UserError where two get one name."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith(BUFFERS):
            continue
        new = name(bare(key))
        if new in found:
            raise UserError(f"{where}: two of its tensors are {new}; the checkpoint holds two drafters, or is damaged")
        found[new] = tensor
    return found


def bare(key: str) -> str:
    """The name of a tensor without prefixes of wrappers."""
    while (prefix := next((p for p in PREFIXES if key.startswith(p)), None)) is not None:
        key = key[len(prefix) :]
    return key


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` atomically."""
    with replacing(folder / SAFE) as path:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def fill(model: nn.Module, weights: Mapping[str, Tensor], folder: Path, kind: str, taps: int) -> None:
    """Put `weights` into `model`, all of them and nothing else, in its own dtypes. UserError for what is lost, unknown, or damaged.

    `kind`: what the model is, "an EAGLE-3 drafter"; `taps`: how many its `fc` reads.
    """
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(weights)):
        raise UserError(f"{folder}: the drafter lacks {missing[0]}; it has {', '.join(sorted(weights)[:3])}, ...")
    if unknown := sorted(set(weights) - set(wanted)):
        raise UserError(
            f"{folder}: {unknown[0]} is no weight of {kind} with these flags; refused, because it would be left out"
        )
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            what = f" of {taps} taps" if name == "fc.weight" else ""
            raise UserError(f"{folder}: {name} is {list(tensor.shape)}, expected {list(wanted[name].shape)}{what}")
        if wanted[name].is_floating_point() and not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{folder}: {name} is of {dtype}: a quantised drafter is not supported")
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise UserError(f"{folder}: {name} has values that are not finite; the checkpoint is damaged")
    model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in weights.items()})


M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def check_written(
    model: M, again: M, weights: Mapping[str, Tensor], folder: Path, trial: Callable[[M], Tensor], same: bool
) -> None:
    """UserError unless what was written is `model`: its tensors as read back (`weights`), and what the model `again` made of them says.

    `trial` gives what a model says of some fixed input; `same`: whether both have one shape.
    """
    for name, tensor in model.state_dict().items():
        if name not in weights or not torch.equal(weights[name], tensor.cpu()):
            raise UserError(
                f"{folder}: {name} reads back as something else than was written; the checkpoint is not good"
            )
    parameter = next(model.parameters())
    again.to(parameter.device, parameter.dtype)
    expected, got = trial(model), trial(again)
    apart = float((got - expected).abs().max()) / max(float(expected.abs().max()), 1e-9)
    if not same or apart > 8 * torch.finfo(parameter.dtype).eps:
        raise UserError(
            f"{folder}: what was written drafts otherwise than the drafter in memory; the checkpoint is not good"
        )


def drafter_folder(name: str, path: str | None, target: Target, any_target: bool) -> Path:
    """Where the weights of drafter `name` for `target` are: in `path`, or those of the built-in model. UserError if they are another's."""
    if path is not None:
        folder = find_checkpoint(path)
        check_trained_for(folder, target, f"the drafter in {folder}", any_target)
        return folder
    folder = drafter_path(name)
    if not (folder / "config.json").exists() or (not any_target and made_for(folder) != fingerprint(target)):
        raise UserError(
            f"drafter {name} has no weights for {target.name}: give a checkpoint, {name}:DIR; `understudy train {name}` makes one"
        )
    return folder


def made_for(folder: Path) -> str | None:
    """The fingerprint of the target that a drafter was trained for, where `understudy.json` beside it says so."""
    card = read_card(folder)
    return None if card is None else str(card["target"]["fingerprint"])


def read_card(folder: Path) -> dict[str, Any] | None:
    """`understudy.json` of a checkpoint: what formats cannot say. None if it has none. UserError for one that names no target."""
    try:
        card: dict[str, Any] = json.loads((folder / "understudy.json").read_text(encoding="utf-8"))
        str(card["target"]["fingerprint"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"cannot read {folder / 'understudy.json'}: it is damaged, or no drafter's") from None
    return card


def check_trained_for(
    folder: Path, target: Target, what: str, anyway: bool, insist: str = "any_target=true to draft with it"
) -> None:
    """UserError if the drafter in `folder` was trained for another target, unless `anyway`; a warning if prompts are rendered otherwise.

    `insist`: how the user says `anyway` here, and what happens then.

    A drafter that was trained with another chat template, or another thinking mode, drafts badly, and nothing else shows it. The
    mode is compared where the card names one and `target.thinking` says how prompts are rendered.
    """
    check_made_for(made_for(folder), target, what, anyway, insist)
    text = (read_card(folder) or {}).get("text") or {}
    trained, here = text.get("chat_template"), template_hash(target.tokenizer)
    if trained is not None and here is not None and trained != here:
        warning = "its chat template is not the one of this tokenizer: expect fewer accepted drafts on chats"
        print(f"warning: {what}: {warning}", file=sys.stderr, flush=True)
    mode = text.get("thinking")
    if mode in ("on", "off") and target.thinking not in (None, mode):
        warning = (
            f"it was trained on answers with thinking {mode}, and prompts are rendered with thinking {target.thinking}: where these"
            f" differ, expect fewer accepted drafts; --thinking {mode} renders them as in training"
        )
        print(f"warning: {what}: {warning}", file=sys.stderr, flush=True)


def _indexed(folder: Path, index: Path) -> dict[str, Tensor]:
    """The tensors that an index names, from the files that it names."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        places = None
    if not isinstance(places, dict) or not all(isinstance(p, str) and Path(p).name == p for p in places.values()):
        raise UserError(f"{index} is no index of weights")
    files: dict[str, dict[str, Tensor]] = {}
    for name in sorted(set(places.values())):
        if not (folder / name).exists():
            raise UserError(f"{folder} lacks {name}, which its index names")
        files[name] = _file(folder / name)
    if lost := [key for key, name in places.items() if key not in files[name]]:
        raise UserError(f"{folder / places[lost[0]]} lacks {lost[0]}, which the index says is there")
    return {key: files[name][key] for key, name in places.items()}


def _file(path: Path) -> dict[str, Tensor]:
    loaded = read_tensors(path)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} holds no weights by name")
    return loaded


def read_tensors(path: Path) -> Any:
    """What a file of tensors holds, on the CPU: safetensors, or torch's, of plain data only. UserError if it is damaged."""
    try:
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` there")
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"cannot read the weights in {path}: it is damaged, or more than plain tensors") from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the weights in {path}: {' '.join(str(error).split())[:200]}") from None
