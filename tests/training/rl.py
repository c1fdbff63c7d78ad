"""DVI-RL on tiny models: a target with a tokenizer of words w0 .. w96, and files of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import tiny
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.target.target import Target
from understudy.training.dvi_rl.adapters import DualLoRA


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(tiny.V)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def target(family: str = "llama", **overrides: Any) -> Target:
    """A new one each time: lora_D stays in a model."""
    return Target(tiny.fresh_model(family, **overrides), tokenizer(), name=f"tiny {family}")


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def data(path: Path, count: int = 12, answered: bool = True) -> Path:
    """Prompts of 8 to 11 tokens; every second one has an answer of 6."""
    rows = []
    for i in range(count):
        asked = {"from": "human", "value": text(tiny.prompt(8 + i % 4, seed=i))}
        answer = {"from": "gpt", "value": text(tiny.prompt(6, seed=100 + i))}
        rows.append({"conversations": [asked, answer] if answered and i % 2 == 0 else [asked]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stir(adapters: DualLoRA, name: str, std: float = 0.1, seed: int = 5) -> None:
    """Give an adapter something to say: its B begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in adapters.get_peft_model_state_dict(name).items():
        if ".lora_B." in key:
            tensor.data.copy_(std * torch.randn(tensor.shape, generator=generator))


def weights(adapters: DualLoRA, name: str) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in adapters.get_peft_model_state_dict(name).items()}


def base(target: Target) -> dict[str, Tensor]:
    """Every weight of the model but its LoRAs, by the name that it has without them."""
    found = target.model.named_parameters()
    return {name.replace(".base_layer", ""): p.detach().clone() for name, p in found if "lora_" not in name}


def merged(family: str, adapters: DualLoRA, *names: str) -> nn.Module:
    """A fresh model into whose weights the adapters are multiplied by hand: W + (alpha / r) B A."""
    model = tiny.fresh_model(family)
    for name in names:
        state = adapters.get_peft_model_state_dict(name)
        for key in [key for key in state if ".lora_A." in key]:
            low, high = state[key], state[key.replace(".lora_A.", ".lora_B.")]
            weight = model.get_submodule(key.split(".lora_A.")[0]).weight
            weight.data += adapters.alpha / adapters.rank * (high @ low)
    return model


def speculate(target: Target, drafter: Any, prompt: list[int], count: int) -> tuple[list[int], int]:
    """(greedy output of `count` tokens, how many drafts were rejected)."""
    sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=count), stop=StopRule())
    sequence.prefill(prompt)
    rejected = sum(len(cycle.drafted) - cycle.accepted for cycle in decode(sequence))
    return sequence.output, rejected


def greedy(model: nn.Module, prompt: list[int], output: list[int]) -> list[int]:
    """The model's choice at each place of `output`, without a cache. All equal: `output` is its greedy continuation."""
    return tiny.logits(model, [*prompt, *output[:-1]])[len(prompt) - 1 :].argmax(-1).tolist()
