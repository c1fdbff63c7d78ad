"""lora_S and lora_D: where they stand, what they change, what they leave alone, and their files."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from training import rl
from understudy.core.errors import UserError
from understudy.training.dvi_rl import inject_lora
from understudy.training.dvi_rl.adapters import DEEP, SHALLOW

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "cohere2", "granite", "qwen3-vl")
PROMPTS = [tiny.prompt(length, seed) for seed, length in enumerate((5, 12, 20))]
TOKENS = 24


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_s_never_changes_a_token(family):
    target = rl.target(family)
    weights = rl.base(target)
    adapters = inject_lora(target, 2, rank=4, deep=False)
    rl.stir(adapters, SHALLOW)
    drafter, rejected = adapters.drafter(steps=4, threshold=0.0), 0
    for prompt in PROMPTS:
        output, more = rl.speculate(target, drafter, prompt, TOKENS)
        rejected += more
        assert output == rl.greedy(tiny.model(family), prompt, output)
    assert rejected >= 40, "what is never rejected says nothing about losslessness"
    after = rl.base(target)
    assert weights.keys() == after.keys()
    assert all(torch.equal(weights[name], after[name]) for name in weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_d_is_what_verifies_even_where_stages_were_built_before(family):
    target = rl.target(family)
    bare = inject_lora(rl.target(family), 2, deep=False).drafter(steps=3, threshold=0.0)
    rl.speculate(bare.target, bare, PROMPTS[0], 4)
    target.stage(0, target.layers), target.stage(2, target.layers)  # as a target that has been decoding has them
    original = tiny.logits(target.model, PROMPTS[2])
    adapters = inject_lora(target, 2, rank=4)
    assert torch.equal(tiny.logits(target.model, PROMPTS[2]), original), "B = 0 is no change at all"
    drafter = adapters.drafter(steps=4, threshold=0.0)
    output, _ = rl.speculate(target, drafter, PROMPTS[1], TOKENS)
    assert output == rl.greedy(tiny.model(family), PROMPTS[1], output)

    rl.stir(adapters, DEEP, std=0.3)
    rl.stir(adapters, SHALLOW)
    changed = rl.merged(family, adapters, DEEP)
    rejected, moved = 0, 0
    for prompt in PROMPTS:
        output, more = rl.speculate(target, drafter, prompt, TOKENS)
        rejected += more
        moved += output != rl.greedy(tiny.model(family), prompt, output)
        assert output == rl.greedy(changed, prompt, output)
    assert rejected >= 40
    assert moved, "an adapter that changes nothing tests nothing"


def test_each_adapter_stands_on_its_own_side_of_the_exit():
    adapters = inject_lora(rl.target("qwen3-vl"), 3, rank=2)
    layers = {
        name: {int(key.split(".layers.")[1].split(".")[0]) for key in adapters.get_peft_model_state_dict(name)}
        for name in (SHALLOW, DEEP)
    }
    assert layers == {SHALLOW: {0, 1, 2}, DEEP: {3}}
    every = {id(p) for name in (SHALLOW, DEEP) for p in adapters.trainable(name)}
    assert every == {id(p) for p in adapters.parameters()}, "both are found as parameters of the module"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in adapters.parameters())
    assert {id(p) for p in adapters.target.model.parameters() if p.requires_grad} == {
        id(p) for p in adapters.trainable(DEEP)
    }
    maps = {key.split(".lora_")[0].rsplit(".", 1)[1] for key in adapters.get_peft_model_state_dict(DEEP)}
    assert maps == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("visual" in key for key in adapters.get_peft_model_state_dict(DEEP))


def test_half_precision_weights_keep_adapters_in_float32():
    target = rl.target()
    target.model.to(torch.bfloat16)
    adapters = inject_lora(type(target)(target.model, target.tokenizer, "half"), 2, rank=2)
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    rl.stir(adapters, DEEP), rl.stir(adapters, SHALLOW)
    output, _ = rl.speculate(adapters.target, adapters.drafter(3, 0.0), PROMPTS[0], 8)
    assert len(output) == 8


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3-vl"])
def test_the_frozen_verifier_stays_what_it_was(family):
    target = rl.target(family)
    adapters = inject_lora(target, 2, rank=4)
    rl.stir(adapters, DEEP, std=0.3)
    ids = torch.tensor(PROMPTS[2])
    at, cache = tiny_pass(len(ids)), target.cache()
    with torch.inference_mode():
        entry, _ = target.forward(ids, at, cache, 0, 2)
        still = target.head(adapters.frozen.run(entry, at, target.positions(at), cache, frozenset()))
        moved = target.head(target.forward(entry, at, cache, 2)[0])
    torch.testing.assert_close(still, tiny.logits(tiny.model(family), PROMPTS[2]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved, tiny.logits(target.model, PROMPTS[2]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(still, moved, atol=1e-2)


def tiny_pass(width):
    from understudy.target.attention import Pass

    return Pass(0, width)


def test_seed_and_alpha_and_rank():
    def first(**settings):
        adapters = inject_lora(rl.target(), 2, **settings)
        rl.stir(adapters, SHALLOW)
        tensors = rl.weights(adapters, SHALLOW)
        return next(v for k, v in tensors.items() if ".lora_A." in k), adapters.shallow(torch.tensor(PROMPTS[0]))

    a, states = first(rank=4, alpha=4.0, seed=1)
    assert torch.equal(a, first(rank=4, alpha=4.0, seed=1)[0])
    assert not torch.equal(a, first(rank=4, alpha=4.0, seed=2)[0])
    assert not torch.allclose(states, first(rank=4, alpha=8.0, seed=1)[1])
    assert first(rank=3)[0].shape[0] == 3


def test_injecting_leaves_the_global_random_stream_alone():
    target = rl.target()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    inject_lora(target, 2)
    assert torch.equal(torch.random.get_rng_state(), before)


# Files


@pytest.fixture
def saved(tmp_path):
    adapters = inject_lora(rl.target(), 2, rank=4, alpha=6.0)
    rl.stir(adapters, SHALLOW), rl.stir(adapters, DEEP, std=0.2)
    adapters.save(tmp_path / "both")
    return adapters, tmp_path / "both"


def test_saved_and_loaded_separately(saved, tmp_path):
    adapters, folder = saved
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} >= {
        f"{name}/{file}"
        for name in ("lora_S", "lora_D")
        for file in ("adapter_config.json", "adapter_model.safetensors")
    }
    other = inject_lora(rl.target(), 2, rank=4, alpha=6.0, seed=9)
    places = [p.data_ptr() for p in other.parameters()]
    other.load(folder)
    assert places == [p.data_ptr() for p in other.parameters()], "in place: an optimizer holds these tensors"
    for name in (SHALLOW, DEEP):
        mine, theirs = rl.weights(adapters, name), rl.weights(other, name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    prompt = PROMPTS[1]
    ours, theirs = (rl.speculate(a.target, a.drafter(4, 0.0), prompt, TOKENS) for a in (adapters, other))
    assert ours == theirs
    shutil.rmtree(folder / "lora_D")  # whoever wants the drafter alone needs nothing else
    alone = inject_lora(rl.target(), 2, rank=4, alpha=6.0, deep=False)
    alone.load(folder)
    output, _ = rl.speculate(alone.target, alone.drafter(4, 0.0), prompt, TOKENS)
    assert output == rl.greedy(tiny.model("llama"), prompt, output)


@pytest.mark.parametrize("family", ["llama", "qwen3-vl"])
def test_peft_itself_reads_the_files(family, tmp_path):
    from peft import PeftModel

    adapters = inject_lora(rl.target(family), 2, rank=4, alpha=6.0)
    rl.stir(adapters, SHALLOW), rl.stir(adapters, DEEP, std=0.2)
    adapters.save(tmp_path)
    deep = PeftModel.from_pretrained(tiny.fresh_model(family), str(tmp_path / "lora_D")).base_model.model
    torch.testing.assert_close(tiny.logits(deep, PROMPTS[2]), tiny.logits(adapters.target.model, PROMPTS[2]))
    shallow = PeftModel.from_pretrained(tiny.fresh_model(family), str(tmp_path / "lora_S")).base_model.model
    torch.testing.assert_close(
        tiny.hidden_states(shallow, PROMPTS[2])[2], adapters.shallow(torch.tensor(PROMPTS[2])), rtol=1e-4, atol=1e-4
    )


def _cut(path):
    path.write_bytes(path.read_bytes()[:100])


def _edit(place, change):
    tensors = load_file(place / "adapter_model.safetensors")
    change(tensors, next(iter(tensors)))
    save_file(tensors, place / "adapter_model.safetensors")


DAMAGE = {
    "no folder": (lambda d: shutil.rmtree(d / "lora_D"), "cannot read the adapter's .*lora_D/adapter_config.json"),
    "no weights": (lambda d: (d / "lora_D/adapter_model.safetensors").unlink(), "lora_D holds no adapter"),
    "half a file": (lambda d: _cut(d / "lora_D/adapter_model.safetensors"), "cannot read .*adapter_model.safetensors"),
    "no JSON": (lambda d: _cut(d / "lora_D/adapter_config.json"), "adapter_config.json is not JSON"),
    "a list": (lambda d: (d / "lora_D/adapter_config.json").write_text("[]"), "is no adapter's configuration"),
    "other rank": (
        lambda d: (d / "lora_D/adapter_config.json").write_text(json.dumps({"r": 5, "lora_alpha": 6.0})),
        "lora_D has r 5, this run 4",
    ),
    "a tensor less": (lambda d: _edit(d / "lora_D", lambda t, k: t.pop(k)), "lora_D lacks base_model"),
    "a tensor more": (lambda d: _edit(d / "lora_D", lambda t, k: t.update(x=t[k].clone())), "lora_D also has x"),
    "another shape": (lambda d: _edit(d / "lora_D", lambda t, k: t.update({k: t[k][:1]})), r"is \[1, \d+\], expected"),
    "not a number": (
        lambda d: _edit(d / "lora_D", lambda t, k: t[k].fill_(float("nan"))),
        "values that are no numbers",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_and_nothing_changes(damage, saved):
    _, folder = saved
    spoil, message = DAMAGE[damage]
    spoil(folder)
    other = inject_lora(rl.target(), 2, rank=4, alpha=6.0)
    before = {name: rl.weights(other, name) for name in (SHALLOW, DEEP)}
    with pytest.raises(UserError, match=message):
        other.load(folder)
    for name, tensors in before.items():
        assert all(torch.equal(tensors[key], now) for key, now in rl.weights(other, name).items())


def test_the_random_streams_of_others_stay_as_they_were(monkeypatch):
    """Those of every device: seeding torch seeds them all."""
    device = {0: "as it was"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(device))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: device.update({0: f"seeded with {seed}"}))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda which: device[which])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, which: device.update({which: state}))
    before, target = torch.get_rng_state(), rl.target()
    device[0] = "as it was"
    torch.set_rng_state(before)
    first = rl.weights(inject_lora(target, 2, rank=2, seed=3), SHALLOW)
    assert torch.equal(torch.get_rng_state(), before) and device == {0: "as it was"}
    again = rl.weights(inject_lora(rl.target(), 2, rank=2, seed=3), SHALLOW)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("layer", "message"), [(4, "exit_layer 4 leaves nothing to verify"), (0, "nothing to draft with")]
)
def test_an_exit_that_leaves_a_side_empty(layer, message):
    with pytest.raises(UserError, match=message):
        inject_lora(rl.target(), layer)


def test_a_model_takes_adapters_once():
    target = rl.target()
    inject_lora(target, 2)
    with pytest.raises(UserError, match="already carries a LoRA"):
        inject_lora(target, 2)


def test_a_bare_model_is_enough():
    adapters = inject_lora(tiny.fresh_model("llama"), exit_layer=2)
    assert adapters.target.layers == tiny.LAYERS
