"""Features on disk: shards that hold packed batches together with what the target said of them.

    folder/manifest.json              what they are: target, needs, dtype, the settings of the data, and whether all is there
    folder/shard-00000.safetensors    tensors `0.ids`, `0.mask`, `0.documents`, `0.positions`, `0.taps.6`, `0.last`, `1.ids`, ...

A batch and its features lie side by side, so nothing has to find its way from one to the other. Teacher logits are not stored: the
target's head makes them of `last`. `understudy.features.capture` writes such folders.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from understudy.core.config import Config
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.core.seeds import derive
from understudy.drafting.objective import Batch, Features
from understudy.target.fingerprint import fingerprint as weights_fingerprint
from understudy.target.target import Target

MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Manifest(Config):
    """What a folder of features holds. All but the last four fields are fixed when capturing begins."""

    version: int = 1
    target: str  # as it was named
    fingerprint: str  # of the target's architecture and weights
    target_dtype: str  # what features are given out in
    dtype: str  # what they are stored in
    taps: list[int]
    last: bool
    hidden_size: int
    settings: dict[str, Any]  # how the batches were made: files, lengths, seed, ...
    shard_mb: int
    batches_per_shard: int
    complete: bool = False
    batches: int = 0
    tokens: int = 0  # without padding
    supervised: int = 0  # tokens under the loss mask

    @property
    def needs(self) -> Needs:
        return Needs(taps=frozenset(self.taps), last=self.last)

    @property
    def thinking(self) -> str:
        """The thinking mode that the data were written in: on, off, or the template's default, where the settings name none."""
        return str(self.settings.get("thinking", "default"))


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def fingerprint(target: Target) -> str:
    """The target's fingerprint and dtype: hidden states of another dtype are not the same."""
    return f"{weights_fingerprint(target)}-{str(target.dtype).removeprefix('torch.')}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; UserError if there is none or it is not one of ours."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no captured features ({MANIFEST} is missing)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} is not a manifest of captured features: {where} {first['msg']}".strip()) from None


def batch_tensors(index: int, batch: Batch) -> dict[str, Tensor]:
    """Tensors of a batch under their names in a shard: ids fit in 32 bits."""
    ints = {"ids": batch.ids, "documents": batch.documents, "positions": batch.positions}
    return {f"{index}.mask": batch.mask.cpu()} | {
        f"{index}.{name}": value.to("cpu", torch.int32) for name, value in ints.items()
    }


def feature_tensors(index: int, features: Features, dtype: torch.dtype) -> dict[str, Tensor]:
    """Taps and last hidden states under their names in a shard, on the CPU and in `dtype`."""
    named = {f"{index}.taps.{tap}": states for tap, states in features.taps.items()}
    if features.last is not None:
        named[f"{index}.last"] = features.last
    return {name: states.to(dtype).cpu() for name, states in named.items()}


def read_batch(path: Path, index: int) -> Batch:
    """Batch `index` of a shard, on the CPU. Raises SafetensorError or OSError."""
    with safe_open(path, framework="pt") as shard:
        ids, documents, positions = (
            shard.get_tensor(f"{index}.{name}").long() for name in ("ids", "documents", "positions")
        )
        return Batch(ids, shard.get_tensor(f"{index}.mask"), documents, positions)


@dataclass(frozen=True, slots=True)
class StoredBatch(Batch):
    """A batch that knows where its features lie."""

    index: int
    store: StoredFeatures

    def to(self, device: object) -> StoredBatch:
        plain = Batch.to(self, device)
        return StoredBatch(plain.ids, plain.mask, plain.documents, plain.positions, self.index, self.store)


