"""What regenerating writes, so that it can be stopped at any moment and goes on without a row lost, twice or in halves.

    DIR/train.json              the settings; a run that goes on has to have the same
    DIR/train-0.jsonl           the rows of rank 0
    DIR/train-0.failed.jsonl    turns and conversations without an answer, each with the reason
    DIR/train-0.done            the conversations that are done: what stands in the other two counts as far as this says

A conversation's rows are on disk before its line in `.done` is; every few seconds both are. Whoever goes on cuts the rows off behind
the last conversation that is done, so half a line, or half of a conversation's rows, never stays.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Self

from understudy.core.errors import UserError
from understudy.core.files import check_writable, replacing, write_json


def agree(folder: Path, split: str, settings: dict[str, Any], environment: dict[str, Any]) -> bool:
    """Write the settings of a new run, or compare them with those of the run that goes on. Returns whether it goes on.

    UserError if they differ. Ranks that begin at once all write the same.
    """
    path = folder / f"{split}.json"
    check_writable(path)
    if not path.exists():
        write_json(path, {"settings": settings, "environment": environment})
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} cannot be read: name another folder with --output-dir") from None
    now = json.loads(json.dumps(settings))
    changed = [
        f"{key} was {before.get(key)}, is {now.get(key)}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"{folder} holds rows of another run ({'; '.join(changed)}): give the same options to go on, or another --output-dir"
        )
    return True


SYNC = 5.0  # seconds of work that a run may lose when it is killed


class Output:
    """The files of one rank of one split. `done`: numbers of the conversations that are over; `counts`: of their rows and turns."""

    def __init__(self, folder: Path, split: str, rank: int) -> None:
        """Open, and cut off what the last run did not finish. UserError if another process writes here."""
        self.path = folder / f"{split}-{rank}.jsonl"
        self.failed_path = folder / f"{split}-{rank}.failed.jsonl"
        self.done: set[int] = set()
        self.counts: Counter[str] = Counter()
        self._waiting: list[dict[str, Any]] = []  # lines of `.done` whose rows may not be on disk yet
        self._synced = time.monotonic()
        check_writable(self.path)
        try:
            self._done = (folder / f"{split}-{rank}.done").open("a+b")
            self._lock()
            end = self._recover()
            self._rows = self._cut(self.path, end)
            self._clean_failed()
            self._failed = self.failed_path.open("ab")
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror or error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        for file in (self._rows, self._failed, self._done):
            file.close()

    def add(
        self, number: int, rows: Iterable[dict[str, Any]], failed: Iterable[dict[str, Any]], counts: Counter[str]
    ) -> None:
        """A conversation is over: its rows, the turns without an answer, what to count."""
        _write(self._rows, *rows)
        _write(self._failed, *failed)
        self._waiting.append({"number": number, "end": self._rows.tell(), "counts": counts})
        self.done.add(number)
        self.counts += counts
        if time.monotonic() - self._synced > SYNC:
            self.sync()

    def sync(self) -> None:
        """Bring everything to disk, in this order."""
        for file in (self._rows, self._failed):
            _to_disk(file)
        _write(self._done, *self._waiting)
        _to_disk(self._done)
        self._waiting.clear()
        self._synced = time.monotonic()

    def failed(self, line: dict[str, Any]) -> None:
        """A conversation failed and is not done: the next run tries it again, and then this line goes."""
        _write(self._failed, line)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._done, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process writes {self.path}: wait for it, or give another --rank or --output-dir"
            ) from None

    def _recover(self) -> int:
        """Read `.done` without an incomplete last line. Returns where the rows end."""
        self._done.seek(0)
        end = whole = 0
        for line in self._done:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if entry is None:
                break
            whole += len(line)
            end = entry["end"]
            self.done.add(entry["number"])
            self.counts.update(entry["counts"])
        self._done.truncate(whole)
        self._done.seek(0, os.SEEK_END)
        return end

    def _cut(self, path: Path, end: int) -> BinaryIO:
        file = path.open("ab")
        if file.tell() < end:
            file.close()
            raise UserError(
                f"{path} has lost rows that were written ({end} bytes): delete {path.with_suffix('.done')} to begin anew"
            )
        file.truncate(end)
        file.seek(end)
        return file

    def _clean_failed(self) -> None:
        """Keep the reasons of conversations that are done; the others are tried again."""
        if not self.failed_path.exists():
            return
        with replacing(self.failed_path) as temporary, self.failed_path.open("rb") as old, temporary.open("wb") as new:
            for line in old:
                try:
                    kept = line.endswith(b"\n") and json.loads(line)["number"] in self.done
                except (ValueError, KeyError, TypeError):
                    kept = False
                if kept:
                    new.write(line)


def _write(file: BinaryIO, *rows: dict[str, Any]) -> None:
    file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
