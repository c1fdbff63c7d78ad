"""Loading by path and by object, and what is refused: each with one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from understudy.core.errors import UserError
from understudy.target.loading import load_target

TOKENIZER = object()  # given, so none is read


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.model("qwen3").save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def one_line(match: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        load_target(*args, **{"tokenizer": TOKENIZER, "device": "cpu", **kwargs})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_round_trip(saved: Path) -> None:
    target = load_target(saved, tokenizer=TOKENIZER, device="cpu")
    assert target.dtype == torch.float32 and target.name == str(saved) and target.tokenizer is TOKENIZER
    ids = tiny.prompt()
    with torch.inference_mode():
        assert torch.equal(tiny.logits(target.model, ids).argmax(-1), tiny.logits(tiny.model("qwen3"), ids).argmax(-1))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_bfloat16(saved: Path, dtype: Any) -> None:
    target = load_target(str(saved), tokenizer=TOKENIZER, dtype=dtype, device="cpu")
    assert target.dtype == torch.bfloat16
    assert {p.dtype for p in target.model.parameters()} == {torch.bfloat16}
    assert ("plain", None) in target.checked


def test_a_vlm_by_path(tmp_path: Path) -> None:
    tiny.model("qwen3-vl").save_pretrained(tmp_path)  # type: ignore[operator]
    target = load_target(tmp_path, tokenizer=TOKENIZER, device="cpu")
    assert type(target.model).__name__ == "Qwen3VLForConditionalGeneration" and target.layers == 4


def test_by_object() -> None:
    model = tiny.fresh_model("llama")
    target = load_target(model)
    assert target.model is model and target.tokenizer is None and target.name == "LlamaForCausalLM"


def test_without_the_probe(saved: Path) -> None:
    assert not load_target(saved, tokenizer=TOKENIZER, device="cpu", check=False).checked


def test_no_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    one_line("holds a configuration but no weights", broken)


def test_no_config(broken: Path) -> None:
    (broken / "config.json").unlink()
    one_line("holds no config.json", broken)
    one_line("holds no config.json", broken / "model.safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_no_such_path(name: str) -> None:
    one_line("does not exist", name)


def test_no_such_name() -> None:
    one_line(
        "cannot read the configuration of no-such-organisation/no-such-model", "no-such-organisation/no-such-model"
    )


def test_no_tokenizer(saved: Path) -> None:
    one_line("tokenizer", saved, tokenizer=None)


@pytest.mark.parametrize("dtype", ["float8", "int4", ""])
def test_unknown_dtype(saved: Path, dtype: str) -> None:
    one_line("unknown dtype .* use one of auto, float32, bfloat16, float16", saved, dtype=dtype)


def test_unknown_device(saved: Path) -> None:
    one_line("device 'warp'", saved, device="warp")


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_remote_code(broken: Path) -> None:
    """Nothing of it runs: there is no such file in the folder, and that is not what the message is about."""
    auto_map = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    _edit(broken, model_type="theirs", auto_map=auto_map, architectures=["TheirModel"])
    one_line("carries its own modelling code.*trust-remote-code", broken)


def test_unknown_architecture(broken: Path) -> None:
    _edit(broken, model_type="nobody-knows-this")
    one_line("cannot read the configuration", broken)


def test_no_model_type(broken: Path) -> None:
    _edit(broken, model_type=None)
    one_line("cannot read the configuration", broken)


def test_an_encoder(broken: Path) -> None:
    _edit(broken, model_type="vit", architectures=["ViTModel"])
    one_line("cannot load .* as a causal language model", broken)


def test_a_recurrent_model(broken: Path) -> None:
    _edit(broken, model_type="mamba", layer_types=None, architectures=["MambaForCausalLM"])
    one_line("is recurrent", broken)


def test_weights_of_another_shape(broken: Path) -> None:
    _edit(broken, intermediate_size=64)
    one_line("cannot load .* as a causal language model", broken)


def test_a_config_that_is_not_json(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    one_line("config", broken)


def test_weights_that_were_cut_off(broken: Path) -> None:
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    one_line("cannot load", broken)


def test_weights_that_lack_a_layer(broken: Path) -> None:
    """transformers would fill in random numbers."""
    weights = load_file(broken / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.2." not in name}
    save_file(kept, broken / "model.safetensors", {"format": "pt"})
    one_line("layers.2", broken)
