"""Answers from a server with an OpenAI-compatible completions route: how regenerating scales past one process.

Prompts are sent as token ids, rendered here, and the server has to return the ids of its answers (`return_token_ids`, which vLLM has
since 0.10.2): text that is tokenised again is not always what the target wrote, so a server that returns only text is refused.
A request that fails for a passing reason is tried again, later and later; a conversation whose request keeps failing is written down
with the reason, and tried again by the next run.
"""

from __future__ import annotations

import math
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import httpx

from understudy.core.errors import UserError
from understudy.core.seeds import derive
from understudy.distill.dialogue import Answer, Dialogue, Style
from understudy.target.params import SamplingParams
from understudy.telemetry.repeats import repeat_share

LONGEST_WAIT = 60.0  # seconds between two tries
FATAL = (401, 403, 404, 405)  # every other request would fail alike


class Failed(Exception):
    """Why one request has no answer."""


Reply = tuple[Dialogue, tuple[list[int], str] | BaseException]  # whose, and what `Server.complete` returned or raised


class Server:
    """One model behind a completions route.

    `url` with or without /v1. `model` None: the only one that is served. `key_env`: environment variable with the key that the server
    wants. `timeout` in seconds per request, `retries` after a first failure. UserError if nobody answers, or not for this model.
    """

    def __init__(
        self, url: str, model: str | None = None, key_env: str | None = None, timeout: float = 600, retries: int = 5
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.retries = retries
        self.closed = Event()
        headers = {}
        if key_env is not None:
            if key_env not in os.environ:
                raise UserError(f"--api-key-env {key_env}: there is no such environment variable")
            headers["Authorization"] = f"Bearer {os.environ[key_env]}"
        self.client = httpx.Client(headers=headers, timeout=timeout, limits=httpx.Limits(max_connections=None))
        served = self._served()
        if model is None and len(served) != 1:
            raise UserError(f"{self.url} serves {', '.join(served) or 'no model'}: name one with --endpoint-model")
        self.model = next(iter(served)) if model is None else model
        if self.model not in served:
            raise UserError(f"{self.url} does not serve {self.model!r}, but {', '.join(served)}")
        self.longest: int | None = served[self.model]  # tokens of prompt and answer; None = it does not say

    def _served(self) -> dict[str, int | None]:
        """Model -> most tokens of a text."""
        try:
            answer = self.client.get(f"{self.url}/models")
            answer.raise_for_status()
            return {str(model["id"]): model.get("max_model_len") for model in answer.json()["data"]}
        except httpx.HTTPStatusError as error:
            raise UserError(
                f"{self.url}/models says {_status(error.response)}: is it the right address and key?"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(
                f"no server answers at {self.url} ({error or type(error).__name__}): start it, or mend --endpoint"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.url}/models is no list of models: --endpoint wants an OpenAI-compatible server"
            ) from None

    def complete(self, prompt: list[int], length: int, options: dict[str, Any]) -> tuple[list[int], str]:
        """(new token ids, the stop token included; "stop" or "length"). Raises `Failed`, and UserError for what will not get better."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": length, "return_token_ids": True, **options}
        reason = "it was given up"
        for attempt in range(self.retries + 1):
            if self.closed.is_set():
                break
            pause = min(2.0**attempt, LONGEST_WAIT)
            try:
                answer = self.client.post(f"{self.url}/completions", json=body)
            except httpx.TransportError as error:
                reason = f"the server did not answer ({type(error).__name__}{f': {error}' if str(error) else ''})"
            else:
                if answer.status_code == 200:
                    return self._read(answer, prompt)
                reason = f"the server says {_status(answer)}"
                if answer.status_code in FATAL:
                    raise UserError(f"{self.url}/completions: {reason}")
                if answer.status_code not in (408, 429) and answer.status_code < 500:
                    raise Failed(reason)
                pause = _asked_pause(answer) or pause
            if attempt < self.retries:
                self.closed.wait(pause * (0.5 + random.random() / 2))  # many clients should not come back at once
        raise Failed(f"{reason}, {self.retries + 1} times")

    def close(self) -> None:
        """Make no more requests, and wait for no other try. One under way cannot be woken: it ends by its answer or by the timeout."""
        self.closed.set()

    def _read(self, answer: httpx.Response, prompt: list[int]) -> tuple[list[int], str]:
        try:
            choice = answer.json()["choices"][0]
            ids, finished, seen = choice.get("token_ids"), choice["finish_reason"], choice.get("prompt_token_ids")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Failed("the server's answer is no completion") from None
        if ids is None:
            raise UserError(
                f"{self.url} returns text without token ids, and text tokenised anew is not what the target wrote: serve the model with"
                " vLLM 0.10.2 or later, which knows return_token_ids"
            )
        if seen is not None and seen != prompt:
            raise UserError(f"{self.url} read another prompt than it was sent: it adds or drops tokens")
        if finished not in ("stop", "length"):
            raise Failed(f"the server ended the answer with {finished!r}")
        return list(ids), finished


class RemoteWriter:
    """Answers of a `Server`, `concurrency` conversations at a time. Each sampled one is asked for with a seed of its own."""

    def __init__(
        self, server: Server, law: SamplingParams, style: Style, max_new_tokens: int = 512, concurrency: int = 32
    ) -> None:
        self.server, self.law, self.style = server, law, style
        self.max_new_tokens, self.concurrency = max_new_tokens, concurrency
        self.options = request_options(law, style.stops)
        self.written = 0  # tokens so far, those of dropped answers too

    def answer(self, dialogues: Iterable[Dialogue]) -> Iterator[Dialogue]:
        """Yield each dialogue once all its turns are over, or one of its requests has failed (`Dialogue.failure`).

        UserError when more requests in a row fail than are under way at once: then it is the server.
        """
        waiting, ready = iter(dialogues), deque[Dialogue]()
        replies: SimpleQueue[Reply] = SimpleQueue()
        asked, failures, why = 0, 0, ""
        try:
            while True:
                while asked < self.concurrency:
                    dialogue = ready.popleft() if ready else next(waiting, None)
                    if dialogue is None:
                        break
                    if dialogue.prompt is None:
                        yield dialogue
                    else:
                        # A daemon: an executor's threads are waited for at the end of the process, and a request may last long.
                        Thread(target=self._ask, args=(dialogue, dialogue.prompt, replies), daemon=True).start()
                        asked += 1
                if not asked:
                    return
                dialogue, said = replies.get()
                asked -= 1
                try:
                    if isinstance(said, BaseException):
                        raise said
                    self._take(dialogue, *said)
                    failures = 0
                except Failed as error:
                    why, failures = str(error), failures + 1
                    dialogue.failure, dialogue.prompt = why, None
                ready.append(dialogue)  # its next turn goes before another conversation
                if failures > self.concurrency:
                    raise UserError(
                        f"{failures} requests in a row failed, the last one so: {why}; the same command goes on"
                    )
        finally:
            if asked:  # somebody stopped, or the server is gone: nobody waits for what is under way
                self.server.close()

    def _ask(self, dialogue: Dialogue, prompt: list[int], replies: SimpleQueue[Reply]) -> None:
        said: tuple[list[int], str] | BaseException
        try:
            options = dict(self.options)
            if self.law.temperature:
                options["seed"] = derive(self.law.seed, dialogue.number, dialogue.turn) % 2**31
            said = self.server.complete(prompt, min(self.max_new_tokens, self.style.limit - len(prompt)), options)
        except BaseException as error:  # whatever it is: who waits for a reply gets one
            said = error
        replies.put((dialogue, said))

    def _take(self, dialogue: Dialogue, ids: list[int], finished: str) -> None:
        self.written += len(ids)
        stopped = finished == "stop"
        if not ids or (stopped and ids[-1] not in self.style.stops):
            raise Failed("the server ended the answer without a stop token of the model")
        dialogue.answer(Answer(ids, "stop" if stopped else "length", repeat_share(ids[:-1] if stopped else ids)))


def request_options(law: SamplingParams, stops: Iterable[int]) -> dict[str, Any]:
    """The law as vLLM's completions route takes it, all of it: a server has defaults of its own. UserError for what it cannot do."""
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if getattr(law, name):
            raise UserError(
                f"the model's generation config has {name}, which cannot be asked of a server: answer in this process"
            )
    if not all(map(math.isfinite, law.logit_bias.values())):
        raise UserError("a logit_bias of -inf cannot be asked of a server: answer in this process")
    options: dict[str, Any] = {
        name: getattr(law, name)
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "min_tokens",
        )
    }
    if law.logit_bias:
        options["logit_bias"] = {str(token): bias for token, bias in law.logit_bias.items()}
    if law.allowed_tokens is not None:
        options["allowed_token_ids"] = list(law.allowed_tokens)
    return {**options, "stop_token_ids": sorted(stops)}


def _status(answer: httpx.Response) -> str:
    """Code, and what the server says of it, in one line."""
    said = " ".join(answer.text.split())[:200]
    return f"{answer.status_code} {answer.reason_phrase}{f' ({said})' if said else ''}"


def _asked_pause(answer: httpx.Response) -> float | None:
    """Seconds that a server asks to wait."""
    try:
        return min(float(answer.headers["Retry-After"]), LONGEST_WAIT)
    except (KeyError, ValueError):
        return None
