"""The target's first layers with a LoRA on them (`lora_S`), run apart from the target with a cache of their own.

The target itself stays bitwise what it was: the LoRA is injected into a copy of the module tree whose weights are shared.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from understudy.core.errors import UserError
from understudy.target.attention import Pass
from understudy.target.cache import KVCache
from understudy.target.stages import Stage
from understudy.target.target import Target

ADAPTER = "lora_S"


class ShallowLoRA(nn.Module):
    """Layers [0, exit_layer) with a LoRA of `rank` on all their linear maps; only the LoRA trains, in fp32."""

    def __init__(self, target: Target, exit_layer: int, rank: int, alpha: float) -> None:
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UserError("a LoRA on the shallow layers needs peft: pip install 'understudy[train]'") from None
        self._stage = [Stage(target.decoder, 0, exit_layer)]
        self._target = [target]  # in lists: these are the user's modules, not ours
        self.exit_layer = exit_layer
        body = self._stage[0].body
        names = {n.rsplit(".", 1)[-1] for n, m in body.layers.named_modules() if isinstance(m, nn.Linear)}
        if not names:
            raise UserError(f"{type(target.model).__name__} has no plain linear layers that a LoRA could stand on")
        lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(names), lora_dropout=0.0)
        with torch.inference_mode(False):  # what trains must be able to, wherever it was made
            inject_adapter_in_model(lora, body.layers, adapter_name=ADAPTER)
        # as a module of ours, so that the LoRA's parameters are found, moved and saved with the drafter
        self.lora = nn.ParameterDict(
            {n.replace(".", "/"): p for n, p in body.layers.named_parameters() if p.requires_grad}
        )
        for parameter in self.lora.values():
            parameter.data = parameter.data.float()

    @property
    def layers(self) -> nn.ModuleList:
        """The copied layers, with peft's modules in them."""
        found: nn.ModuleList = self._stage[0].body.layers
        return found

    def parts(self) -> dict[str, Tensor]:
        """The LoRA's tensors by the name of their place in the layers, as peft names them."""
        return {name.replace("/", "."): p for name, p in self.lora.items()}

    def cache(self) -> KVCache:
        return KVCache(self._target[0].layers)

    def run(self, ids: Tensor, start: int, cache: KVCache) -> Tensor:
        """[n] tokens at rows [start, start + n) of the cache -> adapted exit states [n, D]."""
        target, at = self._target[0], Pass(start, ids.shape[0])
        cache.reserve(start + ids.shape[0])
        return self._stage[0].run(ids.to(target.device), at, target.positions(at), cache, frozenset())

    def forward(self, ids: Tensor) -> Tensor:
        """A whole text [T] -> its adapted exit states [T, D], with gradient into the LoRA."""
        return self.run(ids, 0, self.cache())

    @torch.no_grad()
    def reset(self) -> None:
        """Back to no change at all."""
        for name, parameter in self.parts().items():
            if "lora_B" in name:
                parameter.zero_()
