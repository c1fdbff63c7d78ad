"""Writing features to disk, shard by shard. What was written stays: capturing again goes on after the last whole shard.

    source = LiveFeatures(target, needs)
    capture(batches, source, folder, total=len(batches), settings={"data": ..., "max_length": ...})

The size is estimated and compared with the free space before the first pass. At the end some batches are computed once more and
compared with what lies on the disk; only then the folder is called complete. Several processes (`rank`, `world_size`) may write
into one folder: each goes through the same batches and computes every `world_size`-th shard.
"""

from __future__ import annotations

import errno
import json
import math
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.files import check_writable, replacing, write_json
from understudy.drafting.objective import Batch
from understudy.features.live import LiveFeatures
from understudy.features.store import (
    DTYPES,
    MANIFEST,
    Manifest,
    batch_tensors,
    feature_tensors,
    fingerprint,
    read_batch,
    read_manifest,
    shard_name,
)

# What a recomputed state may differ by, as a share of the largest: another machine or kernel rounds differently
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.06}
PROGRESS = ("complete", "batches", "tokens", "supervised")  # what changes in a manifest while capturing goes on

Say = Callable[[str], None]


def capture(
    batches: Iterable[Batch],
    source: LiveFeatures,
    folder: str | Path,
    *,
    total: int,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    shard_mb: int = 256,
    rank: int = 0,
    world_size: int = 1,
    checks: int = 4,
    force: bool = False,
    say: Say = lambda line: None,
) -> Manifest:
    """Write `batches`, always given from the first one on, with their features into `folder`; the manifest, `complete` when all is there.

    `total`: how many batches there are (for the estimate). `settings`: what the batches follow from, JSON-ready; capturing goes on
    only under equal ones. `dtype`: float32, bfloat16, float16, or auto for the target's own. `shard_mb`: about how large a shard
    becomes, in MiB; it is held in memory until written. `checks`: batches that are computed again at the end. `force`: also when
    the disk has less room than it will take. `say` gets lines for people.

    Raises UserError for another target, needs, settings or texts than those the folder was begun with, for values that `dtype`
    cannot hold, when the disk is full, and when the final check fails.
    """
    assert 0 <= rank < world_size
    folder = Path(folder)
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise UserError("there is nothing to capture: the data gave no batch")
    size = _batch_bytes(first, source, dtype)
    manifest = _begin(folder, _plan(source, settings or {}, dtype, shard_mb, size))
    if manifest.complete:
        say(f"{folder} is complete: {manifest.batches:,} batches")
        return manifest
    _check_room(folder, size, total, world_size, force, say)
    counts, shards = dict.fromkeys(PROGRESS[1:], 0), 0
    for group in _groups(chain([first], iterator), manifest.batches_per_shard):
        path = folder / shard_name(shards)
        if not _is_there(path, group) and shards % world_size == rank:
            _write(path, group, source, manifest)
            say(f"{path.name}: batch {counts['batches'] + len(group):,} of {total:,}")
        counts["batches"] += len(group)
        counts["tokens"] += sum(int((batch.documents >= 0).sum()) for batch in group)
        counts["supervised"] += sum(int(batch.mask.sum()) for batch in group)
        shards += 1
    return _finish(folder, manifest, counts, shards, source, checks, say)


