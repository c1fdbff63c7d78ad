"""Random streams. Every sequence has its own, and drafting never shares one with verification: a shared stream biases the law."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *keys: int | str) -> int:
    """A 63-bit seed that depends on every key: the same keys give the same stream on every machine and in any order of calls."""
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(device: torch.device | str, seed: int, *keys: int | str) -> torch.Generator:
    """A generator on `device`, seeded by `derive`."""
    return torch.Generator(device).manual_seed(derive(seed, *keys))
