"""Checkpoints of EAGLE-3: what is written is what is read, in every public layout, and what cannot be meant is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eagle3.checkpoints import DEFAULT, TAPS, convert, drafter, edit, logits, store, target, tensors, written
from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.drafters.eagle3 import files
from understudy.drafters.eagle3.files import read_drafter, write_drafter
from understudy.drafting.spec import build
from understudy.target.fingerprint import fingerprint

SHAPE = (*files.WRITTEN, "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id")
NORMS = st.sampled_from([{}, {"fc_norm": True}, {"norm_before_fc": True}])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    norms=NORMS,
    residual=st.booleans(),
    output=st.booleans(),
    size=st.sampled_from([1, 40, 96, None]),
    taps=st.sampled_from([[0], [1, 7], DEFAULT, [0, 1, 2, 3]]),
    own=st.booleans(),
    width=st.sampled_from([None, 16]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_was_written_is_read(tmp_path, norms, residual, output, size, taps, own, width, bias, dtype):
    shape = {"norm_before_residual": residual, "norm_output": output, "draft_vocab_size": size, "taps": taps, **norms}
    model = drafter(own_embedding=own or width is not None, width=width, layout={"bias": bias}, **shape).to(dtype)
    found = read_drafter(written(model, tmp_path), target())
    had, has = model.config.to_dict(), found.config.to_dict()
    assert (
        found.dtype == torch.float32
        and found.taps == model.taps
        and {k: had[k] for k in SHAPE} == {k: has[k] for k in SHAPE}
    )
    assert (found.embed_tokens is None) == (model.embed_tokens is None)
    assert (found.ids is None) == (size is None) and (size is None or torch.equal(found.ids, model.ids))
    assert torch.equal(logits(found), logits(model.float()))


def test_config_holds_what_engines_read_and_nothing_else(tmp_path):
    config = json.loads((written(drafter(norm_output=True), tmp_path) / "config.json").read_text())
    assert config == {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": 32, "target_hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "hidden_act": "silu", "vocab_size": 97, "draft_vocab_size": 40, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "attention_bias": False, "mlp_bias": False, "bias": False, "tie_word_embeddings": False, "fc_norm": False,
        "norm_before_fc": False, "norm_output": True, "norm_before_residual": False, "num_aux_hidden_states": 3,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 5],  # vLLM: 0 = embeddings
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 4], "norm_before_fc": False},
        "rope_theta": 1e4, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "dtype": "float32", "torch_dtype": "float32",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
    }  # vLLM reads every *.safetensors


def test_maps_stand_in_the_file_only_beside_a_part_of_the_vocabulary(tmp_path):
    part = tensors(written(drafter(), tmp_path / "part"))
    assert part["d2t"].dtype == torch.int64 and part["t2d"].dtype == torch.bool and part["t2d"].shape == (97,)
    assert torch.equal(part["t2d"].nonzero()[:, 0], part["d2t"] + torch.arange(40))
    whole = tensors(written(drafter(draft_vocab_size=97), tmp_path / "whole"))
    assert set(part) - set(whole) == {"d2t", "t2d"} and "embed_tokens.weight" not in part


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("safeailab", {}),
        ("specforge", {"taps": [1, 3, 6], "norm_output": True}),
        ("specforge", {"taps": [0, 6]}),
        ("old_norms", {"fc_norm": True}),
        ("modelopt", {"taps": [2, 3, 7]}),
        ("automodel", {"norm_before_fc": True}),
        ("automodel", {"draft_vocab_size": 97}),
        ("speculators", {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}),
        ("speculators", {"norm_before_residual": False, "fc_norm": True, "taps": [1, 5, 7]}),
    ],
)
def test_layouts_of_other_makers_are_the_same_drafter(tmp_path, layout, shape):
    model = drafter(seed=3, **shape)
    convert(layout, written(model, tmp_path))
    found = read_drafter(tmp_path, target())
    assert torch.equal(logits(found), logits(model)) and found.taps == model.taps and found.embed_tokens is None
    again = read_drafter(written(found, tmp_path / "again"), target())
    assert torch.equal(logits(again), logits(model))


def test_speculators_norm_before_residual_is_on_unless_it_says_no(tmp_path):
    model = drafter(norm_before_residual=True)
    convert("speculators", written(model, tmp_path))
    edit(tmp_path, drop=("norm_before_residual",))
    assert torch.equal(logits(read_drafter(tmp_path, target())), logits(model))


@pytest.mark.parametrize(
    "stored",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {"rope_theta": 500000, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {
            "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
    ],
)  # fmt: skip
def test_rotary_positions_wherever_they_stand(tmp_path, stored):
    written(drafter(), tmp_path)
    edit(tmp_path, drop=("rope_theta", "rope_scaling", "rope_parameters"), **stored)
    found = read_drafter(tmp_path, target())
    assert found.config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    inverse = 5e5 ** (-torch.arange(0, 8, 2) / 8) / 2
    torch.testing.assert_close(found.rotary.inv_freq, inverse)
    config = json.loads((written(found, tmp_path / "again") / "config.json").read_text())
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert read_drafter(tmp_path / "again", target()).config.rope_parameters == found.config.rope_parameters


def test_embeddings_are_kept_only_where_they_are_not_the_targets(tmp_path):
    written(drafter(), tmp_path)
    own = target().embed_tokens.weight
    store(tmp_path, tensors(tmp_path) | {"embed_tokens.weight": own.clone()})
    found = read_drafter(tmp_path, target())
    assert found.embed_tokens is None and found._shared[0].data_ptr() == own.data_ptr()
    changed = own.clone()
    changed[5, 3] += 1
    store(tmp_path, tensors(tmp_path) | {"embed_tokens.weight": changed})
    kept = read_drafter(tmp_path, target())
    assert kept.embed_tokens is not None and torch.equal(kept.embed(torch.tensor([5])), changed[5:6])
    assert torch.equal(tensors(written(kept, tmp_path / "again"))["embed_tokens.weight"], changed)


def test_a_whole_vocabulary_without_a_head_or_with_idle_maps(tmp_path):
    model = drafter(draft_vocab_size=97)
    written(model, tmp_path)
    edit(tmp_path, draft_vocab_size=None)
    weights = tensors(tmp_path)
    idle = {"d2t": torch.zeros(97, dtype=torch.int64), "t2d": torch.zeros(97, dtype=torch.bool)}
    store(tmp_path, weights | idle)
    found = read_drafter(tmp_path, target())
    assert found.d2t is None and torch.equal(logits(found), logits(model))
    store(tmp_path, {name: x for name, x in weights.items() if name != "lm_head.weight"})
    found = read_drafter(tmp_path, target())
    assert torch.equal(found.lm_head.weight, target().model.lm_head.weight)
    store(tmp_path, weights | {"d2t": torch.ones(97, dtype=torch.int64)})
    with pytest.raises(UserError, match="d2t moves tokens, and the draft vocabulary is the whole one"):
        read_drafter(tmp_path, target())


def test_integer_types_of_maps_do_not_matter(tmp_path):
    model = drafter()
    weights = tensors(written(model, tmp_path))
    store(tmp_path, weights | {"d2t": weights["d2t"].int(), "t2d": weights["t2d"].to(torch.uint8)})
    assert torch.equal(read_drafter(tmp_path, target()).ids, model.ids)


def test_a_checkpoint_that_reads_back_as_another_drafter_is_no_checkpoint(tmp_path, monkeypatch):
    model = drafter(norm_output=True)
    real_config, real_weights = files._config, files.write_weights
    for change in ({"norm_output": False}, {"norm_before_residual": True}, {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0},
        "rope_theta": 9.0}, {"rms_norm_eps": 0.1}, {"hidden_act": "gelu"}):  # fmt: skip
        monkeypatch.setattr(files, "_config", lambda model, change=change: real_config(model) | change)
        with pytest.raises(UserError, match="drafts otherwise than the drafter in memory"):
            write_drafter(model, tmp_path)
    moved = {TAPS: [1, 4, 5], "eagle_config": {TAPS: [0, 3, 4]}}
    monkeypatch.setattr(files, "_config", lambda model: real_config(model) | moved)
    with pytest.raises(UserError, match="drafts otherwise"):
        write_drafter(model, tmp_path)
    monkeypatch.setattr(files, "_config", real_config)
    for change in (
        lambda w: w | {"norm.weight": w["norm.weight"] + 1},
        lambda w: w | {"fc.weight": w["fc.weight"].half()},
    ):
        monkeypatch.setattr(files, "write_weights", lambda folder, w, change=change: real_weights(folder, change(w)))
        with pytest.raises(UserError, match="reads back as something else than was written"):
            write_drafter(model, tmp_path)
    monkeypatch.setattr(files, "write_weights", real_weights)
    write_drafter(model, tmp_path)


def test_saving_draws_no_random_numbers(tmp_path):
    model, before = drafter(), torch.get_rng_state()
    write_drafter(model, tmp_path)
    read_drafter(tmp_path, target())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_is_accepted_wherever_a_checkpoint_is_and_only_by_its_target(tmp_path):
    made, on = {}, target()
    for step in (100, 200):
        place = tmp_path / "checkpoints" / f"step_{step:06d}"
        made[step] = written(drafter(seed=step), place)
        write_json(place / "understudy.json", {"target": {"fingerprint": fingerprint(on)}})
    (tmp_path / "best").symlink_to("checkpoints/step_000100", target_is_directory=True)
    (tmp_path / "latest").symlink_to("checkpoints/step_000200", target_is_directory=True)
    for where, step in {
        "": 100,
        "/best": 100,
        "/latest": 200,
        "/checkpoints": 100,
        "/checkpoints/step_000200": 200,
    }.items():
        found = build(f"eagle3:{tmp_path}{where}", on).model
        assert torch.equal(found.fc.weight, drafter(seed=step).fc.weight), where
    for file in ("config.json", "model.safetensors", "understudy.json"):
        with pytest.raises(UserError, match=f"{file} is a file; give the folder that it is in"):
            build(f"eagle3:{made[100] / file}", on)
    write_json(made[100] / "understudy.json", {"target": {"fingerprint": "another"}})
    with pytest.raises(UserError, match=r"was trained for another target than eight.*any_target=true"):
        build(f"eagle3:{tmp_path}", on)
    build(f"eagle3:{tmp_path},any_target=true", on)


def test_rotary_frequencies_stay_exact_in_every_dtype():
    """Engines compute them in fp32; rounded to bf16, angles at position 1000 would be off by a radian."""
    exact = 1e4 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(drafter().to(torch.bfloat16).rotary.inv_freq, exact, rtol=0, atol=1e-7)
