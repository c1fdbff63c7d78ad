"""Raw logits -> the target's law: penalties, biases, masks and filters, each row of a pass with its own history.

Order as in transformers' `generate` (5.23, `GenerationMixin._get_logits_processor`): bias, repetition penalty, masks
(static, min_tokens, begin_suppress), then, when sampling, temperature, top-k, top-p, min-p. Presence and frequency
penalties, which transformers has not, follow the repetition penalty, as in vLLM. Static masks are folded into the bias:
-inf stays -inf under penalties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.ops import laws
from understudy.target.params import SamplingParams


class History:
    """The committed tokens of a sequence: which are in the prompt, and how often each is in the output."""

    def __init__(self, prompt: Sequence[int] | Tensor, vocab_size: int, device: torch.device | str = "cpu") -> None:
        """`prompt`: all token ids before the first new token, [P] if a tensor."""
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # [V]
        self.in_prompt[torch.as_tensor(prompt, dtype=torch.int64, device=device)] = True
        self.counts = torch.zeros(vocab_size, device=device)  # [V] fp32, of the output
        self.output: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens were committed."""
        self.output.extend(tokens)
        self._add(tokens, 1.0)

    def truncate(self, length: int) -> None:
        """Keep the first `length` output tokens: after a cancel, or a stop inside a block."""
        self._add(self.output[length:], -1.0)
        del self.output[length:]

    def fork(self) -> History:
        """An independent copy: several samples from one prefill. The prompt's mask never changes and is shared."""
        twin = object.__new__(History)
        twin.in_prompt, twin.counts, twin.output = self.in_prompt, self.counts.clone(), list(self.output)
        return twin

    def rows(self, tokens: Tensor, ancestors: Tensor | None = None) -> RowHistory:
        """The histories of a pass. tokens [N]: row 0 is the last committed token, which is counted already.

        ancestors: bool [N, N], row i sees itself and its ancestors (`ops.trees.ancestors`, on the tokens' device);
        None = a chain.
        """
        return RowHistory(self, tokens, ancestors)

    def _add(self, tokens: Sequence[int], amount: float) -> None:
        if tokens:
            at = torch.tensor(tokens, dtype=torch.int64, device=self.counts.device)
            self.counts.index_add_(0, at, self.counts.new_full((len(tokens),), amount))


@dataclass(slots=True)
class RowHistory:
    """The histories of a pass's N rows: what is committed, then the drafts from the root down to the row, itself included.

    Nothing is computed before it is asked for, and nothing comes to the host.
    """

    committed: History
    tokens: Tensor  # [N] int64
    ancestors: Tensor | None  # bool [N, N]; None = a chain

    def drafts(self) -> Tensor:
        """fp32 [N, N]: 1 where row j is a draft that row i continues or is."""
        width = self.tokens.shape[0]
        if self.ancestors is None:
            seen = torch.ones(width, width, device=self.tokens.device).tril_()
        else:
            seen = self.ancestors.float()  # a copy: the mask is bool
        seen[:, 0] = 0.0
        return seen

    def counts(self) -> Tensor:
        """fp32 [N, V] (or [1, V]): how often each token is in the output before the row's prediction."""
        base, width = self.committed.counts, self.tokens.shape[0]
        if width == 1:
            return base[None]
        return base.repeat(width, 1).scatter_add_(1, self.tokens.expand(width, width), self.drafts())

    def seen(self) -> Tensor:
        """bool [N, V] (or [1, V]): which tokens are in prompt or output before the row's prediction."""
        base = self.committed.in_prompt | (self.committed.counts > 0)
        width = self.tokens.shape[0]
        if width == 1:
            return base[None]
        # A place that holds no draft marks row 0's token, which is seen anyway.
        marks = torch.where(self.drafts() > 0, self.tokens, self.tokens[0])
        return base.repeat(width, 1).scatter_(1, marks, True)

    def before(self, count: int) -> Tensor | None:
        """bool [N, 1]: rows that predict one of the first `count` output tokens; None = the host knows that none does."""
        left = count - len(self.committed.output)
        return self.drafts().sum(dim=1, keepdim=True) < left if left > 0 else None


