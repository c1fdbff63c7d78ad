"""What a request asks of the target's law, and the translation of a transformers GenerationConfig into it. Imports no
torch.

Every attribute of GenerationConfig stands in exactly one of four tables here: applied, a stop rule (read where stop
rules are made), refused when it is active, or harmless. One that stands in none is refused: a field nobody knows may
change the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import pydantic

from understudy.core.config import Config, option
from understudy.core.errors import UserError

TokenId = Annotated[int, pydantic.Field(ge=0)]


class SamplingParams(Config):
    """The processors between the model's logits and the law that tokens are drawn from."""

    temperature: float = option(0.0, "Divides the logits before sampling; 0 = greedy.", ge=0.0, allow_inf_nan=False)
    top_k: int = option(0, "Keep the k most probable tokens; 0 = off.", ge=0)
    top_p: float = option(
        1.0, "Keep the most probable tokens that together reach this probability; 1 = off.", ge=0.0, le=1.0
    )
    min_p: float = option(
        0.0, "Remove tokens below this share of the most probable token's probability; 0 = off.", ge=0.0, le=1.0
    )
    repetition_penalty: float = option(
        1.0,
        "Divides positive and multiplies negative logits of tokens in prompt or output; 1 = off.",
        gt=0.0,
        allow_inf_nan=False,
    )
    presence_penalty: float = option(
        0.0, "Subtracted from the logit of every token in the output; 0 = off.", ge=-2.0, le=2.0
    )
    frequency_penalty: float = option(
        0.0, "Subtracted from a token's logit once for each time it is in the output; 0 = off.", ge=-2.0, le=2.0
    )
    logit_bias: dict[TokenId, float] = option({}, "Added to the logits, by token id; -inf forbids a token.")
    suppress_tokens: tuple[TokenId, ...] = option((), "Token ids that are never produced.")
    allowed_tokens: tuple[TokenId, ...] | None = option(None, "The only token ids that may be produced; unset = all.")
    begin_suppress_tokens: tuple[TokenId, ...] = option((), "Token ids that cannot be the first new token.")
    min_tokens: int = option(0, "New tokens before an end-of-sequence token may come.", ge=0)
    seed: int = option(0, "Seed of the sequence's random streams.", ge=0)

    @pydantic.field_validator("temperature")
    @classmethod
    def _divisible(cls, value: float) -> float:
        if 0.0 < value < 1e-5:
            raise ValueError("below 1e-5 logits overflow; use 0 for greedy decoding")
        return value

    @pydantic.field_validator("logit_bias")
    @classmethod
    def _bounded(cls, value: dict[int, float]) -> dict[int, float]:
        if any(math.isnan(v) or v == math.inf for v in value.values()):
            raise ValueError("a bias is a number or -inf; to force tokens, use allowed_tokens")
        return value

    @pydantic.field_validator("allowed_tokens")
    @classmethod
    def _some(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and not value:
            raise ValueError("no token is allowed; leave it unset to allow all")
        return value


# fmt: off
APPLIED = frozenset({
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids", "sequence_bias",
})
# They end the output and change no token before its end. Whoever makes the stop rules reads them.
STOPPING = frozenset({"max_length", "max_new_tokens", "eos_token_id", "stop_strings"})
# No effect on the law here: beam-only, cache, output format, encoder-decoder, how transformers itself would draft,
# bookkeeping.
HARMLESS = frozenset({
    "renormalize_logits", "early_stopping", "length_penalty", "low_memory",
    "use_cache", "cache_config", "max_cache_len", "prefill_chunk_size",
    "compile_config", "disable_compile", "continuous_batching_config",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "pad_token_id", "bos_token_id", "decoder_start_token_id",
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "speculation_type",
    "transformers_version",
})
# fmt: on


def _set(value: Any) -> bool:
    return value is not None and value is not False


def _not(neutral: float) -> Callable[[Any], bool]:
    return lambda value: value != neutral


def _inside(value: float) -> bool:
    return 0.0 < value < 1.0


_BEAMS = "there is no beam search here, set it to 1"
_UNSET = "unset it"
_ENCODER = "it compares with an encoder's input, unset it"
# field -> (is this value active?, what to do). None is never active.
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (_not(1), _BEAMS),
    "num_beam_groups": (_not(1), _BEAMS),
    "diversity_penalty": (_not(0.0), "there is no group beam search here, set it to 0"),
    "constraints": (_set, "there is no constrained beam search here, unset it"),
    "force_words_ids": (_set, "there is no constrained beam search here, unset it"),
    "penalty_alpha": (_not(0.0), "there is no contrastive search here, unset it"),
    "dola_layers": (_set, "there is no DoLa decoding here, unset it"),
    "num_return_sequences": (_not(1), "ask for the samples one by one, set it to 1"),
    "top_h": (_set, "use top_p or min_p instead and unset it"),
    "typical_p": (lambda value: value < 1.0, "use top_p or min_p instead and set it to 1"),
    "epsilon_cutoff": (_inside, "use min_p instead and set it to 0"),
    "eta_cutoff": (_inside, "use min_p instead and set it to 0"),
    "no_repeat_ngram_size": (_not(0), "use frequency_penalty instead and set it to 0"),
    "encoder_repetition_penalty": (_not(1.0), _ENCODER),
    "encoder_no_repeat_ngram_size": (_not(0), _ENCODER),
    "min_length": (_not(0), "it counts the prompt's tokens too, set min_new_tokens instead"),
    "max_time": (_set, "a limit in seconds makes the output depend on the machine, use max_new_tokens"),
    "forced_bos_token_id": (_set, "put the token into the prompt and unset it"),
    "forced_eos_token_id": (_set, _UNSET),
    "exponential_decay_length_penalty": (_set, _UNSET),
    "remove_invalid_values": (_set, "it hides a model that computes NaN, unset it"),
    "token_healing": (_set, "it rewrites the prompt, heal the prompt first and unset it"),
    "guidance_scale": (_not(1.0), "classifier-free guidance needs a second pass, set it to 1"),
    "watermarking_config": (_set, _UNSET),
    "assistant_ensemble_weight": (_set, "it changes the output law on purpose, unset it"),
    "cache_implementation": (lambda value: value == "quantized", "a quantised cache changes the output, unset it"),
}


