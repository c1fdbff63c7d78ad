"""Timing parts of a pass, each alone: the clock, quiet around it, and medians of parts taken in turns.

In turns, so that a machine that slows down slows all parts alike; medians, so that one hiccup changes nothing.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import torch


def now(device: torch.device) -> float:
    """The time, once everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def busy(device: torch.device) -> float:
    """As `now`, but of this thread's processor time where it does all the work (CPU, one thread of torch).

    What other programs take of the processor in the meantime is then not counted.
    """
    return time.thread_time() if device.type == "cpu" and torch.get_num_threads() == 1 else now(device)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No autograd, and no garbage collection in the middle of a measurement."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        if enabled:
            gc.enable()


def medians(
    parts: Mapping[str, Callable[[], object]],
    tries: int,
    device: torch.device,
    after: Mapping[str, Callable[[], None]] | None = None,
    shuffle: random.Random | None = None,
    clock: Callable[[torch.device], float] = now,
) -> dict[str, float]:
    """Median seconds of each part over `tries` rounds; a round calls every part once, in order.

    `after`: what undoes a part once it was timed, outside of its time. `shuffle`: parts that do not need one another come in another
    order in every round, so that none always has the same one before it, whose data are then in the caches. `clock`: `now` or `busy`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    order = list(parts.items())
    for _ in range(tries):
        if shuffle is not None:
            shuffle.shuffle(order)
        for name, part in order:
            began = clock(device)
            part()
            seconds[name].append(clock(device) - began)
            if after and name in after:
                after[name]()
    return {name: median(spent) for name, spent in seconds.items()}
