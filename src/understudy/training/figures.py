"""Figures of a few steps at a time: rates, memory, and why something is zero."""

from __future__ import annotations

import resource
import sys

import torch

from understudy.training.step import StepReport


class Window:
    """The steps since the last log line."""

    def __init__(self) -> None:
        self._steps: list[StepReport] = []
        self._seconds = 0.0
        self._rate = 0.0

    def add(self, report: StepReport, rate: float, seconds: float) -> None:
        self._steps.append(report)
        self._seconds += seconds
        self._rate = rate

    def figures(self) -> dict[str, float]:
        """`train/lr` of the last step, mean `train/grad_norm` of those that had gradients, seconds per step, tokens per second."""
        if not self._steps:
            return {}
        norms = [s.grad_norm for s in self._steps if s.skipped is None]
        return {
            "train/lr": self._rate,
            **({"train/grad_norm": sum(norms) / len(norms)} if norms else {}),
            "perf/step_s": self._seconds / len(self._steps),
            "perf/tokens_per_s": sum(s.tokens for s in self._steps) / self._seconds,
        }


def peak_memory(device: torch.device) -> float:
    """GiB: the most that torch held on a CUDA device, or the most resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def zeros(report: StepReport) -> str | None:
    """Why a step learned nothing; None = it did."""
    if not report.masked:
        return "zero because the loss mask is empty: chat template, --is-preformatted or data"
    if not report.count:
        return "zero because no slot of the mask is supervised: documents are too short for this drafter"
    if report.skipped is None and report.grad_norm == report.loss == 0:
        return (
            f"zero because none of {report.count} slots is in the loss, their likeliest tokens being outside the draft vocabulary"
            " (--draft-vocab-size, --out-of-vocab), or because it is at its minimum"
        )
    if report.skipped is None and report.grad_norm == 0:
        return "gradients are zero: the loss does not depend on what is trained, or it is at its minimum"
    return None
