"""The contract holds while the head learns: on every family the text is plain decoding's, whatever the updates do to the drafts."""

from __future__ import annotations

import pytest
import torch

import tiny
from contract.runs import same
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.drafting.spec import build
from understudy.target.params import SamplingParams
from understudy.training.online import OnlineLearner

LEARN = "dvi_online=true,dvi_lr=0.02,dvi_batch_size=4,dvi_update_every=1,max_online_train_ms=0,dvi_guard=0,dvi_warmup_steps=10"


def learning(family: str, **sampling):
    """(output, plain output, rejected, accepted, updates, how far the head moved) of a head that learns after every block."""
    target = tiny.target(family)
    drafter = build(f"dvi,exit_layer=2,threshold=0,steps=4,{LEARN}", target)
    learner = OnlineLearner(drafter)
    outputs, rejected, accepted = [], 0, 0
    for drafting, listeners in ((drafter, [learner]), (build("none", target), [])):
        sequence = DecodeSequence(
            target, drafting, DecodeParams(max_new_tokens=80), SamplingParams(**sampling), listeners=listeners
        )
        sequence.prefill(tiny.prompt())
        for cycle in decode(sequence):
            rejected += len(cycle.drafted) - cycle.accepted
            accepted += cycle.accepted
        outputs.append(sequence.output)
    assert drafter.drafter_head is not None
    return *outputs, rejected, accepted, learner.summary()["ran"], drafter.drafter_head.proj.B.abs().max().item()


@pytest.mark.parametrize("family", tiny.CONTRACT)
def test_the_text_is_plain_decodings_while_the_head_learns(family):
    target = tiny.target(family)
    before = {name: p.clone() for name, p in target.model.named_parameters()}
    output, plain, rejected, _, updates, moved = learning(family)
    same(output, tiny.reference(family, tiny.prompt(), 80), family)
    same(output, plain, family)
    assert rejected >= 100 and updates >= 40 and moved > 0.05
    assert all(torch.equal(p, before[name]) for name, p in target.model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sampled_text_is_plain_samplings_while_the_head_learns(family):
    output, plain, rejected, _, updates, _ = learning(family, temperature=1.0, seed=5)
    same(output, plain, family)
    assert rejected >= 100 and updates >= 40
