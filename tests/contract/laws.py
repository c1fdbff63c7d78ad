"""The law of sampled output against exact probabilities, with a target that is a table: its next-token law is a row of a matrix.

The table target runs through the very engine, session and stages, but a pass costs a tenth of a millisecond, so thousands of
sequences can be drawn. Its first half gives another law than the whole, so early exit has something to get wrong.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

import tiny
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafting.protocols import Drafter
from understudy.target.params import SamplingParams
from understudy.target.target import Target

V = 6
PROMPT = [3, 1, 4]


class _Layer(nn.Module):
    """Rows times a matrix."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.map = nn.Linear(V, V, bias=False)
        self.map.weight.data = matrix.T.contiguous()

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        out: Tensor = self.map(hidden_states)
        return out


class _Decoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(V, V)
        self.embed_tokens.weight.data = torch.eye(V)
        self.layers = nn.ModuleList([_Layer(torch.eye(V)), _Layer(torch.randn(V, V) + torch.eye(V))])
        self.norm = nn.Identity()

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any) -> Any:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x = layer(x)
        return T.modeling_outputs.BaseModelOutput(last_hidden_state=self.norm(x))


class TableModel(nn.Module):
    """Logits of the next token = one row of a [V, V] table, by the last token."""

    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(V, V, bias=False)
        self.lm_head.weight.data = 0.4 * torch.randn(V, V)

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, **inputs: Any) -> Any:
        hidden = self.model(**inputs).last_hidden_state
        return T.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden))


@cache
def _model() -> TableModel:
    torch.manual_seed(7)
    config = T.LlamaConfig(
        vocab_size=V, hidden_size=V, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=2
    )
    return TableModel(config).requires_grad_(False)


def table_target() -> Target:
    return Target(_model())


def exact(
    model: nn.Module, params: SamplingParams, prompt: Sequence[int], first: int, length: int, vocab: int
) -> dict[tuple[int, ...], float]:
    """The joint law of the `length` tokens that follow `first`, itself the first token of the output."""
    out = {}
    for tokens in itertools.product(range(vocab), repeat=length):
        p = 1.0
        for i, token in enumerate(tokens):
            said = [first, *tokens[:i]]
            p *= _law(model, params, tuple(prompt), tuple(said))[token]
        out[tokens] = p
    return out


@cache
def _cached_law(model: nn.Module, params: str, prompt: tuple[int, ...], said: tuple[int, ...]) -> tuple[float, ...]:
    row = tiny.logits(model, [*prompt, *said])[-1]
    return tuple(tiny.law(row, SamplingParams.model_validate_json(params), prompt, said).tolist())


def _law(model: nn.Module, params: SamplingParams, prompt: tuple[int, ...], said: tuple[int, ...]) -> tuple[float, ...]:
    return _cached_law(model, params.model_dump_json(), prompt, said)


PLAIN = SamplingParams(temperature=0.8)
FILTERED = SamplingParams(temperature=1.3, top_k=4, repetition_penalty=1.6, frequency_penalty=0.3)


def check_law(
    make: Callable[[Target], Drafter],
    params: SamplingParams = PLAIN,
    samples: int = 3000,
    draft_sampling: str = "argmax",
    target: Target | None = None,
    length: int = 2,
) -> tuple[int, int]:
    """The next `length` tokens over many streams have the exact joint law (chi-square). -> (drafted, accepted)."""
    target = table_target() if target is None else target
    vocab = target.vocab_size
    request = DecodeParams(max_new_tokens=length + 3, draft_sampling=draft_sampling)
    root = DecodeSequence(target, make(target), request, params, StopRule())
    root.prefill(PROMPT)
    loop = decode(root)
    first = next(loop).committed[0]
    loop.close()
    seen: Counter[tuple[int, ...]] = Counter()
    drafted = accepted = 0
    for index in range(1, samples + 1):
        sequence = root.fork(index)
        for cycle in decode(sequence):
            drafted, accepted = drafted + len(cycle.drafted), accepted + cycle.accepted
            if len(sequence.output) > length:
                break
        seen[tuple(sequence.output[1 : 1 + length])] += 1
    chi_square(seen, exact(target.model, params, PROMPT, first, length, vocab), samples)
    return drafted, accepted


def chi_square(seen: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float], samples: int) -> None:
    """Raise if the counts are further from the law than one in 30,000 would be. Rare cells are taken together."""
    impossible = {cell: n for cell, n in seen.items() if law[cell] == 0}
    assert not impossible, f"these cannot come: {impossible}"
    cells: list[tuple[float, int]] = []
    rare = (0.0, 0)
    for cell, p in law.items():
        if p * samples >= 8:
            cells.append((p * samples, seen[cell]))
        else:
            rare = (rare[0] + p * samples, rare[1] + seen[cell])
    if rare[0] >= 1:
        cells.append(rare)
    statistic = sum((n - e) ** 2 / e for e, n in cells)
    freedom = len(cells) - 1
    # Wilson and Hilferty: the cube root of chi-square over its mean is nearly normal
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.0, f"chi-square {statistic:.1f} with {freedom} degrees of freedom ({z:.1f} sigma): another law"
