"""`understudy layers`: which layers of a target to tap and where to exit, measured.

understudy layers --model M --num-samples 32 --plot                       # all in one call

for i in {0..7}; do                                                       # or shared by eight GPUs ...
    CUDA_VISIBLE_DEVICES=$i understudy layers --model M --num-samples 32 --rank $i --world-size 8 &
done; wait
understudy layers --aggregate --plot                                      # ... and put together
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import pydantic

from understudy.cli.common import ModelOptions, load, on_own_device, place
from understudy.cli.options import config_command
from understudy.core.config import NumberList, option
from understudy.core.errors import UserError
from understudy.core.explain import show
from understudy.core.files import check_writable, write_json
from understudy.data.options import DataOptions, corpus_paths, several
from understudy.drafting.taps import MEASURED as RESULT

if TYPE_CHECKING:
    from understudy.analysis.ranks import RankFile
    from understudy.data.stream import Stream
    from understudy.drafting.objective import Batch
    from understudy.target.target import Target

READ = ("output_dir", "aggregate", "plot", "layers", "num_taps", "world_size")  # what --aggregate goes by
# what figures follow from; given with --aggregate it has to be what the ranks were given
SAME = ("model", "data_path", "num_samples", "max_length", "is_preformatted", "last_turn_only", "seed")


class LayersOptions(ModelOptions):
    """Options of `understudy layers`."""

    num_samples: int = option(32, "conversations to measure on, of all processes together", ge=1)
    layers: NumberList = option(
        [],
        "layers for step B, separated by commas: 0 = embeddings, i = output of the i-th layer counted from 1;"
        " default: all, or 24 evenly spaced ones of a deeper target. With --aggregate: which of the measured ones to propose",
    )
    num_taps: int = option(5, "taps to propose, fewer if the target is shallow", ge=1)
    rank: int | None = option(
        None, "which of --world-size processes this is, from 0 on; default: torchrun's RANK", ge=0
    )
    world_size: int | None = option(None, "processes that share the samples; default: torchrun's WORLD_SIZE", ge=1)
    aggregate: bool = option(False, "measure nothing: put together what the ranks wrote into the folder")
    plot: bool = option(False, "draw the curves as PNG files")
    output_dir: Path = option(Path("runs/layers"), "folder of the results, the same for all ranks", "outdir")
    data_path: Annotated[list[Path], pydantic.BeforeValidator(several)] = option(
        [],
        "JSON Lines file of conversations, or folder of `understudy data regenerate`, repeatable; default: the built-in"
        " corpus, Python's standard library",
        "train-data-path",
        "train-data",
        "data",
    )
    max_length: int = option(
        2048, "tokens of a conversation; longer ones lose their end", "max-seq-length", "max-seq-len", ge=2
    )
    is_preformatted: bool = option(False, 'rows are {"text": ...}, already rendered by the model\'s chat template')
    last_turn_only: bool = option(False, "look at the last answer of a conversation only")
    seed: int = option(0, "seed of the choice of conversations", ge=0)


@config_command(LayersOptions)
def command(config: LayersOptions) -> None:
    """Measure which layers to tap and where to exit.

    Step A: cosine similarity of every layer's hidden state to the final one. Step B: loss and agreement of an early exit after
    each layer. Then times of the target's passes, and from all of it taps for DFlash and EAGLE-3, and an exit layer with its
    predicted speed-up. Results go to layers.json; with --plot also to PNG files. With --rank a process measures its share only, and
    --aggregate puts the shares together. The last line is JSON: what is proposed, or what a rank has counted.
    """
    from understudy.analysis.ranks import read_ranks, write_rank

    if config.aggregate:
        _check_aggregate(config)
        parts = read_ranks(config.output_dir, config.world_size)
        _check_same(config, parts[0].settings)
        _report(config, parts)
        return
    rank, world = place(config.rank, config.world_size)
    if world > 1 and config.plot:
        raise UserError("--plot draws all ranks together: give it with --aggregate")
    part = _measured(config, rank, world)
    if world == 1:
        _report(config, [part])
        return
    path = write_rank(config.output_dir, part)
    counts = {"samples": part.tally["samples"], "tokens": part.tally["tokens"]}
    click.echo(json.dumps({"file": str(path), "rank": rank, "world_size": world, **counts}))


def _check_aggregate(config: LayersOptions) -> None:
    """Refuse options that measuring would read and merging does not."""
    if config.rank is not None:
        raise UserError("--aggregate puts all ranks together: leave --rank out")
    for name in sorted(config.model_fields_set - {*READ, *SAME}):
        raise UserError(f"--aggregate measures nothing: leave --{name.replace('_', '-')} out")


def _check_same(config: LayersOptions, settings: dict[str, Any]) -> None:
    """UserError for an option that was given and is not that of the ranks."""
    mine = config.model_dump(mode="json")
    for name in SAME:
        if name in config.model_fields_set and mine[name] != settings[name]:
            raise UserError(
                f"--{name.replace('_', '-')} {show(mine[name])}: the ranks were measured with {show(settings[name])}"
            )


def _measured(config: LayersOptions, rank: int, world: int) -> RankFile:
    """Load the target and count this rank's samples; rank 0 also times the target."""
    from understudy.analysis.cost import measure_cost
    from understudy.analysis.layers import candidates, measure, share
    from understudy.analysis.ranks import RankFile
    from understudy.core.provenance import environment
    from understudy.data.stream import open_stream

    check_writable(config.output_dir / RESULT)
    if config.plot:
        from understudy.report.plots import pyplot

        pyplot()  # if it is missing, that is said before the work
    rows = config.model_dump(include={"max_length", "is_preformatted", "last_turn_only"})
    data = DataOptions(train_data_path=config.data_path, pack=False, **rows)
    paths, _ = corpus_paths(data, config.output_dir)
    target = load(on_own_device(config))
    if config.max_length > target.context:
        raise UserError(f"--max-length {config.max_length} is beyond the target's context of {target.context}")
    chosen = candidates(target.layers, config.layers)
    stream = open_stream(
        data,
        paths,
        target.tokenizer,
        batch_size=1,
        seed=config.seed,
        stop_ids=target.eos_ids,
        rank=rank,
        world_size=world,
    )
    batches = share(stream, config.num_samples)
    if (first := next(batches, None)) is None:
        raise UserError(f"rank {rank} of {world} has no sample: there are {config.num_samples}, take fewer processes")
    tally = measure(target, _shown(chain([first], batches), -(-(config.num_samples - rank) // world)), chosen)
    cost, refused = None, None
    if rank == 0:
        times, refused = measure_cost(target, first.ids[first.documents >= 0].tolist())
        cost = times.as_json()
    return RankFile(
        rank=rank,
        world_size=world,
        settings=_settings(config, target, stream, chosen),
        tally=tally.as_json(),
        cost=cost,
        no_split=refused,
        environment={**environment(config.seed), "device": str(target.device)},
    )


def _settings(config: LayersOptions, target: Target, stream: Stream, chosen: list[int]) -> dict[str, Any]:
    """What the figures follow from, JSON-ready."""
    from understudy.core.hashes import template_hash
    from understudy.target.fingerprint import fingerprint

    return {
        **config.model_dump(mode="json", include=set(SAME)),
        "fingerprint": fingerprint(target),
        "dtype": str(target.dtype).removeprefix("torch."),
        "layers": target.layers,
        "vocab_size": target.vocab_size,
        "candidates": chosen,
        "lines": len(stream.corpus),
        "bytes": stream.corpus.bytes,
        "chat_template": template_hash(target.tokenizer),
    }


def _shown(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
    """The batches, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(batches, "measuring", total, console=console, transient=True, disable=not console.is_terminal)


def _report(config: LayersOptions, parts: list[RankFile]) -> None:
    """Write, draw and print what was found."""
    from understudy.analysis.findings import findings
    from understudy.analysis.tables import console, shown

    found = findings(parts, config.layers, config.num_taps)
    write_json(config.output_dir / RESULT, found)
    files = [RESULT, *(_plots(config.output_dir, found) if config.plot else ())]
    console().print(shown(found))
    if (samples := found["samples"]) < config.num_samples and not config.aggregate:
        click.echo(
            f"the data have {samples} conversations that can be measured on, {config.num_samples} were asked for"
        )
    taps, exits = found["taps"], found["exits"]
    last = {
        "folder": str(config.output_dir),
        "files": files,
        "samples": samples,
        "tokens": found["tokens"],
        "taps": taps[0]["taps"],
        "target_layer_ids": taps[0]["target_layer_ids"],
        "default_taps": taps[-1]["taps"],
        "exit_layer": exits[0]["layer"] if exits else None,
        "exit_steps": exits[0]["steps"] if exits else None,
        "predicted_speedup": exits[0]["speedup"] if exits else None,
    }
    click.echo(json.dumps(last))


def _plots(folder: Path, found: dict[str, Any]) -> list[str]:
    """Curves over layers, with the proposed taps marked: names of the files."""
    from understudy.report.intervals import t_quantile
    from understudy.report.plots import Series, lines

    rows = found["curves"]
    early = [(row["layer"], row["early_exit"]) for row in rows if row["early_exit"]]
    marks = {str(tap): float(tap) for tap in found["taps"][0]["taps"]}
    counted = f"{found['samples']} samples, {found['tokens']:,} answer tokens"
    note = f"{counted}; bands: 95 % over samples; upright: proposed taps"
    wide = t_quantile(found["samples"] - 1) if found["samples"] > 1 else 0.0

    def exits(name: str) -> Series:
        return Series(
            [x for x, _ in early], [e[name] for _, e in early], [wide * (e[f"{name}_error"] or 0) for _, e in early]
        )

    layers = [row["layer"] for row in rows]
    to_output = Series(layers, [row["cosine"] for row in rows], [wide * (row["cosine_error"] or 0) for row in rows])
    figures = {
        "cosine": (
            {"last layer's output": to_output, "after the norm": Series(layers, [row["cosine_last"] for row in rows])},
            "cosine similarity",
            "Step A: how near each layer is to the final state",
        ),
        "exit-loss": (
            {"cross-entropy": exits("ce"), "KL": exits("kl")},
            "nats per token",
            "Step B: loss of an early exit",
        ),
        "agreement": (
            {"agreement": exits("agreement")},
            "share of tokens",
            "Step B: early exit agrees with the target",
        ),
    }
    for name, (series, ylabel, title) in figures.items():
        lines(folder / f"{name}.png", series, "layer (0 = embeddings)", ylabel, title, marks, note)
    names = list(figures)
    if found["exits"]:
        gains = sorted((float(one["layer"]), one["speedup"]) for one in found["exits"])
        speedup = {"predicted": Series(*zip(*gains, strict=True))}
        title, note = "Early exit: predicted speed-up over plain decoding", f"{counted}; times of this machine"
        lines(folder / "speedup.png", speedup, "exit layer", "speed-up", title, note=note)
        names.append("speedup")
    return [f"{name}.png" for name in names]
