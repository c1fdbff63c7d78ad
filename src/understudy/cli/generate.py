"""`understudy generate`: continue a prompt, a file of prompts, or a conversation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.cli.common import DraftOptions, ModelOptions, draft_defaults, given, load
from understudy.cli.options import config_command
from understudy.core.config import option
from understudy.core.errors import UserError
from understudy.core.files import check_writable, write_text
from understudy.data.options import ThinkingOptions
from understudy.decoding.request import DecodeParams
from understudy.target.params import SamplingParams
from understudy.telemetry.options import AlignTelemetryParams

PLAIN_PROMPTS = 2  # prompts that plain decoding is timed with, for the speed-up in metrics/speed.csv

if TYPE_CHECKING:
    from rich.console import Console

    from understudy.api import Engine
    from understudy.data.prompts import Prompt
    from understudy.drafting.protocols import Drafter


class GenerateConfig(SamplingParams, DecodeParams, AlignTelemetryParams, DraftOptions, ModelOptions, ThinkingOptions):
    """Options of `understudy generate`."""

    drafter: str = option("prompt-lookup", "NAME[:PATH][,key=value...]; none = plain decoding")
    prompt: str | None = option(None, "text to answer")
    file: Path | None = option(
        None, 'JSON Lines file of prompts ({"prompt"}, {"turns"}, ShareGPT, OpenAI), or a text file'
    )
    interactive: bool = option(False, "a conversation at the terminal; /reset starts over, Ctrl-D ends it")
    system: str | None = option(None, "system message")
    raw: bool = option(False, "continue the text as it is, without the chat template")
    num_prompts: int | None = option(
        None, "prompts of --file (default all) or of the built-in set (default 1)", "num-samples", ge=1
    )
    n: int = option(1, "answers per prompt, sampled from one prefill", ge=1)
    stop: list[str] = option([], "end the answer before this text (repeatable)")
    ignore_eos: bool = option(False, "go on after stop tokens")
    output: Path | None = option(None, "JSON Lines file for prompts, answers, tokens and statistics")
    output_dir: Path | None = option(
        None, "run folder: run.yaml, env.json, metrics/acceptance.csv, metrics/speed.csv, telemetry dumps", "outdir"
    )


@config_command(GenerateConfig)
def command(config: GenerateConfig) -> None:
    """Continue a prompt, a file of prompts, or a conversation; with none of them, the first prompt of the built-in set.

    Accepted drafts are coloured; the tokens that the target added itself are plain. Sampling options and lengths that are not
    given come from the model's own generation config, where it has them.
    """
    _check(config)
    if (config.prompt is not None) + (config.file is not None) + config.interactive > 1:
        raise UserError("give only one of --prompt TEXT, --file FILE and --interactive")
    prompts = _prompts(config)

    from rich.console import Console

    from understudy.api import Engine
    from understudy.cli.text import learned
    from understudy.cli.watching import watching
    from understudy.drafting.spec import build
    from understudy.telemetry.run import RunFolder

    if config.output is not None:
        check_writable(config.output)
    defaults = draft_defaults(config, [config.drafter]) | {"steps": config.steps}
    folder = None if config.output_dir is None else RunFolder(config.output_dir)
    target = load(config)
    target.thinking = None if config.raw else config.thinking
    drafter = build(config.drafter, target, **defaults)
    console = Console(highlight=False)
    few = [_ids(Engine(target, drafter), config, prompt) for prompt in prompts[:PLAIN_PROMPTS]]
    if folder is not None:
        folder.begin(_resolved(config, drafter), config.seed)
    notes: list[str] = []  # lines that come while an answer is being printed
    rows = []
    with watching(
        config, target, drafter, "serve", prompts=few, folder=config.output_dir, summary=notes.append, seed=config.seed
    ) as listeners:
        engine = Engine(target, drafter, listeners)
        if config.interactive:
            _converse(engine, config, console, notes)
        for i, prompt in enumerate(prompts):
            rows.append(_answer(engine, config, console, prompt, i * config.n))
            _tell(console, notes)
    if engine.learner is not None:
        notes.append(learned(engine.learner.summary()))
    _tell(console, notes)
    if folder is not None:
        folder.event("end", prompts=len(rows))
        folder.close()
    if config.output is not None:
        write_text(config.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return None


def _tell(console: Console, notes: list[str]) -> None:
    while notes:
        console.print(notes.pop(0), style="dim", markup=False, soft_wrap=True)


def _resolved(config: GenerateConfig, drafter: Drafter) -> dict[str, Any]:
    """The settings as they turned out, the drafter's own among them."""
    from understudy.drafting.spec import telemetry_of

    own = getattr(drafter, "config", None)
    known = own.model_dump(mode="json") if own is not None else {}
    telemetry = telemetry_of(drafter, config).model_dump(mode="json")
    if config.telemetry_debug and config.output_dir and telemetry["telemetry_save_dir"] is None:
        telemetry["telemetry_save_dir"] = str(config.output_dir / "telemetry")
    settings = config.model_dump(mode="json")
    return settings | {name: value for name, value in known.items() if name in settings} | telemetry


def _check(config: GenerateConfig) -> None:
    """Options that would be ignored where they stand are errors."""
    if config.interactive and (config.n > 1 or config.raw or config.output or config.num_prompts):
        raise UserError("--interactive takes no --n, --raw, --output or --num-prompts")
    if config.raw and config.thinking != "default":
        raise UserError("--raw leaves the chat template out, which is what --thinking switches: give one of them")
    listed = config.prompt is None and (config.file is None or config.file.suffix in (".jsonl", ".json"))
    if config.num_prompts and not listed:
        raise UserError("--num-prompts goes with a .jsonl file of prompts or with the built-in set")


