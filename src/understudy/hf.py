"""Decoding with a drafter from inside transformers' own `generate`.

model.generate(**inputs, custom_generate=understudy.custom_generate("prompt-lookup"), streamer=streamer)
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from understudy.core.errors import UserError
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import build
from understudy.target.loading import load_target
from understudy.target.params import params_from_generation_config
from understudy.target.target import Target

# what `generate` prepares for every model and the engine works out by itself
PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
SCORES = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
MEMO = "_understudy"  # attribute of the user's model: its Target and the drafters built for it go when the model goes


def custom_generate(drafter: str | Drafter, tokenizer: Any = None, **options: Any) -> Callable[..., Any]:
    """A decoding method for `model.generate(..., custom_generate=...)`, for any number of models and calls.

    What `generate` was asked for is honoured or refused: generation config, stop tokens, a StopStringCriteria (needs `tokenizer`
    here), left padding, several return sequences, streamers. `options` are fields of `DecodeParams`.
    """

    def understudy_generate(
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        _check_inputs(model, input_ids, logits_processor, generation_config, model_kwargs)
        streamer = _callers_streamer() if streamer is None else streamer
        if streamer is not None and input_ids.shape[0] > 1:
            raise UserError("a streamer takes one sequence: give a batch of one, or no streamer")
        target, drafting = _prepared(model, drafter)
        config = copy.copy(generation_config)
        config.num_return_sequences = None  # `generate` has repeated the rows already
        law = params_from_generation_config(config, seed=int(torch.randint(2**31, ()).item()))
        params = DecodeParams(max_new_tokens=generation_config.max_length - input_ids.shape[1], **options)
        stop = _stop_rule(stopping_criteria, tokenizer)
        mask = model_kwargs.get("attention_mask")
        outputs = []
        for row in range(input_ids.shape[0]):
            prompt = input_ids[row] if mask is None else input_ids[row][mask[row].bool()]
            sequence = DecodeSequence(target, drafting, params, law, stop, index=row)
            sequence.prefill(prompt.tolist())
            for cycle in decode(sequence):
                if streamer is not None:
                    streamer.put(torch.tensor(cycle.committed))
            outputs.append(sequence.output)
        if streamer is not None:
            streamer.end()
        return _result(input_ids, outputs, generation_config)

    return understudy_generate


def assistant(model: nn.Module, drafter: str | Drafter) -> nn.Module:
    """A drafter as transformers' own generation takes it, for `model` and any number of calls:

        model.generate(**inputs, assistant_model=understudy.assistant(model, "dflash:DIR"), speculation_type="dflash")

    UserError for a drafter that transformers knows no way to draft with.
    """
    return _prepared(model, drafter)[1].assistant()


def _prepared(model: nn.Module, drafter: str | Drafter) -> tuple[Target, Drafter]:
    """The model's Target and the drafter for it, made once."""
    memo = model.__dict__.setdefault(MEMO, {})
    if "target" not in memo:
        memo["target"] = load_target(model)
    target = memo["target"]
    if not isinstance(drafter, str):
        return target, drafter
    if drafter not in memo:
        memo[drafter] = build(drafter, target)
    return target, memo[drafter]


def _callers_streamer() -> Any:
    """The `streamer` of the `generate` call that called us: transformers 5.23 hands it to its own decoding methods only."""
    frame = sys._getframe(2)
    return frame.f_locals.get("streamer") if frame.f_code.co_name == "generate" else None


def _check_inputs(model: Any, input_ids: Tensor, processors: Any, config: Any, kwargs: dict[str, Any]) -> None:
    extra = sorted(k for k, v in kwargs.items() if k not in PREPARED and v is not None)
    if extra:
        raise UserError(f"custom_generate decodes text only: {extra[0]!r} is not supported")
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError("custom_generate starts from the whole prompt: past_key_values must be empty")
    own = model._get_logits_processor(
        generation_config=config,
        input_ids_seq_length=input_ids.shape[1],
        encoder_input_ids=input_ids,
        prefix_allowed_tokens_fn=None,
        logits_processor=[],
        device=input_ids.device,
        model_kwargs=kwargs,
    )
    known = list(own)
    for processor in processors or ():
        same = next((p for p in known if _alike(p, processor)), None)
        if same is None:
            raise UserError(
                f"logits processor {type(processor).__name__} is not supported: use the generation config's own fields,"
                " or logit_bias / suppress_tokens"
            )
        known.remove(same)
    if config.return_dict_in_generate and (asked := [name for name in SCORES if getattr(config, name, None)]):
        raise UserError(f"{asked[0]} is not supported: custom_generate returns sequences only")


def _alike(a: Any, b: Any) -> bool:
    """Two processors of one type with the same settings."""
    if type(a) is not type(b) or vars(a).keys() != vars(b).keys():
        return False
    pairs = [(vars(a)[name], vars(b)[name]) for name in vars(a)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def _stop_rule(criteria: Any, tokenizer: Any) -> StopRule:
    ids: set[int] = set()
    strings: tuple[str, ...] = ()
    for criterion in criteria or ():
        name = type(criterion).__name__
        if name == "EosTokenCriteria":
            ids |= set(criterion.eos_token_id.flatten().tolist())
        elif name == "StopStringCriteria":
            if tokenizer is None:
                raise UserError("stop strings need custom_generate(..., tokenizer=tokenizer)")
            strings += tuple(criterion.stop_strings)
        elif name != "MaxLengthCriteria":
            raise UserError(
                f"stopping criterion {name} is not supported: use max_new_tokens, eos_token_id or stop_strings"
            )
    return StopRule(ids, strings, tokenizer.decode if strings else None)


def _result(input_ids: Tensor, outputs: Sequence[list[int]], config: Any) -> Any:
    """[B, prompt + longest answer], padded on the right, as `generate` returns it."""
    longest = max(len(output) for output in outputs)
    pad = config._pad_token_tensor
    fill = 0 if pad is None else int(pad.flatten()[0])
    rows = [output + [fill] * (longest - len(output)) for output in outputs]
    sequences = torch.cat([input_ids, torch.tensor(rows, device=input_ids.device)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)
