"""The drafters that ship with the built-in model: made for exactly these weights, and worth having from the first minute."""

from __future__ import annotations

import pytest

import tiny
from understudy.assets import drafter_path, pocket_path, prompts_path
from understudy.core.errors import UserError
from understudy.core.hashes import template_hash, tokenizer_hash
from understudy.data.prompts import load_prompts, render
from understudy.decoding.acceptance import measure_acceptance
from understudy.drafting.spec import build
from understudy.drafting.weights import read_card
from understudy.target.fingerprint import fingerprint
from understudy.target.loading import load_target

SHIPPED = ("eagle3", "dflash")


@pytest.fixture(scope="module")
def pocket():
    return load_target(pocket_path(), dtype="float32", check=False)


@pytest.mark.parametrize("name", SHIPPED)
def test_it_was_trained_for_the_model_that_ships(pocket, name):
    """Whoever replaces the built-in model trains its drafters anew."""
    card = read_card(drafter_path(name))
    assert card is not None
    assert card["target"]["fingerprint"] == fingerprint(pocket)
    assert card["text"]["tokenizer"] == tokenizer_hash(pocket.tokenizer)
    assert card["text"]["chat_template"] == template_hash(pocket.tokenizer)
    assert card["servable"]["vllm"] == card["servable"]["sglang"] == "ok"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_folder_holds_what_engines_read_and_the_card_and_nothing_else(name):
    names = sorted(path.name for path in drafter_path(name).iterdir())
    assert names == ["config.json", "model.safetensors", "understudy.json"]


def test_they_draft_well_and_a_tree_better_than_a_chain(pocket):
    prompts = [render(pocket.tokenizer, p.messages) for p in load_prompts(prompts_path(), 3)]
    chain, tree, block = (
        measure_acceptance(pocket, build(text, pocket), prompts, 48)
        for text in ("eagle3", "eagle3,tree=true", "dflash")
    )
    assert chain.outputs == tree.outputs == block.outputs
    assert 2 < chain.tau < tree.tau, "benchmarks/results has the figures; here only that it is no noise"
    assert block.tau > 2


@pytest.mark.parametrize("name", SHIPPED)
def test_another_model_is_told_to_bring_its_own(name):
    with pytest.raises(UserError, match=rf"has no weights for .*: give a checkpoint, {name}:DIR"):
        build(name, tiny.target("qwen3"))
