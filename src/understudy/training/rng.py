"""The global random state of this process, as plain values: python, numpy, torch and the accelerator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from understudy.core.seeds import derive


def seed_all(seed: int, rank: int) -> None:
    """Seed every global generator of this process; ranks differ, or dropout would be the same on all of them."""
    value = derive(seed, "train", rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)  # the accelerators' too


def rng_state() -> dict[str, Any]:
    """Everything that `set_rng_state` needs, of tensors and plain values only, so that it is read with `weights_only`."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_rng() -> Iterator[None]:
    """What happens inside leaves no trace in the random state: looking more often does not change what is learned."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
