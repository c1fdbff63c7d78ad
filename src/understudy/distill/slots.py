"""Many texts in the target at once: a KV cache with a slot per text, and a pass that adds one token to each of several slots.

transformers' own batched decoding pads all texts to the longest, copies the whole cache at every step and keeps finished texts in
the batch; on a CPU that is several times slower than what is here. Linear layers see all rows together, which is where a batch pays;
attention looks at each slot's own length. A slot that is free takes the next text at once, and one whose next text begins like its
last one (the next turn of a conversation) runs only what is new.

Prompts go through `Target.forward`, a slot at a time: the very pass that decoding of one text makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, Cache

from understudy.target.attention import Pass, attention
from understudy.target.cache import KVCache
from understudy.target.stages import Stage
from understudy.target.target import Target

NAME = "understudy-slots"
PREFILL = 2048  # prompt tokens of one pass


class Rows(Cache):
    """The pass at hand: row i is the next token of slot `slots[i]`, which holds `lengths[i]` tokens before it.

    Keys and values are written into the slots' slabs; attention reads them there.
    """

    def __init__(self, keys: list[Tensor | None], values: list[Tensor | None], padded: bool) -> None:
        super().__init__(layers=[])
        self.keys, self.values = keys, values  # per layer [slots, Hkv, capacity, d]; None = a layer that keeps nothing
        self.padded = padded
        self.slots: list[int] = []
        self.lengths: list[int] = []
        self._masks: dict[int | None, Tensor] = {}

    def begin(self, slots: list[int], lengths: list[int], device: torch.device) -> None:
        self.slots, self.lengths = slots, lengths
        self.slot_ids = torch.tensor(slots, device=device)
        self.places = torch.tensor(lengths, device=device)
        self._masks.clear()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [B, Hkv, 1, d] at each row's own place. Returns what it was given: attention takes views of the slabs."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        assert keys is not None and values is not None
        keys[self.slot_ids, :, self.places] = key_states[:, :, 0]
        values[self.slot_ids, :, self.places] = value_states[:, :, 0]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths, default=0)

    def mask(self, window: int | None) -> Tensor:
        """Bool [B, 1, 1, T]: which of the first T = longest keys each row sees, itself included."""
        if window not in self._masks:
            keys = torch.arange(max(self.lengths) + 1, device=self.places.device)
            seen = keys[None] <= self.places[:, None]
            if window is not None:
                seen &= keys[None] > self.places[:, None] - window
            self._masks[window] = seen[:, None, None]
        return self._masks[window]


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: object,
) -> tuple[Tensor, None]:
    """Attention of one row per slot over that slot's keys. query [B, H, 1, d] -> ([B, 1, H, d], None).

    On a CPU, and for what no fused kernel takes (Gemma 2's `softcap`, GPT-OSS's sinks `s_aux`), every row is a pass of its own
    over its own keys; elsewhere one call masks all rows to their lengths.
    """
    rows: Rows = module.understudy_rows  # type: ignore[assignment]
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = rows.keys[layer], rows.values[layer]
    assert keys is not None and values is not None
    if rows.padded and softcap is None and s_aux is None:
        return _padded(rows, query, keys, values, scaling, sliding_window), None
    holder: Any = module.understudy_pass
    out = []
    for i, (slot, length) in enumerate(zip(rows.slots, rows.lengths, strict=True)):
        holder.current = Pass(length, 1)
        mine, theirs = (slabs[slot : slot + 1, :, : length + 1] for slabs in (keys, values))
        out.append(attention(module, query[i : i + 1], mine, theirs, None, scaling, sliding_window, softcap, s_aux)[0])
    return torch.cat(out), None


def _padded(
    rows: Rows, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    count, heads, _, size = query.shape
    length, kv_heads = max(rows.lengths) + 1, keys.shape[1]
    at = slice(count) if rows.slots == list(range(count)) else rows.slot_ids  # a copy only while the last texts run out
    keys, values = keys[at, :, :length], values[at, :, :length]
    packed = query.reshape(count, kv_heads, heads // kv_heads, size)  # the heads of a group become query rows
    mask = rows.mask(window).expand(count, kv_heads, heads // kv_heads, length)
    out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
    return out.reshape(count, 1, heads, size)


AttentionInterface.register(NAME, slot_attention)


class Slots:
    """`count` texts of at most `capacity` tokens each in the target. `texts[i]` are the tokens whose keys slot i holds."""

    def __init__(self, target: Target, count: int, capacity: int, padded: bool | None = None) -> None:
        """`padded`: how rows are attended to (None: one call with a mask, except on a CPU). Memory is taken as it is written on a CPU."""
        self.target, self.capacity = target, capacity
        self.texts: list[list[int]] = [[] for _ in range(count)]
        padded = target.device.type != "cpu" if padded is None else padded
        self._rows = Rows(*self._slabs(count, padded), padded)
        self._views = [self._view(i) for i in range(count)]
        self._stage = Stage(target.decoder, 0, target.layers)  # its own: a stage has one attention
        self._stage.body.config._attn_implementation = NAME
        for module in self._stage.body.modules():
            if hasattr(module, "understudy_pass"):
                module.understudy_rows = self._rows

    def _slabs(self, count: int, padded: bool) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Per layer [count, Hkv, capacity, d] for keys and values, shaped as a pass of one token shapes them."""
        tried = self.target.cache()
        with torch.inference_mode():
            self.target.forward(torch.zeros(1, dtype=torch.int64), Pass(0, 1), tried)

            def slab(one: Tensor | None) -> Tensor | None:
                if one is None:
                    return None
                shape = (count, one.shape[1], self.capacity, one.shape[3])
                # rows that a mask hides are still multiplied, by zero: they have to be numbers
                return one.new_zeros(shape) if padded else one.new_empty(shape)

            return [slab(keys) for keys in tried.keys], [slab(values) for values in tried.values]

    def _view(self, slot: int) -> KVCache:
        """The cache of one slot as the target's own: it writes into the slabs."""
        view = KVCache(self.target.layers, self.capacity)
        for slabs, views in ((self._rows.keys, view.keys), (self._rows.values, view.values)):
            views[:] = [None if slab is None else slab[slot : slot + 1] for slab in slabs]
        return view

    def prefill(self, slot: int, text: Sequence[int]) -> Tensor:
        """Make `text` (not empty, below `capacity`) the slot's, running only what differs from its last one. Raw logits [1, V] after it."""
        held = self.texts[slot]
        assert 0 < len(text) <= self.capacity
        same = next((i for i, (a, b) in enumerate(zip(held, text, strict=False)) if a != b), min(len(held), len(text)))
        self.texts[slot] = []  # nothing is known of it if a pass fails
        hidden: Tensor | None = None
        for start in range(min(same, len(text) - 1), len(text), PREFILL):
            ids = torch.tensor(text[start : start + PREFILL], device=self.target.device)
            hidden, _ = self.target.forward(ids, Pass(start, len(ids)), self._views[slot])
        assert hidden is not None
        self.texts[slot] = list(text)
        return self.target.head(hidden[-1:])

    def step(self, slots: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Append `tokens[i]` to the text of `slots[i]`, which are distinct. Raw logits [len(slots), V] after them."""
        device = self.target.device
        lengths = [len(self.texts[slot]) for slot in slots]
        assert max(lengths) < self.capacity
        self._rows.begin(list(slots), lengths, device)
        out = self._stage.body(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=self._rows.places[:, None],
            past_key_values=self._rows,
            use_cache=True,
        )
        for slot, token in zip(slots, tokens, strict=True):
            self.texts[slot].append(token)
        return self.target.head(out.last_hidden_state[:, 0])
