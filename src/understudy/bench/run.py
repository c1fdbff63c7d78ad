"""`understudy bench` from its options to its results.

results, code = run(BenchConfig(drafter=["prompt-lookup"], check=True))
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from understudy.assets import prompts_path
from understudy.bench import tables
from understudy.bench.check import Checker, verdict
from understudy.bench.config import BenchConfig
from understudy.bench.efficiency import Alone, alone
from understudy.bench.lineup import law, line_up
from understudy.bench.measure import Turns, measure, warm_up
from understudy.bench.modes import EngineMode, Mode, Turn
from understudy.bench.results import PLAIN, REFERENCE, WRONG, median_repeat, row, validity
from understudy.bench.watch import watched
from understudy.core.errors import UserError
from understudy.core.files import write_json, write_text
from understudy.core.provenance import environment
from understudy.data.prompts import Prompt, load_prompts, render, thinking_variables
from understudy.target.memory import memory_guard
from understudy.target.target import Target

SAMPLES, SAMPLE_TOKENS = 3, 32
CHECK_FAILED = 1
OVERHEAD_NOTE = (
    "overhead = 1 - (draft + verify) / decode time; a draft that runs no model (null, prompt-lookup) counts as overhead too."
    " Python's own cost inside draft and verify counts as model time"
)
DRAWN_NOTE = (
    "at a temperature outputs are drawn, so they are not compared: that the law is the same is proved by the tests"
)


def read_prompts(config: BenchConfig) -> list[Prompt]:
    """The prompts that are asked for."""
    return load_prompts(config.prompts or prompts_path(), config.num_prompts)


def run(
    config: BenchConfig, target: Target, asked: Sequence[Prompt] | None = None, **defaults: Any
) -> tuple[dict[str, Any], int]:
    """Measure, print and write: (results, exit code). `asked` stands for `read_prompts`; `defaults` are draft options."""
    asked = read_prompts(config) if asked is None else asked
    path = Path(config.prompts or prompts_path())
    target.thinking = config.thinking  # what drafters that were trained in another mode are warned of by
    variables = thinking_variables(target.tokenizer, config.thinking)
    with memory_guard(target):
        prompts = [render(target.tokenizer, prompt.messages, **variables) for prompt in asked]
        results, turns = bench(config, target, prompts, **defaults)
    file = str(config.prompts) if config.prompts else "the built-in set"
    results["env"]["prompts"] |= {"file": file, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    if config.num_prompts and len(asked) < config.num_prompts:
        results["notes"].append(
            f"{path.name} holds {len(asked)} prompts: fewer than --num-prompts {config.num_prompts}"
        )
    if later := sum(bool(prompt.turns) for prompt in asked):
        results["notes"].append(
            f"{later} prompts have later turns, which were not asked: only first answers are measured"
        )
    _show(config, results)
    _write(config, results, _samples(target, turns[PLAIN]))
    return results, CHECK_FAILED if results["check"] and not results["check"]["passed"] else 0


def bench(
    config: BenchConfig, target: Target, prompts: Sequence[list[int]], **defaults: Any
) -> tuple[dict[str, Any], dict[str, Turns]]:
    """Measure `prompts` (token ids) with every mode: (results without the prompts' file, all turns)."""
    began = time.perf_counter()
    _fits(prompts, target)
    sampling = law(config, target)
    modes = line_up(config, target, **defaults)
    with _progress(config, len(modes) * len(prompts) * config.repeats) as (seen, status):
        status("warming up")
        warm_up(modes, prompts, config.max_new_tokens)
        with watched(config, modes, target, prompts):
            status("measuring")
            turns = measure(modes, prompts, config.max_new_tokens, config.repeats, seen(target.tokenizer))
        status("timing parts alone")
        parts = {mode.name: _alone(mode, prompts, turns[mode.name], config) for mode in modes}
        status("comparing outputs")
        checker = Checker(target, sampling, () if config.ignore_eos else target.eos_ids)
        greedy = sampling.temperature == 0
        found = {
            mode.name: checker.compare(prompts, turns[PLAIN], turns[mode.name]) if greedy else None for mode in modes
        }
    sections = target.device.type != "cuda" or config.detailed_timing
    rows = [row(mode, turns, parts[mode.name], found[mode.name], sections) for mode in modes]
    valid, reason = validity(rows)
    check = None
    if config.check and greedy:
        check = verdict(
            modes, {name: d or [] for name, d in found.items()}, {r["name"]: r["rejected_drafts"] for r in rows}
        )
        check["summary"] = _summary(rows, target)
    results = {
        "valid": valid,
        "reason": reason,
        "check": check,
        "notes": [OVERHEAD_NOTE] + ([] if greedy else [DRAWN_NOTE]),
        "runtime_s": time.perf_counter() - began,
        "env": _env(config, target, len(prompts)),
        "modes": rows,
    }
    return results, turns


def _fits(prompts: Sequence[list[int]], target: Target) -> None:
    """Refuse before the first measurement what would fail in the middle of it."""
    for index, prompt in enumerate(prompts):
        if len(prompt) >= target.context:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, the model's context is {target.context}: shorten or remove it"
            )


