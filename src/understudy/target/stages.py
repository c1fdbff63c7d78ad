"""Parts of a decoder that run by themselves and share its tensors.

A stage is layers [a, b) of the user's model inside a copy of the model's own decoder class: container modules are new, every leaf
module and tensor is the very same object. So the model's own forward code runs, weights are never copied, quantised layers keep
working, and the user's model is not touched.

- A stage that begins at a > 0 gets a first layer that swallows its input and gives the true hidden states instead: what a family
  does to embeddings on entry (Granite's multiplier, for instance) is bypassed exactly.
- A stage that ends at b < L has an identity for a final norm, so it returns the bare output of layer b.
- `layer_idx` stays the model's own, so every stage writes into the same cache at the right layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from understudy.target.attention import NAME, Pass, PassHolder
from understudy.target.cache import KVCache


class Entry(nn.Module):
    """The first layer of a stage that begins in the middle: returns the hidden states it was given beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        assert self.hidden is not None
        return self.hidden


def shared_copy(module: nn.Module, replace: Iterable[tuple[object, object]] = ()) -> Any:
    """A copy of the module tree in which leaf modules, parameters and buffers are shared; `replace` maps old objects to new ones."""
    memo: dict[int, object] = {id(x): x for x in (*module.parameters(), *module.buffers())}
    memo |= {id(m): m for m in module.modules() if not any(True for _ in m.children())}
    memo |= {id(old): new for old, new in replace}
    return copy.deepcopy(module, memo)


class Stage:
    """Layers [first, end) of a decoder, with taps.

    A tap t (0 = embeddings, i = output of the i-th layer counted from 1) is captured while `wanted` holds it.
    """

    def __init__(self, decoder: Any, first: int, end: int) -> None:
        total = len(decoder.layers)
        config = copy.deepcopy(decoder.config)
        config._attn_implementation = NAME
        kinds = getattr(config, "layer_types", None)
        if kinds:
            config.layer_types = ([kinds[first]] if first else []) + list(kinds[first:end])
        config.num_hidden_layers = end - first + bool(first)
        left_out = [layer for i, layer in enumerate(decoder.layers) if not first <= i < end]
        body = shared_copy(decoder, [(decoder.config, config), *((layer, layer) for layer in left_out)])
        kept = list(body.layers[first:end])
        self.entry = Entry() if first else None
        body.layers = nn.ModuleList(([self.entry] if self.entry else []) + kept)
        body.config = config
        if end < total:
            body.norm = nn.Identity()
        self.holder = PassHolder()
        for layer in kept:
            for m in layer.modules():
                if hasattr(m, "layer_idx"):
                    m.understudy_pass = self.holder
        self.body, self.first, self.end = body.eval(), first, end
        self.wanted: frozenset[int] = frozenset()
        self.taps: dict[int, Tensor] = {}
        self._hooked: set[int] = set()
        self._layers = kept

    def run(self, x: Tensor, at: Pass, positions: Tensor, cache: KVCache, wanted: frozenset[int]) -> Tensor:
        """Hidden states [W, D] after layer `end` (after the final norm when this is the last stage).

        `x` is [W] token ids for a stage that begins at the embeddings, else [W, D] hidden states.
        """
        self.wanted, self.taps = wanted, {}
        for tap in wanted - self._hooked:
            self._hook(tap)
        cache.start = at.start
        self.holder.current = at
        try:
            if self.entry is None:
                inputs = {"input_ids": x[None]}
            else:
                self.entry.hidden = x[None]
                inputs = {"inputs_embeds": self.entry.hidden}
            out = self.body(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        finally:
            self.holder.current = None
            if self.entry is not None:
                self.entry.hidden = None
        return out.last_hidden_state[0]

    def _hook(self, tap: int) -> None:
        """Layers are shared with no other stage's containers, so a hook here is this stage's own."""
        self._hooked.add(tap)

        def keep(hidden: Tensor) -> None:
            if tap in self.wanted:
                self.taps[tap] = hidden[0]

        if tap == 0 and self.first == 0:
            self._layers[0].register_forward_pre_hook(
                lambda _, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        elif self.first < tap <= self.end:
            self._layers[tap - self.first - 1].register_forward_hook(
                lambda _, __, out: keep(out if isinstance(out, Tensor) else out[0])
            )


class _Passthrough(nn.Module):
    """Stands where the decoder was: gives back the hidden states it is handed, as the decoder's output."""

    def forward(self, inputs_embeds: Tensor, **_: object) -> Any:
        return _Output(inputs_embeds)


class _Output:
    """What a causal LM's forward reads of its decoder's output: the last hidden state, and None for all else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


class Head(nn.Module):
    """The model's own path from last hidden state to logits: soft-caps and logit scales included.

    Where the bare output projection gives bit for bit the same, it is called directly. `projection` stands in for the model's own
    where a drafter has a head of its own that must go the same way.
    """

    def __init__(self, model: Any, projection: nn.Module | None = None) -> None:
        super().__init__()
        whole = copy.copy(model)
        for name in ("forward", "_old_forward", "_hf_hook"):  # device hooks bind the user's model, not this copy
            whole.__dict__.pop(name, None)
        whole._modules = dict(model._modules)
        whole._modules[model.base_model_prefix] = _Passthrough()
        own = model.get_output_embeddings()
        if projection is not None:
            whole._modules[next(name for name, module in model._modules.items() if module is own)] = projection
        self._whole = [whole]  # in a list: these are the user's modules, not ours
        self._projection = [own if projection is None else projection]
        self._direct = False
        weight = next(self._projection[0].parameters())
        width = model.get_decoder().config.hidden_size
        # wide enough that a soft-cap or a scale shows
        probe = 4 * torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(weight.device)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        with torch.inference_mode():
            probe = probe.to(dtype)
            self._direct = torch.equal(self._projection[0](probe), self(probe))

    def forward(self, hidden: Tensor) -> Tensor:
        """[W, D] -> [W, V] raw logits."""
        if self._direct:
            return self._projection[0](hidden)
        return self._whole[0](inputs_embeds=hidden[None], use_cache=False).logits[0]
