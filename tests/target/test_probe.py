"""The load-time probe: it passes what works, and refuses by name what does not, each planted fault by the feature that shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel, apply_rotary_pos_emb

import tiny
from contract.scripted import Scripted, chain
from understudy.core.errors import UserError
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafting.spec import build
from understudy.target.loading import load_target
from understudy.target.probe import probe
from understudy.target.stages import Head
from understudy.target.target import Target

FEATURES = [("plain", None), ("rewind", None), ("tree", None), ("split", 1), ("split", 2), ("split", 3)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_supported_families_pass(family: str) -> None:
    target = load_target(tiny.model(family))
    assert target.checked == {("plain", None), ("rewind", None)}
    for feature, exit_layer in FEATURES:
        probe(target, feature, exit_layer)
    assert target.checked == set(FEATURES)


def test_each_feature_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(tiny.model("llama"))
    calls: list[int] = []
    forward = target.forward
    monkeypatch.setattr(target, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    probe(target, "tree")
    passes = len(calls)
    probe(target, "tree")
    assert passes == len(calls) > 0


def test_half_precision_passes() -> None:
    target = Target(tiny.fresh_model("qwen3").to(torch.bfloat16))
    for feature, exit_layer in FEATURES:
        probe(target, feature, exit_layer)


# Planted faults


class PositionBlind(LlamaModel):
    """Counts positions from the first row of the pass."""

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids = position_ids - position_ids[:, :1]
        return super().forward(*args, position_ids=position_ids, **kwargs)


class Forgetful(LlamaModel):
    """Takes a cache and does not use it."""

    def forward(self, *args: Any, past_key_values: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, past_key_values=None, use_cache=False, **kwargs)


class EmbeddingsAgain(LlamaModel):
    """A layer in the middle adds the embeddings once more."""

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        handle = self.layers[-1].register_forward_hook(lambda _, __, out: out + embeds)
        try:
            return super().forward(inputs_embeds=embeds, **kwargs)
        finally:
            handle.remove()


class RowCausal(LlamaAttention):
    """Attends by itself, each row to all rows before it: right for chains only."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any, past_key_values: Any = None, **_: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def _decoder(cls: type) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = tiny.fresh_model("llama")
        model.model.__class__ = cls  # type: ignore[union-attr]
        return model

    return make


def _row_causal() -> nn.Module:
    model = tiny.fresh_model("llama")
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.__class__ = RowCausal
    return model


@pytest.mark.parametrize(
    ("make", "feature", "reason"),
    [
        (_decoder(Forgetful), "plain", "keep no keys and values"),
        (_decoder(PositionBlind), "rewind", "going back in its cache"),
        (_decoder(EmbeddingsAgain), "split", "running it in two parts"),
        (_row_causal, "tree", "a tree of drafts"),
    ],
    ids=["no-cache", "position", "split", "tree"],
)
def test_planted_faults_are_refused_by_name(make: Callable[[], nn.Module], feature: str, reason: str) -> None:
    model = make()
    order = [name for name, _ in FEATURES]
    passed = [key for key in FEATURES if order.index(key[0]) < order.index(feature)]
    target = Target(model)
    for key in passed if feature != "split" else passed[:2]:
        probe(target, *key)
    with pytest.raises(UserError, match=rf"^LlamaForCausalLM is not supported: .*{reason}") as error:
        probe(target, feature, 2 if feature == "split" else None)
    assert "\n" not in str(error.value)
    assert (feature, None) not in target.checked
    if feature in ("plain", "rewind"):
        with pytest.raises(UserError, match=reason):
            load_target(model)
    if feature == "split":
        with pytest.raises(UserError, match=reason):
            build("early-exit,exit_layer=2", target)


