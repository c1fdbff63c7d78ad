"""The drafter inside transformers' own generation says what it says in ours, and costs no more than it has to."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import tiny
import understudy
from dflash import drafts, reference
from understudy.core.errors import UserError
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafters.dflash.assistant import DFlashAssistant
from understudy.drafters.dflash.config import DFlashConfig
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.drafters.dflash.model import DFlashModel
from understudy.target.cache import KVCache
from understudy.target.target import Target

NEW = 24
PROMPT = tiny.prompt(9, 3)


def knowing(target: Target, family: str, steps: int | None = None, **options: Any) -> DFlashDrafter:
    """A drafter that half knows what the target answers to PROMPT."""
    objective = reference.objective(target, spread=0.05, **{"block_size": 5, "mask_token_id": 3, **options})
    text = [*PROMPT, *tiny.reference(family, PROMPT, NEW)]
    row = reference.Document(text, [i >= len(PROMPT) for i in range(len(text))])
    reference.taught(objective, [[row]], steps=12, lr=1e-2)
    return DFlashDrafter(target, objective.drafter.model.requires_grad_(False).eval(), DFlashConfig(steps=steps))


def generated(
    model: Any, assistant: DFlashAssistant, prompt: list[int], new: int = NEW, **options: Any
) -> tuple[list[int], list[int]]:
    """(output, tokens per pass after the prefill's) of transformers' own loop."""
    ids, sizes = torch.tensor([prompt]), list[int]()

    class Streamer:
        def put(self, value: Tensor) -> None:
            sizes.append(value.numel())

        def end(self) -> None: ...

    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        assistant_model=assistant,
        speculation_type="dflash",
        streamer=Streamer(),
        **{"do_sample": False, "eos_token_id": None, **options},
    )
    return out[0, len(prompt) :].tolist(), sizes[2:]


def ours(drafter: DFlashDrafter, prompt: list[int]) -> list[int]:
    """Tokens per cycle of our engine."""
    sequence = DecodeSequence(drafter.target, drafter, DecodeParams(max_new_tokens=NEW), stop=StopRule())
    sequence.prefill(prompt)
    return [len(cycle.committed) for cycle in decode(sequence)][1:]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen3", {"steps": 2}),
    ("llama", {"sliding_window": 6}),
    ("gemma3", {}),  # its embedding scales what it looks up
    ("granite", {}),
]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_it_says_there_what_it_says_here(family: str, options: dict[str, Any]) -> None:
    """Plain greedy text, the accepted counts of our engine, and at every round the states of the slow model."""
    target = Target(tiny.fresh_model(family), name=family)
    drafter = knowing(target, family, **options)
    helper, plain, compared = DFlashAssistant(drafter), reference.plain(drafter), list[int]()
    forward = helper.forward

    def compare(**given: Any) -> Any:
        out = forward(**given)
        at = int(given["position_ids"][0, given["context_hidden_states"].shape[1]])
        tokens = [*PROMPT, *tiny.reference(family, PROMPT, NEW)][: at + 1]
        states = tiny.hidden_states(target.model, tokens[:-1])
        context = plain.context([[states[tap][j].double() for tap in drafter.model.taps] for j in range(at)])
        want = torch.stack(plain.block(tokens[-1], context, at, drafter.steps + 1)).detach()
        torch.testing.assert_close(
            out.last_hidden_state[0].double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max())
        )
        compared.append(at)
        return out

    with patch.object(helper, "forward", compare):
        output, passes = generated(target.model, helper, PROMPT)
    assert output == tiny.reference(family, PROMPT, NEW)
    mine = ours(drafter, PROMPT)
    # transformers' last pass may draft beyond the end
    assert passes[:-1] == mine[: len(passes) - 1] and len(compared) >= len(mine) - 1 and len(set(mine)) > 1, (
        passes,
        mine,
    )


def test_context_rows_are_computed_once_and_calls_do_not_mix() -> None:
    target = Target(tiny.fresh_model("llama"), name="llama")
    helper = DFlashAssistant(knowing(target, "llama"))
    written, write = list[tuple[int, int]](), DFlashModel.write

    def counted(self: Any, taps: Tensor, start: int, cache: KVCache) -> None:
        written.append((start, len(taps)))
        write(self, taps, start, cache)

    with patch.object(DFlashModel, "write", counted):
        first, _ = generated(target.model, helper, PROMPT)
        rows = [row for start, n in written for row in range(start, start + n)]
        assert rows == list(range(len(rows))) and len(PROMPT) + NEW - 6 < len(rows) < len(PROMPT) + NEW
        written.clear()
        again, _ = generated(target.model, helper, PROMPT)
        other, _ = generated(target.model, helper, tiny.prompt(5, 8))
    assert first == again and written[0] == (0, len(PROMPT)) and (0, 5) in written
    assert other == tiny.reference("llama", tiny.prompt(5, 8), NEW)
    assert not helper._kept, "what belonged to a call went with it"


def test_it_is_the_drafter_and_no_copy() -> None:
    target = Target(tiny.fresh_model("llama"), name="llama")
    drafter = drafts.drafter(target, block_size=5, steps=2, mask_token_id=3)
    helper = DFlashAssistant(drafter)
    assert {id(p) for p in helper.parameters()} == {id(p) for p in drafter.model.parameters()}
    assert helper.config.block_size == 3 and drafter.model.config.block_size == 5
    assert (
        helper.config.target_layer_ids == [0, 2] and helper.config.mask_token_id == drafter.model.config.mask_token_id
    )
    assert helper.device == torch.device("cpu") and helper.dtype == torch.float32


def test_sampled_text_and_processors() -> None:
    """transformers draws drafts one by one and rejects them by the law: it runs, and a banned token never comes."""
    target = Target(tiny.fresh_model("llama"), name="llama")
    helper = DFlashAssistant(knowing(target, "llama"))
    torch.manual_seed(0)
    output, _ = generated(target.model, helper, PROMPT, do_sample=True, temperature=1.5, suppress_tokens=[7, 8])
    assert len(output) == NEW and not {7, 8} & set(output)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"train_embeddings": True}, "it takes embeddings from the target"),
        ({"markov_rank": 2}, "it knows no Markov head"),
    ],
)
def test_what_transformers_cannot_serve_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=f"^transformers' generation cannot draft with this DFlash drafter: {reason}"):
        DFlashAssistant(drafts.drafter(tiny.target("llama"), mask_token_id=3, **options))


def test_other_drafters_are_refused() -> None:
    target = tiny.target("llama")
    assert isinstance(drafts.drafter(target, mask_token_id=3).assistant(), DFlashAssistant)
    with pytest.raises(UserError, match=r"^transformers' own generation takes no such drafter"):
        tiny.drafters("prompt-lookup", target)[0].assistant()


def test_the_front_door_gives_generate_what_it_takes() -> None:
    model = tiny.fresh_model("llama")
    drafter = drafts.drafter(Target(model), mask_token_id=3)
    ids = torch.tensor([PROMPT])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    given = understudy.assistant(model, drafter)
    assert given.model is drafter.model
    drafted = model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=given, speculation_type="dflash")
    assert drafted.tolist() == plain.tolist()


def test_a_padded_prompt_is_refused() -> None:
    target = Target(tiny.fresh_model("llama"), name="llama")
    helper = DFlashAssistant(drafts.drafter(target, mask_token_id=3))
    ids = torch.tensor([[0, 0, *PROMPT]])
    with pytest.raises(UserError, match="padded prompt"):
        target.model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=9, assistant_model=helper,
                              speculation_type="dflash", do_sample=False)  # fmt: skip
