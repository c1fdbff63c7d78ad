"""Tiny models of every supported family, in memory, and a slow decoder that is plainly right.

    model = tiny.model("gemma2")                # HF eager attention, fp32, wide weights, an untied head
    target = tiny.target("gemma2")
    tiny.reference(model, prompt, 40)           # the whole prefix through the model at every step, no cache

Weights are wide (initializer range 0.3 and more) and heads untied: with narrow ones every family repeats one token, and
then nothing that a test compares means anything. `window` is crossed by every prompt here.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import transformers as T
from torch import Tensor, nn

from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import specs
from understudy.target.params import SamplingParams
from understudy.target.target import Target

logging.getLogger("transformers").setLevel(
    logging.ERROR
)  # token ids of the real checkpoints lie outside tiny vocabularies

V = 97
WINDOW = 6
LAYERS = 4

Overrides = dict[str, Any]

_BASE: Overrides = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}

_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# family -> (causal LM class, config class, overrides)
_FAMILIES: dict[str, tuple[str, str, Overrides]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        # caps low enough that scores and logits really reach them
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "sliding_window": WINDOW + 1,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _ROPE},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {}),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {}),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.5},
    ),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {"sliding_window": 8, "logit_scale": 0.25}),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {}),
}  # fmt: skip

FAMILIES = tuple(_FAMILIES)
_SEEDS = {"qwen3": 3, "olmo2": 2, "qwen3-vl": 2, "cohere2": 3}  # where seed 0 says few different tokens
# The families that the contract suite must cover; the others go through a shorter list.
CONTRACT = ("llama", "qwen3", "gemma2", "gemma3", "cohere2", "granite", "qwen3-vl")


def build(cls: str, config_cls: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A causal LM of transformers with random wide weights, fp32, HF's eager attention."""
    config = getattr(T, config_cls)(**{**_BASE, **overrides})
    return _from_config(getattr(T, cls), config, seed)


def _from_config(cls: Any, config: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = cls._from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1:  # norms, biases and sinks begin as constants: a test must see them
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        assert torch.isfinite(parameter).all(), name
    return made


def _qwen3_vl(seed: int, overrides: Overrides) -> nn.Module:
    text = {
        **_BASE,
        **overrides,
        "rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = T.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=V - 1, video_token_id=V - 2, vision_start_token_id=V - 3, vision_end_token_id=V - 4,
    )  # fmt: skip
    return _from_config(T.Qwen3VLForConditionalGeneration, config, seed)


def fresh_model(family: str, seed: int | None = None, **overrides: Any) -> nn.Module:
    seed = _SEEDS.get(family, 0) if seed is None else seed
    cls, config_cls, own = _FAMILIES[family]
    if family == "qwen3-vl":
        return _qwen3_vl(seed, overrides)
    return build(cls, config_cls, seed, **{**own, **overrides})


@cache
def model(family: str) -> nn.Module:
    return fresh_model(family)


@cache
def target(family: str) -> Target:
    """A Target without the load-time probe: a check of the contract must find by itself what is wrong."""
    return Target(model(family), name=family)


@cache
def drafters(name: str, on: Target) -> list[Drafter]:
    """The tiny instances of a registered drafter, for one target."""
    return specs()[name].tiny(on)


def forget_targets() -> None:
    """Targets are built anew: what patches our code (`mutants`) must not meet stages built before, nor leave any behind."""
    target.cache_clear()
    drafters.cache_clear()


def prompt(length: int = 20, seed: int = 0) -> list[int]:
    return random.Random(f"prompt {seed}").choices(range(5, V - 8), k=length)


# The slow, obvious decoder


def logits(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """Raw logits [T, V] of a whole text: the model's own forward, HF's eager attention, no cache."""
    with torch.inference_mode():
        out: Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return out


def hidden_states(model: nn.Module, tokens: Sequence[int]) -> list[Tensor]:
    """[T, D] per index as in Hugging Face, but the last entry is the output of the last layer before the final norm, and one more
    is added: after the final norm."""
    decoder = model.get_decoder()
    seen: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(_keeper(seen), with_kwargs=True) for layer in decoder.layers]
    handles.append(decoder.norm.register_forward_pre_hook(_keeper(seen), with_kwargs=True))
    try:
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([list(tokens)]), use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    for ours, theirs in zip(seen[:-1], out.hidden_states[:-1], strict=True):
        assert torch.equal(ours, theirs[0]), "the hooks and output_hidden_states disagree"
    return [*seen, out.hidden_states[-1][0]]


def _keeper(seen: list[Tensor]) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"])[0])

    return keep


def adjusted(
    row: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: Sequence[int]
) -> Tensor:
    """Penalties and biases of one row [V], written out token by token."""
    out = row.clone().float()
    for token, bias in params.logit_bias.items():
        out[token] += bias
    for token in {*prompt, *output}:
        value = out[token].item()
        out[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token in set(output):
        out[token] -= params.presence_penalty + params.frequency_penalty * list(output).count(token)
    if len(output) < params.min_tokens:
        out[list(eos)] = -torch.inf
    return out


def law(
    row: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos: Sequence[int] = ()
) -> Tensor:
    """Probabilities [V] after processors; top-k by sorting."""
    out = adjusted(row, params, prompt, output, eos) / (params.temperature or 1.0)
    if params.top_k:
        out[out < out.sort(descending=True).values[params.top_k - 1]] = -torch.inf
    return out.double().softmax(-1)


@cache
def _greedy(family: str, prompt: tuple[int, ...], count: int, params: str, eos: tuple[int, ...]) -> list[int]:
    return continuation(
        model(family), prompt, count, SamplingParams.model_validate_json(params) if params else None, eos
    )


def reference(
    family: str, prompt: Sequence[int], count: int, params: SamplingParams | None = None, eos: Sequence[int] = ()
) -> list[int]:
    """The greedy continuation of `prompt` by `count` tokens, or up to the first of `eos`. Kept for the next call."""
    return list(_greedy(family, tuple(prompt), count, params.model_dump_json() if params else "", tuple(eos)))


def continuation(
    model: nn.Module, prompt: Sequence[int], count: int, params: SamplingParams | None = None, eos: Sequence[int] = ()
) -> list[int]:
    output: list[int] = []
    while len(output) < count:
        row = logits(model, [*prompt, *output])[-1]
        if params is not None:
            row = adjusted(row, params, prompt, output, eos)
        output.append(int(row.argmax()))
        if output[-1] in eos:
            break
    return output