class Processors:
    """All processors of one request, their masks on the device. It holds no state of a sequence: that is a History's.

    `greedy`: the law is a point, take the argmax of `apply`. `identity`: `apply` changes nothing; with `greedy`, skip
    it and the copy. `needs_history`: `apply` wants the rows' histories.
    """

    def __init__(
        self, params: SamplingParams, vocab_size: int, eos_ids: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        """`vocab_size` V: the width of the logits. UserError for a token id outside it, or if no token is left to produce."""
        self.params = params
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.greedy = params.temperature == 0.0
        self._penalised = bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)
        self._bias = self._static_bias()
        self._early: list[tuple[int, Tensor]] = []  # (n, bool [V]): what none of the first n output tokens may be
        ends = [token for token in eos_ids if token < vocab_size]
        if params.min_tokens and ends:
            self._early.append((params.min_tokens, self._mask(ends, "eos")))
        if params.begin_suppress_tokens:
            self._early.append((1, self._mask(params.begin_suppress_tokens, "begin_suppress_tokens")))
        self._check_choice()
        self.needs_history = self._penalised or bool(self._early)
        plain = params.temperature == 1.0 and not params.top_k and params.top_p == 1.0 and params.min_p == 0.0
        self.identity = self._bias is None and not self.needs_history and (self.greedy or plain)

    def history(self, prompt: Sequence[int] | Tensor) -> History | None:
        """A History for a new sequence if `apply` will want one. `prompt`: all token ids before the first new one."""
        return History(prompt, self.vocab_size, self.device) if self.needs_history else None

    def apply(self, logits: Tensor, rows: RowHistory | None = None) -> Tensor:
        """Raw logits [N, V] of any dtype -> processed [N, V] fp32, for argmax or softmax; -inf for removed tokens. The
        input is kept.

        `rows`: `History.rows` of the same N rows, required if `needs_history`. Nothing comes to the host.
        """
        out = logits.float()
        if self._bias is not None:
            out = out + self._bias
        if self.needs_history:
            assert rows is not None, "these processors need the rows' histories"
            out = self._with_history(out, rows)
        return out if self.greedy else self.warp(out)

    def warp(self, logits: Tensor) -> Tensor:
        """The filters alone, without bias, penalties and masks: logits [N, V] of any dtype -> [N, V] fp32. What drafts are drawn by."""
        params, out = self.params, logits.float()
        if params.temperature != 1.0:
            out = out / params.temperature
        return laws.truncate(out, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)

    def _with_history(self, out: Tensor, rows: RowHistory) -> Tensor:
        params = self.params
        if params.repetition_penalty != 1.0:
            out = laws.repetition_penalty(out, rows.seen(), params.repetition_penalty)
        if params.presence_penalty or params.frequency_penalty:
            out = laws.presence_frequency(out, rows.counts(), params.presence_penalty, params.frequency_penalty)
        for count, mask in self._early:
            early = rows.before(count)
            if early is not None:
                out = out.masked_fill(early & mask, -math.inf)
        return out

    def _mask(self, tokens: Sequence[int], field: str) -> Tensor:
        """bool [V]: True at the tokens."""
        wrong = [token for token in tokens if token >= self.vocab_size]
        if wrong:
            raise UserError(
                f"{field} has token id {wrong[0]}, but the model's vocabulary ends at {self.vocab_size - 1}"
            )
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[torch.tensor(tokens, dtype=torch.int64)] = True
        return mask.to(self.device)

    def _static_bias(self) -> Tensor | None:
        """fp32 [V]: logit_bias, and -inf for what suppress_tokens and allowed_tokens remove. None = nothing to add."""
        params = self.params
        if not params.logit_bias and not params.suppress_tokens and params.allowed_tokens is None:
            return None
        bias = torch.zeros(self.vocab_size, device=self.device)
        if params.logit_bias:
            at = self._mask(list(params.logit_bias), "logit_bias")
            bias[at] = torch.tensor([value for _, value in sorted(params.logit_bias.items())], device=self.device)
        bias[self._mask(params.suppress_tokens, "suppress_tokens")] = -math.inf
        if params.allowed_tokens is not None:
            bias[~self._mask(params.allowed_tokens, "allowed_tokens")] = -math.inf
        return bias

    def _check_choice(self) -> None:
        """Some token must be left at the first new position, where most are removed: a law without tokens is no law."""
        left = torch.ones(self.vocab_size, dtype=torch.bool, device=self.device)
        if self._bias is not None:
            left &= self._bias > -math.inf
        for _, mask in self._early:
            left &= ~mask
        if not left.any():
            raise UserError(
                "the token masks (suppress, allowed, begin_suppress, logit_bias, min_tokens) leave no token to produce"
            )
