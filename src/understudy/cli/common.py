"""Options that commands share. Imports no torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from understudy.core.config import Config, option
from understudy.core.errors import UserError
from understudy.drafting.learning import LearnOptions

if TYPE_CHECKING:
    from understudy.target.target import Target

MODEL_ALIASES = ("model-id", "model-path", "target-model", "target-model-path", "model-name")


class ModelOptions(Config):
    """Which target, and how it is loaded."""

    model: str = option("pocket", "target: the built-in 'pocket', a Hugging Face name or a folder", *MODEL_ALIASES)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "dtype of the weights; auto = as saved")
    device: str | None = option(None, "cpu, cuda, cuda:1, mps, ...; default: the best there is")
    device_map: str | None = option(None, "let transformers place the weights, e.g. auto")
    revision: str | None = option(None, "branch, tag or commit of a model on the hub")
    trust_remote_code: bool = option(False, "allow modelling code that comes with the model to run here")
    threads: int | None = option(None, "CPU threads", ge=1)


Options = TypeVar("Options", bound=ModelOptions)


def place(rank: int | None, world: int | None) -> tuple[int, int]:
    """(rank, world size) of this process, by its options or else by torchrun's environment. UserError for what cannot be."""
    if rank is None and (world is None or "RANK" in os.environ):
        rank = int(os.environ.get("RANK", 0))
    world = world or int(os.environ.get("WORLD_SIZE", 1))
    if rank is None and world > 1:
        raise UserError(f"--world-size {world}: say with --rank which of them this process is, 0 to {world - 1}")
    rank = rank or 0
    if rank >= world:
        raise UserError(f"--rank counts from 0: with --world-size {world} it is at most {world - 1}")
    return rank, world


def on_own_device(config: Options) -> Options:
    """torchrun's processes see all accelerators of their machine and take one each."""
    if config.device or config.device_map or "LOCAL_RANK" not in os.environ:
        return config
    import torch

    if not torch.cuda.is_available():
        return config
    return config.model_copy(update={"device": f"cuda:{os.environ['LOCAL_RANK']}"})


class DraftOptions(LearnOptions):
    """Options of drafters that may stand beside `--drafter` instead of inside it. They apply to every drafter that has them.

    Defaults are each drafter's own: what is not given here is not handed on.
    """

    exit_layer: int | None = option(None, "layers that draft: the first E", "exitlayer", "early-layer", ge=1)
    threshold: float | None = option(None, "drafting stops after a draft whose probability is below this", ge=0, le=1)
    adapter_path: str | None = option(None, "folder of a Kangaroo adapter, or none", min_length=1)
    adapter_mode: Literal["auto", "none", "load"] | None = option(
        None,
        "none: the identity path, nothing is read; load: an adapter is required; auto: load one if a path is given",
    )


def draft_defaults(config: DraftOptions, drafters: list[str]) -> dict[str, Any]:
    """The draft options that were given. One that none of the drafters reads would be ignored: it is an error."""
    from understudy.drafting.spec import configured

    values = given(config, DraftOptions)
    configs = [configured(text, **values)[2] for text in drafters]
    for name in values:
        if not any(name in type(c).model_fields and name not in c.unread() for c in configs):
            raise UserError(f"--{name.replace('_', '-')} is given, but no drafter here has it: {', '.join(drafters)}")
    return values


def load(options: ModelOptions) -> Target:
    """The target that the options name."""
    import huggingface_hub
    import torch
    import transformers

    from understudy.assets import pocket_path
    from understudy.target.loading import load_target

    # what these libraries would say at length, an error says in one line
    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    target = load_target(
        pocket_path() if options.model == "pocket" else options.model,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    target.name = options.model  # as it was asked for, not where the built-in model lies on this machine
    return target


def given(config: Config, group: type[Config]) -> dict[str, Any]:
    """The fields of `group` that somebody set: what is not set comes from the model's generation config or a default."""
    return {name: getattr(config, name) for name in config.model_fields_set & set(group.model_fields)}
