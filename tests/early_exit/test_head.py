"""DVI's draft head and the LoRA on the shallow layers: the verifier never notices either of them."""

from __future__ import annotations

import pytest
import torch

import tiny
from understudy.core.errors import UserError
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.drafters.early_exit.head import DrafterHead
from understudy.drafters.early_exit.shallow import ShallowLoRA
from understudy.drafting.spec import build

FAMILIES = ("llama", "gemma2", "cohere2", "granite", "qwen3-vl")


def fingerprint(target) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in target.model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_begins_as_the_targets_and_then_differs_by_the_product(family):
    target = tiny.target(family)
    head = DrafterHead(target, r=3, alpha=6.0)
    hidden = torch.randn(5, target.hidden_size)
    torch.testing.assert_close(head(hidden), target.head(hidden))
    torch.nn.init.normal_(head.proj.B, std=0.5)
    weight = target.model.get_output_embeddings().weight
    changed = torch.nn.Linear(*reversed(weight.shape), bias=False)
    changed.weight.data = weight + 6.0 / 3 * head.proj.B @ head.proj.A
    own = target.model.get_output_embeddings()
    target.model.set_output_embeddings(changed)  # the family's own code behind the changed projection
    try:
        want = target.model(inputs_embeds=None, input_ids=torch.tensor([[1, 2, 3]])).logits
        last = target.decoder(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state[0]
    finally:
        target.model.set_output_embeddings(own)
    torch.testing.assert_close(head(last), want[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(head(last), target.head(last))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_verifier_is_bitwise_the_same_before_during_and_after_training(family):
    target = tiny.target(family)
    hidden = torch.randn(4, target.hidden_size)
    before, weights = target.head(hidden).clone(), fingerprint(target)
    drafter = build("dvi,rank=4,shallow_rank=2", target)
    assert torch.equal(target.head(hidden), before)
    trained = {n for n, p in drafter.named_parameters() if p.requires_grad}
    assert {n for n in trained if n.startswith("drafter_head")} == {"drafter_head.proj.A", "drafter_head.proj.B"}
    assert trained == {n for n in trained if "lora_" in n or n.endswith((".proj.A", ".proj.B"))}
    optimizer = torch.optim.AdamW([p for p in drafter.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        states = drafter.norm(drafter.shallow(torch.tensor(tiny.prompt())))
        loss = drafter.head_logits(states).logsumexp(-1).sum()
        loss.backward()
        assert torch.equal(target.head(hidden), before)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(target.head(hidden), before)
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in target.model.named_parameters())
    assert not torch.allclose(drafter.head_logits(states), drafter.frozen_logits(states))


def test_the_base_is_shared_and_frozen():
    target = tiny.target("llama")
    head = DrafterHead(target)
    assert head.proj.base.weight.data_ptr() == target.model.get_output_embeddings().weight.data_ptr()
    assert not head.proj.base.weight.requires_grad and len(head.lora_params()) == 2


def test_a_shallow_lora_starts_as_the_target_and_learns_with_gradient():
    target = tiny.target("gemma3")
    shallow = ShallowLoRA(target, 2, rank=2, alpha=4.0)
    ids = torch.tensor(tiny.prompt())
    want = target.forward(ids, *_fresh(target, len(ids)), 0, 2)[0]
    torch.testing.assert_close(shallow(ids), want)
    shallow(ids).sum().backward()
    assert all(p.grad is not None for n, p in shallow.parts().items() if "lora_B" in n)
    assert any("self_attn.q_proj" in n for n in shallow.parts()) and all(
        p.dtype == torch.float32 for p in shallow.parts().values()
    )
    for name, part in shallow.parts().items():
        if "lora_B" in name:
            torch.nn.init.normal_(part, std=0.2)
    assert not torch.allclose(shallow(ids), want)
    shallow.reset()
    torch.testing.assert_close(shallow(ids), want)


def _fresh(target, width):
    from understudy.target.attention import Pass

    return Pass(0, width), target.cache()


@pytest.mark.parametrize("text", ["dvi,rank=2", "dvi,rank=2,shallow_rank=2"])
def test_the_trace_holds_what_the_head_read(text):
    target = tiny.target("qwen3")
    drafter = build(f"{text},threshold=0,steps=4,exit_layer=2", target)
    torch.nn.init.normal_(drafter.drafter_head.proj.B, std=0.3)
    for name, part in drafter.shallow.parts().items() if drafter.shallow else ():
        if "lora_B" in name:
            torch.nn.init.normal_(part, std=0.2)
    sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=20))
    sequence.prefill(tiny.prompt())
    before, seen = list(sequence.tokens), 0
    for cycle in decode(sequence):
        if cycle.index and cycle.drafted:
            hidden = cycle.proposal.trace.hidden
            assert hidden.shape == (len(cycle.drafted), target.hidden_size)
            with torch.no_grad():
                assert drafter.head_logits(hidden.clone()).argmax(-1).tolist() == cycle.drafted
            text_ids = torch.tensor([*before, *cycle.drafted[:-1]])
            states = (
                drafter.shallow(text_ids)
                if drafter.shallow
                else target.forward(text_ids, *_fresh(target, len(text_ids)), 0, 2)[0]
            )
            torch.testing.assert_close(hidden, drafter.norm(states)[len(before) - 1 :].detach(), rtol=1e-3, atol=1e-4)
            seen += 1
        before = list(sequence.tokens)
    assert seen > 5


def test_rank_and_alpha_and_checkpoints_of_dvi(tmp_path):
    from understudy.drafting.lora import lora_state_dict

    target = tiny.target("llama")
    drafter = build("dvi,rank=5,alpha=10", target)
    assert drafter.drafter_head.proj.A.shape == (5, 32) and drafter.drafter_head.proj.scale == 2.0
    torch.nn.init.normal_(drafter.drafter_head.proj.B)
    torch.save({"lora": lora_state_dict(drafter)}, tmp_path / "final.pt")
    for text in (f"dvi:{tmp_path / 'final.pt'},rank=5", f"dvi,rank=5,load_lora={tmp_path / 'final.pt'}"):
        loaded = build(text, target)
        assert torch.equal(loaded.drafter_head.proj.B, drafter.drafter_head.proj.B)
    with pytest.raises(UserError, match="rank"):
        build(f"dvi:{tmp_path / 'final.pt'},rank=4", target)
    with pytest.raises(UserError, match="two checkpoints"):
        build(f"dvi:{tmp_path / 'final.pt'},load_lora=/other.pt", target)
    starts = [build(f"dvi,shallow_rank=2,lora_seed={seed}", target) for seed in (0, 0, 1)]
    for start in (
        [d.drafter_head.proj.A for d in starts],
        [next(p for n, p in d.shallow.parts().items() if "lora_A" in n) for d in starts],
    ):
        assert torch.equal(start[0], start[1]) and not torch.equal(start[0], start[2])


def test_a_head_that_is_no_linear_layer_is_refused():
    target = tiny.target("llama")

    class Odd(torch.nn.Module):
        weight = torch.zeros(tiny.V, 32)

    own = target.model.get_output_embeddings()
    target.model.set_output_embeddings(Odd())
    try:
        with pytest.raises(UserError, match="not a linear layer"):
            DrafterHead(target)
    finally:
        target.model.set_output_embeddings(own)
