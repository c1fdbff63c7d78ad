"""What engines make of our checkpoints. Their loaders' rules are written down again: what they build from `config.json`, and where each
tensor of the file goes. vLLM stops at a tensor that it does not know; SGLang and a DSpark of vLLM drop some without a word, and then draft
with something else.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dflash.checkpoints import TAPS, drafter, said, target, tensors, values, written
from understudy.drafters.dflash.config import DFlashObjectiveConfig
from understudy.drafters.dflash.files import read_drafter
from understudy.drafters.dflash.layout import FULL, SLIDING, causal, chosen_taps, default_taps, servable, windows
from understudy.drafters.dflash.model import DFlashModel

FUSED = {
    ".q_proj": ".qkv_proj",
    ".k_proj": ".qkv_proj",
    ".v_proj": ".qkv_proj",
    ".gate_proj": ".gate_up_proj",
    ".up_proj": ".gate_up_proj",
}
MIXED = {"layer_types": [SLIDING, FULL], "sliding_window": 5, "use_sliding_window": True}
Sizes = dict[tuple[str, str], tuple[int, ...]]  # (parameter, part of it) -> shape


def parameters(config: dict[str, Any], spark: bool) -> Sizes:
    """What engines build. Same names in both: theirs differ by `model.` only."""
    h, v, d, inter = (config[key] for key in ("hidden_size", "vocab_size", "head_dim", "intermediate_size"))
    heads, kv, ids = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["dflash_config"]["target_layer_ids"],
    )
    made: Sizes = {
        ("fc.weight", ""): (h, len(ids) * config.get("target_hidden_size", h)),
        ("embed_tokens.weight", ""): (v, h),
    }
    made |= {(f"{norm}.weight", ""): (h,) for norm in ("norm", "hidden_norm")}
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}"
        out = {".q_proj": heads * d, ".k_proj": kv * d, ".v_proj": kv * d}
        made |= {(f"{layer}.self_attn.qkv_proj.weight", part): (size, h) for part, size in out.items()}
        made[f"{layer}.self_attn.o_proj.weight", ""] = (h, heads * d)
        if config["attention_bias"]:
            made |= {(f"{layer}.self_attn.qkv_proj.bias", part): (size,) for part, size in out.items()}
            made[f"{layer}.self_attn.o_proj.bias", ""] = (h,)
        made |= {(f"{layer}.mlp.gate_up_proj.weight", part): (inter, h) for part in (".gate_proj", ".up_proj")}
        made[f"{layer}.mlp.down_proj.weight", ""] = (h, inter)
        made |= {(f"{layer}.{norm}.weight", ""): (h,) for norm in ("input_layernorm", "post_attention_layernorm")}
        made |= {(f"{layer}.self_attn.{norm}.weight", ""): (d,) for norm in ("q_norm", "k_norm")}
    if spark:
        rank = config["markov_rank"]
        made |= {(f"markov_head.markov_{w}.weight", ""): (v, rank) for w in ("w1", "w2")}
        if config.get("enable_confidence_head"):
            made["confidence_head.proj.weight", ""] = (1, h + rank * config["confidence_head_with_markov"])
            made["confidence_head.proj.bias", ""] = (1,)
    return made


def loaded(folder: Any) -> tuple[list[str], list[str], set[str]]:
    """(Tensors of the file that go nowhere, those of another shape than their place, parameters that stay unfilled)."""
    config = values(folder)
    made = parameters(config, config["architectures"] == ["Qwen3DSparkModel"])
    nowhere, wrong, empty = [], [], set(made)
    for name, tensor in tensors(folder).items():
        part = next((part for part in FUSED if part in name), "")
        place = (name.replace(part, FUSED.get(part, "")) if part else name, part)
        if place not in made:
            nowhere.append(name)
            continue
        if made[place] != tuple(tensor.shape):
            wrong.append(name)
        empty.discard(place)
    return nowhere, wrong, {name for name, _ in empty} - {"embed_tokens.weight"}  # the target's is taken


def seen_by(config: dict[str, Any], engine: str) -> list[tuple[int | None, bool]]:
    """(Window, causal) of each layer as the engine resolves it. A window counts the token itself in both."""
    found = []
    for kind in config["layer_types"]:
        window = config["sliding_window"] if kind == SLIDING and config["use_sliding_window"] else None
        if engine == "vllm":
            said = config.get("is_causal", config["dflash_config"].get("causal"))
            found.append((window, kind == SLIDING if said is None else said))
        else:
            found.append((window, kind == SLIDING or bool(config.get("is_causal"))))
    return found


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    attention=st.sampled_from([{}, {"causal": True}, MIXED, MIXED | {"causal": True}]),
    window=st.sampled_from([None, 4]),
    heads=st.sampled_from([{}, {"markov_rank": 3}, {"markov_rank": 3, "confidence_head": True}]),
    anchor=st.booleans(),
    taps=st.sampled_from([[1], [1, 7], TAPS]),
    own=st.booleans(),
    mask=st.booleans(),
    bias=st.booleans(),
)
def test_engines_take_every_tensor_and_see_what_we_see(
    tmp_path, attention, window, heads, anchor, taps, own, mask, bias
):
    layout = {"attention_bias": bias, "sample_from_anchor": anchor, **({} if window else attention)}
    model = drafter(own_mask=mask, layout=layout, taps=taps, sliding_window=window, train_embeddings=own, **heads)
    folder = written(model, tmp_path)
    assert loaded(folder) == ([], [], set())
    config, ours = values(folder), list(zip(windows(model.config), causal(model.config), strict=True))
    assert seen_by(config, "vllm") == seen_by(config, "sglang") == ours
    for key in (
        "target_layer_ids",
        "mask_token_id",
    ):  # SGLang and vLLM look in one place, transformers and DSpark in the other
        assert config[key] == config["dflash_config"][key]
    assert [layer + 1 for layer in config["target_layer_ids"]] == taps and config["mask_token_id"] < config[
        "vocab_size"
    ]
    verdicts = servable(model.config, own, mask)
    if own or mask:  # SGLang drops the one and never looks for the other
        assert verdicts["sglang"] != "ok" and verdicts["transformers"] != "ok"


def test_the_restated_loader_sees_what_goes_wrong(tmp_path):
    folder = written(drafter(layout={"attention_bias": True}), tmp_path)
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"attention_bias": true', '"attention_bias": false')
    )
    nowhere, _, unfilled = loaded(folder)
    assert "layers.0.self_attn.q_proj.bias" in nowhere and not unfilled


@pytest.mark.parametrize(
    ("options", "layout", "vllm", "sglang", "transformers"),
    [
        ({}, {}, "ok", "ok", "ok"),
        ({"sliding_window": 4}, {}, "ok", "ok", "ok"),
        ({}, {"attention_bias": True}, "ok", "ok", "ok"),
        ({}, {"causal": True}, "ok", "ok", "ok"),
        ({}, MIXED, "V2 model runner", "ok", "ok"),
        ({"train_embeddings": True}, {}, "ok", "train without --train-embeddings", "train without --train-embeddings"),
        ({"markov_rank": 3}, {}, "V2 model runner", "ok", "no Markov head"),
        ({"markov_rank": 3}, {"sample_from_anchor": False}, "V2 model runner", "takes a draft from the first row", "no Markov head"),
        ({}, {"sample_from_anchor": True}, "no draft from the first row", "no draft from the first row", "no draft from the first row"),
        ({}, {"hidden_act": "gelu"}, "no activation but silu", "no activation but silu", "ok"),
    ],
)  # fmt: skip
def test_verdicts(options, layout, vllm, sglang, transformers):
    model = drafter(layout=layout, **options)
    found = servable(model.config, model.embed_tokens is not None, model.mask_embedding is not None)
    assert found.pop("understudy") == "ok" and found.keys() == {"vllm", "sglang", "transformers"}
    for engine, expected in (("vllm", vllm), ("sglang", sglang), ("transformers", transformers)):
        assert (found[engine] == "ok") if expected == "ok" else (expected in found[engine])


def test_masks_of_their_own():
    plain, spark = drafter(own_mask=True), drafter(own_mask=True, markov_rank=3)
    assert servable(plain.config, own_mask=True)["vllm"] == "ok"  # mask_embedding.pt
    assert "; with a Markov head, its mask token has to be a row" in servable(spark.config, own_mask=True)["vllm"]
    for engine in ("sglang", "transformers"):
        assert "its mask token has to be a row of the target's" in servable(plain.config, own_mask=True)[engine]


# Old traps: each of these once cost somebody a drafter, and was seen by acceptance only


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_layer_ids": [2, 4, 6]},  # counted as taps
        {"target_layer_ids": [0, 2, 4]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"mask_token_id": 0},
        {"rms_norm_eps": 0.1},
        {"causal": True},
        MIXED,
    ],
)
def test_what_a_config_gets_wrong_changes_what_is_drafted(tmp_path, wrong):
    """None of it shows in a tensor's shape. So the file has to say all of it, and reading has to heed it."""
    model = drafter()
    other = drafter(layout=wrong)
    other.load_state_dict(model.state_dict())
    here, there = (
        read_drafter(written(m, tmp_path / name), target()) for m, name in ((model, "here"), (other, "there"))
    )
    assert set(tensors(tmp_path / "here")) == set(tensors(tmp_path / "there"))
    if "target_layer_ids" in wrong:
        assert here.taps != there.taps
    else:
        assert not torch.allclose(said(here), said(there), atol=1e-4)


def test_rotary_positions_are_the_drafters_own(tmp_path):
    """Targets with partial rotary positions, or mrope: a drafter that copied them trained in one way and was served in another."""
    model = drafter()
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
    config = values(written(model, tmp_path))
    assert not {"partial_rotary_factor", "mrope_section"} & (config.keys() | config["rope_parameters"].keys())


def test_rotary_frequencies_stay_exact_in_every_dtype(tmp_path):
    model: DFlashModel = drafter()
    exact = model.rotary.inv_freq.clone()
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(model.to(dtype).rotary.inv_freq, exact)
        assert torch.equal(read_drafter(written(model, tmp_path), target()).rotary.inv_freq, exact)


def test_taps():
    assert default_taps(36) == [2, 10, 18, 26, 34] and default_taps(8) == [2, 3, 4, 5, 6]
    assert chosen_taps(target(), [7, 3]) == [3, 7]  # engines take them in the order of the layers
    options = DFlashObjectiveConfig(target_layer_ids="1,3")
    assert chosen_taps(target(), options.asked_taps) == [2, 4]
