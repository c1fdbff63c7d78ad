"""Where a cycle's time goes, by laps: each lap ends one section and begins the next, so the sections add up to the whole.

On CUDA launches are asynchronous, so wall-clock laps would show when work was queued, not done: with `detailed` CUDA events are
recorded instead and read at the end; without it only the total is meaningful there.
"""

from __future__ import annotations

import time

import torch

SECTIONS = ("draft", "verify", "sample", "cache", "listen", "other")


class Stopwatch:
    """Seconds per section of one cycle at a time."""

    __slots__ = ("_events", "_last", "detailed", "seconds")

    def __init__(self, device: torch.device, detailed: bool = False) -> None:
        self.detailed = detailed and device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._last = 0.0

    def start(self) -> None:
        """Begin a cycle."""
        self.seconds = dict.fromkeys(SECTIONS, 0.0)
        if self.detailed:
            self._events = [("", self._event())]
        self._last = time.perf_counter()

    def lap(self, section: str) -> None:
        """The time since the last lap belongs to `section`."""
        if self.detailed:
            self._events.append((section, self._event()))
            return
        now = time.perf_counter()
        self.seconds[section] += now - self._last
        self._last = now

    def stop(self) -> dict[str, float]:
        """End the cycle: seconds per section."""
        self.lap("other")
        if self.detailed:
            self._events[-1][1].synchronize()
            for (_, before), (section, after) in zip(self._events, self._events[1:], strict=False):
                self.seconds[section] += before.elapsed_time(after) / 1000
        return self.seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
