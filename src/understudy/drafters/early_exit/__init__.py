"""`early-exit`, `kangaroo` and `dvi`: the target drafts for itself from its own first layers."""

from __future__ import annotations

from pathlib import Path

import torch

from understudy.core.checkpoints import find_checkpoint
from understudy.core.errors import UserError
from understudy.drafters.early_exit.adapter import Adapter
from understudy.drafters.early_exit.config import DVIConfig, ExitConfig, adapter_folder
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafters.early_exit.files import exit_layer_of, read_adapter
from understudy.drafters.early_exit.head import DrafterHead
from understudy.drafters.early_exit.objective import ExitObjectiveConfig, train_kangaroo
from understudy.drafters.early_exit.saved import as_trained, find, load_shallow, read_saved
from understudy.drafters.early_exit.shallow import ShallowLoRA
from understudy.drafting.lora import load_lora_state_dict
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import Spec
from understudy.drafting.weights import check_trained_for
from understudy.target.fingerprint import check_made_for
from understudy.target.probe import probe
from understudy.target.target import Target


def _checked(config: ExitConfig, target: Target, name: str) -> None:
    if config.exit_layer >= target.layers:
        raise UserError(
            f"drafter {name}: exit_layer {config.exit_layer} leaves nothing to verify with: the target has {target.layers} layers"
        )
    probe(target, "split", config.exit_layer)


def build_exit(config: ExitConfig, target: Target, path: str | None) -> ExitDrafter:
    if (folder := adapter_folder(config, "early-exit", path)) is not None:
        raise UserError(
            f"drafter early-exit has no adapter (got {folder}): --drafter kangaroo is the one that takes it"
        )
    _checked(config, target, "early-exit")
    return ExitDrafter(target, config)


def _with_adapter(config: ExitConfig, target: Target, name: str, path: str | None) -> tuple[ExitConfig, Adapter | None]:
    """The adapter of the options, and the options with the exit layer that it was trained at."""
    folder = adapter_folder(config, name, path)
    if folder is None:
        _checked(config, target, name)
        return config, None
    folder = find_checkpoint(folder)
    trained = exit_layer_of(folder)
    if trained is not None and trained != config.exit_layer:
        if "exit_layer" in config.model_fields_set:
            raise UserError(f"{folder} was trained at exit layer {trained}, not {config.exit_layer}")
        config = config.model_copy(update={"exit_layer": trained})
    _checked(config, target, name)
    check_trained_for(folder, target, f"the adapter in {folder}", config.any_target)
    return config, read_adapter(folder, target)


def build_kangaroo(config: ExitConfig, target: Target, path: str | None) -> ExitDrafter:
    config, adapter = _with_adapter(config, target, "kangaroo", path)
    return ExitDrafter(target, config, adapter)


def build_dvi(config: DVIConfig, target: Target, path: str | None) -> ExitDrafter:
    weights = config.load_lora if path is None else Path(path)
    if path is not None and config.load_lora not in (None, weights):
        raise UserError(f"drafter dvi: {path} and load_lora {config.load_lora} are two checkpoints; give one")
    saved = None
    if weights is not None:
        weights = find(weights)
        saved = read_saved(weights)
        config = as_trained(config, saved.settings, weights)
        check_made_for(saved.target, target, str(weights), config.any_target)
    if config.shallow_rank and config.adapter_path != "none":
        raise UserError("drafter dvi: an adapter reads the target's own states, which shallow_rank replaces; give one")
    exits, adapter = _with_adapter(config, target, "dvi", None)
    assert isinstance(exits, DVIConfig)
    head = DrafterHead(target, exits.rank, exits.alpha, torch.Generator().manual_seed(exits.lora_seed))
    shallow = None
    if exits.shallow_rank:
        with torch.random.fork_rng():  # peft draws from the global streams
            torch.manual_seed(exits.lora_seed)
            shallow = ShallowLoRA(target, exits.exit_layer, exits.shallow_rank, exits.shallow_alpha)
    drafter = ExitDrafter(target, exits, adapter, head, shallow, exits.model_copy(update={"load_lora": weights}))
    if saved is not None and weights is not None:
        load_lora_state_dict(drafter, saved.lora)
        if saved.shallow:
            load_shallow(shallow, saved.shallow, weights)
    return drafter


def _tiny_exits(target: Target) -> list[Drafter]:
    return [
        ExitDrafter(target, ExitConfig(exit_layer=1, threshold=0.0, steps=3)),
        ExitDrafter(target, ExitConfig(exit_layer=target.layers - 1, threshold=0.3, steps=4)),
    ]


def _tiny_adapters(target: Target) -> list[Drafter]:
    """An adapter with random weights, which drafts by what it attends to."""
    torch.manual_seed(3)
    adapter = Adapter.identity(target, 2)
    torch.nn.init.normal_(adapter.block.self_attn.o_proj.weight, std=0.5)
    return [ExitDrafter(target, ExitConfig(exit_layer=2, threshold=0.2, steps=4), adapter.requires_grad_(False))]


def _tiny_learners(target: Target) -> list[Drafter]:
    """A head whose LoRA says something, with and without a LoRA on the shallow layers."""
    torch.manual_seed(4)
    made: list[Drafter] = []
    for rank in (0, 2):
        config = DVIConfig(exit_layer=2, threshold=0.2, steps=4, shallow_rank=rank)
        head = DrafterHead(target, 2, 2.0)
        torch.nn.init.normal_(head.proj.B, std=0.3)
        shallow = ShallowLoRA(target, 2, rank, 4.0) if rank else None
        for name, part in shallow.parts().items() if shallow else ():
            if "lora_B" in name:
                torch.nn.init.normal_(part, std=0.1)
        made.append(ExitDrafter(target, config, None, head, shallow, config))
    return made


SPECS = (
    Spec(
        name="early-exit",
        summary="the target's own first layers, final norm and head draft",
        config=ExitConfig,
        build=build_exit,
        tiny=_tiny_exits,
    ),
    Spec(
        name="kangaroo",
        summary="early exit with a trained adapter between exit and head (kangaroo:DIR)",
        config=ExitConfig,
        build=build_kangaroo,
        tiny=_tiny_adapters,
        takes_path=True,
        objective=train_kangaroo,
        objective_config=ExitObjectiveConfig,
    ),
    Spec(
        name="dvi",
        summary="early exit whose head learns from every accept and reject (dvi,dvi_online=true or dvi:CHECKPOINT)",
        config=DVIConfig,
        build=build_dvi,
        tiny=_tiny_learners,
        takes_path=True,
    ),
)
