"""The faults that `mutants` plants: wrong versions of functions of ours, and how they are put in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from understudy.core import seeds
from understudy.core.records import Commit, Cycle, Proposal
from understudy.decoding import engine, sampler
from understudy.decoding.sampler import RecordingSampler
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.ops import laws as draws
from understudy.target import attention as attention_module
from understudy.target.attention import Pass
from understudy.target.cache import KVCache
from understudy.target.session import TargetSession
from understudy.target.stages import Stage

Plant = Callable[[], Any]  # -> a context manager


def after(owner: type, method: str, then: Callable[..., Any]) -> Plant:
    """The method, then `then(self, result, *args)`; what that returns, if anything, is the result."""
    original = getattr(owner, method)

    def mutated(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        other = then(self, out, *args, **kwargs)
        return out if other is None else other

    return lambda: patch.object(owner, method, mutated)


def instead(owner: Any, name: str, mutated: Callable[..., Any]) -> Plant:
    return lambda: patch.object(owner, name, mutated)


def move_length(by: int) -> Plant:
    def then(self: TargetSession, _: None, *args: Any) -> None:
        self.length = max(0, self.length + by)

    return after(TargetSession, "commit", then)


def rewind_keeps_a_row(self: TargetSession, tokens: int) -> None:
    before = self.length
    _REWIND(self, tokens)
    self.length = min(before, tokens)


_REWIND = TargetSession.rewind


def keep_lower_layers(self: KVCache, start: int, rows: list[int]) -> None:
    whole = self.keys, self.values
    self.keys, self.values = whole[0][:2], whole[1][:2]
    try:
        _KEEP(self, start, rows)
    finally:
        self.keys, self.values = whole


_KEEP = KVCache.keep


def drop_bonus(with_its_row: bool) -> Plant:
    original = engine._finish

    def mutated(sequence: DecodeSequence, cycle: Cycle, path: Any) -> Cycle:
        if cycle.index and cycle.drafted and cycle.accepted == len(cycle.drafted):
            cycle.committed = cycle.committed[:-1]
            path = path[:-1] if with_its_row else path
        return original(sequence, cycle, path)

    return lambda: patch.object(engine, "_finish", mutated)


def hook_one_below(self: Stage, tap: int) -> None:
    """The tap is taken from the layer before."""
    self._hooked.add(tap)

    def keep(_: Any, __: Any, out: Any) -> None:
        if tap in self.wanted:
            self.taps[tap] = (out if isinstance(out, Tensor) else out[0])[0]

    if tap == 0 and self.first == 0:
        self._layers[0].register_forward_pre_hook(
            lambda m, args, kwargs: keep(m, None, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    elif self.first < tap <= self.end:
        self._layers[max(tap - self.first - 2, 0)].register_forward_hook(keep)


def shallow_short_of_a_layer(self: TargetSession, tokens: Tensor) -> Tensor:
    needs = self.needs
    assert needs.exit is not None
    at = Pass(self.length + self.ahead, tokens.shape[0])
    hidden, _ = self.target.forward(tokens, at, self.cache, 0, needs.exit - 1)
    self.ahead += tokens.shape[0]
    return hidden


def other_law(self: RecordingSampler, q: Tensor | None, proposal: Proposal) -> Tensor | None:
    return None if q is None else q.sqrt() / q.sqrt().sum(-1, keepdim=True)


def same_stream(device: Any, seed: int, *keys: Any) -> torch.Generator:
    return seeds.generator(device, seed, keys[0])


def target_law_after_rejection(p: Tensor, q: Tensor, tokens: Tensor, generator: torch.Generator) -> Tensor:
    at = tokens[:, None]
    u = draws.uniforms(q.shape[0], generator)
    kept = u * q.gather(1, at).squeeze(1) < p[:-1].gather(1, at).squeeze(1)
    accepted = kept.long().cumprod(0).sum(0, keepdim=True)
    return torch.cat([accepted, draws.draw(p.index_select(0, accepted), generator)])


def last_token_only(self: StopRule, output: Any, new: Any) -> int | None:
    return len(new) if new[-1] in self.ids else None


def window_by_row(self: Pass, window: int | None, like: Tensor) -> Tensor:
    return _OWN_MASK(Pass(self.start, self.width, self.ancestors, torch.arange(self.width)), window, like)


_OWN_MASK = Pass._own_mask


def sees_the_next_row(start: int, width: int, window: int | None, groups: int, like: Tensor) -> Tensor:
    mask = _CHAIN_MASK(start, width, window, groups, like).clone()
    first = Pass(start, width).first_key(window)
    for row in range(width - 1):
        mask[row::width, start - first + row + 1] = 0
    return mask


_CHAIN_MASK = attention_module._chain_mask


def walk_anywhere(choices: Any, tokens: Any, parents: Any) -> list[int]:
    """Follows a draft that equals the choice, whoever its parent is."""
    path = [0]
    for row in range(1, len(tokens)):
        if tokens[row] == choices[path[-1]]:
            path.append(row)
    return path


def walk_too_far(choices: Any, tokens: Any, parents: Any) -> list[int]:
    path = _WALK(choices, tokens, parents)
    more = path[-1] + 1
    return [*path, more] if more < len(tokens) and (parents is None or parents[more] == path[-1]) else path


_WALK = sampler.walk


def fork_shares(self: KVCache, length: int) -> KVCache:
    copy = KVCache(len(self.keys), self.capacity)
    copy.keys, copy.values = self.keys, self.values
    return copy


def budget_to_the_end(self: DecodeSequence) -> Any:
    made = len(self.tokens) - self.prompt
    return type(_BUDGET(self))(
        min(self.length.depth(), self.params.max_new_tokens - made), self.drafter_model.nodes or 9
    )


_BUDGET = DecodeSequence.budget


def without_cap(*args: Any) -> Tensor:
    return _EXPLICIT(*args[:6], None, *args[7:])


_EXPLICIT = attention_module._explicit


def names_first_new(rows: Any, path: Any, next: int, stopped: bool) -> Commit:
    return Commit(rows, path, int(rows.tokens[path[-1]]), stopped)


def taps_of_all_rows(self: TargetSession) -> None:
    self.ahead = 0  # the taps of rows that ran ahead stay


@contextmanager
def both(*patches: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield
