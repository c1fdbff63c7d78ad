"""Two LoRAs on one model: `lora_S` on the first E layers, for the drafter only, and `lora_D` on the rest, for the verifier.

    adapters = inject_lora(target, exit_layer=2)
    drafter = adapters.drafter(steps=6, threshold=0.6)     # drafts with lora_S; every layer of the target verifies
    adapters.save(folder)                                  # folder/lora_S and folder/lora_D, each as peft writes an adapter

`lora_S` stands in a copy of the module tree of layers [0, E), so whatever it learns, the target stays what it was. `lora_D` stands in
the model itself: it changes it as soon as its B is not zero. Parts of the target that were built before share the bare layers and
would never see it; `inject_lora` therefore drops them, and keeps one, the frozen verifier that `lora_D` is held to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from understudy.core.errors import UserError
from understudy.core.files import replacing
from understudy.drafters.early_exit.config import DVIConfig
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafters.early_exit.shallow import ShallowLoRA
from understudy.target.probe import probe
from understudy.target.stages import Stage
from understudy.target.target import Target

SHALLOW, DEEP = "lora_S", "lora_D"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
PREFIX = "base_model.model."  # of every tensor in peft's files: the names under which a PeftModel holds the model


def inject_lora(
    base_model: Target | nn.Module,
    exit_layer: int,
    rank: int = 8,
    alpha: float = 16.0,
    deep: bool = True,
    seed: int = 0,
) -> DualLoRA:
    """Put `lora_S` on layers 1 to `exit_layer` (counted from 1) and, with `deep`, `lora_D` on all later ones.

    Both are on every linear map of their layers, in fp32, and begin with B = 0: as no change at all. All other weights of the model
    are marked as not trainable. UserError for an exit layer that leaves no verifier, a family that cannot be split there, layers
    without linear maps, a model that already has adapters, and where peft is not installed.
    """
    target = base_model if isinstance(base_model, Target) else Target(base_model)
    if not 0 < exit_layer < target.layers:
        raise UserError(
            f"exit_layer {exit_layer} leaves nothing to verify with: {target.name or 'the model'} has {target.layers} layers"
            if exit_layer > 0
            else f"exit_layer {exit_layer} leaves nothing to draft with: give 1 or more"
        )
    if any("lora_" in name for name, _ in target.model.named_parameters()):
        raise UserError("the model already carries a LoRA: load it anew, or merge the LoRA into it")
    probe(target, "split", exit_layer)
    return DualLoRA(target, exit_layer, rank, alpha, deep, seed)


class DualLoRA(nn.Module):
    """Both adapters of a target. Made by `inject_lora`."""

    def __init__(self, target: Target, exit_layer: int, rank: int, alpha: float, deep: bool, seed: int) -> None:
        super().__init__()
        self._target = [target]  # in a list: these are the user's modules, not ours
        self.exit_layer, self.rank, self.alpha = exit_layer, rank, alpha
        self.names = (SHALLOW, DEEP) if deep else (SHALLOW,)
        target.model.requires_grad_(False)
        self._frozen = [Stage(target.decoder, exit_layer, target.layers)]  # built before lora_D: it never has it
        decoder = next(name for name, module in target.model.named_modules() if module is target.decoder)
        self._layers_name = f"{decoder}.layers"
        self._maps = {name: self._linear_maps(name) for name in self.names}
        with torch.random.fork_rng():  # of all devices: manual_seed seeds them all
            torch.manual_seed(seed)
            self.shallow = ShallowLoRA(target, exit_layer, rank, alpha)
            self.deep = nn.ParameterDict(self._inject_deep() if deep else {})

    def _span(self, name: str) -> tuple[int, int]:
        """The layers of an adapter: from the first one (counted from 0) to before the last one."""
        return (0, self.exit_layer) if name == SHALLOW else (self.exit_layer, self.target.layers)

    def _linear_maps(self, name: str) -> list[str]:
        """The names of the linear maps in its layers, as long as no LoRA stands on them."""
        first, end = self._span(name)
        layers = self.target.decoder.layers[first:end]
        maps = sorted({n.rsplit(".", 1)[-1] for n, m in layers.named_modules() if isinstance(m, nn.Linear)})
        if not maps:
            raise UserError(f"{type(self.target.model).__name__} has no plain linear layers that a LoRA could stand on")
        return maps

    def _inject_deep(self) -> dict[str, nn.Parameter]:
        from peft import inject_adapter_in_model

        target = self.target
        inject_adapter_in_model(self._peft_config(DEEP), target.model, adapter_name=DEEP)
        target.rebuild()  # stages built before share the bare layers
        found = {name: p for name, p in target.model.named_parameters() if f".{DEEP}." in name}
        for parameter in found.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return {name.replace(".", "/"): p for name, p in found.items()}  # a ParameterDict takes no dots

    def _peft_config(self, name: str) -> Any:
        """peft's own description of an adapter: which maps of which layers. Read by whoever loads the files."""
        from peft import LoraConfig

        first, end = self._span(name)
        which = "|".join(map(str, range(first, end)))
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # peft scales by it, whole or not
            target_modules=rf"{re.escape(self._layers_name)}\.(?:{which})\.(?:.*\.)?(?:{'|'.join(self._maps[name])})",
            lora_dropout=0.0,
            base_model_name_or_path=self.target.name or None,
        )

    @property
    def target(self) -> Target:
        return self._target[0]

    @property
    def frozen(self) -> Stage:
        """Layers [E, L) as they are without `lora_D`, however far it has moved."""
        return self._frozen[0]

    def drafter(self, steps: int = 6, threshold: float = 0.6) -> ExitDrafter:
        """The drafter of `lora_S`. Its proposals carry the states that the head read."""
        config = DVIConfig(
            exit_layer=self.exit_layer,
            threshold=threshold,
            steps=steps,
            shallow_rank=self.rank,
            shallow_alpha=self.alpha,
        )
        return ExitDrafter(self.target, config, shallow=self.shallow, learning=config)

    def trainable(self, name: str) -> list[nn.Parameter]:
        """A and B of one adapter."""
        return list(self.shallow.lora.values() if name == SHALLOW else self.deep.values())

    def get_peft_model_state_dict(self, name: str) -> dict[str, Tensor]:
        """The tensors of one adapter by the names that they have in the model: `...layers.0.self_attn.q_proj.lora_A.weight`.

        They are the trained tensors themselves; copy what is kept.
        """
        from peft import get_peft_model_state_dict

        module: nn.Module = self.shallow.layers if name == SHALLOW else self.target.model
        state = get_peft_model_state_dict(module, adapter_name=name, save_embedding_layers=False)
        return {f"{self._layers_name}.{key}" if name == SHALLOW else key: tensor for key, tensor in state.items()}

    def save(self, folder: Path) -> None:
        """Write `folder/lora_S` and `folder/lora_D`. `PeftModel.from_pretrained(model, folder/lora_D)` reads them too."""
        for name in self.names:
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            config = self._peft_config(name)
            config.inference_mode = True
            config.save_pretrained(str(place))
            state = self.get_peft_model_state_dict(name)
            tensors = {PREFIX + key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
            with replacing(place / WEIGHTS) as path:
                save_file(tensors, path, metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, in place. UserError if something is missing, damaged or of another shape; then nothing changed."""
        read = {name: self._read(folder / name, name) for name in self.names}
        for name, tensors in read.items():
            for key, tensor in self.get_peft_model_state_dict(name).items():
                tensor.copy_(tensors[PREFIX + key])

    def _read(self, place: Path, name: str) -> dict[str, Tensor]:
        config = _adapter_config(place)
        for key, ours in (("r", self.rank), ("lora_alpha", self.alpha)):
            if config.get(key) != ours:
                raise UserError(
                    f"{place} has {key} {config.get(key)}, this run {ours}: give the options it was trained with"
                )
        try:
            tensors = load_file(place / WEIGHTS)
        except FileNotFoundError:
            raise UserError(f"{place} holds no adapter: {WEIGHTS} is not there") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot read {place / WEIGHTS}: {' '.join(str(error).split())[:200]}") from None
        _check(tensors, {PREFIX + k: v for k, v in self.get_peft_model_state_dict(name).items()}, place)
        return tensors


def _adapter_config(place: Path) -> dict[str, Any]:
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the adapter's {place / CONFIG}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{place / CONFIG} is not JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{place / CONFIG} is no adapter's configuration")
    return config


def _check(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], place: Path) -> None:
    if differing := sorted(tensors.keys() ^ wanted.keys()):
        whose = "lacks" if differing[0] in wanted else "also has"
        raise UserError(f"{place} {whose} {differing[0]}: it belongs to another model or exit layer")
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            raise UserError(f"{place}: {key} is {list(tensor.shape)}, expected {list(wanted[key].shape)}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"{place}: {key} holds values that are no numbers")
