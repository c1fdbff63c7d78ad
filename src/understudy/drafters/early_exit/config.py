"""Options of the drafters that are the target's own first layers, and what they mean together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from understudy.core.config import option
from understudy.core.errors import UserError
from understudy.drafting.learning import LearnOptions
from understudy.drafting.spec import DrafterConfig

NO_ADAPTER = "none"


class ExitConfig(DrafterConfig):
    """Options of `early-exit`, `kangaroo` and `dvi`. The defaults are Kangaroo's."""

    exit_layer: int = option(2, "layers that draft: the first E", "exitlayer", "early-layer", ge=1)
    threshold: float = option(
        0.6, "drafting stops after a draft whose probability is below this; 0 = never", ge=0, le=1
    )
    adapter_path: str = option(NO_ADAPTER, "folder of a Kangaroo adapter, or none", min_length=1)
    adapter_mode: Literal["auto", "none", "load"] = option(
        "auto",
        "none: the identity path, nothing is read; load: an adapter is required; auto: load one if a path is given",
    )
    any_target: bool = option(
        False, "take weights that were trained for another target; the output stays the target's own"
    )


class DVIConfig(LearnOptions, ExitConfig):
    """Options of `dvi`: an early exit whose head learns."""

    rank: int = option(8, "rank r of the LoRA on the draft head", "lora-rank", ge=1)
    alpha: float = option(8.0, "alpha of that LoRA: its product is scaled by alpha / r", "lora-alpha", gt=0)
    lora_seed: int = option(0, "seed of the LoRAs' random start", ge=0)
    shallow_rank: int = option(
        0,
        "rank of a LoRA on the shallow layers, which then run apart from the target, with a cache of their own; 0 = none",
        ge=0,
    )
    shallow_alpha: float = option(16.0, "alpha of that LoRA", gt=0)


def adapter_folder(config: ExitConfig, name: str, path: str | None = None) -> Path | None:
    """The folder that an adapter is to be read from, or None for the identity path. `path` is that of `NAME:PATH`."""
    given = None if config.adapter_path == NO_ADAPTER else config.adapter_path
    if path is not None:
        if given not in (None, path):
            raise UserError(f"drafter {name}: {path} and adapter_path {given} are two adapters; give one")
        given = path
    if config.adapter_mode == "none" and given is not None:
        raise UserError(
            f"drafter {name}: adapter_mode none reads no adapter, but {given} is given; leave one of them out"
        )
    if config.adapter_mode == "load" and given is None:
        raise UserError(
            f"drafter {name}: adapter_mode load needs the adapter's folder: {name}:DIR or --adapter-path DIR"
        )
    return None if given is None else Path(given)
