"""Kangaroo's adapter: the cached path against whole rows, both against a slow one, and its files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
from understudy.core.errors import UserError
from understudy.core.records import Budget
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.drafters.early_exit.adapter import Adapter
from understudy.drafters.early_exit.config import ExitConfig
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafters.early_exit.files import read_adapter, write_adapter
from understudy.drafting.spec import build

FAMILIES = ("llama", "qwen3", "gemma2", "cohere2", "granite")


def random_adapter(target, exit_layer: int = 2, std: float = 0.5) -> Adapter:
    torch.manual_seed(3)
    adapter = Adapter.identity(target, exit_layer)
    torch.nn.init.normal_(adapter.block.self_attn.o_proj.weight, std=std)
    torch.nn.init.normal_(adapter.block.input_layernorm.weight, mean=1.0, std=0.3)
    return adapter.requires_grad_(False)


def slow_read(adapter: Adapter, states: Tensor) -> Tensor:
    """The equations, head by head and row by row: [T, D] exit states -> [T, D]."""
    config, w = adapter.config, adapter.state_dict()
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def rotate(x: Tensor, position: int) -> Tensor:
        angle = position * config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        a, b = x[: size // 2], x[size // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])

    x = rms(states, w["layers.0.input_layernorm.weight"])
    q, k, v = (x @ w[f"layers.0.self_attn.{n}_proj.weight"].T for n in "qkv")
    rows = []
    for t in range(states.shape[0]):
        joined = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            own = rotate(q[t, head * size : (head + 1) * size], t)
            keys = [rotate(k[s, group * size : (group + 1) * size], s) for s in range(t + 1)]
            weights = torch.stack([own @ key / math.sqrt(size) for key in keys]).softmax(0)
            joined.append(sum(weights[s] * v[s, group * size : (group + 1) * size] for s in range(t + 1)))
        rows.append(torch.cat(joined) @ w["layers.0.self_attn.o_proj.weight"].T)
    return rms(states + torch.stack(rows), w["norm.weight"])


def test_whole_rows_and_cached_rows_are_the_slow_ones():
    target = tiny.target("qwen3")
    adapter = random_adapter(target)
    states = torch.randn(11, target.hidden_size, generator=torch.Generator().manual_seed(0))
    want = slow_read(adapter, states)
    whole = adapter(states[None], torch.arange(11)[None], torch.zeros(1, 11, dtype=torch.int64))[0]
    torch.testing.assert_close(whole, want, rtol=1e-4, atol=1e-5)
    cache = adapter.cache()
    adapter.write(states[:4], 0, cache)
    parts = [adapter.read(states[4:7], 4, cache), adapter.read(states[7:8], 7, cache)]
    adapter.read(torch.randn(2, target.hidden_size), 8, cache)  # drafts that are rejected, then overwritten
    parts.append(adapter.read(states[8:], 8, cache))
    torch.testing.assert_close(torch.cat(parts), want[4:], rtol=1e-4, atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    target = tiny.target("llama")
    adapter = random_adapter(target)
    a, b = torch.randn(5, 32), torch.randn(4, 32)
    pad = torch.randn(3, 32)
    packed = adapter(
        torch.cat([a, b, pad])[None],
        torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]]),
        torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3]),
    )[0]
    torch.testing.assert_close(packed[:5], slow_read(adapter, a), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[5:9], slow_read(adapter, b), rtol=1e-4, atol=1e-5)
    assert packed.isfinite().all()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "cohere2"])  # whose final norm subtracts the mean
def test_a_new_adapter_drafts_what_the_bare_exit_drafts(family):
    target = tiny.target(family)
    config = ExitConfig(exit_layer=2, threshold=0.0, steps=4)
    outputs = []
    for adapter in (None, Adapter.identity(target, 2)):
        sequence = DecodeSequence(target, ExitDrafter(target, config, adapter), DecodeParams(max_new_tokens=24))
        sequence.prefill(tiny.prompt())
        outputs.append([cycle.drafted for cycle in decode(sequence)])
    assert outputs[0] == outputs[1] and sum(map(len, outputs[0])) > 30


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("chunk", [3, 512])
def test_drafts_in_the_engine_are_those_of_the_whole_text(family, chunk, again):
    """Every draft equals the argmax after the adapter over all exit states of text and drafts so far: no row of its cache is stale,
    whether the drafts before were all accepted, partly, or not at all, after a rewind, and (`again`) after one into a prompt that was
    prefilled and not yet decoded."""
    target, adapter = tiny.target(family), None
    adapter = random_adapter(target, std=0.15)
    drafter = ExitDrafter(target, ExitConfig(exit_layer=2, threshold=0.0, steps=3), adapter)
    sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=30, prefill_chunk=chunk))
    sequence.prefill(tiny.prompt())
    if again:
        sequence.rewind(len(tiny.prompt()) - 5)
        sequence.prefill(tiny.prompt()[-5:])
    shapes, before = set(), list(sequence.tokens)
    for cycle in decode(sequence):
        if cycle.index:
            text = before + cycle.drafted
            with torch.inference_mode():
                states = target.stage(0, 2).run(torch.tensor(text), *_pass(target, len(text)), frozenset())
                want = target.head(slow_read(adapter, states)).argmax(-1).tolist()
            assert cycle.drafted == want[len(before) - 1 : len(text) - 1]
            shapes.add(cycle.accepted)
        before = list(sequence.tokens)
        if cycle.index == 4:
            sequence.rewind(len(before) - 2)
            before = list(sequence.tokens)
    assert 0 in shapes and len(shapes) > 1, f"accepted counts were only {shapes}"


def _pass(target, width):
    from understudy.target.attention import Pass

    at = Pass(0, width)
    cache = target.cache()
    cache.reserve(width)
    return at, target.positions(at), cache


def test_a_fork_goes_on_with_its_own_rows():
    target = tiny.target("llama")
    drafter = ExitDrafter(target, ExitConfig(exit_layer=2, threshold=0.0, steps=3), random_adapter(target, std=0.15))
    sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=16))
    sequence.prefill(tiny.prompt())
    copy = sequence.fork(1)
    first = [c.drafted for c in decode(sequence)]
    assert [c.drafted for c in decode(copy)] == first


def test_a_released_adapter_is_read_and_written(tmp_path):
    target = tiny.target("llama")
    adapter = random_adapter(target)
    write_adapter(adapter, tmp_path, released=True)
    (tmp_path / "model.safetensors").unlink()  # released adapters have the .bin alone
    back = read_adapter(tmp_path, target)
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in adapter.state_dict().items())
    assert set(back.state_dict()) == {
        "norm.weight",
        "layers.0.input_layernorm.weight",
        *(f"layers.0.self_attn.{n}_proj.weight" for n in "qkvo"),
    }
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(
        {k: v.half() for k, v in weights.items()} | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        tmp_path / "pytorch_model.bin",
    )
    assert read_adapter(tmp_path, target).norm.weight.dtype == torch.float32
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and config["rope_theta"] == 1e4 and config["exit_layer"] == 2


def test_what_is_no_adapter_is_refused_in_one_line(tmp_path):
    target = tiny.target("llama")
    with pytest.raises(UserError, match=r"config\.json"):
        read_adapter(tmp_path, target)
    write_adapter(random_adapter(target), tmp_path)
    good = {k: v.clone() for k, v in random_adapter(target).state_dict().items()}

    def refused(weights, match):
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=match):
            read_adapter(tmp_path, target)

    refused({k: v for k, v in good.items() if "o_proj" not in k}, "lacks layers.0.self_attn.o_proj.weight")
    refused(good | {"layers.0.mlp.up_proj.weight": torch.ones(2)}, "no weight of a Kangaroo adapter")
    refused(good | {"norm.weight": torch.ones(3)}, r"norm.weight is \[3\], expected \[32\]")
    (tmp_path / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match="cannot read the weights"):
        read_adapter(tmp_path, target)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        read_adapter(tmp_path, target)
    torch.save(
        {"norm.weight": torch.nn.Linear(2, 2)}, tmp_path / "pytorch_model.bin"
    )  # a pickled object: never executed
    with pytest.raises(UserError, match="cannot read the weights"):
        read_adapter(tmp_path, target)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, match in (({"hidden_size": 64}, "hidden size 64"), ({"num_hidden_layers": 2}, "one layer")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=match):
            read_adapter(tmp_path, target)


def test_adapter_options(tmp_path):
    target = tiny.target("llama")
    folder = tmp_path / "adapter"
    write_adapter(random_adapter(target, 3), folder)
    assert build(f"kangaroo:{folder}", target).config.exit_layer == 3  # where it was trained
    assert build("kangaroo", target, adapter_path=str(folder)).adapter is not None
    assert build("kangaroo", target).adapter is None and build("kangaroo,adapter_mode=none", target).adapter is None
    assert build(f"dvi,adapter_path={folder}", target).adapter is not None
    assert build("early-exit,adapter_path=none", target).adapter is None
    for text, match in (
        (f"kangaroo:{folder},adapter_mode=none", "adapter_mode none reads no adapter"),
        ("kangaroo,adapter_mode=load", "needs the adapter's folder"),
        (f"kangaroo:{folder},adapter_path=/elsewhere", "two adapters"),
        (f"kangaroo:{folder},exit_layer=2", "was trained at exit layer 3, not 2"),
        (f"early-exit,adapter_path={folder}", "--drafter kangaroo"),
        (f"dvi,adapter_path={folder},shallow_rank=2", "shallow_rank"),
        (f"kangaroo:{tmp_path / 'nothing'}", "does not exist"),
        ("kangaroo,exit_layer=4", "leaves nothing to verify"),
    ):
        with pytest.raises(UserError, match=match):
            build(text, target)


def test_the_identity_path_reads_no_file(monkeypatch):
    target = tiny.target("llama")

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a file was read")

    for name in ("torch.load", "pathlib.Path.read_text", "builtins.open"):
        monkeypatch.setattr(name, opened)
    for text in ("early-exit,adapter_path=none", "kangaroo,adapter_mode=none", "dvi"):
        drafter = build(text, target)
        sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=6))
        sequence.prefill(tiny.prompt())
        assert sum(len(c.drafted) for c in decode(sequence)) > 0


def test_the_threshold_stops_drafting():
    target = tiny.target("llama")
    lengths = []
    for threshold in (0.0, 1.0):
        drafter = ExitDrafter(target, ExitConfig(exit_layer=2, threshold=threshold, steps=5))
        sequence = DecodeSequence(target, drafter, DecodeParams(max_new_tokens=20))
        sequence.prefill(tiny.prompt())
        assert sequence.budget() == Budget(5, 5)
        lengths.append({len(c.drafted) for c in decode(sequence) if c.index})
    assert max(lengths[0]) == 5 and lengths[1] <= {0, 1}  # the unsure draft is kept, and none follows it
