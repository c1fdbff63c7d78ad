"""Stages share the model's tensors and leave it alone; a split pass is the whole pass; the head is the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tiny
from understudy.core.records import Needs, Proposal
from understudy.target.attention import Pass
from understudy.target.cache import KVCache
from understudy.target.session import TargetSession
from understudy.target.stages import Stage
from understudy.target.target import Target

SCALED_HEADS = {"gemma2", "cohere2", "granite"}  # something stands between the output projection and the logits


def storages(module: nn.Module) -> set[int]:
    return {x.data_ptr() for x in (*module.parameters(), *module.buffers())}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=2e-4 * max(1.0, want.abs().max().item()), rtol=0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_stages_share_every_tensor(family: str) -> None:
    model = tiny.fresh_model(family)
    target = Target(model)
    mine, decoder = storages(model), storages(target.decoder)
    bodies = [target.stage(a, b).body for a, b in ((0, 4), (0, 1), (1, 4), (2, 3))]
    for body in bodies:
        assert storages(body) <= decoder
    assert storages(bodies[0]) == decoder
    head = storages(target.head._whole[0])
    assert model.lm_head.weight.data_ptr() in head and head <= mine - decoder, "the head holds nothing of the decoder"
    last = bodies[2].layers[-1]
    assert last is not target.decoder.layers[-1] and storages(last) == storages(target.decoder.layers[-1])
    assert target.stage(0, 4) is target.stage(0, 4)


def surface(model: nn.Module) -> dict[str, Any]:
    """What one could see of a model: its modules, their attributes' names and hooks, its configurations."""
    out: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        out[name] = (type(module), id(module), sorted(vars(module)), hooks, module.training)
        if hasattr(module, "config"):
            out[f"{name}.config"] = (id(module.config), module.config.to_dict(), module.config._attn_implementation)
    return out


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_users_model_is_untouched(family: str) -> None:
    model = tiny.fresh_model(family)
    before, weights = surface(model), {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.tensor([tiny.prompt()])
    said = model.generate(ids, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    target = Target(model)
    session = TargetSession(target, Needs(taps=frozenset(range(5)), exit=2, last=True, logits=True))
    rows = session.prefill(ids[0].tolist(), True)
    session.commit(rows, range(20), ids[0].tolist() + [7])
    states = session.shallow(torch.tensor([7, 8]))
    session.verify(Proposal(torch.tensor([8]), resume=(2, states)))
    session.rewind(21)
    session.verify(Proposal(torch.tensor([8, 9, 10]), parents=[-1, -1, 0]))
    assert surface(model) == before
    assert model.config._attn_implementation == "eager"
    after = model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[k], v) for k, v in weights.items())
    again = model.generate(ids, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    assert torch.equal(said, again)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_split_is_unsplit_at_every_layer(family: str) -> None:
    """The prompt whole, then rows in two parts: hidden states and logits of the model's own pass, at each E."""
    model, target = tiny.model(family), tiny.target(family)
    ids = tiny.prompt(18, seed=3)
    logits, hidden = tiny.logits(model, ids), tiny.hidden_states(model, ids)
    for exit_layer in range(1, target.layers):
        with torch.inference_mode():
            session = TargetSession(target, Needs(taps=frozenset(range(5)), exit=exit_layer, last=True))
            rows = session.prefill(ids[:11], False)
            session.commit(rows, range(11), ids[:12])
            assert session.lengths() == {"shallow": 11, "target": 11}
            states = torch.cat([session.shallow(torch.tensor(part)) for part in (ids[11:13], ids[13:14], ids[14:])])
            assert session.lengths() == {"shallow": 18, "target": 11}
            rows = session.verify(Proposal(torch.tensor(ids[12:]), resume=(exit_layer, states)))
        assert rows.logits is not None and rows.exit is not None and rows.last is not None
        close(rows.logits, logits[11:])
        close(rows.exit, hidden[exit_layer][11:])
        close(rows.last, hidden[-1][11:])
        for tap in range(5):
            close(rows.taps[tap], hidden[tap][11:])


def test_stages_of_one_layer_each() -> None:
    """Layer by layer through four stages and one cache."""
    for family in ("gemma2", "granite", "qwen3-vl"):
        model, target = tiny.model(family), tiny.target(family)
        ids = tiny.prompt(12, seed=4)
        want = tiny.hidden_states(model, ids)
        cache, x = target.cache(), torch.tensor(ids)
        with torch.inference_mode():
            for layer in range(4):
                x, _ = target.forward(x, Pass(0, 12), cache, layer, layer + 1)
                close(x, want[layer + 1] if layer < 3 else want[-1])
        assert cache.written == [True] * 4


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_head_is_the_models_own(family: str) -> None:
    """Soft-caps and logit scales are part of it: compared on logits, because an argmax would not notice."""
    model, target = tiny.model(family), tiny.target(family)
    ids = tiny.prompt()
    hidden, want = tiny.hidden_states(model, ids)[-1], tiny.logits(model, ids)
    with torch.inference_mode():
        close(target.head(hidden), want)
        close(target.head(target.norm(tiny.hidden_states(model, ids)[-2])), want)
        bare = model.get_output_embeddings()(hidden)  # type: ignore[operator]
    lost = (bare - want).abs().max().item()
    assert (lost > 0.1) == (family in SCALED_HEADS), lost
    assert target.head._direct == (family not in SCALED_HEADS)
    if family in SCALED_HEADS:
        assert torch.equal(bare.argmax(-1), want.argmax(-1)), "the point of looking at logits"


def test_taps_are_kept_only_while_wanted() -> None:
    stage = Stage(tiny.model("llama").get_decoder(), 0, 4)  # type: ignore[operator]
    target = tiny.target("llama")
    cache = target.cache()
    cache.reserve(32)
    at = Pass(0, 3)
    for wanted in (frozenset({1, 3}), frozenset(), frozenset({0, 4})):
        with torch.inference_mode():
            stage.run(torch.tensor([5, 6, 7]), at, target.positions(at), cache, wanted)
        assert stage.taps.keys() == wanted


def test_a_stage_works_only_inside_a_pass() -> None:
    body = tiny.target("llama").stage(0, 4).body
    with pytest.raises(AssertionError, match="outside"):
        body(input_ids=torch.tensor([[5, 6]]), past_key_values=KVCache(4, 8), use_cache=True)


def test_positions_are_depths() -> None:
    target = tiny.target("llama")
    assert target.positions(Pass(7, 3)).tolist() == [[7, 8, 9]]
    tree = Pass(7, 4, torch.eye(4, dtype=torch.bool), torch.tensor([0, 1, 1, 2]))
    assert target.positions(tree).tolist() == [[7, 8, 8, 9]]


def test_facts_of_a_target() -> None:
    target = tiny.target("qwen3-vl")
    assert (target.layers, target.hidden_size, target.vocab_size, target.context) == (4, 32, tiny.V, 512)
    assert target.decoder is target.model.model.language_model
    model = tiny.fresh_model("llama")
    for eos, ids in ((None, ()), (3, (3,)), ([4, 9], (4, 9))):
        model.generation_config.eos_token_id = eos  # type: ignore[union-attr]
        assert Target(model).eos_ids == ids
