"""Batches of packed rows from JSON Lines files, in an order that can be resumed, on any number of processes.

    stream = open_stream(options, paths, tokenizer, batch_size=4, seed=0)
    for packed in stream: ...               # the rest of this epoch; then the next one is due
    stream.state()                          # small; `Stream(...).load_state(state)` goes on with the next batch

Memory holds the byte offset of every line and one number per document, not texts: a row is read and tokenised when it is needed.
The order of an epoch is a function of (seed, epoch, number of lines) alone. Rows do not depend on the number of processes: every
process packs the same rows and takes its share of each global batch, so it has to know every document's length. In the
first epoch it therefore tokenises all documents, in later ones only its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from understudy.core.errors import UserError
from understudy.data.conversations import Conversation, Malformed, checked_text, parse_conversation, parse_row
from understudy.data.encode import Encoded, Encoder, Rejected
from understudy.data.options import DataOptions
from understudy.data.packing import OPEN_ROWS, Packed, Packer, collate
from understudy.data.tokens import TokenRow, has_tokens, parse_tokens

MALFORMED = "malformed line"
NO_TEXT = "no `text` in the row, which --is-preformatted reads"
HAS_IDS = "the row holds token ids, which --is-preformatted does not read"
ONLY_TEXT = "the row has `text` only, which --is-preformatted reads"
FORMS = ("conversations", "messages", "turns", "prompt")
CHUNK = 1 << 20  # bytes read at once to find line ends

Document = tuple[int, Encoded | None]  # line, and its tokens unless they are to be made when they are needed


class Corpus:
    """The lines of JSON Lines files by number, over all files. With `preformatted` a line is `{"text": ...}`.

    With `ids` rows that hold token ids are given as such; without, as the conversations that they are, too.
    """

    def __init__(self, paths: Sequence[str | Path], preformatted: bool = False, ids: bool = False) -> None:
        self.paths, self.preformatted, self.ids = [Path(path) for path in paths], preformatted, ids
        self._starts = [
            _line_starts(path) for path in self.paths
        ]  # per file: where each line begins, and the file's size
        self._first = np.cumsum([0, *(len(starts) - 1 for starts in self._starts)])  # number of each file's first line
        self.bytes = sum(int(starts[-1]) for starts in self._starts)

    def __len__(self) -> int:
        """Lines of all files, blank and malformed ones too."""
        return int(self._first[-1])

    def where(self, line: int) -> str:
        """`FILE:LINE` of a line."""
        file, number = self._place(line)
        return f"{self.paths[file]}:{number + 1}"

    def row(self, line: int) -> Conversation | TokenRow | str | None:
        """What a line holds: a conversation or ids, with `preformatted` a text; None if it is blank. Raises `Rejected`."""
        file, number = self._place(line)
        start, end = map(int, self._starts[file][number : number + 2])
        try:
            with self.paths[file].open("rb") as lines:
                lines.seek(start)
                raw = lines.read(end - start)
        except OSError as error:
            raise UserError(f"cannot read {self.paths[file]}: {error.strerror or error}") from None
        if number == 0:
            raw = raw.removeprefix(b"\xef\xbb\xbf")  # byte-order mark
        if not raw.strip():
            return None
        try:
            row = parse_row(raw)
            if self.ids and has_tokens(row):
                return parse_tokens(row)
            if self.preformatted and "text" not in row:
                if has_tokens(row):
                    raise Rejected(HAS_IDS)
                raise Rejected(NO_TEXT)
            if self.preformatted:
                return checked_text(row["text"], "text")
            if "text" in row and row.keys().isdisjoint(FORMS):
                raise Rejected(ONLY_TEXT)
            return parse_conversation(row, f"{self.paths[file].stem}:{number + 1}")
        except Malformed as reason:
            raise Rejected(MALFORMED, str(reason)) from None

    def _place(self, line: int) -> tuple[int, int]:
        """(file, number of the line in it from 0 on)."""
        file = int(np.searchsorted(self._first, line, side="right")) - 1
        return file, line - int(self._first[file])


def _line_starts(path: Path) -> NDArray[np.int64]:
    """Byte offset of every line, then the size of the file."""
    found, size = [np.zeros(1, np.int64)], 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + size + 1)
                size += len(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    starts = np.concatenate(found)
    return starts if starts[-1] == size else np.append(starts, size)


def epoch_order(lines: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of `range(lines)`: the same on every machine and with every version of every library.

    Each number is mixed by SplitMix64 (Steele, Lea and Flood 2014), a bijection, so that no two are equal, and they are sorted.
    """
    from understudy.core.seeds import derive

    x = np.arange(lines, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive(seed, "data", epoch))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)))


