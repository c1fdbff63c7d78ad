"""The one reader of drafters' weights: every way of storing them gives the same tensors, and what is not whole is one clear line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import tiny
from understudy.core.errors import UserError
from understudy.core.hashes import template_hash
from understudy.drafting.weights import (
    bare,
    check_trained_for,
    llama_config,
    made_for,
    read_config,
    read_weights,
    renamed,
    write_weights,
)
from understudy.target.fingerprint import fingerprint
from understudy.target.target import Target

TENSORS = {
    "fc.weight": torch.arange(6.0).view(2, 3),
    "d2t": torch.arange(3),
    "norm.weight": torch.ones(2, dtype=torch.bfloat16),
}


def same(found):
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in TENSORS.items())


def index(folder, suffix, places):
    (folder / f"{suffix}.index.json").write_text(json.dumps({"weight_map": places}))


def test_one_file_shards_and_torch_files_hold_the_same(tmp_path):
    parts = {"a": ["fc.weight"], "b": ["d2t", "norm.weight"]}
    for name in ("whole", "shards", "torch", "torch_shards"):
        (tmp_path / name).mkdir()
    write_weights(tmp_path / "whole", TENSORS)
    torch.save(TENSORS, tmp_path / "torch" / "pytorch_model.bin")
    for kind, folder, save in (("safetensors", "shards", save_file), ("bin", "torch_shards", torch.save)):
        for part, names in parts.items():
            save({name: TENSORS[name] for name in names}, tmp_path / folder / f"{part}.{kind}")
        one = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
        index(tmp_path / folder, one, {name: f"{part}.{kind}" for part, names in parts.items() for name in names})
    for name in ("whole", "shards", "torch", "torch_shards"):
        same(read_weights(tmp_path / name))


def test_transposed_and_shared_tensors_are_written_whole(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    write_weights(tmp_path, {"t": whole.T, "part": whole[1:]})
    found = read_weights(tmp_path)
    assert torch.equal(found["t"], whole.T) and torch.equal(found["part"], whole[1:])


def test_weights_that_are_not_whole_are_refused_in_one_line(tmp_path):
    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            read_weights(tmp_path)
        assert "\n" not in str(error.value)

    refused(r"holds no weights: neither model.safetensors nor model.safetensors.index.json nor pytorch_model.bin")
    torch.save({"norm.weight": torch.nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin")  # an object: never executed
    refused("damaged, or more than plain tensors")
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    refused("holds no weights by name")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused("cannot read the weights in .*pytorch_model.bin")

    for text in (
        "{}",
        "not JSON",
        '{"weight_map": {"fc.weight": "../elsewhere.safetensors"}}',
        '{"weight_map": {"a": 3}}',
    ):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        refused("is no index of weights")
    save_file({"d2t": TENSORS["d2t"]}, tmp_path / "a.safetensors")
    index(tmp_path, "model.safetensors", {"fc.weight": "a.safetensors", "norm.weight": "b.safetensors"})
    refused(r"lacks b.safetensors, which its index names")
    index(tmp_path, "model.safetensors", {"fc.weight": "a.safetensors"})
    refused(r"a.safetensors lacks fc.weight, which the index says is there")

    write_weights(tmp_path, TENSORS)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:7], whole[:40], whole[:-1]):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        refused("cannot read the weights in .*model.safetensors")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    refused("git lfs pull")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("fc.weight", "fc.weight"),
        ("model.fc.weight", "fc.weight"),
        ("module.model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("draft_model.module.norm.weight", "norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("modelling.weight", "modelling.weight"),
    ],
)
def test_prefixes_of_wrappers_are_taken_off(key, name):
    assert bare(key) == name


def test_names_are_changed_and_rotary_tables_left_out(tmp_path):
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    found = renamed({"model.old.weight": TENSORS["fc.weight"]} | tables, lambda key: key.replace("old", "fc"), tmp_path)
    assert list(found) == ["fc.weight"]
    twice = {"model.fc.weight": torch.ones(1), "fc.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"two of its tensors are fc\.weight"):
        renamed(twice, str, tmp_path)


def test_a_configuration_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*config\.json: No such file"):
        read_config(tmp_path)
    for text, match in (("{", "is not JSON"), ("[1]", "holds no configuration"), ("\udcff", "is not JSON")):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=match):
            read_config(tmp_path)
    for values in (
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"hidden_size": 33},
        {"rope_parameters": {"rope_type": "yarn"}},
    ):
        with pytest.raises(UserError, match=r"config\.json is refused") as error:
            llama_config(values, tmp_path)
        assert "\n" not in str(error.value)
    assert llama_config({"hidden_size": 64}, tmp_path).hidden_size == 64


def test_whose_drafter_it_is(tmp_path):
    assert made_for(tmp_path) is None
    (tmp_path / "understudy.json").write_text('{"target": {"fingerprint": "abc"}}')
    assert made_for(tmp_path) == "abc"
    for damaged in ("{}", "[]", '{"target": 3}', "half"):
        (tmp_path / "understudy.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged, or no drafter's"):
            made_for(tmp_path)


def test_another_chat_template_is_warned_of(tmp_path, capsys):
    """A drafter that was trained on other prompts drafts badly, and nothing else shows it."""
    target = tiny.target("qwen3")

    class Tokenizer:
        chat_template = "{{ messages }}"

    here = Target(target.model, Tokenizer(), "tiny")
    for template, warned in (
        (template_hash(Tokenizer()), False),
        (template_hash(SimpleNamespace(chat_template="thinking on: {{ messages }}")), True),
        (None, False),
    ):
        card = {"target": {"fingerprint": fingerprint(here)}, "text": {"chat_template": template}}
        (tmp_path / "understudy.json").write_text(json.dumps(card))
        check_trained_for(tmp_path, here, "the drafter", anyway=False)
        assert ("its chat template is not the one of this tokenizer" in capsys.readouterr().err) == warned
