"""From a name, a path or an object to a Target. What cannot work is refused here, by name and with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from understudy.core.errors import UserError
from understudy.target.memory import is_out_of_memory, what_fits_of_weights
from understudy.target.probe import probe
from understudy.target.target import Target

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
RECURRENT_KINDS = ("linear_attention", "mamba", "conv", "recurrent", "ssm", "gated_delta")


def load_target(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    check: bool = True,
    **model_kwargs: Any,
) -> Target:
    """A Target from a Hugging Face name, a folder or a loaded model.

    `device` defaults to cuda, then mps, then cpu; with `device_map` transformers places the weights. Further keywords
    (`quantization_config`, ...) go to `from_pretrained`. `check` runs the load-time probe of the plain pass and of rewinding;
    other features are probed when they are first used.
    """
    if isinstance(model, nn.Module):
        if dtype != "auto" or device is not None or device_map is not None or model_kwargs:
            raise UserError("a loaded model stays as it is: dtype, device and device_map go with a name or a folder")
        name = getattr(model.config, "name_or_path", "") or type(model).__name__
        _refuse_recurrent(model.config, name)
        target = Target(model, tokenizer, name)
    else:
        torch_dtype = _dtype(dtype)
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        config = _config(str(model), hub)
        _refuse_recurrent(config, str(model))
        placement = {"device_map": device_map} if device_map is not None else {}
        loaded = _weights(str(model), config, {**hub, "dtype": torch_dtype, **placement, **model_kwargs})
        if device_map is None and getattr(loaded, "hf_quantizer", None) is None:
            loaded = _to(loaded, device or default_device())
        target = Target(loaded, tokenizer or _tokenizer(str(model), hub), str(model))
    if check:
        probe(target, "plain")
        probe(target, "rewind")
    return target


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _config(name: str, hub: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"{name} holds no config.json: give the folder of a Hugging Face model")
    if path.exists():
        _refuse_remote_code(path, hub)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{name} does not exist")
    try:
        return AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read the configuration of {name}: {_first_line(error)}") from error


def _refuse_remote_code(path: Path, hub: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path / 'config.json'}: {_first_line(error)}") from error
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not hub["trust_remote_code"]:
        raise UserError(
            f"{path} carries its own modelling code, which would run here: read it, then pass --trust-remote-code to allow it"
        )


def _weights(name: str, config: Any, kwargs: dict[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    path = Path(name)
    if path.is_dir() and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise UserError(f"{name} holds a configuration but no weights (*.safetensors): is the download complete?")
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    auto = AutoModelForCausalLM if known else AutoModelForImageTextToText
    try:
        model, report = auto.from_pretrained(name, output_loading_info=True, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, MemoryError, SafetensorError) as error:
        if is_out_of_memory(error):
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            raise UserError(what_fits_of_weights(f"loading {name}", size, torch.device("cpu"))) from error
        raise UserError(f"cannot load {name} as a causal language model: {_first_line(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{name} lacks {len(missing)} weights ({missing[0]}, ...), which would be random: is the download complete?"
        )
    loaded: nn.Module = model
    return loaded


def _to(model: nn.Module, device: str) -> nn.Module:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError, MemoryError) as error:
        if is_out_of_memory(error):
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            raise UserError(what_fits_of_weights("loading the model", size, torch.device(device))) from error
        raise UserError(f"cannot put the model on device {device!r}: {_first_line(error)}") from error


def _tokenizer(name: str, hub: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    path = Path(name)
    if path.is_dir() and not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(
            f"{name} holds no tokenizer ({TOKENIZER_FILES[0]}, ...): copy it from the model that it was made from"
        )
    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else _first_line(error)
        raise UserError(f"cannot load the tokenizer of {name}: {reason}") from error


def _refuse_recurrent(config: Any, name: str) -> None:
    """Recurrent state is a running sum: it cannot drop the last rows, so drafts that were rejected would stay in it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = {kind for kind in getattr(text, "layer_types", None) or () if any(k in kind for k in RECURRENT_KINDS)}
    stateful = {
        "mamba",
        "mamba2",
        "rwkv",
        "falcon_mamba",
        "recurrent_gemma",
        "jamba",
        "bamba",
        "zamba",
        "zamba2",
        "xlstm",
    }
    if getattr(text, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder model: only decoder-only language models can be targets")
    if kinds or text.model_type in stateful:
        what = ", ".join(sorted(kinds)) or text.model_type
        raise UserError(
            f"{name} is recurrent ({what}): its state cannot be rewound past rejected drafts, so it cannot be a target"
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
