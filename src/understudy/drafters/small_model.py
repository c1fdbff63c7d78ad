"""`small-model`: another causal LM with the same tokenizer drafts, one token after the other (Leviathan et al., 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from understudy.core.config import option
from understudy.core.errors import UserError
from understudy.drafting.own_cache import OwnCacheSession
from understudy.drafting.protocols import Drafter, View
from understudy.drafting.spec import DrafterConfig, Spec
from understudy.target.attention import Pass
from understudy.target.cache import KVCache
from understudy.target.loading import load_target
from understudy.target.target import Target


class SmallModelConfig(DrafterConfig):
    """Options of `small-model`."""

    steps: int = option(6, "most tokens drafted in a row per cycle", "num-speculative-tokens", ge=0)
    dtype: str = option("auto", "dtype of the small model: auto (as saved), float32, bfloat16 or float16")


class SmallModel:
    """A causal LM with its own cache, as a drafter runs it."""

    def __init__(self, model: Target) -> None:
        self.model, self.context, self.device = model, model.context, model.device

    def cache(self) -> KVCache:
        return self.model.cache()

    def states(self, ids: Tensor, start: int, cache: KVCache) -> Tensor:
        return self.model.forward(ids, Pass(start, ids.shape[0]), cache)[0][-1:]

    def logits(self, states: Tensor) -> Tensor:
        return self.model.head(states)


class SmallModelDrafter(Drafter):
    def __init__(self, model: Target, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def session(self, view: View) -> OwnCacheSession:
        return OwnCacheSession(view, SmallModel(self.model))


def build(config: SmallModelConfig, target: Target, path: str | None) -> SmallModelDrafter:
    if path is None:
        raise UserError("drafter small-model needs a model: small-model:PATH_OR_NAME")
    model = load_target(path, dtype=config.dtype, device=str(target.device))
    if target.tokenizer is not None and model.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise UserError(
            f"{path} has another tokenizer than {target.name}: a small-model drafter must share the target's vocabulary"
        )
    if model.vocab_size > target.vocab_size:
        raise UserError(
            f"{path} has {model.vocab_size} output tokens, {target.name} only {target.vocab_size}: not a drafter for it"
        )
    return SmallModelDrafter(model, config.steps)


def tiny(target: Target) -> list[Drafter]:
    """The target as its own drafter (always right when greedy), and one with other weights (mostly wrong)."""
    torch.manual_seed(1)
    other = type(target.model)(target.model.config).eval()
    return [SmallModelDrafter(target, 4), SmallModelDrafter(Target(other), 4)]


SPECS = (
    Spec(
        name="small-model",
        summary="another causal LM with the same tokenizer drafts (small-model:PATH)",
        config=SmallModelConfig,
        build=build,
        tiny=tiny,
        takes_path=True,
    ),
)
