"""Reading the weights of a drafter's checkpoint, however its maker stored them, and writing ours."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.files import replacing

SAFE, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint. UserError if it is not there or no JSON object."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; a drafter's folder has config.json and {SAFE}") from None
    except ValueError:
        raise UserError(f"{path} is not JSON") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no configuration")
    return values


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name: one safetensors file, several with an index, or a torch file of plain tensors."""
    try:
        if (folder / SAFE).exists():
            return load_file(folder / SAFE)
        if (folder / INDEX).exists():
            places: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards = {name: load_file(folder / name) for name in sorted(set(places.values()))}
            return {key: shards[name][key] for key, name in places.items()}
        loaded = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        missing = Path(error.filename).name if error.filename else SAFE
        if missing != PICKLED:
            raise UserError(f"{folder} lacks {missing}, which its index names") from None
        raise UserError(f"{folder} holds no weights: neither {SAFE} nor {INDEX} nor {PICKLED} is there") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the weights in {folder}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{folder / PICKLED} holds no weights")
    return loaded


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` atomically."""
    with replacing(folder / SAFE) as path:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def made_for(folder: Path) -> str | None:
    """The fingerprint of the target that a drafter was trained for, where `understudy.json` beside it says so."""
    try:
        card = json.loads((folder / "understudy.json").read_text(encoding="utf-8"))
        return str(card["target"]["fingerprint"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"cannot read {folder / 'understudy.json'}: it is damaged, or no drafter's") from None
