"""What an offline run learns from: batches, the target's part of them, what is held out. From files, or from captured features."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from understudy.core.config import option
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.data.options import DataOptions, corpus_paths
from understudy.data.report import DataReport, inspect
from understudy.data.stream import Stream, open_stream
from understudy.drafting.objective import Batch
from understudy.features.live import LiveFeatures
from understudy.features.store import StoredBatches, StoredFeatures
from understudy.target.target import Target
from understudy.training.distributed import Ranks
from understudy.training.options import TrainOptions
from understudy.training.protocols import Batches, FeatureSource, HeldOut

REPORT_ROWS = 2000  # rows that the report at the start looks at
FIXED_BY_FEATURES = {"train_data_path", "max_length", "is_preformatted", "last_turn_only", "pack", "batch_size"}
VOCABULARIES = (1024, 2048, 8192, 32768)  # draft vocabularies whose coverage it tells


class OfflineOptions(DataOptions, TrainOptions):
    """Options of every offline run."""

    init_from: Path | None = option(None, "start from the weights of this checkpoint or run")
    features: Path | None = option(
        None, "folder of `understudy data capture`: its batches and hidden states are trained on"
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


class StreamBatches:
    """Packed rows of a corpus as the loop takes them."""

    def __init__(self, stream: Stream, count: bool) -> None:
        """`count`: how many batches an epoch has must be known; it takes one pass over the data."""
        self.stream = stream
        self.steps_per_epoch: int | None = stream.count() if count else None

    def __iter__(self) -> Iterator[Batch]:
        for packed in self.stream:
            yield Batch(*packed.tensors())

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state(state)


class Fixed:
    """The first few batches of held-out data, kept: the same at every evaluation."""

    def __init__(self, batches: Iterator[Batch], count: int) -> None:
        self.batches = list(itertools.islice(batches, count))

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class TrainingData:
    """Batches, the target's part of them (live, or from stored shards), and what is held out.

    An objective may depend on the data (`token_counts`), and what the data are depends on the objective's needs: open, make the
    objective, `bind`.
    """

    batches: Batches
    features: FeatureSource

    def __init__(self, config: OfflineOptions, target: Target, ranks: Ranks) -> None:
        """Opens files. UserError if one cannot be read, or holds what is of another target."""
        self.config, self.target, self.ranks = config, target, ranks
        self.stream: Stream | None = None
        self.held_out: HeldOut | None = None
        self._stored: StoredFeatures | None = None
        self._reports: dict[int, DataReport] = {}  # by the number of rows that were looked at
        self.eval_path = config.eval_data_path
        if config.features is None:
            paths, self.eval_path = _paths(config, ranks)
            self.stream = self._stream(paths)
        else:
            self._stored = StoredFeatures(config.features)
            self._stored.check(target)

    def token_counts(self) -> Tensor:
        """[V] int64: how often each token is supervised, in at most `vocab_rows` rows spread evenly over the data.

        Every rank counts the same rows by itself, so whoever asks waits for nobody.
        """
        if self._stored is not None:
            return self._stored.token_counts(self.target.vocab_size, self.config.vocab_rows)
        found = torch.from_numpy(self._inspect(self.config.vocab_rows).counts)
        if bool(found[self.target.vocab_size :].any()):
            raise UserError(
                f"the data hold tokens beyond the target's vocabulary of {self.target.vocab_size}: its tokenizer is another model's"
            )
        counts = torch.zeros(self.target.vocab_size, dtype=torch.int64)
        known = min(len(found), len(counts))  # embeddings are padded, or a tokenizer has more than the model
        counts[:known] = found[:known]
        return counts

    def bind(self, needs: Needs) -> None:
        """Make batches, features and what is held out for an objective with these needs. UserError if they cannot be met."""
        config, ranks = self.config, self.ranks
        if self.stream is not None:
            # an epoch's batches have to be known only where they decide how long the schedule is; counting reads all the data
            counted = config.max_steps is None or config.num_epochs is not None
            self.features, self.batches = LiveFeatures(self.target, needs), StreamBatches(self.stream, counted)
            if self.eval_path is not None:
                held = StreamBatches(self._stream([self.eval_path], shuffle=False), count=False)
                self.held_out = Fixed(iter(held), config.eval_batches)
            return
        assert config.features is not None
        stored = StoredFeatures(config.features, needs)
        self.batches, self.features = StoredBatches(stored, config.seed, ranks.rank, ranks.world), stored
        if (config.features / "eval").is_dir():
            held_out = StoredFeatures(config.features / "eval", needs)
            mine = range(ranks.rank, len(held_out) // ranks.world * ranks.world, ranks.world)
            self.held_out = Fixed((held_out.batch(i) for i in mine), config.eval_batches)

    def _inspect(self, rows: int) -> DataReport:
        """A report on `rows` rows of the data, or all that there are. Kept, because encoding is what takes time."""
        assert self.stream is not None
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

    def first(self) -> Batch:
        """A batch to look at, without moving the stream."""
        if self.stream is not None:
            return next(iter(StreamBatches(self._stream(list(self.stream.corpus.paths), shuffle=False), count=False)))
        assert isinstance(self.batches, StoredBatches)
        return self.batches.stored.batch(0)

    def facts(self, console: Console | None) -> tuple[dict[str, Any], int]:
        """What the run learns from, shown and as JSON; batches of an epoch. UserError if nothing would be supervised."""
        config = self.config
        if self.stream is None:
            assert isinstance(self.batches, StoredBatches)
            manifest = self.batches.stored.manifest
            told = {"tokens": manifest.tokens, "supervised": manifest.supervised}
            if console is not None:
                console.print(
                    f"{config.features}: {manifest.tokens:,} captured tokens, {manifest.supervised:,} supervised"
                )
            return told, self.batches.steps_per_epoch
        report = self._inspect(max([REPORT_ROWS, *self._reports]))  # what was counted for a vocabulary is told, too
        if console is not None:
            console.print(report)
        report.check()
        share = len(self.stream.corpus) / max(report.rows, 1) if report.sampled else 1.0
        rows = report.packed_rows(config.max_length) if config.pack else report.documents * share
        return report.as_dict(), max(1, round(rows / (config.batch_size * self.ranks.world)))


def _paths(config: OfflineOptions, ranks: Ranks) -> tuple[list[Path], Path | None]:
    """Where the data are; the first process writes the built-in corpus, the others then find it."""
    assert config.output_dir is not None
    place = config.output_dir / ".data"  # hidden, so that a folder whose run never began is still empty
    if ranks.main:
        corpus_paths(config, place)
    ranks.gather(True)
    return corpus_paths(config, place)
