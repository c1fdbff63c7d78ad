"""`understudy data capture`: what the target says of the training data, written to disk once instead of computed in every epoch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from understudy.cli.common import ModelOptions, load
from understudy.cli.options import config_command
from understudy.core.config import option
from understudy.core.errors import UserError
from understudy.data.options import DataOptions, corpus_paths

if TYPE_CHECKING:
    from understudy.features.live import LiveFeatures
    from understudy.target.target import Target


class CaptureOptions(DataOptions, ModelOptions):
    """Options of `understudy data capture`."""

    output: Path = option(
        ..., "folder for the features; held-out data goes into its folder eval", "output-dir", "outdir"
    )
    taps: list[int] = option(
        [], "layer to keep, repeatable: 0 = embeddings, i = output of the i-th layer counted from 1", "layers"
    )
    last: bool = option(True, "keep the last hidden state, which teacher logits are made of")
    store_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype on disk; auto = the target's own"
    )
    batch_size: int = option(4, "rows of a batch; training takes the batches as they are", ge=1)
    shard_mb: int = option(256, "about how large a file becomes, in MiB", ge=1)
    seed: int = option(0, "seed of the order of the rows", ge=0)
    checks: int = option(4, "batches that are computed once more at the end and compared", ge=0)
    rank: int = option(0, "which of --world-size processes this is, from 0 on; all write into one folder", ge=0)
    world_size: int = option(1, "processes that share the work", ge=1)
    force: bool = option(False, "begin even if the disk has less room than the features will take")


@config_command(CaptureOptions, name="capture")
def capture_command(config: CaptureOptions) -> None:
    """Write hidden states of the target for training data to disk.

    The size is estimated first. What was written stays: the same command goes on where it was stopped. The last line is JSON: the
    folder, and batches, tokens and supervised tokens of the data and of the held-out data.
    """
    if config.rank >= config.world_size:
        raise UserError(
            f"--rank counts from 0: with --world-size {config.world_size} it is at most {config.world_size - 1}"
        )
    if not config.taps and not config.last:
        raise UserError("nothing is asked for: give --taps, or leave --no-last out")
    from understudy.core.records import Needs
    from understudy.features.live import LiveFeatures

    train, held_out = corpus_paths(config, config.output)
    target = load(config)
    if config.max_length > target.context:
        raise UserError(f"--max-length {config.max_length} is beyond the target's context of {target.context}")
    source = LiveFeatures(target, Needs(taps=frozenset(config.taps), last=config.last))
    done: dict[str, Any] = {
        "folder": str(config.output),
        "data": _capture(config, target, source, train, config.output),
    }
    if held_out is not None:
        done["eval"] = _capture(config, target, source, [held_out], config.output / "eval")
    click.echo(json.dumps(done))


def _capture(
    config: CaptureOptions, target: Target, source: LiveFeatures, paths: Iterable[Path], folder: Path
) -> dict[str, int | bool]:
    """Capture one set of files."""
    from understudy.core.hashes import template_hash
    from understudy.data.report import inspect
    from understudy.data.stream import open_stream
    from understudy.drafting.objective import Batch
    from understudy.features.capture import capture
    from understudy.training.datasets import REPORT_ROWS

    tokenizer = target.tokenizer
    stream = open_stream(
        config, list(paths), tokenizer, batch_size=config.batch_size, seed=config.seed, stop_ids=target.eos_ids
    )
    corpus = stream.corpus
    thinking = inspect(corpus, stream.encoder, REPORT_ROWS).thinking_mode
    settings = {
        "lines": len(corpus),
        "bytes": corpus.bytes,
        "chat_template": template_hash(tokenizer),
        **config.model_dump(include={"max_length", "is_preformatted", "last_turn_only", "pack", "batch_size", "seed"}),
        **({} if thinking == "default" else {"thinking": thinking}),  # `Manifest.thinking` reads it
    }
    manifest = capture(
        (Batch(*packed.tensors()) for packed in stream),
        source,
        folder,
        total=stream.count(),
        settings=settings,
        dtype=config.store_dtype,
        shard_mb=config.shard_mb,
        rank=config.rank,
        world_size=config.world_size,
        checks=config.checks,
        force=config.force,
        say=click.echo,
    )
    return manifest.model_dump(include={"complete", "batches", "tokens", "supervised"})
