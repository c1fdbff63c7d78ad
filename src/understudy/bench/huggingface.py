"""The modes that run transformers' own `generate` on the very same weights, with the attention it chose for itself.

What is asked of the model is one `GenerationConfig` made from our `SamplingParams`. It stands in for the model's own while a turn
runs, because transformers fills gaps from there, and reads the draft settings of early exit nowhere else.

Where prefill ends is seen by a streamer: `generate` hands it the prompt, then the tokens of each pass as they come. Plain
generation comes token by token. Assisted generation verifies its first drafts in the pass over the prompt, so its first hand-over
can hold several tokens: all of them count as prefill's, and only the later ones as decoded.

The settings of an assisted mode are those of our drafter of the same method: the first one of that name that was given, else its
defaults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from understudy.analysis.clock import now, undisturbed
from understudy.bench.modes import Turn
from understudy.core.errors import UserError
from understudy.core.seeds import derive
from understudy.decoding.stats import Stats
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import DrafterConfig, configured, parse
from understudy.target.memory import is_out_of_memory
from understudy.target.params import SamplingParams
from understudy.target.target import Target


@dataclass(frozen=True)
class Method:
    """One way of `generate`, and what its settings are called there."""

    counterpart: str | None  # our drafter of the same method
    call: Callable[[Any, Any], dict[str, Any]]  # the counterpart's config and the counterpart -> keywords of `generate`
    config: Callable[[Any], dict[str, Any]]  # the counterpart's config -> fields of the GenerationConfig


METHODS = {
    "hf": Method(None, lambda c, d: {}, lambda c: {}),
    "hf-prompt-lookup": Method(
        "prompt-lookup",
        lambda c, d: {"prompt_lookup_num_tokens": c.steps, "max_matching_ngram_size": c.max_ngram},
        lambda c: {},
    ),
    "hf-dflash": Method(
        "dflash", lambda c, d: {"assistant_model": d.assistant(), "speculation_type": "dflash"}, lambda c: {}
    ),
    "hf-early-exit": Method(
        "early-exit",
        lambda c, d: {"assistant_early_exit": c.exit_layer},
        lambda c: {
            "num_assistant_tokens": c.steps,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": c.threshold,
        },
    ),
}


class HuggingFaceMode:
    """`model.generate`, in one of the METHODS."""

    ours = False

    def __init__(
        self,
        name: str,
        target: Target,
        sampling: SamplingParams,
        stop_ids: Sequence[int],
        given: Sequence[str],
        **defaults: Any,
    ) -> None:
        """`given`: the drafters as given; `defaults`: draft options where they do not say."""
        method = METHODS[name]
        settings, drafter = (
            (None, None) if method.counterpart is None else _counterpart(method.counterpart, target, given, defaults)
        )
        self.name, self.target, self.seed = name, target, sampling.seed
        self.stop_ids = frozenset(stop_ids)
        self.call = method.call(settings, drafter)
        self.config = GenerationConfig(**_law(sampling), **_ends(target, stop_ids), **method.config(settings))

    def begin(self) -> None:
        """Nothing is learned here."""

    def turn(self, prompt: list[int], index: int, limit: int) -> Turn:
        device, streamer = self.target.device, Clock()
        limit = min(limit, self.target.context - len(prompt))
        torch.manual_seed(derive(self.seed, index, self.name))
        with undisturbed(), self._config():
            began = now(device)
            ids = torch.tensor([prompt], device=device)
            out = self.target.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, streamer=streamer, **self.call
            )
            done = now(device)
        output = self._trimmed(out[0, len(prompt) :].tolist())
        first, stats = streamer.times[1], _stats(streamer.sizes[1:], len(output))
        return Turn(output, first - began, done - first, stats)

    def _trimmed(self, output: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(output) if token in self.stop_ids), None)
        return output[:end]

    @contextmanager
    def _config(self) -> Iterator[None]:
        """Our GenerationConfig in the place of the model's own."""
        model = self.target.model
        own, level = model.generation_config, logging.get_verbosity()
        model.generation_config = self.config
        logging.set_verbosity_error()  # early exit passes itself what transformers warns about
        try:
            yield
        except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"transformers cannot run {self.name} on this model ({reason}): leave it out of --baselines"
            ) from error
        finally:
            model.generation_config = own
            logging.set_verbosity(level)


class Clock(BaseStreamer):
    """Notes when tokens come and how many: first the prompt's, then those of each pass."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.sizes: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.sizes.append(value.numel())

    def end(self) -> None:
        """Nothing is held back."""


def _counterpart(
    name: str, target: Target, given: Sequence[str], defaults: dict[str, Any]
) -> tuple[DrafterConfig, Drafter]:
    """The first drafter of that name that was given, else a default one, with its config. UserError for what does not fit the target."""
    text = next((text for text in given if parse(text)[0].name == name), name)
    spec, path, config = configured(text, **defaults)
    return config, spec.build(config, target, path)


def _stats(passes: list[int], length: int) -> Stats:
    """Cycles and what they committed, from the tokens per pass; the first pass is prefill's, and a cut at a stop ends the last."""
    stats = Stats(turns=1)
    left = length - passes[0]
    for size in passes[1:]:
        if left <= 0:
            break
        stats.cycles += 1
        stats.accept_hist[size - 1] += 1
        stats.accepted += size - 1
        stats.tokens += min(size, left)
        left -= size
    return stats


def _ends(target: Target, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Stop tokens; without any, generation runs to its full length."""
    own = getattr(target.model.generation_config, "pad_token_id", None)
    pad = own if own is not None else next(iter(stop_ids), 0)
    return {"eos_token_id": list(stop_ids) or None, "pad_token_id": pad}


def _law(sampling: SamplingParams) -> dict[str, Any]:
    """SamplingParams as fields of a GenerationConfig: the same law, with nothing left to transformers' defaults (top-k of 50)."""
    if sampling.presence_penalty or sampling.frequency_penalty or sampling.allowed_tokens is not None:
        raise UserError(
            "transformers has no presence penalty, frequency penalty or allowed tokens: leave hf out of --baselines"
        )
    law: dict[str, Any] = {"do_sample": sampling.temperature > 0, "repetition_penalty": sampling.repetition_penalty}
    if sampling.temperature > 0:
        law |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        law |= {"min_p": sampling.min_p or None}
    if sampling.logit_bias:
        law["sequence_bias"] = {(token,): bias for token, bias in sampling.logit_bias.items()}
    if sampling.suppress_tokens:
        law["suppress_tokens"] = list(sampling.suppress_tokens)
    if sampling.begin_suppress_tokens:
        law["begin_suppress_tokens"] = list(sampling.begin_suppress_tokens)
    if sampling.min_tokens:
        law["min_new_tokens"] = sampling.min_tokens
    return law
