"""The learner under the real engine: what it captures is what happened, and the text stays the target's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from online.fake import newest
from understudy.core.records import Cycle, Needs
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.drafting.learning import Trace
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import specs
from understudy.target.params import SamplingParams
from understudy.training.online import OnlineLearner

LEARN: dict[str, Any] = {
    "dvi_online": True, "dvi_update_every": 2, "dvi_batch_size": 16, "dvi_lr": 5e-3, "max_online_train_ms": 0, "threshold": 0,
    "steps": 4, "dvi_logits_dtype": "float32",
}  # fmt: skip


def dvi(family: str, **more: Any) -> Drafter:
    spec = specs()["dvi"]
    return spec.build(spec.config.model_validate({**LEARN, **more}), tiny.target(family), None)


class Check:
    """Compares every cycle with what the learner made of it."""

    needs = Needs()

    def __init__(self, learner: OnlineLearner) -> None:
        self.learner, self.cycles, self.rejected = learner, 0, 0

    def on_cycle(self, cycle: Cycle) -> None:
        if not cycle.index or not cycle.drafted:
            return
        assert cycle.proposal is not None and isinstance(cycle.proposal.trace, Trace)
        assert cycle.rows.logits is not None
        self.cycles += 1
        self.rejected += cycle.accepted < len(cycle.drafted)
        count = min(cycle.accepted + 1, len(cycle.drafted))
        buffer = self.learner.buffer
        assert buffer is not None
        batch = {name: None if v is None else v.flip(0) for name, v in newest(buffer, count).items()}
        assert batch["token"].tolist() == cycle.drafted[:count]  # type: ignore[union-attr]
        top = batch["z_idx"].gather(1, batch["z_val"].argmax(-1, keepdim=True)).squeeze(1)  # type: ignore[union-attr]
        assert top.tolist() == cycle.rows.logits[:count].argmax(-1).tolist()
        torch.testing.assert_close(batch["hk"], cycle.proposal.trace.hidden[:count].half())


def run(
    drafter: Drafter, family: str, listeners: list[Any], prompt: list[int], new: int = 40, **sampling: Any
) -> list[int]:
    draft = sampling.pop("draft_sampling", "argmax")
    params = DecodeParams(max_new_tokens=new, draft_sampling=draft)
    sequence = DecodeSequence(
        tiny.target(family), drafter, params, SamplingParams(temperature=0.0, **sampling) if "temperature" not in sampling
        else SamplingParams(**sampling), listeners=listeners,
    )  # fmt: skip
    sequence.prefill(prompt)
    for _ in decode(sequence):
        pass
    return sequence.output


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_text_stays_the_targets_while_the_head_learns(family: str) -> None:
    drafter = dvi(family, dvi_lr=0.05)
    learner = OnlineLearner(drafter)
    check = Check(learner)
    frozen = tiny.model(family).get_output_embeddings().weight.clone()  # type: ignore[operator]
    for seed in range(5):
        prompt = tiny.prompt(12, seed)
        assert run(drafter, family, [learner, check], prompt) == tiny.reference(family, prompt, 40)
    summary = learner.summary()
    assert check.rejected > 30 and summary["ran"] > 20 and summary["global_step"] >= check.cycles
    assert drafter.drafter_head.proj.B.abs().max() > 0.1  # type: ignore[union-attr, operator]
    assert torch.equal(tiny.model(family).get_output_embeddings().weight, frozen)  # type: ignore[operator]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "top_k": 20},
        {"temperature": 0.9, "repetition_penalty": 1.3},
        {"temperature": 1.2, "draft_sampling": "sample"},
    ],
)
def test_it_learns_from_raw_logits_also_when_sampling(sampling: dict[str, Any]) -> None:
    drafter = dvi("llama")
    learner = OnlineLearner(drafter)
    check = Check(learner)
    for seed in range(3):
        run(drafter, "llama", [learner, check], tiny.prompt(12, seed), seed=seed, **sampling)
    assert check.cycles > 20 and check.rejected > 10 and learner.summary()["ran"] > 10
    if (
        "draft_sampling" not in sampling
    ):  # matching: with one seed the text is plain decoding's, also with a head that changed
        plain = specs()["none"]
        for seed in range(2):
            prompt = tiny.prompt(12, seed)
            assert run(drafter, "llama", [learner], prompt, seed=seed, **sampling) == run(
                plain.build(plain.config(), tiny.target("llama"), None), "llama", [], prompt, seed=seed, **sampling
            )


def test_several_sequences_in_turn() -> None:
    drafter = dvi("llama")
    learner = OnlineLearner(drafter)
    params, sampling = DecodeParams(max_new_tokens=30), SamplingParams(temperature=1.0, seed=3)
    first = DecodeSequence(tiny.target("llama"), drafter, params, sampling, listeners=[learner, Check(learner)])
    first.prefill(tiny.prompt(10))
    forks = [first, first.fork(1), first.fork(2)]
    loops = [decode(s) for s in forks]
    passes = 0
    while loops:
        for loop in list(loops):
            cycle = next(loop, None)
            if cycle is None:
                loops.remove(loop)
            else:
                passes += cycle.index > 0
    assert len({tuple(s.output) for s in forks}) == 3 and learner.global_step == passes


@pytest.mark.slow
def test_acceptance_rises_on_a_stream() -> None:
    """The rolling acceptance of the first draft on prompts not seen before, first against last, and beside the frozen head."""

    class Meter:
        needs = Needs()

        def __init__(self) -> None:
            self.first: list[bool] = []

        def on_cycle(self, cycle: Cycle) -> None:
            if cycle.index and cycle.drafted:
                self.first.append(cycle.accepted >= 1)

    def stream(**more: Any) -> list[bool]:
        drafter, meter = dvi("qwen2", **more), Meter()
        learner = OnlineLearner(drafter)
        for seed in range(40):
            run(drafter, "qwen2", [learner, meter], tiny.prompt(12, seed), new=60)
        return meter.first

    online, frozen = stream(), stream(dvi_online=False)
    third = len(online) // 3
    early, late = sum(online[:third]) / third, sum(online[-third:]) / third
    before = sum(frozen[-len(frozen) // 3 :]) / (len(frozen) // 3)
    print(f"first third {early:.3f}, last third {late:.3f}, frozen {before:.3f}")
    assert late > early and late > before + 0.03
