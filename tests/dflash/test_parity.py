"""The forward is that of transformers' own DFlash drafter (`muse_glimmer_assistant`, z-lab's DFlash), given the same weights.

Theirs is driven by transformers' candidate generator, with its cache and its positions, through rounds in which nothing, something
or everything is accepted; ours by `write` and `block` over a `KVCache`, through the assistant, and at once as in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

import tiny
from dflash import drafts, reference
from understudy.drafters.dflash.assistant import DFlashAssistant
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.drafters.dflash.layout import FULL
from understudy.target.cache import KVCache
from understudy.target.target import Target

PROMPT = 9
MASK = 3
RENAMED = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
SHAPES: dict[str, dict[str, Any]] = {
    "one layer": {"layers": 1},
    "one tap, two rows": {"layers": 2, "taps": [2], "block_size": 2},
    "three layers": {"layers": 3, "block_size": 8},
    "no groups": {"layers": 2, "heads": (4, 4)},
    "one group, wider than the model": {"layers": 2, "heads": (8, 1), "block_size": 16},
}


def made(layers: int = 2, heads: tuple[int, int] = (4, 2), block_size: int = 5, **options: Any) -> DFlashDrafter:
    """Random wide weights in float32, every norm its own; an epsilon so large that it shows."""
    model = tiny.fresh_model("llama", num_attention_heads=heads[0], num_key_value_heads=heads[1], rms_norm_eps=0.01)
    shape = {"num_draft_layers": layers, "block_size": block_size, "taps": [1, 2, 3], "mask_token_id": MASK, **options}
    return drafts.drafter(Target(model, name="llama"), seed=4, **shape)


def theirs(drafter: DFlashDrafter, changed: Mapping[str, Tensor] | None = None) -> nn.Module:
    """transformers' drafter with our weights, but for those in `changed`, by our names."""
    layout = drafter.model.config
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "hidden_act", "block_size",
            "mask_token_id", "target_layer_ids")  # fmt: skip
    config = T.MuseGlimmerAssistantConfig(
        **{key: getattr(layout, key) for key in same}, layer_types=[FULL] * layout.num_hidden_layers
    )
    model: nn.Module = T.MuseGlimmerAssistantModel._from_config(config, attn_implementation="eager")
    weights = {**drafter.model.state_dict(), **(changed or {})}
    model.load_state_dict({RENAMED.get(key, key): value.clone() for key, value in weights.items()}, strict=True)
    return model.requires_grad_(False).eval()


