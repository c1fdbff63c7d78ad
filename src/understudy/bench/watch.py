"""Who watches the measured turns of a run: alignment telemetry and the metrics file, where the options ask for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from understudy.bench.config import BenchConfig
from understudy.bench.modes import EngineMode, Mode
from understudy.bench.results import PLAIN, WRONG
from understudy.core.errors import UserError
from understudy.decoding.acceptance import plain_ms_per_token
from understudy.drafting.spec import telemetry_of
from understudy.target.target import Target
from understudy.telemetry.alignment import alignment
from understudy.telemetry.speculation import SpeculationMetrics

PLAIN_PROMPTS = 4  # prompts that plain decoding is timed with, for the speed-up in the metrics file


@contextmanager
def watched(config: BenchConfig, modes: Sequence[Mode], target: Target, prompts: Sequence[list[int]]) -> Iterator[None]:
    """Give the drafters under test their listeners, and close them at the end; learners too, which saves what they learned."""
    tested = [m for m in modes if isinstance(m, EngineMode) and m.name.partition(",")[0] not in (PLAIN, WRONG)]
    made: list[Any] = []
    saving = [m for m in tested if m.drafter.learning is not None and m.drafter.learning.save_lora_path is not None]
    if len(saving) > 1:
        raise UserError(f"--save-lora-path is for one learning drafter, here are {len(saving)}")
    for number, mode in enumerate(tested):
        params = telemetry_of(mode.drafter, config)
        listener = alignment(params, f"bench{number}", "timing", partial(_policy, mode))
        if listener is not None:
            mode.listeners += (listener,)
            made.append(listener)
    if config.metrics_out is not None:
        if len(tested) != 1:
            raise UserError(f"--metrics-out is for one drafter, here are {len(tested)}: give one --drafter")
        plain = plain_ms_per_token(target, prompts[:PLAIN_PROMPTS], config.max_new_tokens)
        steps, out = tested[0].drafter.steps, config.metrics_out
        metrics = SpeculationMetrics(None, steps, every=0, plain_ms_per_token=plain, metrics_out=out)
        tested[0].listeners += (metrics,)
        made.append(metrics)
    try:
        yield
    finally:
        for listener in [*made, *(mode.learner for mode in tested if mode.learner)]:
            listener.close()


def _policy(mode: EngineMode) -> Mapping[str, float | None]:
    return {} if mode.learner is None else mode.learner.policy()
