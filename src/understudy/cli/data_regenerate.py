"""`understudy data regenerate`: training data whose answers are written by the target itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pydantic

from understudy.cli.common import ModelOptions, given, load, on_own_device, place
from understudy.cli.options import config_command
from understudy.core.config import Config, option
from understudy.core.errors import UserError
from understudy.data.options import FileOptions, ThinkingOptions, corpus_paths

if TYPE_CHECKING:
    from understudy.distill.author import Author

HERE = ("dtype", "device", "device_map", "threads", "batch_size")  # what only a target in this process has
THERE = ("endpoint_model", "api_key_env", "concurrency", "timeout", "retries")  # and only a server


class LawOptions(Config):
    """How the target answers. What is not given comes from the model's generation config."""

    temperature: float | None = option(None, "divides the logits before sampling; 0 = greedy", ge=0)
    top_p: float | None = option(
        None, "keep the most probable tokens that together reach this probability; 1 = off", ge=0, le=1
    )
    top_k: int | None = option(None, "keep the k most probable tokens; 0 = off", ge=0)
    seed: int | None = option(None, "seed of sampled answers", ge=0)


class EndpointOptions(Config):
    """A server that answers instead of this process."""

    endpoint: str | None = option(
        None, "address of an OpenAI-compatible server that returns token ids (vLLM) and answers instead of this process"
    )
    endpoint_model: str | None = option(None, "the model's name at the server; default: the only one there")
    api_key_env: str | None = option(None, "environment variable that holds the server's key")
    concurrency: int = option(32, "conversations that the server answers side by side", ge=1)
    timeout: float = option(600.0, "seconds to wait for one answer of the server", gt=0)
    retries: int = option(5, "tries after a request has failed for a passing reason", ge=0)


class RegenerateOptions(FileOptions, ModelOptions, LawOptions, EndpointOptions, ThinkingOptions):
    """Options of `understudy data regenerate`."""

    output_dir: Path = option(
        ..., "folder for the rows; the same command goes on where it was stopped", "output", "outdir"
    )
    split: Literal["train", "eval"] = option("train", "which data to answer: those to train on or those to evaluate on")
    max_new_tokens: int = option(512, "tokens of an answer at most; longer ones are cut and kept", ge=1)
    max_repeat_share: float = option(
        0.5,
        "drop answers in which more than this share of 4-grams occurred before: they loop; 1 = keep all",
        ge=0,
        le=1,
    )
    num_samples: int | None = option(
        None, "conversations to answer, of all processes together, drawn evenly from the data; default: all", ge=1
    )
    batch_size: int = option(32, "conversations that this process answers side by side", ge=1)
    rank: int | None = option(
        None, "which of --world-size processes this is, from 0 on; default: RANK of torchrun", ge=0
    )
    world_size: int | None = option(None, "processes that share the work; default: WORLD_SIZE of torchrun", ge=1)

    @pydantic.model_validator(mode="after")
    def _one_place(self) -> Self:
        for name in THERE if self.endpoint is None else HERE:
            if name in self.model_fields_set:
                flag = name.replace("_", "-")
                raise ValueError(
                    f"--{flag} is for a server, and there is no --endpoint"
                    if self.endpoint is None
                    else f"--{flag} is for a target in this process, and --endpoint answers instead"
                )
        return self


@config_command(RegenerateOptions, name="regenerate")
def regenerate_command(config: RegenerateOptions) -> None:
    """Let the target answer every user turn of the data anew, and keep the token ids.

    Rows go to DIR/train-RANK.jsonl and can be trained on as they are (--train-data-path DIR). A run that was stopped, however it was
    stopped, goes on with the same command. The last line is JSON: rows, answers, tokens, what was dropped and why, tokens per second.
    """
    from rich.console import Console

    from understudy.core.provenance import environment
    from understudy.distill.output import Output, agree
    from understudy.distill.run import Work, regenerate

    rank, world = place(config.rank, config.world_size)
    work = Work(_files(config), config.num_samples, rank, world)
    author = _author(config)
    settings = {
        **author.made,
        "lines": len(work.corpus),
        "bytes": work.corpus.bytes,
        "world_size": world,
        "max_length": author.style.limit,
        "max_new_tokens": config.max_new_tokens,
        "max_repeat_share": config.max_repeat_share,
    }
    console = Console(stderr=True, soft_wrap=True)
    if agree(config.output_dir, config.split, settings, environment(author.law.seed)):
        console.print(f"going on with {config.output_dir}", highlight=False)
    with Output(config.output_dir, config.split, rank) as output:
        summary = regenerate(work, author, output, console)
    print(json.dumps(summary))


def _files(config: RegenerateOptions) -> list[Path]:
    train, held_out = corpus_paths(config, config.output_dir / ".data")
    if config.split == "train":
        return train
    if held_out is None:
        raise UserError("--split eval needs --eval-data-path: the data given have no part to evaluate on")
    return [held_out]


def _author(config: RegenerateOptions) -> Author:
    """Who answers: the target in this process, or a server."""
    from understudy.distill.author import here, there

    options: dict[str, Any] = {
        "thinking": config.thinking,
        "max_length": config.max_length,
        "max_new_tokens": config.max_new_tokens,
        "max_repeat_share": config.max_repeat_share,
        "sampling": given(config, LawOptions),
    }
    if config.endpoint is None:
        if config.device_map is not None:
            raise UserError(
                "--device-map: answers in this process are written on one device; serve the model and give --endpoint"
            )
        target = load(on_own_device(config))
        return here(target, config.batch_size, **options)
    from understudy.assets import pocket_path
    from understudy.distill.endpoint import Server

    server = Server(config.endpoint, config.endpoint_model, config.api_key_env, config.timeout, config.retries)
    model = str(pocket_path()) if config.model == "pocket" else config.model
    hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    return there(server, model, hub, config.concurrency, **options)
