"""What ships inside the package: the pocket model, the default of every command, and the default prompts."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def _asset(*parts: str) -> Path:
    # the package is installed as files, never run from an archive: model loaders need real paths
    return Path(str(resources.files(__name__).joinpath(*parts)))


def pocket_path() -> Path:
    """The folder of the built-in model, as `from_pretrained` takes it."""
    return _asset("pocket")


def prompts_path() -> Path:
    """The default prompt set: 200 prompts from modules that the built-in model was not trained on."""
    return _asset("prompts", "pocket.jsonl")


def drafter_path(name: str) -> Path:
    """The folder of a drafter of the built-in model: a checkpoint as `understudy train NAME` writes it."""
    return _asset("drafters", name)
