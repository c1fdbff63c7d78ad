"""What a run is about to learn from, said before it starts: rows kept and rejected, what is supervised, one masked sample.

report = inspect(corpus, encoder, draft_vocab_sizes=(8000, 32000))
console.print(report); report.as_dict(); report.check()
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

from understudy.core.errors import UserError
from understudy.data.encode import (
    CUT,
    HISTORY,
    MARKS,
    NO_ANSWER,
    NOT_FOUND,
    PROMPT,
    REFUSED,
    STOP_INSIDE,
    Encoded,
    Encoder,
    Rejected,
)
from understudy.data.stream import HAS_IDS, NO_TEXT, ONLY_TEXT, Corpus
from understudy.data.tokens import TokenRow

SHOWN = 5  # places that are named per reason
WINDOW = 300  # tokens of the sample that are shown
BEFORE = 60  # of them before the first supervised one
OPEN, CLOSE = "⟦", "⟧"

ADVICE = {
    NO_ANSWER: "rows need answers; `understudy data peek FILE` shows what is read",
    NO_TEXT: 'leave --is-preformatted out, or give rows as {"text": ...}',
    HAS_IDS: "leave --is-preformatted out",
    ONLY_TEXT: "add --is-preformatted",
    NOT_FOUND: "the text has to be rendered by this model's own chat template, with its generation prompt before each answer",
    CUT: "raise --max-length",
    REFUSED: "convert the rows to roles that the template takes",
    PROMPT: 'render the rows as the model wrote them and give them as {"text": ...} with --is-preformatted',
    HISTORY: "give one row per answer, or rendered rows with --is-preformatted",
    MARKS: "mend {% generation %} in the template: it has to enclose each answer and the stop token behind it, and nothing else",
    STOP_INSIDE: "answers must not hold the template's own tokens; give rendered texts with --is-preformatted",
}


@dataclass
class DataReport:
    """Counts over the rows that were looked at. `sampled`: not all of `lines` were."""

    files: list[str]
    lines: int  # in the files
    rows: int = 0  # looked at; blank lines do not count
    sampled: bool = False
    documents: int = 0  # rows kept
    rejected: Counter[str] = field(default_factory=Counter)  # reason -> rows
    where: dict[str, list[str]] = field(
        default_factory=dict
    )  # reason -> the first few, FILE:LINE and what is wrong there
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> answers of kept rows that are not supervised
    written_by: Counter[str] = field(default_factory=Counter)  # rows with token ids, by the target that wrote them
    thinking: Counter[str] = field(default_factory=Counter)  # of these, by mode: on, off, default
    other_template: int = 0  # of these, rendered by another chat template than the model's
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0  # documents that lost their end
    lengths: list[int] = field(default_factory=list)  # tokens of each document, after the cut
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))  # [V] supervised tokens by id
    draft_vocab_sizes: tuple[int, ...] = ()
    sample: list[tuple[bool, str]] = field(default_factory=list)  # (supervised, text) pieces of the first document

    @property
    def supervised_fraction(self) -> float:
        return self.supervised / self.tokens if self.tokens else 0.0

    @property
    def thinking_mode(self) -> str:
        """The one thinking mode of the rows that were looked at, on or off; `default` if they have several, or say none."""
        alone = sum(self.thinking.values()) == self.documents  # ordinary conversations are rendered by the default
        return next(iter(self.thinking)) if len(self.thinking) == 1 and alone else "default"

    def coverage(self) -> dict[int, float]:
        """Draft vocabulary size -> share of the supervised tokens inside it."""
        return {size: coverage(self.counts, size) for size in self.draft_vocab_sizes}

    def packed_rows(self, max_length: int) -> int:
        """About how many packed rows an epoch has, had they no padding, from what was looked at. Exact, and slow: `Stream.count`."""
        return math.ceil(self.lines * self.tokens / max(self.rows, 1) / max_length)

    def check(self) -> None:
        """UserError if nothing would be supervised, with the reason and what to check."""
        if self.supervised:
            return
        files = ", ".join(self.files)
        if not self.rejected:
            raise UserError(f"nothing to train on: {files} has no rows")
        reason, n = self.rejected.most_common(1)[0]
        advice = f"; {ADVICE[reason]}" if reason in ADVICE else ""
        raise UserError(
            f"nothing to train on: none of {self.rows:,} rows of {files} supervises a token. {reason} ({n:,} rows,"
            f" first {self.where[reason][0]}){advice}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "files": self.files,
            "lines": self.lines,
            "sampled": self.sampled,
            "rows": self.rows,
            "documents": self.documents,
            "rejected": dict(self.rejected),
            "rejected_first": self.where,
            "answers_left_out": dict(self.left_out),
            "written_by": dict(self.written_by),
            "thinking": dict(self.thinking),
            "other_template": self.other_template,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "supervised_fraction": self.supervised_fraction,
            "length_median": float(np.median(self.lengths)) if self.lengths else 0.0,
            "length_max": max(self.lengths, default=0),
            "truncated": self.truncated,
            "coverage": {str(size): share for size, share in self.coverage().items()},
        }

    def table(self) -> list[tuple[str, str]]:
        """(what, value) in the order of reading."""
        found = self.as_dict()
        looked = f"{self.rows:,} rows"
        if self.sampled:
            looked = (
                f"a sample of {self.rows:,} rows of {self.lines:,} lines, evenly spread: all counts are of the sample"
            )
        return [
            ("data", ", ".join(self.files)),
            ("read", looked),
            ("kept", f"{self.documents:,} documents"),
            *(
                (f"rejected {n:,}", f"{reason}: {'; '.join(self.where[reason])}")
                for reason, n in self.rejected.most_common()
            ),
            *((f"answers left out {n:,}", reason) for reason, n in self.left_out.most_common()),
            *((f"token ids in {n:,} rows", f"written by {who}") for who, n in self.written_by.most_common()),
            *([("WARNING", f"{self.other_template:,} rows with token ids were rendered by another chat template than this model's, which"
              " serving will not use")] if self.other_template else []),
            ("tokens", f"{self.tokens:,}, supervised {self.supervised:,} ({self.supervised_fraction:.1%})"),
            (
                "lengths",
                f"median {found['length_median']:,.0f}, max {found['length_max']:,} tokens;"
                f" {self.truncated:,} cut at max_length",
            ),
            *((f"draft vocabulary {size:,}", f"{share:.2%} of supervised tokens") for size, share in self.coverage().items()),
        ]  # fmt: skip

    def sample_text(self) -> Text:
        """The sample for a terminal: supervised tokens green, the others dim."""
        return Text.assemble(*((text, "green" if supervised else "dim") for supervised, text in self.sample))

    def sample_plain(self) -> str:
        """The sample without colour: supervised tokens between ⟦ and ⟧."""
        return "".join(f"{OPEN}{text}{CLOSE}" if supervised else text for supervised, text in self.sample)

    def plain(self) -> str:
        """The whole report without colour."""
        lines = [f"{what}: {value}" for what, value in self.table()]
        return "\n".join([*lines, *(["sample:", self.sample_plain()] if self.sample else [])])

    def __rich__(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for what, value in self.table():
            table.add_row(Text(what, style="bold"), Text(value))
        return (
            Group(table, Text("\nsample (green: supervised)", style="bold"), self.sample_text())
            if self.sample
            else Group(table)
        )


def coverage(counts: NDArray[np.int64], size: int) -> float:
    """Share of the supervised tokens inside the `size` most frequent ids. `counts` [V] by id. Nothing counted: 0.0."""
    total = int(counts.sum())
    return float(np.sort(counts)[::-1][:size].sum() / total) if total else 0.0


def inspect(
    corpus: Corpus, encoder: Encoder, limit: int | None = None, draft_vocab_sizes: Sequence[int] = ()
) -> DataReport:
    """Encode the rows of a corpus, or `limit` lines spread evenly over it, and count. `check` of the report may stop the run."""
    tokenizer = encoder.tokenizer
    lines = np.arange(len(corpus))
    sampled = limit is not None and limit < len(corpus)
    if limit is not None and sampled:
        lines = np.linspace(0, len(corpus) - 1, limit).round().astype(np.int64)
    report = DataReport(
        [str(path) for path in corpus.paths],
        len(corpus),
        sampled=sampled,
        draft_vocab_sizes=tuple(draft_vocab_sizes),
        counts=np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int64),
    )
    for line in map(int, lines):
        try:
            row = corpus.row(line)
            document = encoder(row) if row is not None else None
        except Rejected as why:
            _reject(report, why, corpus.where(line))
            continue
        if document is None:
            continue
        _count(report, document)
        if isinstance(row, TokenRow):
            report.written_by[row.author] += 1
            report.thinking[str(row.made.get("thinking", "default"))] += 1
            report.other_template += row.made.get("template") not in (None, encoder.template_hash)
        if not report.sample:
            report.sample = list(_pieces(tokenizer, document))
    return report


def _reject(report: DataReport, why: Rejected, where: str) -> None:
    report.rows += 1
    report.rejected[why.reason] += 1
    first = report.where.setdefault(why.reason, [])
    if len(first) < SHOWN:
        first.append(f"{where} ({why.detail})" if why.detail else where)


def _count(report: DataReport, document: Encoded) -> None:
    chosen = np.asarray(document.ids)[np.asarray(document.mask)]
    report.rows += 1
    report.documents += 1
    report.tokens += len(document.ids)
    report.supervised += len(chosen)
    report.truncated += document.cut > 0
    report.lengths.append(len(document.ids))
    report.left_out.update(document.left_out)
    report.counts += np.bincount(chosen, minlength=len(report.counts))


def _pieces(tokenizer: Any, document: Encoded) -> Iterator[tuple[bool, str]]:
    """Runs of tokens with the same mask, decoded: a window of the document that holds its first supervised token."""
    start = max(0, document.mask.index(True) - BEFORE)
    stop = min(len(document.ids), start + WINDOW)
    if start:
        yield False, "... "
    for supervised, run in groupby(range(start, stop), key=lambda i: document.mask[i]):
        yield supervised, tokenizer.decode([document.ids[i] for i in run])
    if stop < len(document.ids):
        yield False, " ..."
