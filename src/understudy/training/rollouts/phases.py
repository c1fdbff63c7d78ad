"""Alignment telemetry over the phases of a run: one count of blocks, and a share of the budgets for each phase.

The first evaluation alone would spend budgets that are meant for a run. They are divided evenly, what is left over goes to the
earlier phases of (train, eval, timing); lines and files of a run never exceed them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from understudy.decoding.listeners import Listener
from understudy.telemetry.alignment import AlignTelemetry, Extra, Phase, alignment
from understudy.telemetry.options import AlignTelemetryParams

BUDGETS = ("telemetry_prints_budget", "telemetry_max_blocks")


class PhasedTelemetry:
    """`watching(phase)` gives the listeners of a phase; phases may come in any order, any number of times.

    Each time a phase begins it has a listener of its own, whose `prefix_hist` counts from there. Off by default, and then free.
    """

    def __init__(
        self,
        params: AlignTelemetryParams,
        phases: Sequence[Phase],
        run_id: str,
        extra: Extra,
        write: Callable[[str], None],
        folder: Path,
    ) -> None:
        self.params, self.run_id, self.extra, self.write, self.folder = params, run_id, extra, write, folder
        self.step = 0  # verify passes of the run so far, when no phase is open
        self._left = {
            phase: {name: _part(getattr(params, name), phases, phase) for name in BUDGETS} for phase in phases
        }
        self._open: AlignTelemetry | None = None
        if params.telemetry_debug:
            self._begin(phases[0])  # what cannot be written is said before hours of work

    def watching(self, phase: Phase) -> tuple[Listener, ...]:
        """The listeners for what is decoded now."""
        if not self.params.telemetry_debug:
            return ()
        if self._open is None or self._open.phase != phase:
            self.close()
            self._begin(phase)
        assert self._open is not None
        return (self._open,)

    def _begin(self, phase: Phase) -> None:
        params = self.params.model_copy(update=self._left[phase])
        self._open = alignment(params, self.run_id, phase, self.extra, self.write, self.folder, self.step)

    def close(self) -> None:
        """Show the blocks that still wait for text."""
        if self._open is None:
            return
        self._open.close()
        left, seen = self._left[self._open.phase], self._open.step - self.step
        for name in BUDGETS:
            left[name] = max(0, left[name] - seen)
        self.step, self._open = self._open.step, None


def _part(budget: int, phases: Sequence[Phase], phase: Phase) -> int:
    each, over = divmod(budget, len(phases))
    return each + (phases.index(phase) < over)
