"""What came of training: acceptance at every draft length, CTAR, and the clock against plain decoding.

CTAR@w, counterfactual acceptance within w: the share of places of the target's own text from which a draft of w tokens would have been
accepted whole. Every place counts, not only those where a block happened to begin, so it does not depend on how earlier blocks
went. Where a draft is accepted its tokens are the text, so reading the text once answers for all places: the draft made at place t is
accepted up to w iff the drafter's argmax is the next token at t, t + 1, ..., t + w - 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.decoding.acceptance import WARM_TOKENS, evaluating, measure_acceptance
from understudy.decoding.engine import decode
from understudy.decoding.listeners import Listener
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stats import Stats
from understudy.decoding.stops import StopRule
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import build
from understudy.target.attention import Pass
from understudy.target.memory import memory_guard
from understudy.target.params import params_from_generation_config
from understudy.target.target import Target


@contextmanager
def draft_length(drafter: Drafter, steps: int) -> Iterator[None]:
    """Drafts of at most `steps` tokens inside."""
    before, drafter.steps = drafter.steps, steps
    try:
        yield
    finally:
        drafter.steps = before


@torch.inference_mode()
def hits(drafter: ExitDrafter, ids: Sequence[int], first: int) -> list[bool]:
    """Whether the drafter's argmax after `ids[: t + 1]` is `ids[t + 1]`, for t = first, ..., len(ids) - 2."""
    target = drafter.target
    text = torch.tensor(list(ids[:-1]), device=target.device)
    if drafter.shallow is not None:
        states = drafter.shallow(text)
    else:
        at = Pass(0, text.shape[0])
        states, _ = target.forward(text, at, target.cache(), 0, drafter.config.exit_layer)
    read = _read(drafter, states)[first:]
    said: Tensor = drafter.head_logits(read).argmax(-1)
    return [token == wanted for token, wanted in zip(said.tolist(), ids[first + 1 :], strict=True)]


def _read(drafter: ExitDrafter, states: Tensor) -> Tensor:
    """What the head reads of the exit states [T, D] of a whole text."""
    if drafter.adapter is None:
        return drafter.norm(states)
    positions = torch.arange(states.shape[0], device=states.device)[None]
    read: Tensor = drafter.adapter(states[None], positions, torch.zeros_like(positions))
    return read[0]


def ctar(rows: Iterable[Sequence[bool]], w: int) -> float | None:
    """CTAR@w over texts, of each its hits. Of all places with w tokens after them; None if there is none."""
    places = [all(row[t : t + w]) for row in rows for t in range(len(row) - w + 1)]
    return sum(places) / len(places) if places else None


def evaluate(
    target: Target,
    drafter: ExitDrafter,
    prompts: Sequence[list[int]],
    k_max: int,
    max_new_tokens: int,
    listeners: Iterable[Listener] = (),
) -> list[dict[str, Any]]:
    """For every draft length k = 1, ..., k_max, greedily: k, tau, acceptance_rate, acc@k (the first k drafts were all accepted, of all
    cycles), ctar@k (with w = k), tokens."""
    listeners, rows, texts = tuple(listeners), list[dict[str, Any]](), list[list[bool]]()
    for k in range(1, k_max + 1):
        with draft_length(drafter, k):
            found = measure_acceptance(target, drafter, prompts, max_new_tokens, listeners=listeners)
        if k == 1:  # the text is the same with every draft length
            with evaluating(target.model, drafter), memory_guard(target):
                texts = [hits(drafter, [*p, *out], len(p) - 1) for p, out in zip(prompts, found.outputs, strict=True)]
        joint = found.joint[k - 1] if len(found.joint) >= k else 0.0
        rows.append(
            {
                "k": k,
                "tau": found.tau,
                "acceptance_rate": found.acceptance_rate,
                "acc": joint,
                "ctar": ctar(texts, k),
                "tokens": found.tokens,
            }
        )
    return rows


def clock(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    repeats: int,
    greedy: bool,
    listeners: Iterable[Listener] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Plain and speculative decoding of the same prompts in turn, `repeats` times; past stop tokens, so that lengths are equal.

    Of every prompt the medians of its seconds count, without prefill and without what listeners took: tokens_per_s and
    plain_tokens_per_s over all prompts, speedup = their ratio, tau, and `same`: prompts whose two texts were equal every time
    (in fp32 all of them; below, near ties may fall otherwise). UserError without prompts, or where nothing is left to time.
    """
    if not prompts:
        raise UserError("there is no prompt to time")
    plain, listeners, total = build("none", target), tuple(listeners), Stats()
    same = [True] * len(prompts)
    seconds: dict[str, list[list[float]]] = {"plain": [[] for _ in prompts], "drafted": [[] for _ in prompts]}
    tokens = 0
    with evaluating(target.model, drafter), memory_guard(target):
        for who in (plain, drafter):  # first passes are slower
            _decode(target, who, prompts[0], WARM_TOKENS, greedy, seed, 0, ())
        for repeat in range(repeats):
            for i, prompt in enumerate(prompts):
                one, text = _decode(target, plain, prompt, max_new_tokens, greedy, seed, i, ())
                two, other = _decode(target, drafter, prompt, max_new_tokens, greedy, seed, i, listeners)
                seconds["plain"][i].append(one.decode_s)
                seconds["drafted"][i].append(two.decode_s - two.seconds["listen"])
                same[i] &= text == other
                total.merge(two)
                tokens += one.tokens if repeat == 0 else 0
    if not tokens:
        raise UserError("no token was left to time: allow at least 2 new tokens, or shorten prompts")
    spent = {name: sum(map(median, lists)) for name, lists in seconds.items()}
    return {
        "prompts": len(prompts),
        "repeats": repeats,
        "greedy": greedy,
        "tokens": tokens,
        "plain_tokens_per_s": tokens / spent["plain"],
        "tokens_per_s": tokens / spent["drafted"],
        "speedup": spent["plain"] / spent["drafted"],
        "tau": total.tau,
        "acceptance_rate": total.acceptance_rate,
        "same": sum(same),
    }


def _decode(
    target: Target,
    drafter: Drafter,
    prompt: list[int],
    max_new_tokens: int,
    greedy: bool,
    seed: int,
    index: int,
    listeners: tuple[Listener, ...],
) -> tuple[Stats, list[int]]:
    law = params_from_generation_config(
        getattr(target.model, "generation_config", None), temperature=0.0 if greedy else 1.0, seed=seed
    )
    params = DecodeParams(max_new_tokens=max_new_tokens)
    sequence = DecodeSequence(target, drafter, params, law, StopRule(), listeners, index)
    sequence.prefill(prompt)
    stats = Stats()
    for cycle in decode(sequence):
        stats.add(cycle)
    return stats, sequence.output
