"""The options of every trainer that say what it is trained on. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pydantic

from understudy.core.config import Config, option


def _several(value: Any) -> Any:
    """One path where several may stand."""
    return [value] if isinstance(value, str | Path) else value


class DataOptions(Config):
    """Which files, and how their rows become batches."""

    train_data_path: Annotated[list[Path], pydantic.BeforeValidator(_several)] = option(
        [],
        "JSON Lines file to train on, repeatable; default: the built-in corpus, Python's standard library",
        "data-path",
        "train-data",
        "data",
    )
    eval_data_path: Path | None = option(
        None, "JSON Lines file to evaluate on; default: the built-in corpus's, when that is trained on", "eval-data"
    )
    max_length: int = option(
        2048, "tokens of a row; longer conversations lose their end", "max-seq-length", "max-seq-len", ge=2
    )
    is_preformatted: bool = option(False, 'rows are {"text": ...}, already rendered by the model\'s chat template')
    last_turn_only: bool = option(False, "supervise only the last answer of a conversation")
    pack: bool = option(True, "put several conversations into one row; they do not see each other")


def corpus_paths(options: DataOptions, folder: str | Path) -> tuple[list[Path], Path | None]:
    """(files to train on, file to evaluate on or None).

    Without a training file the built-in corpus is written to `folder`/corpus, the run's own folder, once: a resumed run reads the
    bytes that it began with. With processes side by side, one has to come here first.
    """
    if options.train_data_path:
        return list(options.train_data_path), options.eval_data_path
    corpus = Path(folder) / "corpus"
    train, held_out = corpus / "train.jsonl", corpus / "eval.jsonl"
    if not (train.exists() and held_out.exists()):
        from understudy.data.stdlib import write_corpus

        write_corpus(corpus)
    return [train], options.eval_data_path or held_out