def _alone(mode: Mode, prompts: Sequence[list[int]], turns: Turns, config: BenchConfig) -> Alone | None:
    if not isinstance(mode, EngineMode) or mode.name == PLAIN:
        return None
    return alone(mode, prompts, median_repeat(turns), config.max_new_tokens)


def _summary(rows: Sequence[dict[str, Any]], target: Target) -> str:
    differ = sum(len(r["divergences"]) for r in rows)
    if not differ:
        return "every output equals plain decoding's, token by token"
    worst = max(d["gap"] for r in rows for d in r["divergences"])
    dtype = str(target.dtype).removeprefix("torch.")
    return f"{differ} outputs part from plain decoding's at a near tie of {dtype} (at most {worst:.3g} ulp)"


def _env(config: BenchConfig, target: Target, prompts: int) -> dict[str, Any]:
    return environment(config.seed) | {
        "model": target.name,
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "layers": target.layers,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "hf_attention": target.model.config._attn_implementation,
        "prompts": {"count": prompts, "file": None, "sha256": None},
        "preset_changed": config.preset_changed(),
        "settings": config.model_dump(mode="json"),
    }


class _progress:
    """A bar on standard error while standard error is a terminal, and the lines of `--verbose` on standard output."""

    def __init__(self, config: BenchConfig, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        err = Console(stderr=True)
        self.bar = Progress(*columns, console=err, transient=True, disable=config.verbose or not err.is_terminal)
        self.task = self.bar.add_task("", total=total)
        self.out = tables.console() if config.verbose else None

    def __enter__(self) -> tuple[Callable[[Any], Callable[[Mode, int, int, Turn], None]], Callable[[str], None]]:
        self.bar.start()
        return self._seen, lambda text: self.bar.update(self.task, description=text)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def _seen(self, tokenizer: Any) -> Callable[[Mode, int, int, Turn], None]:
        def seen(mode: Mode, repeat: int, prompt: int, turn: Turn) -> None:
            self.bar.advance(self.task)
            if self.out is not None and repeat == 0:
                for cycle, draft in enumerate(turn.log, start=1):
                    self.out.print(tables.draft_line(mode.name, prompt, cycle, draft, tokenizer), soft_wrap=True)

        return seen


def _samples(target: Target, turns: Turns) -> list[dict[str, Any]]:
    """The first tokens of the first prompts' answers."""
    tokenizer, found = target.tokenizer, []
    for index, turn in enumerate(turns[0][:SAMPLES]):
        tokens = turn.output[:SAMPLE_TOKENS]
        found.append(
            {"prompt": index, "tokens": tokens, "text": None if tokenizer is None else tokenizer.decode(tokens)}
        )
    return found


def _show(config: BenchConfig, results: dict[str, Any]) -> None:
    """The tables, and as the last line everything as JSON."""
    out = tables.console()
    out.print(tables.overview(results))
    for line in tables.verdict_lines(results):
        out.print(line, soft_wrap=True)
    if config.compare:
        by_name = {r["name"]: r for r in results["modes"]}
        count = results["env"]["prompts"]["count"]
        for name in by_name:
            if name != WRONG and by_name[name]["rejected_drafts"] is not None:
                for table in tables.comparison(by_name[name], by_name[REFERENCE], count):
                    out.print(table)
    print(json.dumps(results, ensure_ascii=False), flush=True)


def _write(config: BenchConfig, results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    if config.output is not None:
        write_json(config.output, results)
    if config.output_dir is not None:
        write_json(config.output_dir / "results.json", results)
        write_text(config.output_dir / "README.md", tables.readme(results, samples))
