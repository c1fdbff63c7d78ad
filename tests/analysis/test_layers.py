"""Steps A and B against the slow way: every text alone, and an early exit as a model that really ends there."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

import tiny
from understudy.analysis import layers
from understudy.analysis.layers import candidates, measure, statistics
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.drafting.objective import Batch
from understudy.features.live import LiveFeatures

CHOSEN = [0, 1, 3]


def sample(length: int, seed: int, supervised: list[int]) -> Batch:
    ids = torch.tensor([tiny.prompt(length, seed)])
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[0, supervised] = True
    return Batch(ids, mask, torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None])


# 0 is supervised in the second: nothing comes before it, so it cannot be counted
SAMPLES = [sample(14, 1, [3, 4, 5, 9, 13]), sample(20, 2, [0, 1, 2, 19]), sample(9, 3, [])]


def shortened(family: str, end: int):
    """The model as if it had only its first `end` layers."""
    model = copy.deepcopy(tiny.model(family))
    decoder = model.get_decoder()
    decoder.layers = decoder.layers[:end]
    decoder.config.num_hidden_layers = end
    return model


def slow(family: str) -> dict[str, float]:
    """Means, written out."""
    values: dict[str, list[float]] = {name: [] for name in statistics(tiny.LAYERS, CHOSEN)}
    exits = {end: shortened(family, end) for end in (*CHOSEN, tiny.LAYERS)}
    for batch in SAMPLES:
        text = batch.ids[0].tolist()
        *taps, last = tiny.hidden_states(tiny.model(family), text)
        whole = tiny.logits(tiny.model(family), text).log_softmax(-1)
        laws = {end: tiny.logits(model, text).log_softmax(-1) for end, model in exits.items()}
        for t in range(1, len(text)):
            if not batch.mask[0, t]:
                continue
            for layer, states in enumerate(taps):
                for name, final in (("cosine", taps[-1]), ("cosine_last", last)):
                    values[f"{name}/{layer}"].append(F.cosine_similarity(states[t - 1], final[t - 1], dim=0).item())
            for end, law in laws.items():
                p, q = whole[t - 1], law[t - 1]
                values[f"ce/{end}"].append(-q[text[t]].item())
                values[f"agreement/{end}"].append(float(p.argmax() == q.argmax()))
                values[f"kl/{end}"].append((p.exp() * (p - q)).sum().item())
    return {name: sum(found) / len(found) for name, found in values.items()}


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "cohere2", "granite", "qwen3-vl"])
def test_the_slow_way_gives_the_same(family):
    found = measure(tiny.target(family), SAMPLES, CHOSEN)
    assert (found.samples, found.tokens) == (2, 8)
    assert {name: found.mean(name) for name in found.names} == pytest.approx(slow(family), rel=1e-4, abs=1e-4)
    assert found.mean(f"cosine/{tiny.LAYERS}") == pytest.approx(1) == found.mean(f"agreement/{tiny.LAYERS}")


def test_chunks_change_nothing(monkeypatch):
    target = tiny.target("qwen3")
    whole = measure(target, SAMPLES, CHOSEN)
    monkeypatch.setattr(layers, "LOGITS", 2 * target.vocab_size)
    sizes, head = [], target.head
    monkeypatch.setattr(target, "head", lambda x: sizes.append(len(x)) or head(x))
    assert measure(target, SAMPLES, CHOSEN).sums == pytest.approx(whole.sums, rel=1e-5)
    assert max(sizes) == 2


def test_memory_does_not_grow_with_samples(monkeypatch):
    alive: list[weakref.ref] = []
    most = 0

    class Watched(LiveFeatures):
        def __call__(self, batch):
            nonlocal most
            features = super().__call__(batch)
            gc.collect()
            alive.extend(weakref.ref(states) for states in (*features.taps.values(), features.last))
            most = max(most, sum(ref() is not None for ref in alive))
            return features

    monkeypatch.setattr(layers, "LiveFeatures", Watched)
    tally = measure(tiny.target("qwen3"), (SAMPLES[i % 2] for i in range(6)), CHOSEN)
    assert tally.samples == 6 and len(alive) == 6 * (tiny.LAYERS + 2)
    assert most <= 2 * (tiny.LAYERS + 2)  # the sample at hand, and at most the one before it


def test_the_target_runs_once_per_sample(monkeypatch):
    target, calls = tiny.target("qwen3"), []
    handles = [layer.mlp.down_proj.register_forward_hook(lambda *_: calls.append(1)) for layer in target.decoder.layers]
    measure(target, SAMPLES[:2], CHOSEN)
    for handle in handles:
        handle.remove()
    assert len(calls) == 2 * tiny.LAYERS


def test_overflow_is_an_error():
    target = tiny.target("llama")
    features = LiveFeatures(target, Needs(taps=frozenset(range(tiny.LAYERS + 1)), last=True))(SAMPLES[0])
    features.taps[1][0, 4] = float("inf")
    tally = layers.Tally(statistics(tiny.LAYERS, CHOSEN))
    with pytest.raises(UserError, match=r"cosine/1 is not finite.*--dtype"):
        layers.add(tally, target, features, CHOSEN)
    assert tally.samples == 0


def test_default_candidates_are_all_or_evenly_spaced():
    assert candidates(12) == list(range(12))
    found = candidates(80)
    assert len(found) == layers.MOST and (found[0], found[-1]) == (0, 79)
    assert candidates(36, [34, 0, 16, 16]) == [0, 16, 34]
    assert candidates(36, [20, 36]) == [20]  # the last layer is always there
    with pytest.raises(UserError, match=r"--layers 37: layers are 0 \(embeddings\) to 36"):
        candidates(36, [0, 37])
