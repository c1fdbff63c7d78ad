"""From turns to figures: sums per repeat, the median repeat, and ratios at the very end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from understudy.bench.check import Divergence
from understudy.bench.efficiency import Alone
from understudy.bench.measure import Turns
from understudy.bench.modes import EngineMode, Mode, Turn
from understudy.decoding.stats import Stats
from understudy.telemetry.repeats import repeat_share
from understudy.telemetry.stopwatch import SECTIONS

PLAIN, WRONG, REFERENCE = "none", "null", "hf"
RESAMPLES = 1000


def median_repeat(turns: Turns) -> list[Turn]:
    """The repeat whose decode time is the median (of two, the slower): all times come from one repeat, so they add up."""
    ranked = sorted(turns, key=lambda repeat: sum(turn.decode_s for turn in repeat))
    return ranked[len(ranked) // 2]


def rate(turns: Sequence[Turn]) -> float:
    """Decoded tokens per second of decoding."""
    seconds = sum(turn.decode_s for turn in turns)
    return sum(turn.decoded for turn in turns) / seconds if seconds else 0.0


def ratio(a: float, b: float) -> float | None:
    return a / b if a and b else None


def interval(turns: Turns, plain: Turns) -> list[float] | None:
    """95 % bootstrap interval of the decode speed-up over plain decoding: prompts drawn with replacement, each with its median time."""
    pairs = []
    for i in range(len(turns[0])):
        times = [median(repeat[i].decode_s for repeat in runs) for runs in (turns, plain)]
        pairs.append((turns[0][i].decoded, times[0], plain[0][i].decoded, times[1]))
    if len(pairs) < 2:
        return None
    rng, values = random.Random(0), []
    for _ in range(RESAMPLES):
        tokens, seconds, base_tokens, base_seconds = (
            sum(column) for column in zip(*rng.choices(pairs, k=len(pairs)), strict=True)
        )
        if tokens and seconds and base_tokens and base_seconds:
            values.append(tokens / seconds / (base_tokens / base_seconds))
    values.sort()
    return [values[int(0.025 * len(values))], values[int(0.975 * len(values))]] if values else None


def breakdown(stats: Stats, decode_s: float) -> dict[str, Any] | None:
    """Seconds and share of the decode time by section. What no section saw (the loop, its caller) is `other`."""
    seconds = dict(stats.seconds)
    seconds["other"] += decode_s - sum(seconds.values())
    if not decode_s:
        return None
    return {name: {"seconds": seconds[name], "share": seconds[name] / decode_s} for name in SECTIONS}


def overhead(parts: dict[str, Any] | None, runs_model: bool) -> float | None:
    """Share of the decode time outside model time. A draft that runs no model is overhead."""
    if parts is None:
        return None
    return 1 - parts["verify"]["share"] - (parts["draft"]["share"] if runs_model else 0.0)


def row(
    mode: Mode,
    turns: dict[str, Turns],
    parts_alone: Alone | None,
    divergences: list[Divergence] | None,
    sections: bool,
) -> dict[str, Any]:
    """One mode's results. `divergences` is None where outputs cannot be compared (they are drawn); `sections`: times by section are
    real."""
    mine = median_repeat(turns[mode.name])
    stats = _sum(mine)
    speed, plain = rate(mine), rate(median_repeat(turns[PLAIN]))
    hf = rate(median_repeat(turns[REFERENCE])) if REFERENCE in turns else None
    total, prefill = sum(t.prefill_s + t.decode_s for t in mine), sum(t.prefill_s for t in mine)
    decode_s = sum(t.decode_s for t in mine)
    parts = breakdown(stats, decode_s) if mode.ours and sections else None
    drafts = mode.ours and mode.name != PLAIN
    gain = ratio(speed, plain)
    ideal = parts_alone.ideal(stats.tau) if parts_alone and stats.tau else None
    return {
        "name": mode.name,
        "tokens": sum(len(t.output) for t in mine),
        "decode_tokens": stats.tokens,
        "total_s": total,
        "prefill_s": prefill,
        "decode_s": decode_s,
        "tokens_per_s": speed,
        "speedup_vs_none": gain,
        "speedup_ci": interval(turns[mode.name], turns[PLAIN]),
        "speedup_vs_hf": ratio(speed, hf) if hf else None,
        "tau": stats.tau or None,
        "acceptance_rate": stats.acceptance_rate if drafts else None,
        "acc_at": stats.acc_at,
        "accept_hist": {str(k): stats.accept_hist[k] for k in sorted(stats.accept_hist)},
        "repeat_share": fmean(repeat_share(t.output) for t in mine),
        "efficiency": gain / ideal if gain and ideal else None,
        "alone": parts_alone.as_json() if parts_alone else None,
        "breakdown": parts,
        "learning": mode.learner.summary() if isinstance(mode, EngineMode) and mode.learner else None,
        "overhead": overhead(parts, parts_alone is None or parts_alone.runs_model),
        "identical": None if divergences is None else not divergences,
        "rejected_drafts": stats.rejected if drafts else None,
        "divergences": None if divergences is None else [d.as_json() for d in divergences],
    }


def validity(rows: Sequence[dict[str, Any]]) -> tuple[bool | None, str]:
    """Whether plain decoding was measured fairly: a drafter that is always wrong must not gain."""
    wrong = next((r for r in rows if r["name"].partition(",")[0] == WRONG), None)
    if wrong is None:
        return None, f"{WRONG} did not run, so it is not known whether plain decoding was measured fairly"
    gain = wrong["speedup_vs_none"]
    if gain is None:
        return None, f"{WRONG} decoded no token after the first ones"
    if gain >= 1:
        return (
            False,
            f"{WRONG} drafts only wrong tokens and yet is {gain:.3f}x as fast as plain decoding: no speed-up of this run counts",
        )
    return True, f"{WRONG} is at {gain:.3f}x"


def _sum(turns: Sequence[Turn]) -> Stats:
    stats = Stats()
    for turn in turns:
        stats.merge(turn.stats)
    return stats
