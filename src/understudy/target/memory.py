"""Running out of memory, as one line that says how much there is and what would fit in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from understudy.core.errors import UserError
from understudy.target.target import Target


def is_out_of_memory(error: BaseException) -> bool:
    """torch's CPU allocator raises a plain RuntimeError."""
    says = str(error)
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in says or "backend out of memory" in says


def free_bytes(device: torch.device) -> int | None:
    """Memory that could still be had on `device`; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def kv_bytes_per_token(target: Target) -> int:
    """Bytes that one token's keys and values take, over all layers."""
    config = target.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * target.layers * kv_heads * size * target.dtype.itemsize


def what_fits_of_weights(doing: str, weights: int, device: torch.device) -> str:
    """The message for running out of memory while loading `weights` bytes onto `device`."""
    free = free_bytes(device)
    room = "" if free is None else f", {free / 2**30:.1f} GiB are free on {device}"
    return (
        f"out of memory while {doing}: the weights take {weights / 2**30:.1f} GiB as saved{room};"
        " try --dtype bfloat16, a quantised checkpoint or --device-map auto"
    )


def what_would_fit(doing: str, target: Target) -> str:
    """The message for running out of memory while `doing` something with a loaded target."""
    per_token, free = kv_bytes_per_token(target), free_bytes(target.device)
    room = (
        ""
        if free is None
        else f": about {free // per_token} tokens fit in the {free / 2**30:.1f} GiB that are free now"
    )
    return (
        f"out of memory while {doing}; the KV cache takes {per_token / 1024:.0f} KiB per token{room};"
        " shorten the prompt or --max-new-tokens, or try --dtype bfloat16"
    )


@contextmanager
def memory_guard(target: Target) -> Iterator[None]:
    """Turn running out of memory into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(what_would_fit("decoding", target)) from error