class Rounds:
    """A text, the target's states of it, and how many drafts each round accepts, which makes the anchors of its blocks."""

    def __init__(self, drafter: DFlashDrafter, accepted: Sequence[int] | None = None) -> None:
        drafted = drafter.model.drafts
        accepted = [0, drafted, drafted // 2, 0, 0, drafted, drafted] if accepted is None else accepted
        self.drafter, self.accepted = drafter, accepted
        self.anchors = [PROMPT + sum(accepted[:i]) + i for i in range(len(accepted) + 1)]
        self.text = tiny.prompt(self.anchors[-1] + 1, 7)
        self.states = tiny.hidden_states(drafter.target.model, self.text)
        self.taps = torch.cat([self.states[tap] for tap in drafter.model.taps], dim=-1)

    def theirs(self, model: nn.Module) -> list[tuple[dict[str, Any], Tensor, Tensor]]:
        """Per round what transformers' generator calls its drafter with, the states [S, H], and the logits [K, V] of the drafts."""
        main, called = self.drafter.target.model, list[tuple[dict[str, Any], Tensor]]()
        generator = DFlashTokenCandidateGenerator(
            model, main.get_input_embeddings(), main.get_output_embeddings(), T.GenerationConfig(max_length=400)
        )
        handle = model.register_forward_hook(
            lambda _, args, kwargs, out: called.append((kwargs, out.last_hidden_state[0])), with_kwargs=True
        )
        rounds = []
        for i, anchor in enumerate(self.anchors):
            start = self.anchors[i - 1] if i else 0  # the target's pass read from here, and what it then rejected
            matches = self.accepted[i - 1] if i else 0
            junk = torch.full((1, self.drafter.model.drafts - matches if i else 0, self.states[0].shape[-1]), 5.0)
            passed = [torch.cat([layer[None, start:anchor], junk], dim=1) for layer in self.states]
            _, logits = generator.get_candidates(
                torch.tensor([self.text[: anchor + 1]]),
                {"position_ids": torch.arange(anchor + 1)[None], "attention_mask": torch.ones(1, anchor + 1)},
                SimpleNamespace(hidden_states=passed),
                is_first_iteration=False,
                n_last_matches=matches,
            )
            rounds.append((*called[-1], logits[0]))
        handle.remove()
        assert len(called) == len(self.anchors)
        return rounds

    def decoded(self) -> list[Tensor]:
        """Per round the states [S, H] by the path that decoding takes."""
        model = self.drafter.model
        cache, valid, outs = KVCache(len(model.layers)), 0, list[Tensor]()
        for anchor in self.anchors:
            model.write(self.taps[valid:anchor], valid, cache)
            valid = anchor
            token = torch.tensor(self.text[anchor : anchor + 1])
            outs.append(model.block(token, model.config.block_size, anchor, cache))
        return outs

    def trained(self) -> Tensor:
        """[rounds, S, H]: all at once, behind another document in the same row."""
        model, before = self.drafter.model, reference.document(6)
        batch = reference.pack([[before, reference.Document(self.text, [True] * len(self.text))]])
        noise = torch.randn(6, self.taps.shape[1], generator=torch.Generator().manual_seed(1))
        anchors = torch.tensor([self.anchors]) + 6
        return model.blocks(torch.cat([noise, self.taps])[None], batch, anchors, model.config.block_size)[0]


def close(found: Tensor, want: Tensor) -> None:
    """To float32's rounding: the states are of size 1 to 4."""
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_forward_is_that_of_transformers(shape: str) -> None:
    drafter = made(**SHAPES[shape])
    rounds, helper = Rounds(drafter), DFlashAssistant(drafter)
    decoded, trained = rounds.decoded(), rounds.trained()
    for i, (call, want, logits) in enumerate(rounds.theirs(theirs(drafter))):
        assert want.shape == (drafter.model.config.block_size, 32) and float(want.std()) > 0.3
        close(decoded[i], want)
        close(trained[i], want)
        close(helper(**call).last_hidden_state[0], want)
        close(drafter.model.logits(decoded[i][1:]) / logits.std(), logits / logits.std())


def distance(rounds: Rounds, model: nn.Module) -> list[float]:
    """Per round, how far our states are from those of `model`."""
    pairs = zip(rounds.decoded(), rounds.theirs(model), strict=True)
    return [float((found - want).abs().max()) for found, (_, want, _) in pairs]


@torch.no_grad()
def test_every_norm_and_the_order_of_taps_and_rows_show() -> None:
    """What is compared above tells the likely mistakes from rounding, in every round."""
    drafter = made()
    rounds, weights = Rounds(drafter), drafter.model.state_dict()
    norms = [name for name in weights if "norm" in name]
    assert len(norms) == 2 + 4 * 2
    changes = {name: {name: torch.ones_like(weights[name])} for name in norms}
    keys = [f"layers.{i}.self_attn.k_norm.weight" for i in range(2)]
    changes["keys' norms of the layers swapped"] = {keys[0]: weights[keys[1]], keys[1]: weights[keys[0]]}
    changes["taps in another order"] = {"fc.weight": weights["fc.weight"].roll(32, dims=1)}
    for what, changed in changes.items():
        assert min(distance(rounds, theirs(drafter, changed))) > 1e-3, what
    same = theirs(drafter)
    assert max(distance(rounds, same)) < 1e-4
    rounds.taps = rounds.taps.roll(1, dims=0)
    assert min(distance(rounds, same)) > 1e-3, "a row of context too early"


@torch.no_grad()
def test_a_causal_block_shows() -> None:
    drafter = made(causal=True)
    assert all(attention.causal for attention in drafter.model.attentions)
    assert min(distance(Rounds(drafter), theirs(drafter))) > 1e-3
