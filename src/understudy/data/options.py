"""Options that say what is read and how it is rendered, for every command that does. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from understudy.core.config import Config, option
from understudy.core.errors import UserError


def several(value: Any) -> Any:
    """One path where several may stand."""
    return [value] if isinstance(value, str | Path) else value


class ThinkingOptions(Config):
    """How prompts are rendered."""

    thinking: Literal["on", "off", "default"] = option(
        "default",
        "whether the target thinks before it answers (enable_thinking of its chat template); default = unsaid",
    )


class FileOptions(Config):
    """Which files, and how long a row may be."""

    train_data_path: Annotated[list[Path], pydantic.BeforeValidator(several)] = option(
        [],
        "JSON Lines file to train on, or folder of `understudy data regenerate`, repeatable; default: the built-in corpus, Python's"
        " standard library",
        "data-path",
        "train-data",
        "data",
    )
    eval_data_path: Path | None = option(
        None,
        "JSON Lines file to evaluate on; default: that of the folder or of the built-in corpus that is trained on",
        "eval-data",
    )
    max_length: int = option(
        2048, "tokens of a row; longer conversations lose their end", "max-seq-length", "max-seq-len", ge=2
    )


class DataOptions(FileOptions):
    """Which files, and how their rows become batches."""

    is_preformatted: bool = option(False, 'rows are {"text": ...}, already rendered by the model\'s chat template')
    last_turn_only: bool = option(False, "supervise only the last answer of a conversation")
    pack: bool = option(True, "put several conversations into one row; they do not see each other")


PART = re.compile(r"(train|eval)-(\d+)\.jsonl")  # what regenerating writes: split and rank


def parts(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder of `understudy data regenerate`, in the order of their ranks."""
    found = [
        (int(named[2]), path) for path in folder.iterdir() if (named := PART.fullmatch(path.name)) and named[1] == split
    ]
    return [path for _, path in sorted(found)]


def _opened(options: FileOptions) -> tuple[list[Path], Path | None]:
    """What the options name, with the files that are in its folders. UserError for a folder without any."""
    train: list[Path] = []
    held_out = []
    for path in options.train_data_path:
        if not path.is_dir():
            train.append(path)
            continue
        if not (files := parts(path, "train")):
            raise UserError(
                f"{path} holds no train-0.jsonl: name its files one by one, or a folder of `understudy data regenerate`"
            )
        train += files
        held_out += parts(path, "eval")
    given = options.eval_data_path
    if given is not None and given.is_dir():
        held_out, given = parts(given, "eval"), None
        if not held_out:
            raise UserError(f"{options.eval_data_path} holds no eval-0.jsonl: name a file")
    if given is None and len(held_out) > 1:
        raise UserError(
            f"there are {len(held_out)} files to evaluate on ({held_out[0]}, ...): name one with --eval-data-path"
        )
    return train, given or (held_out[0] if held_out else None)


def corpus_paths(options: FileOptions, folder: str | Path) -> tuple[list[Path], Path | None]:
    """(files to train on, file to evaluate on or None). A folder stands for the files that `understudy data regenerate` wrote there.

    Without a training file the built-in corpus is written to `folder`/corpus, the run's own folder, once: a resumed run reads the
    bytes that it began with. Processes side by side that begin at once each write the same bytes, atomically.
    """
    if options.train_data_path:
        return _opened(options)
    corpus = Path(folder) / "corpus"
    train, held_out = corpus / "train.jsonl", corpus / "eval.jsonl"
    if not (train.exists() and held_out.exists()):
        from understudy.data.stdlib import write_corpus

        write_corpus(corpus)
    return [train], options.eval_data_path or held_out