class Stream:
    """An iterator over `Packed` batches [batch_size, T] of one rank.

    With `pack`, T is the encoder's max_length, and documents share rows; without, a row is one document and T the longest of the
    batch. Of `world_size * batch_size` consecutive rows, rank r gets every `world_size`-th from r on. The last batch of an epoch
    is filled up with empty rows (nothing but padding): all documents are seen, and every rank has the same number of batches.
    `shuffle=False` reads in file order, the same in every epoch.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        *,
        batch_size: int,
        pad_id: int,
        seed: int = 0,
        pack: bool = True,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert 0 <= rank < world_size
        assert corpus.preformatted == encoder.preformatted
        self.corpus, self.encoder = corpus, encoder
        self.batch_size, self.pad_id, self.seed = batch_size, pad_id, seed
        self.pack, self.shuffle = pack, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.rejected: Counter[str] = Counter()  # reasons, of the documents seen so far
        self._lengths = np.zeros(len(corpus), np.int32)  # tokens of each document; 0 = not known yet, -1 = none
        self._begin()

    def __iter__(self) -> Iterator[Packed]:
        """The batches that are left of this epoch, which may be none. At its end `epoch` counts up, and iterating again gives the next one.

        UserError if an epoch has no row to give.
        """
        rows = self._rows(self._order(self.epoch))
        while chosen := self._share(rows):
            documents = [[self._encoded(document) for document in row] for row in chosen]
            self.batch += 1
            yield collate(documents, self.pad_id, self.encoder.max_length if self.pack else None)
        if not self.batch:
            why = "; ".join(f"{reason} ({n} rows)" for reason, n in self.rejected.most_common(3)) or "there are no rows"
            raise UserError(f"no row of {', '.join(map(str, self.corpus.paths))} can be trained on: {why}")
        self.epoch += 1
        self._begin()

    def count(self) -> int:
        """Batches of a whole epoch, the current one, exactly. Tokenises the documents whose length is not known yet: all, at first."""
        packer, rows = self._packer(), 0
        for line in map(int, self._order(self.epoch)):
            if (length := self._measure(line)[0]) > 0:
                rows += packer.add((line, None), length) is not None
        return -(-(rows + len(packer.open)) // (self.batch_size * self.world_size))

    def state(self) -> dict[str, Any]:
        """Where the stream stands between two batches; plain values for JSON."""
        return {
            "epoch": self.epoch,
            "position": self._position,  # documents taken from the epoch's order
            "batch": self.batch,
            "open": [[line for line, _ in row] for row in self._packing.open],
            "of": self._identity(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. The number of processes may differ, if batch size times processes does not.

        UserError if the state is of other data or of other options, since then the rows would not be those of that run.
        """
        mine, theirs = self._identity(), state["of"]
        changed = [
            f"{name} was {theirs.get(name)}, is {value}" for name, value in mine.items() if theirs.get(name) != value
        ]
        if changed:
            raise UserError(f"cannot resume, the data or its options have changed: {'; '.join(changed)}")
        self.epoch = state["epoch"]
        self._begin()
        self.batch, self._position = state["batch"], state["position"]
        for lines in state["open"]:
            row = [(line, *self._measure(line)) for line in lines]
            if any(length < 1 for _, length, _ in row):
                raise UserError(
                    "cannot resume, the data have changed: a document of the run can no longer be trained on"
                )
            self._packing.restore([(line, encoded) for line, _, encoded in row], sum(length for _, length, _ in row))

    def _begin(self) -> None:
        self.batch = 0  # batches of this epoch that were given
        self._position = 0
        self._packing = self._packer()

    def _identity(self) -> dict[str, Any]:
        """What the rows follow from."""
        return {
            "lines": len(self.corpus),
            "bytes": self.corpus.bytes,
            "max_length": self.encoder.max_length,
            "global batch size": self.batch_size * self.world_size,
            "seed": self.seed,
            "pack": self.pack,
            "shuffle": self.shuffle,
            "last turn only": self.encoder.last_turn_only,
            "preformatted": self.encoder.preformatted,
            "chat template": self.encoder.template_hash,
        }

    def _packer(self) -> Packer[Document]:
        return Packer(self.encoder.max_length, OPEN_ROWS if self.pack else 0)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return epoch_order(len(self.corpus), self.seed, epoch) if self.shuffle else np.arange(len(self.corpus))

    def _rows(self, order: NDArray[np.int64]) -> Iterator[list[Document]]:
        """The rows that are left, of all ranks. Whenever one is given, `_position` and `_packing` say what is left after it."""
        while self._position < len(order):
            line = int(order[self._position])
            self._position += 1
            length, encoded = self._measure(line)
            if length > 0 and (row := self._packing.add((line, encoded), length)) is not None:
                yield row
        while (row := self._packing.pop()) is not None:
            yield row

    def _share(self, rows: Iterator[list[Document]]) -> list[list[Document]]:
        """This rank's rows of the next global batch, filled up with empty ones; [] when there is none."""
        every = list(islice(rows, self.batch_size * self.world_size))
        mine = every[self.rank :: self.world_size]
        return mine + [[]] * (self.batch_size - len(mine)) if every else []

    def _measure(self, line: int) -> tuple[int, Encoded | None]:
        """(tokens of a document, -1 if it has none to train on; the document itself if it had to be tokenised for that)."""
        if known := int(self._lengths[line]):
            return known, None
        encoded = None
        try:
            row = self.corpus.row(line)
            encoded = self.encoder(row) if row is not None else None
        except Rejected as why:
            self.rejected[why.reason] += 1
        self._lengths[line] = len(encoded.ids) if encoded else -1
        return int(self._lengths[line]), encoded

    def _encoded(self, document: Document) -> Encoded:
        line, encoded = document
        if encoded is not None:
            return encoded
        row = self.corpus.row(line)
        assert row is not None, "a document that has a length"
        return self.encoder(row)


def open_stream(
    options: DataOptions,
    paths: Sequence[str | Path],
    tokenizer: Any,
    *,
    batch_size: int,
    seed: int = 0,
    shuffle: bool = True,
    stop_ids: Collection[int] = (),
    rank: int = 0,
    world_size: int = 1,
) -> Stream:
    """The stream that the options describe. `stop_ids`: the model's stop tokens besides the tokenizer's EOS."""
    encoder = Encoder(
        tokenizer,
        max_length=options.max_length,
        last_turn_only=options.last_turn_only,
        preformatted=options.is_preformatted,
        stop_ids=stop_ids,
    )
    return Stream(
        Corpus(paths, options.is_preformatted, ids=not options.is_preformatted),
        encoder,
        batch_size=batch_size,
        pad_id=tokenizer.pad_token_id or 0,  # any id will do: no document sees it, nothing predicts it
        seed=seed,
        pack=options.pack,
        shuffle=shuffle,
        rank=rank,
        world_size=world_size,
    )
