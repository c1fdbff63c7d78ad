"""Imitation first, then reward: the weights of the losses by verify pass (DVI, Bhansali and Heck, 2510.05421)."""

from __future__ import annotations

from typing import Any

from understudy.core.errors import UserError


class PiecewiseSchedule:
    """Constant for `warmup` verify passes, then a straight line to the last values, as long as the warm-up.

    t = min(1, max(0, step - warmup) / warmup), and 1 without a warm-up;
    kd = kd0 (1 - t) + kdmin t,  ce constant,  pg = pgmax t,  kl = kl0 (1 - t) + klmin t,  entropy constant.
    """

    def __init__(
        self,
        warmup: int,
        kl0: float,
        klmin: float,
        pgmax: float,
        kd0: float = 0.5,
        kdmin: float = 0.0,
        ce: float = 0.5,
        entropy: float = 0.0,
    ) -> None:
        self.warmup, self.kl0, self.klmin, self.pgmax = warmup, kl0, klmin, pgmax
        self.kd0, self.kdmin, self.ce, self.entropy = kd0, kdmin, ce, entropy
        self.step = 0  # verify passes so far

    def weights(self) -> dict[str, float]:
        """The weight of each loss at `step`: kd, ce, pg, kl, entropy."""
        t = min(1.0, max(0, self.step - self.warmup) / self.warmup) if self.warmup else 1.0
        return {
            "kd": self.kd0 * (1 - t) + self.kdmin * t,
            "ce": self.ce,
            "pg": self.pgmax * t,
            "kl": self.kl0 * (1 - t) + self.klmin * t,
            "entropy": self.entropy,
        }

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is. What its weights are belongs to the options."""
        return {"step": self.step}

    def load_state_dict(self, s: dict[str, Any]) -> None:
        if not isinstance(s.get("step"), int) or s["step"] < 0:
            raise UserError(f"the state of a schedule holds a step, not {s}")
        self.step = s["step"]
