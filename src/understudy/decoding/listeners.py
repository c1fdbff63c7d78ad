"""Who watches decoding. A listener says what it needs of a pass, and sees every cycle; without listeners nothing is kept for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from understudy.core.records import Cycle, Needs


class Listener(Protocol):
    """Sees drafts, the target's choices, accepted count, KV lengths before and after, and what `needs` asked for (taps, exit
    states, last hidden states, raw logits) in `cycle.rows`. Tensors there are views: copy what is kept. When sampling, the choices
    are draws: the verifier's argmax is that of `cycle.rows.logits`."""

    needs: Needs

    def on_cycle(self, cycle: Cycle) -> None: ...


def united_needs(first: Needs, listeners: Iterable[Listener]) -> Needs:
    needs = first
    for listener in listeners:
        needs = needs | listener.needs
    return needs
