"""Who writes: a server answers by the law by which the same model answers in this process."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from understudy.assets import pocket_path
from understudy.distill.author import here, there
from understudy.target.loading import load_target

MANNER: dict[str, Any] = {
    "max_new_tokens": 4,
    "thinking": "default",
    "max_length": 64,
    "max_repeat_share": 1.0,
    "sampling": {},
}
WARM = {"do_sample": True, "temperature": 0.7, "top_k": 5}


def saved(folder: Path, family: str, generation: dict[str, Any] | None, config: dict[str, Any]) -> Path:
    """A model with the built-in tokenizer, a generation_config.json or none, and these fields in its config.json."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(pocket_path()).save_pretrained(folder)
    tiny.fresh_model(family).save_pretrained(folder)  # type: ignore[operator]
    path = folder / "config.json"
    written = json.loads(path.read_text())
    text = {**written.get("text_config", {}), **config.pop("text_config", {})}
    path.write_text(json.dumps({**written, **({"text_config": text} if text else {}), **config}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("family", "generation", "config", "stops"),
    [
        ("llama", {**WARM, "eos_token_id": [6, 8]}, {"eos_token_id": 4}, {6, 8}),
        ("llama", WARM, {"eos_token_id": [4, 9]}, {4, 9}),
        ("llama", WARM, {}, {3}),
        ("llama", None, {"eos_token_id": 4, **WARM}, {4}),
        ("qwen3-vl", WARM, {"eos_token_id": 5, "text_config": {"eos_token_id": 7}}, {5}),
        ("qwen3-vl", WARM, {"text_config": {"eos_token_id": [7, 9]}}, {7, 9}),
        ("qwen3-vl", None, {"text_config": {"eos_token_id": 7}, **WARM}, {7}),
    ],
    ids=[
        "generation",
        "config",
        "tokenizer",
        "no generation config",
        "both configs",
        "text config",
        "text config alone",
    ],
)
def test_a_server_stops_and_samples_as_this_process_does(tmp_path, family, generation, config, stops):
    folder = saved(tmp_path / "model", family, generation, config)
    own = here(load_target(folder, device="cpu", check=False), 1, **MANNER)
    served: Any = SimpleNamespace(model="m", longest=None)
    other = there(served, str(folder), {"revision": None, "trust_remote_code": False}, 1, **MANNER)
    assert own.style.stops == other.style.stops == stops
    assert own.law == other.law and own.law.temperature == 0.7 and own.law.top_k == 5
    assert own.style.limit == other.style.limit
    own.made.pop("target"), other.made.pop("target"), other.made.pop("endpoint_model")
    assert own.made == other.made
