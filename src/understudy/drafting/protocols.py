"""The contract between the engine and a drafter.

A `Drafter` holds weights and configuration and is shared by all sequences; a `DraftSession` is the state of one sequence. Whatever
a session proposes, the output law stays the target's: the engine verifies every token and records `q` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from understudy.core.errors import UserError
from understudy.core.records import Budget, Commit, Needs, Proposal
from understudy.drafting.learning import LearnOptions


class View(Protocol):
    """What a draft session sees of its sequence in the target."""

    tokens: list[int]  # committed tokens, prompt included; the last one is in no cache yet

    @property
    def device(self) -> torch.device: ...

    def shallow(self, tokens: Tensor) -> Tensor:
        """Run [n] tokens through layers [0, exit) of the target, into its own cache: hidden [n, D]."""


class DraftSampler(Protocol):
    """Where drafts are chosen, so that the law they were drawn from is recorded by the engine and not claimed by the drafter."""

    def draw(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Draft tokens [n] from logits [n, V]: the argmax, or with `draft_sampling` a draw from the request's own law.

        `ids` [V_d] int64: the token ids of the columns, where logits are [n, V_d] over a part of the vocabulary.

        Every token that is drawn must be proposed, in the order of the draws.
        """


class DraftSession(Protocol):
    """The state of one sequence.

    `observe` is the only call that changes what the session knows of the text. What `propose` leaves behind (rows of a drafter's
    own cache, say) is scratch: a cycle may be cancelled, and the next `propose` starts from the last `observe` again.
    """

    def observe(self, commit: Commit) -> None:
        """Rows joined the text: a prefill chunk, or the accepted path of a cycle. `view.tokens` is already up to date."""

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        """Draft at most `budget.depth` tokens in a row and `budget.nodes` in all, from the last committed token on."""

    def fork(self, view: View) -> Self:
        """A session of its own that continues from here, on the forked sequence's view."""

    def rewind(self, tokens: int) -> None:
        """The text went back to its first `tokens` tokens."""


class Drafter(nn.Module):
    """Weights and configuration of a drafter. Subclasses set `steps` and `needs` and implement `session`."""

    steps: int  # most drafts in a row per cycle
    nodes: int | None = None  # most drafts per cycle for drafters of trees; None = chains of at most `steps`
    static_tree: bool = (
        False  # the tree's shape does not depend on drafted tokens, so its drafts may be drawn and rejected
    )
    needs: Needs = Needs()
    runs_model: bool = True  # drafting runs layers or a head; False = its time is overhead, not model time
    telemetry: Mapping[str, Any] = MappingProxyType({})  # telemetry options of the drafter's text
    learning: LearnOptions | None = None  # how its head learns while it decodes; None = it has none that could

    def session(self, view: View) -> DraftSession:
        raise NotImplementedError

    def assistant(self) -> nn.Module:
        """What transformers' `generate` takes as `assistant_model`, with these very weights. UserError where it takes no such drafter."""
        raise UserError(
            "transformers' own generation takes no such drafter: give it custom_generate=custom_generate(drafter)"
        )

    # Drafters with `learning` put a `Trace` into every proposal and implement these

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of the learning head at states [n, D] (`Trace.hidden`), differentiable in its trainable parameters."""
        raise NotImplementedError

    def frozen_logits(self, hidden: Tensor) -> Tensor:
        """The same of the head as it was before any learning."""
        raise NotImplementedError

    def lora_extras(self) -> dict[str, Any]:
        """What a checkpoint of the head holds besides its A and B: tensors and numbers by name."""
        return {}
