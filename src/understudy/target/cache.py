"""The KV cache: one preallocated slab per layer, written at the position of the pass and rolled back by setting a length.

It answers the calls that transformers' attention modules and decoders make of a cache (`update`, `get_seq_length`), so the models'
own code fills it. Every layer keeps every row, sliding layers too: a rewind then never needs what a ring would have overwritten,
and attention reads only the rows in the window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

GROWTH = 256  # slabs are sized in multiples of this many rows


class KVCache(Cache):
    """Keys and values of one sequence. `start` is where the pass at hand writes; rows [0, length) of a layer are valid.

    A split target runs its lower layers ahead, so the engine keeps a length per stage; the cache only holds rows.
    """

    def __init__(self, layers: int, capacity: int = 0) -> None:
        super().__init__(layers=[])
        self.keys: list[Tensor | None] = [None] * layers  # [1, Hkv, capacity, d]
        self.values: list[Tensor | None] = [None] * layers
        self.capacity = capacity
        self.start = 0

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all. Slabs that exist already are copied once into larger ones."""
        if rows <= self.capacity:
            return
        self.capacity = max(-(-rows // GROWTH) * GROWTH, 2 * self.capacity)
        for slabs in (self.keys, self.values):
            for i, slab in enumerate(slabs):
                if slab is not None:
                    slabs[i] = _grown(slab, self.capacity)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [1, Hkv, W, d] at rows [start, start + W) of a layer; return views of its first start + W rows."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if keys is None or values is None:
            keys, values = self._allocate(key_states, value_states, layer_idx)
        end = self.start + key_states.shape[2]
        keys[:, :, self.start : end] = key_states
        values[:, :, self.start : end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def _allocate(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        made = []
        for states, slabs in ((key_states, self.keys), (value_states, self.values)):
            slab = states.new_empty(1, states.shape[1], self.capacity, states.shape[3])
            slabs[layer_idx] = slab
            made.append(slab)
        return made[0], made[1]

    def keep(self, start: int, rows: list[int]) -> None:
        """Move rows start + rows[i] to start + i, in every layer: the accepted path of a tree becomes contiguous."""
        source = None
        for slab in (*self.keys, *self.values):
            if slab is None:
                continue
            if source is None or source.device != slab.device:
                source = torch.tensor(rows, device=slab.device) + start
            slab[:, :, start : start + len(rows)] = slab.index_select(2, source)

    def fork(self, length: int) -> KVCache:
        """A cache of its own with the first `length` rows copied."""
        copy = KVCache(len(self.keys), self.capacity)
        for slabs, copies in ((self.keys, copy.keys), (self.values, copy.values)):
            for i, slab in enumerate(slabs):
                if slab is not None:
                    own = torch.empty_like(slab)
                    own[:, :, :length] = slab[:, :, :length]
                    copies[i] = own
        return copy

    def rows(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, Hkv, length, d] of a layer: views."""
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None and values is not None
        return keys[:, :, :length], values[:, :, :length]

    @property
    def written(self) -> list[bool]:
        """Which layers have been written at all. A model that never writes some layer does not keep its past here."""
        return [slab is not None for slab in self.keys]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.start


def _grown(slab: Tensor, capacity: int) -> Tensor:
    larger = slab.new_empty(*slab.shape[:2], capacity, slab.shape[3])
    larger[:, :, : slab.shape[2]] = slab
    return larger
