"""Who watches a command's decoding: the learner, alignment telemetry, the metrics files. Made once, closed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from understudy.telemetry.options import AlignTelemetryParams

if TYPE_CHECKING:
    from understudy.decoding.listeners import Listener
    from understudy.drafting.protocols import Drafter
    from understudy.target.target import Target

Phase = Literal["train", "eval", "timing", "serve"]


@contextmanager
def watching(
    config: AlignTelemetryParams,
    target: Target,
    drafter: Drafter,
    phase: Phase,
    *,
    prompts: Sequence[list[int]] = (),
    folder: Path | None = None,
    summary: Callable[[str], None] | None = None,
    seed: int = 0,
) -> Iterator[tuple[Listener, ...]]:
    """The listeners that the options ask for. `folder` gets `metrics/` and `telemetry/`.

    `summary` gets telemetry's lines and the periodic one. `prompts`: a few, to time plain decoding with, which the speed-up in the
    metrics is relative to.
    """
    from understudy.decoding.acceptance import plain_ms_per_token
    from understudy.drafting.spec import telemetry_of
    from understudy.telemetry.alignment import alignment
    from understudy.telemetry.speculation import SpeculationMetrics
    from understudy.training.online.learner import learner_of

    learner = learner_of(drafter, seed)
    listeners: list[Any] = [] if learner is None else [learner]

    params = telemetry_of(drafter, config)
    run_id = "understudy" if folder is None else folder.resolve().name
    policy, where = None if learner is None else learner.policy, None if folder is None else folder / "telemetry"
    align = alignment(params, run_id, phase, policy, summary or print, where)
    listeners += [] if align is None else [align]
    if folder is not None:
        plain = plain_ms_per_token(target, prompts, max_new_tokens=32) if prompts else None
        listeners.append(
            SpeculationMetrics(
                folder,
                drafter.steps,
                plain_ms_per_token=plain,
                summary=summary,
                learns=learner is not None,
            )
        )
    try:
        yield tuple(listeners)
    finally:
        for listener in listeners:
            listener.close()
