"""Learning may not make a head worse than it was: the last good weights, and when they come back.

The measure is the head against the *frozen* head at the same positions, on the newest states that no update has seen. Acceptance
alone says nothing: when the text changes it falls for both. The verifier's law is taken as it is, not softened as in the losses:
that is the one which drafts have to meet.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from understudy.drafting.lora import SUFFIXES, lora_parameters
from understudy.drafting.protocols import Drafter
from understudy.ops.divergences import forward_kl
from understudy.ops.laws import argmax
from understudy.training.online.buffer import Batch
from understudy.training.online.losses import drafter_log_law, field, verifier_log_law

SIGMAS = 3.0  # how sure a window has to be
# Share of the frozen head's KL by which the head's has to be higher: losses on single tokens sharpen a head, and may.
MARGIN = 0.25
KEEP_EVERY = 64  # updates between copies where no window says that the head is good


class Guard:
    """Holds copies of a head's A and B and of their moments, and compares the head with the frozen one over windows.

    A head is worse when it names the verifier's argmax less often than the frozen head (paired: SIGMAS standard deviations), or when
    the verifier's KL to it is higher by SIGMAS standard errors and by MARGIN while it names the argmax no more often. Then the last good
    weights return; if those too are worse at the window's positions, as after a change of text, B = 0 does, the frozen head itself.
    A window that is not worse makes the present weights the last good ones, unless its last positions speak against them (one
    standard deviation suffices: keeping them a window later costs little).
    """

    def __init__(self, drafter: Drafter, optimizer: Optimizer, window: int) -> None:
        self.drafter, self.optimizer, self.window = drafter, optimizer, window
        self.parameters = lora_parameters(drafter)
        self.restored = 0
        self.verdict: dict[str, float] = {}  # of the last window
        self._updates = 0
        self.keep()
        self._clear()

    def _clear(self) -> None:
        self._seen = 0
        self._probes: list[Batch] = []
        self._head: list[Tensor] = []  # [n, 2] per probe: KL, agreement
        self._frozen: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """The present weights and moments are good."""
        self._updates = 0
        self._weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._moments = {name: _copy(self.optimizer.state.get(p, {})) for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Back to the last good weights and moments. The learning rate is the optimizer's own and stays."""
        self.restored += 1
        for name, p in self.parameters.items():
            p.copy_(self._weights[name])
            self.optimizer.state[p] = _copy(self._moments[name])
        self._clear()

    def updated(self) -> None:
        """An update was made and left finite weights. Without windows that alone makes weights good, now and then."""
        self._updates += 1
        if not self.window and self._updates >= KEEP_EVERY:
            self.keep()

    @torch.no_grad()
    def watch(self, probe: Batch) -> bool:
        """Compare at more positions. True if that closed a window in which the head was worse: its weights were replaced."""
        hk = field(probe, "hk").float()
        verifier = _verifier(probe)
        self._probes.append(probe)
        self._head.append(_scores(self.drafter.head_logits(hk), verifier, probe))
        self._frozen.append(_scores(self.drafter.frozen_logits(hk), verifier, probe))
        self._seen += hk.shape[0]
        if self._seen < self.window:
            return False
        frozen, probes = torch.cat(self._frozen), self._probes
        self.verdict = compare(torch.cat(self._head), frozen)
        if not self.verdict["worse"]:
            # Over the window the head was good; what is kept is how it ended.
            if not compare(self._head[-1], self._frozen[-1], sigmas=1.0)["worse"]:
                self.keep()
            self._clear()
            return False
        self.restore()
        again = [_scores(self.drafter.head_logits(field(p, "hk").float()), _verifier(p), p) for p in probes]
        if compare(torch.cat(again), frozen)["worse"]:
            self._to_frozen()
        return True

    def _to_frozen(self) -> None:
        for name, p in self.parameters.items():
            if name.endswith(SUFFIXES[1]):
                p.zero_()
            self.optimizer.state[p] = {}
        self.keep()


def _verifier(probe: Batch) -> tuple[Tensor, Tensor]:
    """log p over the stored tokens [n, V or K], not softened, and its argmax [n]."""
    log_p = verifier_log_law(probe, tau=1.0)
    top = argmax(log_p)
    if probe["z_idx"] is not None:
        top = probe["z_idx"].gather(1, top[:, None]).squeeze(1).long()
    return log_p, top


def _scores(logits: Tensor, verifier: tuple[Tensor, Tensor], probe: Batch) -> Tensor:
    """[n, 2] of a head's logits [n, V]: KL(p || q), and whether its argmax is the verifier's."""
    log_p, top = verifier
    return torch.stack([forward_kl(log_p, drafter_log_law(logits, probe)), (argmax(logits) == top).float()], dim=1)


def compare(head: Tensor, frozen: Tensor, sigmas: float = SIGMAS) -> dict[str, float]:
    """Paired scores [n, 2] (KL, agreement) -> means of both heads, and `worse` (0 or 1). Not a number counts as worse."""
    n = head.shape[0]
    head, frozen = head.cpu(), frozen.cpu()  # float64 is not everywhere
    difference = (head - frozen).double()
    kl, gained = difference.sum(0).tolist()
    squares = (difference**2).sum(0).tolist()
    own, base = head.double().mean(0).tolist(), frozen.double().mean(0).tolist()
    fewer = gained < -sigmas * math.sqrt(squares[1])
    error = math.sqrt(max(0.0, squares[0] - kl**2 / n) / (n - 1)) * math.sqrt(n) if n > 1 else math.inf
    further = gained <= 0 and kl > sigmas * error and kl > MARGIN * n * base[0]
    worse = fewer or further or not math.isfinite(kl)
    return {"kl": own[0], "kl_frozen": base[0], "agree": own[1], "agree_frozen": base[1], "worse": float(worse)}


def _copy(state: dict[str, object]) -> dict[str, object]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def finite(parameters: list[nn.Parameter]) -> bool:
    return bool(torch.isfinite(torch.stack([p.detach().sum() for p in parameters])).all())
