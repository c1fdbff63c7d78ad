"""What a person reads: the table of all modes, `--compare`'s tables of one drafter, `--verbose`'s drafts, and the README of a run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from understudy.bench.modes import Draft
from understudy.telemetry.stopwatch import SECTIONS

WIDTH = 120  # of what goes to a file or pipe
Row = dict[str, Any]
# prefill is milliseconds per prompt; "95 %" is the interval of "vs none"; "repeats" the share of repeated 4-grams
COLUMNS = (
    *("mode", "tok/s", "vs none", "95 %", "vs hf", "prefill", "tau", "accept", "repeats"),
    *("effic.", "overhead", "rejected", "same"),
)
PARTS = {
    "draft": "Draft",
    "verify": "Target verify",
    "sample": "Token sampling",
    "cache": "KV cache and commit",
    "listen": "Learning, telemetry",
    "other": "Other overhead",
}


def console() -> Console:
    """Standard output: as wide as the terminal, or WIDTH where there is none."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=WIDTH)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def cells(row: Row, prompts: int) -> list[str]:
    """One mode as text, in the order of COLUMNS."""
    low, high = row["speedup_ci"] or (None, None)
    identical = {None: "-", True: "yes", False: f"{len(row['divergences'] or ())} differ"}[row["identical"]]
    return [
        row["name"],
        _number(row["tokens_per_s"], ".1f"),
        _number(row["speedup_vs_none"], ".3f"),
        "-" if low is None else f"{low:.2f}-{high:.2f}",
        _number(row["speedup_vs_hf"], ".3f"),
        _number(1000 * row["prefill_s"] / prompts, ".1f"),
        _number(row["tau"], ".2f"),
        _number(row["acceptance_rate"], ".1%"),
        _number(row["repeat_share"], ".1%"),
        _number(row["efficiency"], ".3f"),
        _number(row["overhead"], ".1%"),
        _number(row["rejected_drafts"], "d"),
        identical,
    ]


def overview(results: Row) -> Table:
    """One line per mode."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for i, name in enumerate(COLUMNS):
        table.add_column(
            name, justify="right" if i else "left", no_wrap=bool(i), overflow="fold", min_width=0 if i else 16
        )
    for row in results["modes"]:
        table.add_row(*cells(row, results["env"]["prompts"]["count"]))
    return table


def comparison(row: Row, standard: Row, prompts: int) -> list[Text | Table]:
    """A drafter beside `hf`: times per prompt, acceptance, and where its decode time went."""
    title = Text(f"\n{row['name']} beside transformers' generate, means per prompt", style="bold")
    times = Table("Metric", row["name"], "Standard", "Speedup")
    for label, key in (("Total time", "total_s"), ("Prefill time", "prefill_s"), ("Decode time", "decode_s")):
        mine, theirs = 1000 * row[key] / prompts, 1000 * standard[key] / prompts
        times.add_row(
            label, f"{mine:.1f} ms", f"{theirs:.1f} ms", "-" if key == "prefill_s" else f"{theirs / mine:.2f}x"
        )
    speeds = (f"{row['tokens_per_s']:.1f}", f"{standard['tokens_per_s']:.1f}")
    times.add_row("Tokens/sec", *speeds, "-" if row["speedup_vs_hf"] is None else f"{row['speedup_vs_hf']:.2f}x")
    quality = Table("Speculative decoding metrics", "Value")
    quality.add_row("Avg acceptance rate", _number(row["acceptance_rate"], ".1%"))
    quality.add_row("Avg acceptance length", _number(row["tau"], ".2f"))
    if row["breakdown"] is None:
        return [title, times, quality]
    parts = Table("Decode breakdown", "Time", "% of decode")
    for name in SECTIONS:
        part = row["breakdown"][name]
        if name == "listen" and not part["seconds"]:
            continue  # nobody listened
        parts.add_row(PARTS[name], f"{1000 * part['seconds'] / prompts:.1f} ms", f"{part['share']:.1%}")
    return [title, times, quality, parts]


def draft_line(mode: str, prompt: int, cycle: int, draft: Draft, tokenizer: Any) -> Text:
    """`--verbose`: accepted drafts in green, rejected ones struck out, then what the cycle committed."""

    def text(token: int) -> str:
        return repr(tokenizer.decode([token])) if tokenizer is not None else str(token)

    line = Text(f"{mode} prompt {prompt} cycle {cycle}: {draft.accepted}/{len(draft.drafted)} accepted [")
    for i, token in enumerate(draft.drafted):
        line.append(" " if i else "")
        line.append(text(token), style="green" if i < draft.accepted else "red strike")
    line.append("] -> ")
    return line.append(" ".join(text(token) for token in draft.committed), style="bold")


def verdict_lines(results: Row) -> list[Text]:
    """Validity, the check, and notes: what must be read with the table."""
    lines = []
    if results["valid"] is False:
        lines.append(Text(f"INVALID RUN: {results['reason']}", style="bold red"))
    elif results["valid"] is None:
        lines.append(Text(f"note: {results['reason']}", style="yellow"))
    check = results["check"]
    if check is not None:
        lines += [Text(f"CHECK FAILED: {failure}", style="bold red") for failure in check["failures"]]
        lines += [Text(f"warning: {warning}", style="yellow") for warning in check["warnings"]]
        if check["passed"]:
            lines.append(Text(f"check passed: {check['summary']}", style="green"))
    return lines + [Text(f"note: {note}") for note in results["notes"]]


def readme(results: Row, samples: Sequence[dict[str, Any]]) -> str:
    """The README.md of `--output-dir`: environment, command, table, sample tokens, runtime."""
    env, prompts = results["env"], results["env"]["prompts"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    machine = f"{env['processor']}, {env['cores']} cores, {env['threads']} threads"
    lines = [
        "# Benchmark",
        "",
        f"- command: `{shlex.join(env['argv'])}`",
        f"- model: `{env['model']}`, {env['dtype']} on {env['device']}, attention of transformers: {env['hf_attention']}",
        f"- prompts: {prompts['count']} of {prompts['file']} (sha256 {prompts['sha256'][:16]})",
        f"- machine: {machine}{', ' + env['accelerator'] if env['accelerator'] else ''}; {env['platform']}, Python {env['python']}",
        f"- versions: {versions}; git {env['git'] or 'unknown'}",
        f"- time: {env['time']}; runtime {results['runtime_s']:.0f} s",
        f"- valid: {results['valid']} ({results['reason']})",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" + "|--:" * (len(COLUMNS) - 1) + "|",
    ]
    lines += ["| " + " | ".join(cells(row, prompts["count"])) + " |" for row in results["modes"]]
    lines += ["", *(f"- {line.plain}" for line in verdict_lines(results)), "", "## Sample tokens", ""]
    for sample in samples:
        lines += [f"Prompt {sample['prompt']}, plain decoding: `{sample['tokens']}`", ""]
        if sample["text"] is not None:
            lines += [*("    " + line for line in sample["text"].splitlines()), ""]
    return "\n".join(lines).rstrip() + "\n"