@pytest.mark.parametrize("family", ["gemma2", "cohere2", "granite"])
def test_a_lost_soft_cap_or_scale_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argmax would be the same."""
    target = Target(tiny.model(family))
    monkeypatch.setattr(Head, "forward", lambda self, hidden: self._projection[0](hidden))
    with pytest.raises(
        UserError, match=r"ForCausalLM is not supported: our pass is not the model's own; logits differ"
    ):
        probe(target, "plain")


# Families that cannot be targets


def refused(cls: str, config: str, reason: str, **overrides: Any) -> None:
    with pytest.raises(UserError, match=reason) as error:
        load_target(tiny.build(cls, config, **overrides))
    assert str(error.value).startswith(cls) and "\n" not in str(error.value)


def test_kv_shared_across_layers() -> None:
    refused(
        "Gemma3nForCausalLM", "Gemma3nTextConfig", "some layers keep no keys and values of their own",
        num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97, laurel_rank=4,
        altup_num_inputs=2, altup_active_idx=0, sliding_window=6, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip


def test_decoders_without_layers() -> None:
    refused("GPT2LMHeadModel", "GPT2Config", "has no .layers", n_embd=32, n_head=4, n_layer=2, n_positions=64)
    experts = {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1}
    refused("Llama4ForCausalLM", "Llama4TextConfig", "has no .layers", **experts)


@pytest.mark.parametrize(
    ("cls", "config", "overrides"),
    [
        ("MambaForCausalLM", "MambaConfig", {"state_size": 4}),
        ("Lfm2ForCausalLM", "Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}),
        ("RwkvForCausalLM", "RwkvConfig", {"attention_hidden_size": 32}),
        (
            "Qwen3NextForCausalLM",
            "Qwen3NextConfig",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
             "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        ),
    ],
    ids=["mamba", "lfm2", "rwkv", "qwen3-next"],
)  # fmt: skip
def test_recurrent_families(cls: str, config: str, overrides: dict[str, Any]) -> None:
    refused(cls, config, r"is recurrent \(.*\): its state cannot be rewound", **overrides)


def test_encoder_decoders() -> None:
    refused(
        "T5ForConditionalGeneration",
        "T5Config",
        "encoder-decoder",
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=2,
    )


def right_or_refused(cls: str, config: str, **overrides: Any) -> None:
    """Either the family is refused, or 30 tokens after 30 are the model's own."""
    model = tiny.build(cls, config, **overrides)
    prompt = tiny.prompt(30)
    want = tiny.continuation(model, prompt, 30)
    assert len(set(want)) >= 10
    try:
        target = load_target(model)
    except UserError:
        return
    drafter = Scripted([*prompt, *want, *[0] * 9], [chain(2, 1)], tree=False, vocab=tiny.V)
    sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=30, prefill_chunk=7), stop=StopRule())
    try:
        sequence.prefill(prompt)
        for _ in decode(sequence):
            pass
    except UserError:
        return
    assert sequence.output == want[: len(sequence.output)] and (sequence.room == 0 or len(sequence.output) == 30)


@pytest.mark.parametrize(
    ("cls", "config", "overrides"),
    [
        ("MixtralForCausalLM", "MixtralConfig", {"sliding_window": 16, "num_local_experts": 4}),
        ("Olmo3ForCausalLM", "Olmo3Config", {"sliding_window": 16}),
        (
            "LlamaForCausalLM",
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ),
    ],
    ids=["mixtral", "olmo3", "dynamic-rope"],
)
def test_windows_wider_than_the_probe(cls: str, config: str, overrides: dict[str, Any]) -> None:
    right_or_refused(cls, config, **overrides)


@pytest.mark.parametrize(
    ("cls", "config", "overrides"),
    [
        ("PhimoeForCausalLM", "PhimoeConfig", {"sliding_window": 16, "num_local_experts": 4}),
        (
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4, "num_experts": 4, "num_experts_per_tok": 2,
             "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        ),
    ],
    ids=["phimoe", "qwen2-moe"],
)  # fmt: skip
def test_windows_that_attention_is_not_told_of(cls: str, config: str, overrides: dict[str, Any]) -> None:
    right_or_refused(cls, config, **overrides)


def test_longrope() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 40,
    }  # fmt: skip
    right_or_refused("Phi3ForCausalLM", "Phi3Config", original_max_position_embeddings=40, rope_parameters=rope)
