"""Asking a run to stop: SIGTERM, SIGINT and the clock. The step in progress ends first."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any, Self


class StopRequest:
    """Inside it, the first SIGTERM or SIGINT only sets `reason`; a second one acts as it did before.

    Signals can be caught in the main thread only; elsewhere only the clock counts.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, minutes: float | None = None) -> None:
        self.signal: str | None = None
        self._limit = None if minutes is None else minutes * 60
        self._began = time.monotonic()
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """`SIGTERM`, `SIGINT`, `max_minutes`, or None: go on."""
        if self.signal is not None:
            return self.signal
        over = self._limit is not None and time.monotonic() - self._began >= self._limit
        return "max_minutes" if over else None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._caught) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            which, handler = self._before.popitem()
            signal.signal(which, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._restore()
