"""The end of the demo: a draft head learns live, on a stream of prompts that it has not seen, while the text stays what it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from understudy.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from understudy.target.target import Target
    from understudy.training.streaming import PromptRecord

EXIT = 2
LEARNER = (  # cross-entropy and constant KD: what docs/results.md finds best on this model
    f"dvi,dvi_online=true,exit_layer={EXIT},rank=32,alpha=32,dvi_lr=2e-3,dvi_update_every=4,"
    "dvi_kd_lambdamin=0.5,dvi_pg_lambda_max=0,dvi_kl_lambda0=0,dvi_kl_lambdamin=0"
)
BARS = "▁▂▃▄▅▆▇█"
GROUP = 8  # prompts per bar
LEAST = 4  # prompts that are decoded whatever the time


def bars(values: Sequence[float]) -> str:
    """Values as bars, from 0 on; the highest is full."""
    top = max([*values, 1e-9])
    return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in values)


def groups(records: Sequence[PromptRecord]) -> list[float]:
    """Acceptance at position 1 of every `GROUP` prompts, pooled."""
    from understudy.training.streaming import summed

    return [summed(records[i : i + GROUP]).acc_1 for i in range(0, len(records), GROUP)]


def learn(console: Console, target: Target, prompts: Sequence[list[int]], seconds: float, tokens: int) -> bool:
    """Decode `prompts` with a learning head for about `seconds`, each beside plain decoding; whether every output was the same."""
    from understudy.drafting.spec import build
    from understudy.training.online import OnlineLearner
    from understudy.training.streaming import stream, summed

    console.print(
        f"\n[bold]Live learning[/bold]: {LEARNER.partition(',')[0]} drafts from the first {EXIT} of {target.layers} layers with an"
        f" untrained head, and learns from every accepted and rejected draft (about {seconds:.0f} s).",
        soft_wrap=True,
    )
    drafter, plain = build(LEARNER, target), build("none", target)
    learner = OnlineLearner(drafter)
    records: list[PromptRecord] = []
    outputs: list[list[int]] = []
    references: list[list[int]] = []
    same, began = 0, time.perf_counter()

    def seen(record: PromptRecord, output: list[int]) -> None:
        records.append(record)
        outputs.append(output)

    for prompt in prompts:
        if len(records) >= LEAST and time.perf_counter() - began > seconds:
            break
        stream(target, drafter, [prompt], learner, max_new_tokens=tokens, on_prompt=seen)
        stream(target, plain, [prompt], max_new_tokens=tokens, on_prompt=lambda _, output: references.append(output))
        same += outputs[-1] == references[-1]
        if len(records) % GROUP == 0:
            done = groups(records)
            console.print(
                f"{len(records):4d} prompts, first draft accepted {done[-1]:5.1%}  {bars(done)}"
                f"  {learner.summary()['ran']:.0f} updates; {same}/{len(records)} outputs the same",
                highlight=False,
            )
    if not records:
        raise UserError("there are no prompts left to learn from")
    half = max(1, len(records) // 2)
    first, last = summed(records[:half]), summed(records[half:] or records)
    summary = learner.summary()
    share = sum(r.learning_s for r in records) / sum(r.learning_s + r.decode_s for r in records)
    console.print(
        f"first half: first draft accepted {first.acc_1:.1%}, tau {first.tau:.2f}; second half: {last.acc_1:.1%}, tau {last.tau:.2f}."
        f" {summary['ran']:.0f} updates of {summary['ms_p50']:.1f} ms took {share:.1%} of the time.",
        soft_wrap=True,
    )
    return same == len(records)
