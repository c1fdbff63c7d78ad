"""What a family supports is measured, not listed: each feature is compared on logits with a pass that cannot be wrong.

Argmax would hide a lost soft-cap or logit scale. A feature is probed once per target, when it is first needed; a family that
fails is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from understudy.core.errors import UserError
from understudy.core.records import Needs, Proposal, Rows
from understudy.target.session import TargetSession
from understudy.target.target import Target

ROWS = 12
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit; half precision below
HALF_TOLERANCE = 0.06


def probe(target: Target, feature: str, exit_layer: int | None = None) -> None:
    """Check `feature` ("plain", "rewind", "split" at `exit_layer`, "tree"); raise UserError if the family fails it."""
    key = (feature, exit_layer)
    if key in target.checked:
        return
    with torch.inference_mode():
        ids = torch.randint(0, target.vocab_size, (ROWS,), generator=torch.Generator().manual_seed(0)).to(target.device)
        try:
            got, want = CHECKS[feature](target, ids, exit_layer)
        except (TypeError, AttributeError, RuntimeError, KeyError, AssertionError, NotImplementedError) as error:
            raise UserError(_refusal(target, feature, f"the pass failed ({type(error).__name__}: {error})")) from error
    limit = TOLERANCE.get(target.dtype, HALF_TOLERANCE)
    worst = ((got.float() - want.float()).abs().max() / want.float().abs().max().clamp_min(1e-6)).item()
    if not worst <= limit:
        raise UserError(
            _refusal(target, feature, f"logits differ by {worst:.2g} of the largest one (at most {limit:g})")
        )
    target.checked.add(key)


def _refusal(target: Target, feature: str, reason: str) -> str:
    family = type(target.model).__name__
    meaning = {
        "plain": "our pass is not the model's own",
        "rewind": "going back in its cache does not restore it",
        "split": "running it in two parts changes it",
        "tree": "a tree of drafts does not equal its branches one by one",
    }[feature]
    return f"{family} is not supported: {meaning}; {reason}"


def _all_logits(target: Target, ids: Tensor) -> Tensor:
    session = TargetSession(target, Needs(logits=True))
    logits = session.prefill(ids.tolist(), True).logits
    assert logits is not None
    return logits


def _plain(target: Target, ids: Tensor, _: int | None) -> tuple[Tensor, Tensor]:
    session = TargetSession(target, Needs(logits=True))
    holder = target.stage(0, target.layers).holder
    holder.windows = {}
    try:
        logits = session.prefill(ids.tolist(), True).logits
        assert logits is not None and all(session.cache.written), "some layers keep no keys and values of their own"
        _check_windows(target, holder.windows)
    finally:
        holder.windows = None
    return logits, target.model(input_ids=ids[None], use_cache=False).logits[0]


def _check_windows(target: Target, asked: dict[int, int | None]) -> None:
    """A window is wider than the probe's rows, so it cannot be crossed here; that attention is told of it can be seen."""
    kinds = getattr(target.config, "layer_types", None)
    window = getattr(target.config, "sliding_window", None)
    if getattr(target.config, "use_sliding_window", True) is False:
        window = None
    for layer in range(target.layers):
        kind = kinds[layer] if kinds else "sliding_attention"
        assert kind in ("full_attention", "sliding_attention"), f"layer {layer} has {kind}"
        expected = window if kind == "sliding_attention" else None
        assert asked.get(layer) == expected, f"layer {layer} has a window of {expected} that attention is not told of"


def _after_prefix(target: Target, ids: Tensor, needs: Needs = Needs()) -> TargetSession:
    """A session whose cache holds all but the last two tokens of `ids`, ready for a cycle."""
    session = TargetSession(target, needs)
    rows = session.prefill(ids[:-2].tolist(), False)
    session.commit(rows, range(rows.width), ids[:-1].tolist())
    return session


def _verify(session: TargetSession, proposal: Proposal) -> tuple[Rows, Tensor]:
    rows = session.verify(proposal)
    assert rows.logits is not None
    return rows, rows.logits


def _rewind(target: Target, ids: Tensor, _: int | None) -> tuple[Tensor, Tensor]:
    session = _after_prefix(target, ids)
    _verify(session, Proposal((ids[-3:] + 1) % target.vocab_size))
    session.rewind(len(ids) - 1)
    return _verify(session, Proposal(ids[-1:]))[1], _all_logits(target, ids)[-2:]


def _split(target: Target, ids: Tensor, exit_layer: int | None) -> tuple[Tensor, Tensor]:
    session = _after_prefix(target, ids, Needs(exit=exit_layer))
    hidden = session.shallow(ids[-2:])
    assert exit_layer is not None
    return _verify(session, Proposal(ids[-1:], resume=(exit_layer, hidden)))[1], _all_logits(target, ids)[-2:]


def _tree(target: Target, ids: Tensor, _: int | None) -> tuple[Tensor, Tensor]:
    """Two branches of two drafts, their rows interleaved; the second branch must come out as the chain does."""
    session = _after_prefix(target, ids[:-1])
    other = (ids[-2:] + 1) % target.vocab_size
    drafts = torch.stack([other[0], ids[-2], other[1], ids[-1]])
    rows, logits = _verify(session, Proposal(drafts, parents=[-1, -1, 0, 1]))
    session.commit(rows, [0, 2, 4], [*ids[-2:].tolist(), 0])
    after = _verify(session, Proposal(ids[:1]))[1]
    whole = torch.cat([ids, torch.zeros_like(ids[:1]), ids[:1]])
    return torch.cat([logits[[0, 2, 4]], after]), _all_logits(target, whole)[-5:]


CHECKS: dict[str, Callable[[Target, Tensor, int | None], tuple[Tensor, Tensor]]] = {
    "plain": _plain,
    "rewind": _rewind,
    "split": _split,
    "tree": _tree,
}
