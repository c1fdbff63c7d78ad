"""What an offline run learns from: batches, the target's part of them, what is held out. From files, or from captured features."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

import pydantic
import torch
from rich.console import Console
from torch import Tensor

from understudy.core.config import CommaList, option
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.data.options import DataOptions, corpus_paths
from understudy.data.prompts import load_prompts, render, thinking_variables
from understudy.data.report import DataReport, inspect
from understudy.data.stream import Stream, open_stream
from understudy.drafting.objective import Batch
from understudy.features.live import LiveFeatures
from understudy.features.store import MANIFEST, StoredBatches, StoredFeatures
from understudy.target.fingerprint import fingerprint
from understudy.target.target import Target
from understudy.training.batches import Fixed, StreamBatches
from understudy.training.distributed import Ranks
from understudy.training.options import TrainOptions
from understudy.training.protocols import Batches, FeatureSource, HeldOut

REPORT_ROWS = 2000  # rows that the report at the start looks at
FIXED_BY_FEATURES = {"train_data_path", "max_length", "is_preformatted", "last_turn_only", "pack", "batch_size"}
HASH = re.compile("[0-9a-f]{16}")  # a target's fingerprint
VOCABULARIES = (1024, 2048, 8192, 32768)  # draft vocabularies whose coverage it tells


class OfflineOptions(DataOptions, TrainOptions):
    """Options of every offline run."""

    init_from: Path | None = option(None, "start from the weights of this checkpoint or run")
    any_target: bool = option(False, "take --init-from weights that were trained for another target")
    features: Path | None = option(
        None, "folder of `understudy data capture`: its batches and hidden states are trained on"
    )
    data_dir: Path | None = option(
        None,
        "a folder to train on, by what it holds: rows of `understudy data regenerate`, as --train-data-path, or what `understudy data"
        " capture` wrote, as --features",
    )
    overfit: int = option(
        0,
        "a self-test: learn the target's own greedy answers to this many prompts by heart, instead of the data, and say at the end"
        " how far the accept length on them comes; prompts are those of --eval-prompts, --eval-data-path, --train-data-path or the"
        " built-in ones. 0 = off",
        ge=0,
    )
    require: CommaList = option(
        [], "engines, separated by commas, that must be able to serve what is trained: else the run does not begin"
    )
    vocab_rows: int = option(
        20_000, "rows, spread evenly over the data, whose supervised tokens are counted for a draft vocabulary", ge=1
    )
    eval_batches: int = option(8, "held-out batches for the held-out loss", ge=1)
    eval_prompts: Path | None = option(
        None, "JSON Lines file of prompts that acceptance is measured on; default: the held-out conversations"
    )
    eval_num_prompts: int = option(16, "prompts that acceptance is measured on", ge=1)
    eval_max_new_tokens: int = option(64, "new tokens per prompt while acceptance is measured", ge=2)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _one_source(cls, values: Any) -> Any:
        """What --data-dir means; in the settings of a run both names stand, and say the same."""
        folder = values.get("data_dir") if isinstance(values, dict) else None
        if not folder:
            return values
        name = "features" if (Path(folder) / MANIFEST).exists() else "train_data_path"
        given = {key: values.get(key) for key in ("features", "train_data_path") if values.get(key)}
        if any(key != name or not _same_place(value, folder) for key, value in given.items()):
            raise ValueError("--data-dir, --train-data-path and --features name data in three ways; give one")
        return {**values, name: folder}

    @pydantic.model_validator(mode="after")
    def _overfit_measures(self) -> Self:
        if self.overfit and self.features is not None:
            raise ValueError(
                "--overfit lets the target write its own texts and --features are those of others; give one"
            )
        if self.overfit and not self.eval_interval:
            raise ValueError("--overfit tells what is measured, and --eval-interval 0 measures nothing")
        return self


def _same_place(value: Any, folder: Any) -> bool:
    several = value if isinstance(value, list | tuple) else [value]
    return [Path(path) for path in several] == [Path(folder)]


class TrainingData:
    """Batches, the target's part of them, and what is held out.

    An objective may depend on the data (`token_counts`), and what the data are depends on the objective's needs: open, make the
    objective, `bind`; the other methods come after that.
    """

    batches: Batches
    features: FeatureSource
    held_out: HeldOut | None = None
    eval_path: Path | None  # the file of held-out conversations, if there is one

    def __init__(self, config: OfflineOptions, target: Target, ranks: Ranks) -> None:
        """Opens files. UserError if one cannot be read, or holds what is of another target."""
        self.config, self.target, self.ranks = config, target, ranks
        self.eval_path = config.eval_data_path

    def token_counts(self) -> Tensor:
        """[V] int64: how often each token is supervised, in at most `vocab_rows` rows spread evenly over the data.

        Every rank counts the same rows by itself, so whoever asks waits for nobody.
        """
        raise NotImplementedError

    def bind(self, needs: Needs) -> None:
        """Make `batches`, `features` and `held_out` for an objective with these needs. UserError if they cannot be met."""
        raise NotImplementedError

    def first(self) -> Batch:
        """A batch to look at, without moving the stream."""
        raise NotImplementedError

    @property
    def thinking(self) -> str:
        """The thinking mode that the data were written in, where that is one and known: on, off, or the template's default."""
        return "default"

    def facts(self, console: Console | None) -> tuple[dict[str, Any], int]:
        """What the run learns from, shown and as JSON; batches of an epoch. UserError if nothing would be supervised."""
        raise NotImplementedError

    def prompts(self) -> list[list[int]]:
        """Token ids of the prompts that acceptance is measured on; none = it is not measured."""
        config = self.config
        path = config.eval_prompts or (None if config.is_preformatted else self.eval_path)
        if path is None or not config.eval_interval:
            return []
        fitting = fitting_prompts(config, self.target, path, 8 * config.eval_num_prompts, self.thinking)
        step = max(1, len(fitting) // config.eval_num_prompts)  # spread: neighbours in a file resemble each other
        return fitting[::step][: config.eval_num_prompts]


class FileData(TrainingData):
    """Files of conversations, and what the target says of them while it is trained."""

    def __init__(self, config: OfflineOptions, target: Target, ranks: Ranks) -> None:
        super().__init__(config, target, ranks)
        paths, self.eval_path = _paths(config, ranks)
        self.stream = self._stream(paths)
        self._reports: dict[int, DataReport] = {}  # by the number of rows that were looked at

    def token_counts(self) -> Tensor:
        found = torch.from_numpy(self._inspect(self.config.vocab_rows).counts)
        counts = torch.zeros(self.target.vocab_size, dtype=torch.int64)
        if bool(found[len(counts) :].any()):
            raise UserError(
                f"the data have tokens beyond the target's vocabulary of {len(counts):,}: its tokenizer is another model's"
            )
        known = min(len(found), len(counts))  # either may be padded
        counts[:known] = found[:known]
        return counts

    def bind(self, needs: Needs) -> None:
        config = self.config
        # an epoch's batches have to be known only where they decide how long the schedule is; counting reads all the data
        counted = config.max_steps is None or config.num_epochs is not None
        self.features, self.batches = LiveFeatures(self.target, needs), StreamBatches(self.stream, counted)
        if self.eval_path is not None:
            held = StreamBatches(self._stream([self.eval_path], shuffle=False), count=False)
            self.held_out = Fixed(iter(held), config.eval_batches)

    def first(self) -> Batch:
        return next(iter(StreamBatches(self._stream(list(self.stream.corpus.paths), shuffle=False), count=False)))

    def facts(self, console: Console | None) -> tuple[dict[str, Any], int]:
        config = self.config
        report = self._inspect(max([REPORT_ROWS, *self._reports]))  # what was looked at for a vocabulary is told
        if console is not None:
            console.print(report)
            self._warn_of(report, console)
        report.check()
        share = len(self.stream.corpus) / max(report.rows, 1) if report.sampled else 1.0
        rows = report.packed_rows(config.max_length) if config.pack else report.documents * share
        return report.as_dict(), max(1, round(rows / (config.batch_size * self.ranks.world)))

    @property
    def thinking(self) -> str:
        return self._inspect(max([REPORT_ROWS, *self._reports])).thinking_mode

    def _warn_of(self, report: DataReport, console: Console) -> None:
        """Rows that another target wrote teach what this one does not say. Rows of a server name no weights."""
        here = fingerprint(self.target)
        if others := [by for by in report.written_by if HASH.fullmatch(by) and by != here]:
            console.print(
                f"WARNING: {sum(report.written_by[by] for by in others):,} of the rows looked at were written by another target:"
                " regenerate them with this one",
                soft_wrap=True,
            )

    def _inspect(self, rows: int) -> DataReport:
        """A report on `rows` rows of the data, or all that there are. Kept, because encoding is what takes time."""
        rows = min(rows, len(self.stream.corpus))
        if rows not in self._reports:
            sizes = [size for size in VOCABULARIES if size < self.target.vocab_size]
            self._reports[rows] = inspect(self.stream.corpus, self.stream.encoder, rows, sizes)
        return self._reports[rows]

    def _stream(self, paths: list[Path], shuffle: bool = True) -> Stream:
        return open_stream(
            self.config,
            paths,
            self.target.tokenizer,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            shuffle=shuffle,
            stop_ids=self.target.eos_ids,
            rank=self.ranks.rank,
            world_size=self.ranks.world,
        )


class ShardData(TrainingData):
    """Batches and features as `understudy data capture` wrote them."""

    def __init__(self, config: OfflineOptions, target: Target, ranks: Ranks) -> None:
        super().__init__(config, target, ranks)
        assert config.features is not None
        self.folder = config.features
        self.stored = StoredFeatures(self.folder)
        self.stored.check(target)

    def token_counts(self) -> Tensor:
        return self.stored.token_counts(self.target.vocab_size, self.config.vocab_rows)

    def bind(self, needs: Needs) -> None:
        ranks = self.ranks
        self.stored = StoredFeatures(self.folder, needs)
        self.batches = StoredBatches(self.stored, self.config.seed, ranks.rank, ranks.world)
        self.features = self.stored
        if (self.folder / "eval").is_dir():
            held_out = StoredFeatures(self.folder / "eval", needs)
            mine = range(ranks.rank, len(held_out) // ranks.world * ranks.world, ranks.world)
            self.held_out = Fixed((held_out.batch(i) for i in mine), self.config.eval_batches)

    def first(self) -> Batch:
        return self.stored.batch(0)

    @property
    def thinking(self) -> str:
        return self.stored.manifest.thinking

    def facts(self, console: Console | None) -> tuple[dict[str, Any], int]:
        manifest = self.stored.manifest
        if console is not None:
            console.print(f"{self.folder}: {manifest.tokens:,} captured tokens, {manifest.supervised:,} supervised")
        told = {"tokens": manifest.tokens, "supervised": manifest.supervised}
        return told, len(self.stored) // self.ranks.world


def fitting_prompts(
    config: OfflineOptions, target: Target, path: Path, count: int, thinking: str = "default"
) -> list[list[int]]:
    """Token ids of those of the first `count` prompts of a file that leave room for an answer. UserError if none does."""
    room = target.context - config.eval_max_new_tokens
    variables = thinking_variables(target.tokenizer, thinking)
    rendered = [render(target.tokenizer, prompt.messages, **variables) for prompt in load_prompts(path, count)]
    fitting = [ids for ids in rendered if len(ids) < room]
    if not fitting:
        raise UserError(f"no prompt of {path} leaves room for {config.eval_max_new_tokens} new tokens")
    return fitting


def _paths(config: OfflineOptions, ranks: Ranks) -> tuple[list[Path], Path | None]:
    """Where the data are; the first process writes the built-in corpus, the others then find it."""
    assert config.output_dir is not None
    place = config.output_dir / ".data"  # hidden, so that a folder whose run never began is still empty
    if ranks.main:
        corpus_paths(config, place)
    ranks.gather(True)
    return corpus_paths(config, place)
