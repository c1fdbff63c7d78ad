"""Who writes the answers, by what law and in which manner: the target in this process, or a server that holds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from understudy.core.errors import UserError
from understudy.data.encode import Encoder
from understudy.data.prompts import thinking_variables
from understudy.distill.answers import Writer
from understudy.distill.dialogue import Dialogue, Style
from understudy.distill.endpoint import RemoteWriter, Server
from understudy.target.fingerprint import fingerprint
from understudy.target.params import SamplingParams, params_from_generation_config
from understudy.target.target import Target, stop_ids


class Answers(Protocol):
    written: int  # tokens so far, those of dropped answers too

    def answer(self, dialogues: Iterable[Dialogue]) -> Iterator[Dialogue]:
        """Yield each dialogue once it is over."""
        ...


@dataclass(frozen=True, slots=True)
class Author:
    """`made` is what every row says of its making."""

    answers: Answers
    style: Style
    law: SamplingParams
    made: dict[str, Any]


def here(target: Target, batch_size: int, *, max_new_tokens: int, **manner: Any) -> Author:
    """A target in this process."""
    generation = getattr(target.model, "generation_config", None)
    style, law, made = _manner(target.tokenizer, target.eos_ids, target.context, generation, **manner)
    answers = Writer(target, law, style, max_new_tokens, batch_size)
    return Author(answers, style, law, {"target": fingerprint(target), **made})


def there(
    server: Server, model: str, hub: dict[str, Any], concurrency: int, *, max_new_tokens: int, **manner: Any
) -> Author:
    """A server. Of `model`, a folder or a name, only configuration and tokenizer are read: rows do not know its weights' fingerprint."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(model, **hub)
        tokenizer = AutoTokenizer.from_pretrained(model, **hub)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read configuration and tokenizer of {model}: {str(error).partition(chr(10))[0]}"
        ) from None
    place = {"revision": hub.get("revision")}  # of what it does not know, a generation config makes fields
    try:
        generation = GenerationConfig.from_pretrained(model, **place)
    except OSError:  # as a model does that is loaded without one
        generation = GenerationConfig.from_pretrained(
            model, config_file_name="config.json", _from_model_config=True, **place
        )
    text = config.get_text_config()
    stops = stop_ids(generation, config, text)  # as `Target.eos_ids`
    most = min(getattr(text, "max_position_embeddings", None) or 2**31, server.longest or 2**31)
    style, law, made = _manner(tokenizer, stops, most, generation, **manner)
    answers = RemoteWriter(server, law, style, max_new_tokens, concurrency)
    return Author(answers, style, law, {"target": None, "endpoint_model": server.model, **made})


def _manner(
    tokenizer: Any,
    eos_ids: tuple[int, ...],
    context: int,
    generation: Any,
    *,
    thinking: str,
    max_length: int,
    max_repeat_share: float,
    sampling: dict[str, Any],
) -> tuple[Style, SamplingParams, dict[str, Any]]:
    if tokenizer is None:
        raise UserError("the model has no tokenizer: conversations cannot be turned into tokens")
    encoder = Encoder(tokenizer, stop_ids=eos_ids)
    law = params_from_generation_config(generation, **sampling)
    stops = frozenset(eos_ids) or encoder.stops
    limit = min(max_length, context)
    style = Style(tokenizer, stops, limit, max_repeat_share, thinking_variables(tokenizer, thinking))
    unsaid = SamplingParams().model_dump(mode="json")
    made = {
        "tokenizer": encoder.token_reader.hash,
        "template": encoder.template_hash,
        "thinking": thinking,
        "sampling": {
            name: value
            for name, value in law.model_dump(mode="json").items()
            if value != unsaid[name] or name in ("temperature", "seed")
        },
    }
    return style, law, made