class StoredFeatures:
    """A source of features as `LiveFeatures` is, but for the rounding of the stored dtype: `stored(batch) -> Features`.

    Batches come from `stored.batch(i)` or `StoredBatches`. `needs` (default: all that is stored) narrows what is read.
    Raises UserError if the folder is not complete or lacks a need.
    """

    def __init__(self, folder: str | Path, needs: Needs | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest.complete:
            raise UserError(f"capturing into {self.folder} is not finished: run it again, it goes on where it stopped")
        self.needs = self.manifest.needs if needs is None else needs
        assert not self.needs.logits, "features hold no logits: ask for the last hidden state"
        self._taps = sorted(self.needs.taps | ({self.needs.exit} if self.needs.exit is not None else frozenset()))
        missing = [f"tap {tap}" for tap in self._taps if tap not in self.manifest.taps]
        missing += ["the last hidden state"] if self.needs.last and not self.manifest.last else []
        if missing:
            raise UserError(
                f"{self.folder} lacks {missing[0]} (it has taps {self.manifest.taps}"
                f"{' and the last hidden state' if self.manifest.last else ''}): capture again with it"
            )

    def check(self, target: Target) -> None:
        """UserError unless the features are those of `target`."""
        if fingerprint(target) != self.manifest.fingerprint:
            raise UserError(
                f"the features in {self.folder} are those of another target ({self.manifest.target}, in"
                f" {self.manifest.target_dtype}): load that one, or capture again with {target.name or 'this one'}"
            )

    def __len__(self) -> int:
        """Number of batches."""
        return self.manifest.batches

    def batch(self, index: int) -> StoredBatch:
        """Batch `index`, on the CPU."""
        assert 0 <= index < len(self)
        with _reading(self._shard(index)) as path:
            plain = read_batch(path, index % self.manifest.batches_per_shard)
        return StoredBatch(plain.ids, plain.mask, plain.documents, plain.positions, index, self)

    def token_counts(self, vocab_size: int, rows: int) -> Tensor:
        """[V] int64: how often each token is under the loss mask, in batches of about `rows` rows, spread evenly over all."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        most = max(1, rows // self.batch(0).ids.shape[0]) if len(self) else 0
        for index in torch.linspace(0, len(self) - 1, min(most, len(self))).round().long().tolist():
            batch = self.batch(index)
            counts += torch.bincount(batch.ids[batch.mask], minlength=vocab_size)
        return counts

    def __call__(self, batch: Batch) -> Features:
        """Features of a stored batch, this folder's or another's, on the batch's device and in the target's dtype."""
        assert isinstance(batch, StoredBatch), "stored features belong to stored batches: take them from StoredBatches"
        if batch.store is not self:
            return batch.store(batch)
        place, device = batch.index % self.manifest.batches_per_shard, str(batch.ids.device)
        dtype = DTYPES[self.manifest.target_dtype]
        with _reading(self._shard(batch.index)) as path, safe_open(path, framework="pt", device=device) as shard:
            taps = {tap: shard.get_tensor(f"{place}.taps.{tap}").to(dtype) for tap in self._taps}
            last = shard.get_tensor(f"{place}.last").to(dtype) if self.needs.last else None
        return Features(batch, taps, last)

    def _shard(self, index: int) -> Path:
        return self.folder / shard_name(index // self.manifest.batches_per_shard)


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    try:
        yield path
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; capture again into an empty folder") from None


class StoredBatches:
    """An iterator over stored batches in a new order every epoch, which can stop anywhere and go on exactly there.

    Iterating gives the rest of the epoch at hand; the next one is then due. Of every `world_size` consecutive batches of an epoch's
    order, rank r gets the r-th. What does not divide is left out, so that all ranks take equally many steps; each epoch leaves out
    something else. Raises UserError if there are fewer batches than ranks.
    """

    def __init__(self, stored: StoredFeatures, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size
        if len(stored) < world_size:
            raise UserError(f"{stored.folder} holds {len(stored)} batches: too few for {world_size} processes")
        self.stored, self.seed, self.rank, self.world_size = stored, seed, rank, world_size
        self.epoch = 0
        self.batch = 0  # batches of this epoch that were given

    @property
    def steps_per_epoch(self) -> int:
        """Batches of this rank in one epoch."""
        return len(self.stored) // self.world_size

    def order(self, epoch: int) -> list[int]:
        """Which batches this rank gets in `epoch`, in order: a function of seed and epoch alone."""
        every = list(range(len(self.stored)))
        random.Random(derive(self.seed, "stored batches", epoch)).shuffle(every)
        return every[self.rank :: self.world_size][: self.steps_per_epoch]

    def __iter__(self) -> Iterator[StoredBatch]:
        for index in self.order(self.epoch)[self.batch :]:
            self.batch += 1
            yield self.stored.batch(index)
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, a batch that was given counting as done; plain values for JSON."""
        return {"epoch": self.epoch, "batch": self.batch, "of": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. UserError if it was taken of other features or with other options."""
        for name, mine in self._identity().items():
            if (theirs := state["of"].get(name)) != mine:
                raise UserError(
                    f"cannot resume, the captured features or their options have changed: {name} was {theirs}, is {mine}"
                )
        self.epoch, self.batch = state["epoch"], state["batch"]

    def _identity(self) -> dict[str, Any]:
        """What the order follows from."""
        return {
            "target": self.stored.manifest.fingerprint,
            "batches": len(self.stored),
            "seed": self.seed,
            "world size": self.world_size,
        }