def _prompts(config: GenerateConfig) -> list[Prompt]:
    from understudy.assets import prompts_path
    from understudy.data.conversations import Message
    from understudy.data.prompts import Prompt, load_prompts, text_prompt

    if config.prompt is not None:
        prompts = [text_prompt(config.prompt)]
    elif config.interactive:
        return []
    elif config.file is None:
        prompts = load_prompts(prompts_path(), config.num_prompts or 1)
    elif config.file.suffix in (".jsonl", ".json"):
        prompts = load_prompts(config.file, config.num_prompts)
    else:
        try:
            prompts = [text_prompt(config.file.read_text(encoding="utf-8"), str(config.file))]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {config.file}: {error}") from error
    if config.system is None:
        return prompts
    return [Prompt(p.id, (Message("system", config.system), *p.messages), p.turns) for p in prompts]


def _options(config: GenerateConfig) -> dict[str, Any]:
    options = given(config, DecodeParams) | given(config, SamplingParams)
    options.pop("steps", None)  # the drafter has it, where its text does not say otherwise
    return options


def _ids(engine: Engine, config: GenerateConfig, prompt: Prompt) -> list[int]:
    from understudy.data.prompts import render, thinking_variables

    if engine.target.tokenizer is None:
        raise UserError(f"{config.model} has no tokenizer: text cannot be turned into tokens")
    if config.raw:
        text = "\n".join(m.content for m in prompt.messages)
        return list(engine.target.tokenizer(text)["input_ids"])
    variables = thinking_variables(engine.target.tokenizer, config.thinking)
    return render(engine.target.tokenizer, prompt.messages, **variables)


def _answer(engine: Engine, config: GenerateConfig, console: Console, prompt: Prompt, index: int) -> dict[str, Any]:
    """Answer one prompt `n` times from one prefill; the record for --output."""
    from understudy.cli.text import Printer, statistics
    from understudy.decoding.engine import decode
    from understudy.decoding.stats import Stats
    from understudy.target.memory import memory_guard

    rule = engine.stop_rule(config.stop, config.ignore_eos)
    with memory_guard(engine.target):
        first = engine.sequence(stop=rule, index=index, **_options(config))
        if config.n > 1 and first.sampling.temperature == 0:
            raise UserError("greedy answers are all the same: --n needs a --temperature")
        first.prefill(_ids(engine, config, prompt))
        answers, total = [], Stats()
        for sequence in [first, *(first.fork(index + i) for i in range(1, config.n))]:
            printer, stats = Printer(console, engine.target.tokenizer, rule), Stats()
            for cycle in decode(sequence):
                stats.add(cycle)
                printer.show(cycle)
            printer.end()
            console.print(statistics(stats, config.drafter), style="dim", markup=False, soft_wrap=True)
            total.merge(stats)
            answers.append(
                {"text": engine.text(sequence.output, rule), "tokens": sequence.output, "finished": sequence.finished}
            )
    return {
        "id": prompt.id,
        "messages": [m.as_dict() for m in prompt.messages],
        "answers": answers,
        "drafter": config.drafter,
        "stats": total.summary(),
    }


def _converse(engine: Engine, config: GenerateConfig, console: Console, notes: list[str]) -> None:
    """Turns at the terminal. What the new conversation shares with the cache is not run again."""
    from understudy.cli.text import Printer, common_prefix, statistics
    from understudy.data.conversations import Message
    from understudy.data.prompts import render, thinking_variables
    from understudy.decoding.engine import decode
    from understudy.decoding.stats import Stats
    from understudy.target.memory import memory_guard

    variables = thinking_variables(engine.target.tokenizer, config.thinking)
    system = [Message("system", config.system)] if config.system else []
    rule = engine.stop_rule(config.stop, config.ignore_eos)
    messages, sequence = list(system), engine.sequence(stop=rule, **_options(config))
    while True:
        try:
            text = console.input("[bold]> [/bold]").strip()
        except EOFError:
            return console.print()
        if text == "/reset":
            messages = list(system)
        if not text or text == "/reset":
            continue
        messages.append(Message("user", text))
        ids = render(engine.target.tokenizer, messages, **variables)
        keep = min(common_prefix(sequence.tokens, ids), len(ids) - 1)
        sequence.rewind(keep)
        printer, stats = Printer(console, engine.target.tokenizer, rule), Stats()
        try:
            with memory_guard(engine.target):
                sequence.prefill(ids[keep:])
                for cycle in decode(sequence):
                    stats.add(cycle)
                    printer.show(cycle)
        except UserError as error:
            console.print(f"{error} (/reset starts over)", style="red", markup=False, soft_wrap=True)
            messages.pop()
            continue
        except KeyboardInterrupt:
            console.print("[dim](stopped)[/dim]", end="")
            if not stats.turns:  # the prompt itself was interrupted: nothing was answered
                messages.pop()
                continue
        printer.end()
        line = f"{statistics(stats, config.drafter)}; {keep} of {len(ids)} prompt tokens reused"
        console.print(line, style="dim", markup=False, soft_wrap=True)
        _tell(console, notes)
        messages.append(Message("assistant", engine.text(sequence.output, rule)))
