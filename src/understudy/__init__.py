"""Understudy: train, watch, run and ship drafters for lossless speculative decoding.

The names below load on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy.api import Engine, Generation, generate, load, stream
    from understudy.core.errors import UserError
    from understudy.hf import assistant, custom_generate

__version__ = "0.1.0"
__all__ = ["Engine", "Generation", "UserError", "assistant", "custom_generate", "generate", "load", "stream"]

_HOMES = {
    "Engine": "understudy.api",
    "Generation": "understudy.api",
    "generate": "understudy.api",
    "load": "understudy.api",
    "stream": "understudy.api",
    "UserError": "understudy.core.errors",
    "assistant": "understudy.hf",
    "custom_generate": "understudy.hf",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'understudy' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
