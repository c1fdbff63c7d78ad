"""Weights in several places and dtypes: what a device map puts elsewhere comes back, and norms meet rows in their own dtype."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from eagle3 import reference
from eagle3.reference import document
from understudy.core.records import Needs
from understudy.drafters.eagle3.config import Eagle3ObjectiveConfig
from understudy.drafters.eagle3.start import train_eagle3
from understudy.drafting.blocks import Norm
from understudy.target.session import TargetSession
from understudy.target.target import Target

ROWS = [[document(9, "..#######", 1)], [document(8, "########", 2)]]


@dataclass
class Elsewhere:
    """A tensor of another device: nothing can be done with it but bring it here."""

    tensor: Tensor

    def to(self, device: torch.device) -> Tensor:
        assert torch.device(device) == torch.device("cpu")
        return self.tensor


def test_taps_come_to_the_device_of_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(tiny.model("llama"))
    forward, kept = target.forward, dict[int, Tensor]()

    def scattered(*args: Any, **kwargs: Any) -> Any:
        hidden, taps = forward(*args, **kwargs)
        kept.update(taps)
        return hidden, {tap: Elsewhere(states) for tap, states in taps.items()}

    monkeypatch.setattr(target, "forward", scattered)
    rows = TargetSession(target, Needs(taps=frozenset({1, 3}))).prefill(tiny.prompt(5), want_logits=True)
    assert sorted(rows.taps) == [1, 3] and all(rows.taps[tap] is kept[tap] for tap in kept)


@pytest.mark.parametrize("options", [{}, {"draft_vocab_size": 3}])
def test_a_head_elsewhere(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(tiny.fresh_model("llama", vocab_size=reference.V))
    objective = reference.objective(target, **options)
    features = reference.features(objective, reference.pack(ROWS))
    want, head = objective(features).loss, target.head
    monkeypatch.setattr(target, "head", lambda rows: Elsewhere(head(rows)))
    assert torch.equal(objective(features).loss, want)


def test_a_final_norm_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(tiny.model("llama"))
    config, counts = Eagle3ObjectiveConfig(taps=[1]), torch.arange(tiny.V)
    want, norm = train_eagle3(config, target, None, lambda: counts).drafter.model.norm.weight, target.norm
    monkeypatch.setattr(target, "norm", lambda rows: Elsewhere(norm(rows)))
    assert torch.equal(train_eagle3(config, target, None, lambda: counts).drafter.model.norm.weight, want)


def test_norms_are_in_the_dtype_of_their_rows() -> None:
    """In bf16 autocast torch's own norm warns of fp32 weights and takes its slow way; in fp32 nothing is different."""
    ours, torchs, rows = Norm(32, 1e-6), nn.RMSNorm(32, 1e-6), torch.randn(5, 32)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(32))
    torchs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(rows), torchs(rows))
    objective = reference.objective(reference.small(), fc_norm=True, norm_output=True)
    assert not any(type(m) is nn.RMSNorm for m in objective.drafter.model.modules())
    features = reference.features(objective, reference.pack(ROWS))
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")
        out = objective(features)
        out.loss.backward()
    assert torch.isfinite(out.loss) and objective.drafter.model.norm.weight.grad is not None
