"""`understudy demo`: real output of the built-in model, decoded with every drafter, compared token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from understudy.cli.common import ModelOptions, load
from understudy.cli.options import config_command
from understudy.core.config import option
from understudy.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from understudy.api import Engine
    from understudy.decoding.stats import Stats
    from understudy.target.target import Target

DRAFTERS = ("none", "null", "prompt-lookup", "early-exit,exit_layer=4", "eagle3", "eagle3,tree=true", "dflash")
SHOWN = 2  # prompts whose answer is printed


class DemoConfig(ModelOptions):
    """Options of `understudy demo`."""

    drafter: list[str] = option(
        list(DRAFTERS),
        "NAME[:PATH][,key=value...] to compare with none (repeatable); of the default ones, those that fit the model",
    )
    num_prompts: int = option(8, "prompts of the built-in set", "num-samples", ge=1)
    max_new_tokens: int = option(96, "most new tokens per answer", "max-tokens", ge=2)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "float32", "dtype of the weights; in float32 outputs are identical, below it near ties may fall otherwise"
    )
    learn_seconds: float = option(60.0, "seconds of live learning at the end; 0 = none", ge=0)
    threads: int | None = option(1, "CPU threads; one is steady on a machine that is busy otherwise", ge=1)


@config_command(DemoConfig)
def command(config: DemoConfig) -> int:
    """Decode held-out prompts with every drafter: real output, what each one gains, and that no token differs.

    At the end a draft head learns live on new prompts, while the text stays identical.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from understudy.assets import prompts_path
    from understudy.cli.demo_learning import learn
    from understudy.data.prompts import load_prompts, render
    from understudy.decoding.stats import Stats

    console = Console(highlight=False)
    target = load(config)
    console.print(
        f"[bold]{config.model}[/bold]: {type(target.model).__name__}, {target.layers} layers, {target.dtype}, {target.device}"
    )
    prompts = load_prompts(prompts_path(), config.num_prompts)
    names = list(dict.fromkeys(["none", *config.drafter]))
    engines = _engines(console, target, names, optional="drafter" not in config.model_fields_set)
    names = list(engines)
    totals = {name: Stats() for name in names}
    same = dict.fromkeys(names, 0)
    for engine in engines.values():  # first passes are slower: keep them out of the figures
        _decode(engine, render(target.tokenizer, prompts[0].messages), 8, None)
    for i, prompt in enumerate(prompts):
        ids = render(target.tokenizer, prompt.messages)
        outputs = {}
        for name, engine in engines.items():
            show = console if i < SHOWN and name == names[min(2, len(names) - 1)] else None
            if show:
                text = escape(prompt.messages[-1].content)
                console.print(f"\n[bold]prompt:[/bold] {text}", soft_wrap=True)
                console.print(
                    f"[bold]answer, decoded with {escape(name)}[/bold] (accepted drafts in [green]green[/green]):"
                )
            outputs[name], stats = _decode(engine, ids, config.max_new_tokens, show)
            totals[name].merge(stats)
        for name, output in outputs.items():
            same[name] += output == outputs["none"]
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"{len(prompts)} prompts, at most {config.max_new_tokens} new tokens, greedy",
    )
    table.add_column("drafter", no_wrap=True)
    for column in ("tokens/s", "speed-up", "tau", "accepted", "rejected", "same"):
        table.add_column(column, justify="right")
    plain = totals["none"].tokens_per_s
    for name, stats in totals.items():
        table.add_row(
            name,
            f"{stats.tokens_per_s:.0f}",
            f"{stats.tokens_per_s / plain:.2f}x",
            f"{stats.tau:.2f}",
            f"{stats.acceptance_rate:.0%}",
            str(stats.rejected),
            f"{same[name]}/{len(prompts)}",
        )
    console.print()
    console.print(table)
    differ = any(count != len(prompts) for count in same.values())
    console.print("tau = tokens committed per cycle; null is always wrong and must come out below 1x.", soft_wrap=True)
    if config.learn_seconds:
        rest = load_prompts(prompts_path())[config.num_prompts :]
        new = [render(target.tokenizer, prompt.messages) for prompt in rest]
        differ |= not learn(console, target, new, config.learn_seconds, config.max_new_tokens)
    return _verdict(console, target, differ)


def _engines(console: Console, target: Target, names: list[str], optional: bool) -> dict[str, Engine]:
    """An engine per drafter. Where nobody asked for just these, one that does not fit the target is left out, and that is said."""
    from rich.markup import escape

    from understudy.api import Engine
    from understudy.drafting.spec import build

    engines: dict[str, Engine] = {}
    missing: dict[str, list[str]] = {}  # by reason
    for name in names:
        try:
            engines[name] = Engine(target, build(name, target))
        except UserError as error:
            if not optional:
                raise
            missing.setdefault(str(error), []).append(name)
    for reason, left in missing.items():
        console.print(f"left out: {escape(' and '.join(left))} ({escape(reason)})", soft_wrap=True)
    return engines


def _verdict(console: Console, target: Target, differ: bool) -> int:
    """Say whether the outputs are the same; the exit code."""
    exact = target.dtype.itemsize >= 4
    if not differ:
        console.print("Not one token differs from plain decoding.")
    elif exact:
        console.print("[red]An output differs from plain decoding: that must not happen. Please report it.[/red]")
    else:
        console.print(
            f"Where an output differs, two tokens were nearly tied in {target.dtype}: see understudy bench --check."
        )
    return 1 if differ and exact else 0


def _decode(engine: Engine, ids: list[int], tokens: int, console: object) -> tuple[list[int], Stats]:
    """Greedy answer to `ids`, printed on `console` if there is one."""
    from understudy.cli.text import Printer
    from understudy.decoding.engine import decode
    from understudy.decoding.stats import Stats

    rule = engine.stop_rule()
    sequence = engine.sequence(stop=rule, max_new_tokens=tokens, temperature=0.0)
    sequence.prefill(ids)
    stats = Stats()
    printer = Printer(console, engine.target.tokenizer, rule) if console is not None else None  # type: ignore[arg-type]
    for cycle in decode(sequence):
        stats.add(cycle)
        if printer:
            printer.show(cycle)
    if printer:
        printer.end()
    return sequence.output, stats