def params_from_generation_config(generation_config: Any, **overrides: Any) -> SamplingParams:
    """A transformers GenerationConfig (or None), with SamplingParams fields laid over it; an override of None is not
    given.

    The law is that of `model.generate` with the same config. Hence top-k is 50 where the config asks to sample and
    names no top_k, and a config that does not ask to sample is greedy unless `temperature` is overridden. Fields that
    change the output and are not supported, and fields nobody knows, raise UserError. Tokens of `bad_words_ids` stay
    forbidden whatever `suppress_tokens` says.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    fields: dict[str, Any] = {}
    if generation_config is not None:
        config = {
            name: value for name, value in vars(generation_config).items() if value is not None and name[0] != "_"
        }
        _refuse(config, has_min_tokens="min_new_tokens" in config or "min_tokens" in given)
        fields = _applied(config)
        banned = _bad_words(config)
        fields["suppress_tokens"] = (*given.pop("suppress_tokens", fields.get("suppress_tokens", ())), *banned)
        fields["logit_bias"] = _single_token_bias(config) | given.pop("logit_bias", {})
    try:
        return SamplingParams(**(fields | given))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"sampling parameter {name}={first['input']!r}: {first['msg']}") from None


def _refuse(config: dict[str, Any], has_min_tokens: bool) -> None:
    for name, value in config.items():
        if name in APPLIED or name in STOPPING or name in HARMLESS:
            continue
        if name not in REFUSED:
            raise UserError(
                f"generation_config.{name}={value!r} is not a field that is known here: unset it if it does not matter"
            )
        active, advice = REFUSED[name]
        # transformers lets min_new_tokens override min_length, and fills min_length in from it.
        if active(value) and not (name == "min_length" and has_min_tokens):
            raise UserError(f"generation_config.{name}={value!r} is not supported: {advice}")


def _applied(config: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: config[name] for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in config
    }
    if "min_new_tokens" in config:
        fields["min_tokens"] = config["min_new_tokens"]
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if name in config:
            fields[name] = tuple(config[name])
    sampled = bool(config.get("do_sample"))
    fields["temperature"] = config.get("temperature", 1.0) if sampled else 0.0
    if sampled:
        fields.setdefault("top_k", 50)
    return fields


def _bad_words(config: dict[str, Any]) -> list[int]:
    """The forbidden single tokens. transformers drops an end-of-sequence token from the list, and so does this."""
    words = [list(word) for word in config.get("bad_words_ids", ())]
    if any(len(word) != 1 for word in words):
        raise UserError(
            "generation_config.bad_words_ids has entries of several tokens, which is not supported: keep single tokens"
        )
    eos = config.get("eos_token_id", [])
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    return [word[0] for word in words if word[0] not in ends]


def _single_token_bias(config: dict[str, Any]) -> dict[int, float]:
    bias = config.get("sequence_bias", {})
    pairs = [(tuple(sequence), value) for sequence, value in (bias.items() if isinstance(bias, dict) else bias)]
    if any(len(sequence) != 1 for sequence, _ in pairs):
        raise UserError(
            "generation_config.sequence_bias has entries of several tokens, which is not supported: keep single tokens"
        )
    return {sequence[0]: value for sequence, value in pairs}
