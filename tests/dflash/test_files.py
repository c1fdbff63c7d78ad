"""Checkpoints of DFlash: what is written is what is read, in every public layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from dflash.checkpoints import MASK, TAPS, convert, drafter, edit, said, store, target, tensors, values, written
from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.drafters.dflash import files
from understudy.drafters.dflash.files import read_drafter, shape
from understudy.drafters.dflash.layout import FULL, SLIDING, borrowed_mask, causal, drafts_of
from understudy.drafting.spec import build
from understudy.target.fingerprint import fingerprint
from understudy.target.target import Target

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
MIXED = {"layer_types": [SLIDING, FULL], "sliding_window": 5, "use_sliding_window": True}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    attention=st.sampled_from([{}, {"causal": True}, {**MIXED, "sliding_window": 3}, MIXED | {"causal": True}]),
    window=st.sampled_from([None, 4]),
    heads=st.sampled_from([{}, {"markov_rank": 3}, {"markov_rank": 3, "confidence_head": True}]),
    alone=st.booleans(),
    anchor=st.booleans(),
    taps=st.sampled_from([[1], [1, 7], TAPS, [2, 3, 4, 5]]),
    own=st.booleans(),
    mask=st.booleans(),
    bias=st.booleans(),
    rope=st.sampled_from([None, LLAMA3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_was_written_is_read(
    tmp_path, attention, window, heads, alone, anchor, taps, own, mask, bias, rope, dtype
):
    layout = {"attention_bias": bias, "sample_from_anchor": anchor, **({} if window else attention)}
    layout |= {"confidence_head_with_markov": not alone} if "confidence_head" in heads else {}
    layout |= {} if rope is None else {"rope_parameters": rope}
    model = drafter(own_mask=mask, layout=layout, taps=taps, sliding_window=window, train_embeddings=own, **heads).to(
        dtype
    )
    state = torch.get_rng_state()
    found = read_drafter(written(model, tmp_path), target())
    assert torch.equal(torch.get_rng_state(), state)  # saving changes nothing of what training draws
    assert found.dtype == torch.float32 and shape(found) == shape(model) and found.taps == model.taps == tuple(taps)
    assert [a.causal for a in found.attentions] == [a.causal for a in model.attentions]
    assert [a.window for a in found.attentions] == [a.window for a in model.attentions]
    assert (found.embed_tokens is None) == (not own) and (found.mask_embedding is None) == (not mask)
    assert found.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(said(found), said(model.float()), rtol=0, atol=0)


def test_config_holds_what_engines_read_and_nothing_else(tmp_path):
    config = values(written(drafter(), tmp_path))
    assert config == {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": 32, "target_hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_target_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "hidden_act": "silu", "vocab_size": 97, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "attention_bias": False, "tie_word_embeddings": False, "layer_types": [FULL, FULL], "sliding_window": None,
        "use_sliding_window": False, "block_size": 5, "target_layer_ids": [1, 3, 5], "mask_token_id": MASK,
        "sample_from_anchor": False,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [1, 3, 5], "causal": False},
        "rope_theta": 1e4, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "dtype": "float32", "torch_dtype": "float32",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    layer = {f"layers.{i}.{name}.weight" for i in range(2) for name in (
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
    assert set(tensors(tmp_path)) == layer | {
        "fc.weight",
        "hidden_norm.weight",
        "norm.weight",
    }  # neither embedding nor head


def test_a_markov_head_makes_it_a_dspark_checkpoint(tmp_path):
    plain = values(written(drafter(), tmp_path / "plain"))
    config = values(written(drafter(markov_rank=3, confidence_head=True), tmp_path / "spark"))
    assert {key: value for key, value in config.items() if plain.get(key) != value} == {
        "architectures": ["Qwen3DSparkModel"], "markov_rank": 3, "markov_head_type": "vanilla", "enable_confidence_head": True,
        "confidence_head_with_markov": True, "sample_from_anchor": True,
        "dflash_config": plain["dflash_config"] | {"sample_from_anchor": True},
    }  # fmt: skip
    more = {name: list(x.shape) for name, x in tensors(tmp_path / "spark").items() if not name.startswith("layers.")}
    assert {k: v for k, v in more.items() if "head" in k} == {
        "markov_head.markov_w1.weight": [97, 3], "markov_head.markov_w2.weight": [97, 3],
        "confidence_head.proj.weight": [1, 35], "confidence_head.proj.bias": [1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "layout", "nested", "top"),
    [
        ({}, {}, False, None),
        ({"sliding_window": 4}, {}, True, None),
        ({}, MIXED, None, None),  # a word for all layers would be wrong for one of them
        ({}, {"causal": True}, True, True),
        ({}, MIXED | {"causal": True}, True, True),
    ],
)
def test_who_sees_whom_is_said_where_layers_agree_and_by_their_types_where_not(tmp_path, options, layout, nested, top):
    model = drafter(layout=layout, **options)
    config = values(written(model, tmp_path))
    assert config["dflash_config"].get("causal") == nested and config.get("is_causal") == top
    by_vllm = [
        config["is_causal"] if "is_causal" in config else config["dflash_config"].get("causal", kind == SLIDING)
        for kind in config["layer_types"]
    ]
    assert by_vllm == causal(model.config)
    assert config["use_sliding_window"] == (SLIDING in config["layer_types"])  # Qwen3Config drops the window otherwise


def test_an_own_mask_lies_where_vllm_looks_for_it(tmp_path):
    model = drafter(own_mask=True)
    written(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "mask_embedding.pt"}
    stored = torch.load(tmp_path / "mask_embedding.pt", weights_only=True)
    token = model.config.mask_token_id
    assert stored.keys() == {"embedding", "mask_token_id"} and stored["mask_token_id"] == token
    assert torch.equal(stored["embedding"], model.mask_embedding) and "mask_embedding" not in tensors(tmp_path)
    assert values(tmp_path)["dflash_config"]["mask_token_id"] == token == borrowed_mask(target()) < target().vocab_size
    torch.save(model.mask_embedding.detach()[None], tmp_path / "mask_embedding.pt")  # MiMo has the bare tensor
    assert torch.equal(said(read_drafter(tmp_path, target())), said(model))
    written(drafter(), tmp_path)
    assert not (tmp_path / "mask_embedding.pt").exists()  # it would be taken for the new drafter's


def test_a_borrowed_mask_is_a_token_after_which_no_block_begins():
    ended = Target(tiny.fresh_model("llama", eos_token_id=[7, 5], pad_token_id=9), name="ended")
    assert borrowed_mask(ended) == 5
    padded = Target(tiny.fresh_model("llama", eos_token_id=None, pad_token_id=9), name="padded")
    assert borrowed_mask(padded) == 9
    neither = Target(tiny.fresh_model("llama", eos_token_id=None, pad_token_id=None), name="neither")
    assert borrowed_mask(neither) == neither.vocab_size - 1


@pytest.mark.parametrize(
    ("layout", "options", "changes"),
    [
        ("z-lab", {}, {}),
        ("z-lab", {"sliding_window": 4}, {}),
        ("z-lab", {}, MIXED),
        ("encoder", {"taps": [1, 7]}, {"attention_bias": True}),
        ("deepspec", {"markov_rank": 3, "confidence_head": True}, {}),
        ("deepspec", {"markov_rank": 3}, {}),
        ("specforge", {"markov_rank": 3, "confidence_head": True}, {"confidence_head_with_markov": False}),
        ("modelopt", {"markov_rank": 3, "confidence_head": True}, {"confidence_head_with_markov": False}),
        ("modelopt", {"markov_rank": 3, "confidence_head": True}, {}),
        ("speculators", {}, {}),  # all full: trained both ways, although it says sliding_window_non_causal false
        ("speculators", {"sliding_window": 4}, {}),
        ("speculators", {}, MIXED),
        ("speculators", {"markov_rank": 3, "confidence_head": True}, {"sample_from_anchor": False}),
    ],
)
def test_layouts_of_other_makers_are_the_same_drafter(tmp_path, layout, options, changes):
    model = drafter(seed=3, layout=changes, **options)
    convert(layout, written(model, tmp_path / "theirs"))
    found = read_drafter(tmp_path / "theirs", target())
    assert torch.equal(said(found), said(model)) and shape(found) == shape(model) and found.embed_tokens is None
    again = read_drafter(written(found, tmp_path / "ours"), target())
    assert torch.equal(said(again), said(model)) and shape(again) == shape(model)


def test_what_a_block_size_means():
    assert drafts_of(drafter().config) == 4 and drafts_of(drafter(markov_rank=3).config) == 5


def test_dspark_drafts_from_its_first_row_unless_it_says_no(tmp_path):
    model = drafter(markov_rank=3)
    convert("deepspec", written(model, tmp_path))
    assert read_drafter(tmp_path, target()).drafts == 5
    for no in ({"sample_from_anchor": False}, {"dspark_bonus_anchor": True, "sample_from_anchor": False}):
        edit(tmp_path, **no)
        assert read_drafter(tmp_path, target()).drafts == 4
    convert("speculators", written(model, tmp_path))
    edit(tmp_path, drop=("sample_from_anchor",))
    assert read_drafter(tmp_path, target()).drafts == 4


@pytest.mark.parametrize(
    "stored",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ],
)
def test_rotary_positions_wherever_they_stand(tmp_path, stored):
    edit(written(drafter(), tmp_path), drop=("rope_theta", "rope_scaling", "rope_parameters"), **stored)
    found = read_drafter(tmp_path, target())
    torch.testing.assert_close(found.rotary.inv_freq, 5e5 ** (-torch.arange(0, 8, 2) / 8) / 2)
    config = values(written(found, tmp_path / "again"))
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_embeddings_and_heads_are_kept_only_where_they_are_not_the_targets(tmp_path):
    written(drafter(), tmp_path)
    own, head = target().embed_tokens.weight, target().model.get_output_embeddings().weight
    store(tmp_path, tensors(tmp_path) | {"embed_tokens.weight": own.clone(), "lm_head.weight": head.clone()})
    found = read_drafter(tmp_path, target())
    assert found.embed_tokens is None and found._shared[0].data_ptr() == own.data_ptr()
    changed = own.clone()
    changed[5, 3] += 1
    store(tmp_path, tensors(tmp_path) | {"embed_tokens.weight": changed})
    kept = read_drafter(tmp_path, target())
    assert torch.equal(kept.embed(torch.tensor([5]), 1)[0], changed[5:6])


def test_a_mask_token_that_texts_hold_is_read_with_a_warning(tmp_path, capsys):
    written(drafter(), tmp_path)
    read_drafter(tmp_path, target())
    assert capsys.readouterr().err == ""
    edit(tmp_path, nested={"mask_token_id": 0}, mask_token_id=0)
    assert read_drafter(tmp_path, target()).config.mask_token_id == 0
    assert (
        "warning" in (said := capsys.readouterr().err)
        and "its mask token 0 is padding or a stop token of eight" in said
    )
    written(drafter(own_mask=True), tmp_path)
    read_drafter(tmp_path, target())
    assert capsys.readouterr().err == ""  # its embedding is its own


@pytest.mark.parametrize("what", ["weights", "mask", "shape"])
def test_a_checkpoint_that_reads_back_otherwise_is_not_called_saved(tmp_path, monkeypatch, what):
    model = drafter(own_mask=True)
    if what == "shape":
        configured = files._config
        monkeypatch.setattr(
            files, "_config", lambda model: configured(model) | {"rope_theta": 5e5, "rope_parameters": None}
        )
        match = "drafts otherwise than the drafter in memory"
    elif what == "mask":
        monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            written(model, tmp_path)
        assert not (tmp_path / "mask_embedding.pt").exists()
        return
    else:
        write = files.write_weights
        monkeypatch.setattr(
            files, "write_weights", lambda folder, weights: write(folder, weights | {"norm.weight": torch.ones(32)})
        )
        match = "norm.weight reads back as something else"
    with pytest.raises(UserError, match=match):
        written(model, tmp_path)


def test_another_target_is_refused_unless_asked_for(tmp_path):
    written(drafter(), tmp_path)
    write_json(tmp_path / "understudy.json", {"target": {"name": "other", "fingerprint": "0" * 16}})
    with pytest.raises(UserError, match="any_target=true"):
        build(f"dflash:{tmp_path}", target())
    assert build(f"dflash:{tmp_path},any_target=true", target()).needs.taps == frozenset(TAPS)
    write_json(tmp_path / "understudy.json", {"target": {"name": "eight", "fingerprint": fingerprint(target())}})
    build(f"dflash:{tmp_path}", target())