def _plan(source: LiveFeatures, settings: Mapping[str, Any], dtype: str, shard_mb: int, batch_bytes: int) -> Manifest:
    target = source.target
    own = str(target.dtype).removeprefix("torch.")
    return Manifest(
        target=target.name,
        fingerprint=fingerprint(target),
        target_dtype=own,
        dtype=own if dtype == "auto" else dtype,
        taps=sorted(source.needs.taps),
        last=source.needs.last,
        hidden_size=target.hidden_size,
        settings=json.loads(json.dumps(settings)),  # as it will be read again
        shard_mb=shard_mb,
        batches_per_shard=max(1, shard_mb * 2**20 // batch_bytes),
    )


def _begin(folder: Path, plan: Manifest) -> Manifest:
    """The manifest to go on with: that of the folder if it is the same undertaking, else `plan`, written."""
    check_writable(folder / MANIFEST)
    if not (folder / MANIFEST).exists():
        if stray := next(folder.glob("shard-*.safetensors"), None):
            raise UserError(f"{folder} holds {stray.name} but no {MANIFEST}: empty the folder or take another one")
        write_json(folder / MANIFEST, plan.model_dump())
        return plan
    found = read_manifest(folder)
    for name in Manifest.model_fields:
        mine, theirs = getattr(plan, name), getattr(found, name)
        if mine != theirs and name not in (*PROGRESS, "target"):
            if name == "settings":
                name, mine, theirs = next(
                    (key, mine.get(key), theirs.get(key))
                    for key in [*theirs, *mine]
                    if mine.get(key) != theirs.get(key)
                )
            if name == "fingerprint":
                name, mine, theirs = "target", "the one at hand", f"{found.target or theirs} ({found.target_dtype})"
            raise UserError(
                f"{folder} was begun with {name.replace('_', ' ')} {theirs}, not {mine}: go on with the same settings,"
                " or take another folder"
            )
    return found


def _batch_bytes(batch: Batch, source: LiveFeatures, dtype: str) -> int:
    """Bytes that a batch takes on disk."""
    wide = source.target.dtype if dtype == "auto" else DTYPES[dtype]
    states = len(source.needs.taps) + source.needs.last
    return batch.ids.numel() * (states * source.target.hidden_size * wide.itemsize + 3 * 4 + 1)


def _check_room(folder: Path, batch_bytes: int, total: int, world_size: int, force: bool, say: Say) -> None:
    """Print what is still to be written by all processes; UserError if the disk has less."""
    there = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    need, free = max(0, batch_bytes * total - there), shutil.disk_usage(folder).free
    say(
        f"features take about {(need + there) / 2**30:.2f} GiB ({batch_bytes / 2**20:.1f} MiB per batch, {total:,} batches)"
        f"{f', {there / 2**30:.2f} GiB are there' if there else ''}; {free / 2**30:.2f} GiB are free in {folder}"
    )
    if need > free and not force:
        raise UserError(
            f"the features need {need / 2**30:.2f} GiB more, {free / 2**30:.2f} GiB are free in {folder}: make room, capture"
            " fewer taps or less data, take float16 or bfloat16, or --force"
        )


def _groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    while group := list(islice(batches, size)):
        yield group


def _is_there(path: Path, group: list[Batch]) -> bool:
    """Whether a whole shard lies at `path`. UserError if it holds other texts than `group`."""
    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as shard:
            found = int(shard.metadata()["batches"])
        stored = [read_batch(path, i) for i in range(found)]
    except (OSError, SafetensorError):  # cut off or overwritten since: made anew
        return False
    if found != len(group) or not all(map(_same, stored, group)):
        raise UserError(
            f"{path} holds other texts than the data gives now: it has changed since. Take another folder, or empty this one"
        )
    return True


def _same(a: Batch, b: Batch) -> bool:
    b = b.to("cpu")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "mask", "documents", "positions"))


def _write(path: Path, group: list[Batch], source: LiveFeatures, manifest: Manifest) -> None:
    for leftover in path.parent.glob(f".{path.name}.*"):  # of a process that was killed while writing it
        leftover.unlink(missing_ok=True)
    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(group):
        tensors |= batch_tensors(i, batch) | _states(i, batch, source, manifest)
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"batches": str(len(group))})
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        what = "the disk is full" if full else str(error)
        raise UserError(f"cannot write {path}: {what}; run this again to go on from here") from error


def _states(index: int, batch: Batch, source: LiveFeatures, manifest: Manifest) -> dict[str, Tensor]:
    """The features of a batch as they are stored. UserError if the dtype cannot hold them."""
    tensors = feature_tensors(index, source(batch), DTYPES[manifest.dtype])
    for name, states in tensors.items():
        if not torch.isfinite(states).all():
            raise UserError(
                f"{name.partition('.')[2]} of the target has values that {manifest.dtype} cannot hold: store another dtype"
                " (bfloat16 has the range of float32)"
            )
    return tensors


def _finish(
    folder: Path,
    manifest: Manifest,
    counts: dict[str, int],
    shards: int,
    source: LiveFeatures,
    checks: int,
    say: Say,
) -> Manifest:
    """Check, and call it complete, if no other process has shards to write."""
    there = sorted(path.name for path in folder.glob("shard-*.safetensors"))
    wanted = [shard_name(i) for i in range(shards)]
    if more := [name for name in there if name not in wanted]:
        raise UserError(f"{folder} holds {more[0]}, which the data does not reach any more: it has changed since")
    if missing := len(wanted) - len(there):
        say(f"{missing:,} shards of other processes are still to come")
        return manifest
    _spot_check(folder, manifest, counts["batches"], source, checks)
    manifest = manifest.model_copy(update={"complete": True, **counts})
    write_json(folder / MANIFEST, manifest.model_dump())
    say(f"{counts['batches']:,} batches with {counts['tokens']:,} tokens in {shards:,} shards, checked")
    return manifest


def _spot_check(folder: Path, manifest: Manifest, batches: int, source: LiveFeatures, checks: int) -> None:
    """Compute some batches, as they lie on the disk, once more. UserError if the states on the disk are others."""
    for index in sorted(random.Random(batches).sample(range(batches), min(checks, batches))):
        shard, place = divmod(index, manifest.batches_per_shard)
        path = folder / shard_name(shard)
        worst = math.inf
        try:
            again = _states(place, read_batch(path, place), source, manifest)
            with safe_open(path, framework="pt") as stored:
                worst = max((_difference(stored.get_tensor(name), want) for name, want in again.items()), default=0.0)
        except (OSError, SafetensorError):
            pass
        if not worst <= TOLERANCE[DTYPES[manifest.dtype]]:
            raise UserError(
                f"{path} failed the check: batch {place} differs from what the target says by {worst:.2g} of the largest"
                " value. Delete this file and run again; if it comes back, the disk or the memory is faulty"
            )


def _difference(got: Tensor, want: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    if got.shape != want.shape:
        return math.inf
    scale = want.float().abs().max().clamp_min(1e-6)
    return float(((got.float() - want.float()).abs().max() / scale).item())
