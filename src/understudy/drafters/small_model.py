"""`small-model`: another causal LM with the same tokenizer drafts, one token after the other (Leviathan et al., 2023).

The small model has a cache of its own. Rows of rejected drafts are left in it and overwritten; what it has not seen yet (the token
that the target added, and the last draft after full acceptance) goes in with its next pass.
"""

from __future__ import annotations

from typing import Self

import torch

from understudy.core.config import option
from understudy.core.errors import UserError
from understudy.core.records import Budget, Commit, Proposal
from understudy.drafting.protocols import Drafter, DraftSampler, View
from understudy.drafting.spec import DrafterConfig, Spec
from understudy.drafting.stateless import nothing
from understudy.target.attention import Pass
from understudy.target.loading import load_target
from understudy.target.target import Target

PREFILL_CHUNK = 512


class SmallModelConfig(DrafterConfig):
    """Options of `small-model`."""

    steps: int = option(6, "most tokens drafted in a row per cycle", "num-speculative-tokens", ge=0)
    dtype: str = option("auto", "dtype of the small model: auto (as saved), float32, bfloat16 or float16")


class SmallModelSession:
    """The small model's state on one sequence: its cache and how many committed tokens are in it."""

    def __init__(self, view: View, model: Target) -> None:
        self.view, self.model = view, model
        self.cache = model.cache()
        self.valid = 0  # rows of the cache that belong to committed tokens
        self.drafted: list[int] = []  # tokens of the rows after them

    def observe(self, commit: Commit) -> None:
        """Count the drafted rows that turned out right; run a prompt, all but its last token, so that it counts as prefill."""
        agreed = self.view.tokens[self.valid : self.valid + len(self.drafted)]
        for draft, token in zip(self.drafted, agreed, strict=False):
            if draft != token:
                break
            self.valid += 1
        self.valid = min(self.valid, len(self.view.tokens) - 1)
        self.drafted = []
        end = len(self.view.tokens) - 1
        if end - self.valid > 1:  # a cycle leaves one token at most besides the last
            for start in range(self.valid, end, PREFILL_CHUNK):
                stop = min(start + PREFILL_CHUNK, end)
                self._run(self.view.tokens[start:stop])
                self.valid = stop

    def _run(self, tokens: list[int] | torch.Tensor, offset: int = 0) -> torch.Tensor:
        """Logits [1, V] after the last of `tokens`, which go in at row valid + offset."""
        ids = torch.as_tensor(tokens, device=self.model.device)
        hidden, _ = self.model.forward(ids, Pass(self.valid + offset, ids.shape[0]), self.cache)
        return self.model.head(hidden[-1:])

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        room = self.model.context - len(self.view.tokens)
        depth = min(budget.depth, room)
        if depth < 1:
            return nothing(self.view.device)
        new = self.view.tokens[self.valid :]
        drafts = [sampler.draw(self._run(new))]
        for i in range(1, depth):
            drafts.append(sampler.draw(self._run(drafts[-1], len(new) + i - 1)))
        tokens = torch.cat(drafts)
        # the rows of `new` and of all drafts but the last are in the cache now; which of them count, `observe` decides
        self.drafted = new + tokens[:-1].tolist()
        return Proposal(tokens.to(self.view.device))

    def fork(self, view: View) -> Self:
        other = type(self)(view, self.model)
        other.cache, other.valid = self.cache.fork(self.valid), self.valid
        return other

    def rewind(self, tokens: int) -> None:
        self.valid = min(self.valid, max(tokens - 1, 0))
        self.drafted = []


class SmallModelDrafter(Drafter):
    def __init__(self, model: Target, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def session(self, view: View) -> SmallModelSession:
        return SmallModelSession(view, self.model)


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
