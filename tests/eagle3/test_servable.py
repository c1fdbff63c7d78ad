"""What engines make of our checkpoints. vLLM is proved by serving; here its loader's rules and SGLang's are written down again.

A loader is restated as the parameters that it builds from `config.json`, and where each tensor of the file goes. vLLM stops at a tensor
that it does not know; SGLang drops it without a word, and then drafts with what a parameter happened to hold.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eagle3.checkpoints import TAPS, drafter, target, tensors, written
from understudy.core.errors import UserError
from understudy.drafters.eagle3.config import Eagle3ObjectiveConfig
from understudy.drafters.eagle3.layout import chosen_taps, default_taps, servable
from understudy.drafters.eagle3.objective import Eagle3Objective
from understudy.drafters.eagle3.start import train_eagle3

FUSED = {  # part -> (fused parameter, which part)
    ".q_proj": (".qkv_proj", 0), ".k_proj": (".qkv_proj", 1), ".v_proj": (".qkv_proj", 2),
    ".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1),
}  # fmt: skip
Sizes = dict[str, list[tuple[int, ...]]]  # parameter -> shapes of the parts that fill it


def parameters(config: dict[str, Any], engine: str) -> Sizes:
    """What the engine builds for `LlamaForCausalLMEagle3`, by its own names."""
    sglang = engine == "sglang"
    h, v = config["hidden_size"], config["vocab_size"]
    heads, kv, d = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    nested = config["eagle_config"]
    many = config.get("num_aux_hidden_states") or len(nested[TAPS])
    source = config.get("target_hidden_size", h)
    any_bias = config["attention_bias"] or (config["bias"] and not sglang)
    layer, inter = "model.layers.0.", config["intermediate_size"]
    made: Sizes = {
        "model.embed_tokens.weight": [(v, h)],
        "model.fc.weight": [(h, many * source)],
        "model.norm.weight": [(h,)],
        "lm_head.weight": [(config["draft_vocab_size"], h)],
        f"{layer}self_attn.qkv_proj.weight": [(heads * d, 2 * h), (kv * d, 2 * h), (kv * d, 2 * h)],
        f"{layer}self_attn.o_proj.weight": [(h, heads * d)],
        f"{layer}mlp.gate_up_proj.weight": [(inter, h), (inter, h)],
        f"{layer}mlp.down_proj.weight": [(h, inter)],
        **{f"{layer}{norm}.weight": [(h,)] for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
    }
    if config["bias"] and sglang:
        made["model.fc.bias"] = [(h,)]
    if any_bias:
        made[f"{layer}self_attn.o_proj.bias"] = [(h,)]
    if any_bias and not sglang:
        made[f"{layer}self_attn.qkv_proj.bias"] = [(heads * d,), (kv * d,), (kv * d,)]
    if config["mlp_bias"] and not sglang:
        made |= {f"{layer}mlp.gate_up_proj.bias": [(inter,), (inter,)], f"{layer}mlp.down_proj.bias": [(h,)]}
    if config["fc_norm"] or (sglang and config.get("use_aux_norm")):
        made |= {f"model.fc_norm.{i}.weight": [(source,)] for i in range(many)}
    if nested.get("norm_before_fc", config["norm_before_fc"]):
        made["model.input_norm.weight"] = [(many * source,)]
    if not sglang and config["draft_vocab_size"] != v:
        made["draft_id_to_target_id"] = [(config["draft_vocab_size"],)]
    return made


def sglang(name: str, made: Sizes) -> tuple[str, int] | None:
    """Where SGLang puts a tensor: (parameter, part); None = nowhere."""
    name = name.replace("midlayer", "layers.0")
    for part, (fused, index) in FUSED.items():
        if part in name:
            name = name.replace(part, fused)
            name = name if name in made else f"model.{name}"
            return (name, index) if name in made else None
    name = name if name in made else f"model.{name}"
    return (name, 0) if name in made else None


def vllm(name: str, made: Sizes) -> tuple[str, int] | None:
    if "d2t" in name:
        name = name.replace("d2t", "draft_id_to_target_id")
    elif "lm_head" not in name:
        name = "model." + name
    name = name.replace("midlayer.", "layers.0.")
    for part, (fused, index) in FUSED.items():
        if part in name:
            name = name.replace(part, fused)
            return (name, index) if name in made else None
    return (name, 0) if name in made else None


def loaded(engine: str, folder) -> tuple[list[str], list[str], list[str]]:
    """(Tensors of the file that go nowhere, those of another shape than their place, parameters that stay unfilled)."""
    made = parameters(json.loads((folder / "config.json").read_text()), engine)
    place = sglang if engine == "sglang" else vllm
    empty = {(name, index) for name, parts in made.items() for index in range(len(parts))}
    nowhere, wrong = [], []
    for name, tensor in tensors(folder).items():
        if "t2d" in name or ("d2t" in name and engine == "sglang"):  # SGLang makes ids of it: d2t + arange
            continue
        found = place(name, made)
        if found is None:
            nowhere.append(name)
            continue
        if made[found[0]][found[1]] != tuple(tensor.shape):
            wrong.append(name)
        empty.remove(found)
    return nowhere, wrong, sorted({name for name, _ in empty} - {"model.embed_tokens.weight"})  # the target's is taken


SHAPES = {
    "norms": st.sampled_from([{}, {"fc_norm": True}, {"norm_before_fc": True}]),
    "residual": st.booleans(),
    "output": st.booleans(),
    "size": st.sampled_from([40, None]),
    "taps": st.sampled_from([[3], [0, 4], [2, 4, 5], [1, 2, 3, 7]]),
    "own": st.booleans(),
    "width": st.sampled_from([None, 16]),
    "biases": st.fixed_dictionaries({name: st.booleans() for name in ("bias", "attention_bias", "mlp_bias")}),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(**SHAPES)
def test_an_engine_that_is_said_to_serve_it_takes_every_tensor(
    tmp_path, norms, residual, output, size, taps, own, width, biases
):
    shape = {"norm_before_residual": residual, "norm_output": output, "draft_vocab_size": size, "taps": taps, **norms}
    own = own or width is not None
    model = drafter(own_embedding=own, width=width, layout=biases, **shape)
    folder = written(model, tmp_path)
    verdicts = servable(model.config, own)
    clean = {engine: not any(loaded(engine, folder)) for engine in ("vllm", "sglang")}
    for engine, fine in clean.items():
        assert fine or verdicts[engine] != "ok", loaded(engine, folder)
    # what vLLM's loader refuses is all that it cannot serve; SGLang also loads what it then computes otherwise
    assert clean["vllm"] == (verdicts["vllm"] == "ok")
    config = json.loads((folder / "config.json").read_text())
    assert config[TAPS] == [layer + 1 for layer in config["eagle_config"][TAPS]] == sorted(set(config[TAPS]))


def test_the_restated_loaders_see_what_goes_wrong(tmp_path):
    folder = written(drafter(layout={"attention_bias": True, "mlp_bias": True}), tmp_path)
    nowhere, _, unfilled = loaded("sglang", folder)
    assert "midlayer.self_attn.q_proj.bias" in nowhere and "midlayer.mlp.up_proj.bias" in nowhere and not unfilled
    assert loaded("vllm", folder) == ([], [], [])
    nowhere, _, unfilled = loaded("vllm", written(drafter(layout={"bias": True}), tmp_path))
    assert nowhere == ["fc.bias"] and "model.layers.0.self_attn.qkv_proj.bias" in unfilled
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_aux_hidden_states": 2}))
    assert loaded("sglang", folder)[1] == ["fc.weight"]


@pytest.mark.parametrize(
    ("shape", "layout", "vllm", "sglang"),
    [
        ({}, {}, "ok", "ok"),
        ({"norm_output": True, "fc_norm": True}, {}, "ok", "ok"),
        ({"norm_before_fc": True, "draft_vocab_size": 97}, {}, "ok", "ok"),
        ({"norm_before_residual": True}, {}, "ok", "train without --norm-before-residual"),
        ({"taps": [0, 4]}, {}, "ok", "none for the embeddings"),  # vLLM: what goes into the first layer
        ({"taps": [4]}, {}, "ok", "skips fc"),
        ({"own_embedding": True}, {}, "ok", "the target's embeddings in the place of"),
        ({"own_embedding": True, "width": 16}, {}, "ok", "ok"),
        ({"own_embedding": True, "width": 64, "taps": [2, 4]}, {}, "ok", "skips fc"),  # 2 x 32 = 64
        ({}, {"bias": True}, "its fc has no bias", "ok"),
        ({}, {"attention_bias": True}, "ok", "queries, keys and values have no bias"),
        ({}, {"mlp_bias": True}, "ok", "its MLP has no bias"),
        ({}, {"hidden_act": "gelu"}, "no activation but silu", "no activation but silu"),
        ({}, {"fc_norm": True, "norm_before_fc": True}, "input_norm before fc_norm", "one norm before fc"),
    ],
)
def test_verdicts(shape, layout, vllm, sglang):
    model = drafter(layout=layout, **shape)
    found = servable(model.config, model.embed_tokens is not None)
    assert found.keys() == {"understudy", "vllm", "sglang", "transformers"} and found["transformers"] != "ok"
    for engine, expected in (("vllm", vllm), ("sglang", sglang)):
        assert (found[engine] == "ok") if expected == "ok" else (expected in found[engine])


def test_all_obstacles_are_named_and_embeddings_of_its_own_are_seen(tmp_path):
    model = drafter(norm_before_residual=True, taps=[0, 1])
    assert "; " in servable(model.config)["sglang"]
    written(drafter(own_embedding=True), tmp_path)
    counts = lambda: torch.ones(target().vocab_size)  # noqa: E731
    objective = train_eagle3(Eagle3ObjectiveConfig(), target(), tmp_path, counts)
    assert isinstance(objective, Eagle3Objective) and "embeddings" in objective.servable()["sglang"]


def test_taps():
    assert default_taps(8) == [2, 4, 5] and default_taps(32) == [2, 16, 29] and default_taps(36) == [2, 18, 33]
    for layers in (3, 4, 5, 6):
        with pytest.raises(UserError, match=f"a target of {layers} layers has no default taps"):
            default_taps(layers)
    assert chosen_taps(target(), []) == [2, 4, 5] and chosen_taps(target(), [7, 0, 3]) == [0, 3, 7]
    for taps, match in (([8], "taps 8: taps are 0"), ([-1], "taps -1"), ([2, 2], "each tap once")):
        with pytest.raises(UserError, match=match):
            chosen_taps(target(), taps)
