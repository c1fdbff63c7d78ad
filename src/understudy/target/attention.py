"""Our attention function, registered with transformers as "understudy".

Attention modules hand it queries of W rows and the cache's view of T + W keys. What each row may see follows from the `Pass` at
hand, not from a mask that the model builds: causality by row, ancestors in a tree, windows by depth. Three reasons to own it:

1. With a mask, transformers repeats K and V once per query head group and layer; here the group's heads are viewed as query rows.
2. The mask of a chain is a view into one constant per width: its tail is a triangle, what lies before is open, so neither T nor a
   rewind changes it, and nothing is built per pass.
3. A sliding window counts positions. In a tree the position is the depth, not the row index.

Windows follow Hugging Face: a query at position t sees keys at positions in (t - window, t].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "understudy"
PACKED_ROWS = 64  # up to this many rows, GQA heads are viewed as query rows; beyond, K and V are expanded instead
_chain_masks: dict[tuple[object, ...], Tensor] = {}


@dataclass(slots=True)
class Pass:
    """What the W rows of one forward pass are: where they start and who sees whom."""

    start: int  # T: keys already in the cache
    width: int  # W
    ancestors: Tensor | None = None  # [W, W] bool, row sees column; None = a chain
    depths: Tensor | None = None  # [W] int64, distance from the cache's end; None = a chain (0 .. W - 1)
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def first_key(self, window: int | None) -> int:
        """Index of the first key that any row may see."""
        return 0 if window is None else max(0, self.start - window + 1)

    def mask(self, window: int | None, groups: int, like: Tensor) -> Tensor:
        """Additive [groups * W, keys] mask over the keys from `first_key(window)` on, in the dtype and on the device of `like`."""
        if self.ancestors is None and self.width <= PACKED_ROWS:
            return _chain_mask(self.start, self.width, window, groups, like)
        # a tree, or a chunk of a prompt, whose width may never come again: built once for this pass, and gone with it
        key = (window, groups, like.dtype, like.device)
        if key not in self._masks:
            self._masks[key] = self._own_mask(window, like).repeat(groups, 1)
        return self._masks[key]

    def _own_mask(self, window: int | None, like: Tensor) -> Tensor:
        device, width = like.device, self.width
        ancestors = torch.ones(width, width, dtype=torch.bool).tril() if self.ancestors is None else self.ancestors
        depths = torch.arange(width) if self.depths is None else self.depths
        first = self.first_key(window)
        queries = self.start + depths.to(device)
        keys = torch.cat([torch.arange(first, self.start, device=device), queries])
        seen = torch.ones(self.width, self.start - first, dtype=torch.bool, device=device)
        visible = torch.cat([seen, ancestors.to(device)], dim=1)
        if window is not None:
            visible &= keys[None, :] > queries[:, None] - window
        return torch.zeros_like(visible, dtype=like.dtype).masked_fill_(~visible, float("-inf"))


def _chain_mask(start: int, width: int, window: int | None, groups: int, like: Tensor) -> Tensor:
    """Additive mask of rows at positions start .. start + width - 1 over the keys from `first_key` on: a view, nothing is built.

    Without a window the constant is [G * W, M + W]: open columns, then a triangle; the last start + W columns are the mask.
    With one it is [G * W, window - 1 + W], a band: column c is the key at position start - window + 1 + c, so row i sees the columns
    in [i, i + window - 1]; at the beginning of a text the columns before key 0 are cut off.
    """
    with torch.inference_mode(False):  # a constant made while decoding also serves passes with gradients
        return _chain_constant(start, width, window, groups, like)


def _chain_constant(start: int, width: int, window: int | None, groups: int, like: Tensor) -> Tensor:
    key = (width, window, groups, like.dtype, like.device)
    constant = _chain_masks.get(key)
    if window is not None:
        if constant is None:
            open_ = torch.ones(width, window - 1 + width, dtype=torch.bool, device=like.device)
            band = open_.triu() & open_.tril(window - 1)
            constant = torch.zeros_like(band, dtype=like.dtype).masked_fill_(~band, float("-inf")).repeat(groups, 1)
            _chain_masks[key] = constant
        return constant[:, max(0, window - 1 - start) :]
    if constant is None or constant.shape[1] < start + width:
        length = max(1024, 2 * start) + width
        constant = torch.zeros(width, length, dtype=like.dtype, device=like.device)
        future = torch.ones(width, width, dtype=torch.bool, device=like.device).triu(1)
        constant[:, -width:].masked_fill_(future, float("-inf"))
        constant = constant.repeat(groups, 1)
        _chain_masks[key] = constant
    return constant[:, constant.shape[1] - start - width :]


class PassHolder:
    """Where the attention modules of a stage find the pass at hand. One per stage; passes do not nest."""

    __slots__ = ("current", "windows")

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.windows: dict[int, int | None] | None = None  # layer -> the window it asked for, while the probe looks


def attention(
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
    """Attention of W rows over the cache. query [1, H, W, d]; key, value [1, Hkv, T + W, d] -> ([1, W, H, d], None).

    `softcap` is Gemma 2's tanh cap on scores, `s_aux` GPT-OSS's [H] sink logits. `unused` holds what other backends take.
    """
    holder: PassHolder = module.understudy_pass  # type: ignore[assignment]
    at = holder.current
    assert at is not None, "a stage of the target was called outside Target.forward"
    if holder.windows is not None:
        holder.windows[module.layer_idx] = sliding_window  # type: ignore[index]
    first = at.first_key(sliding_window)
    if first:
        key, value = key[:, :, first:], value[:, :, first:]
    if softcap is not None or s_aux is not None:
        return _explicit(at, query, key, value, scaling, sliding_window, softcap, s_aux), None
    _, heads, width, _ = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    if width == 1:
        return _single_row(query, key, value, groups, scaling), None
    if width == length and at.ancestors is None and (sliding_window is None or length <= sliding_window):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        return out.transpose(1, 2), None
    if groups == 1 or width > PACKED_ROWS:
        mask = at.mask(sliding_window, 1, query)
        key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling).transpose(1, 2), None
    packed = query.reshape(1, kv_heads, groups * width, -1)  # row g * W + i is row i of the group's g-th head
    mask = at.mask(sliding_window, groups, query)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(1, heads, width, -1).transpose(1, 2), None


def _single_row(query: Tensor, key: Tensor, value: Tensor, groups: int, scaling: float | None) -> Tensor:
    """One row sees every key it is given: the heads of a group become the query rows, without a mask."""
    _, heads, _, size = query.shape
    packed = query.reshape(1, heads // groups, groups, size)
    if groups == 1 and query.device.type == "cpu" and query.dtype != torch.float32:
        # torch's CPU kernel is several times slower for one half-precision query row than for two
        out = F.scaled_dot_product_attention(packed.expand(-1, -1, 2, -1), key, value, scale=scaling)[:, :, :1]
    else:
        out = F.scaled_dot_product_attention(packed, key, value, scale=scaling)
    return out.reshape(1, 1, heads, -1)


def _explicit(
    at: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Scores written out, for what no fused kernel takes. Softmax in fp32, as the models' own eager attention does."""
    _, heads, width, size = query.shape
    kv_heads = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    grouped = query.view(1, kv_heads, heads // kv_heads, width, size)
    scores = torch.matmul(grouped, key[:, :, None].transpose(-1, -2)) * scale  # [1, Hkv, G, W, keys]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if width > 1:
        scores = scores + at.mask(window, 1, query)
    if sinks is not None:
        column = sinks.view(1, kv_heads, -1, 1, 1).expand(-1, -1, -1, width, 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return torch.matmul(weights, value[:, :, None]).reshape(1, heads, width, -1).transpose(1, 2)


AttentionInterface.register(NAME, attention)
