"""Which checkpoints a drafter takes: runs as well as folders, and only those that were made for its target."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny
from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.drafters.early_exit.adapter import Adapter
from understudy.drafters.early_exit.files import write_adapter
from understudy.drafters.early_exit.saved import find
from understudy.drafting.spec import build
from understudy.target.fingerprint import fingerprint, places
from understudy.target.target import Target
from understudy.training.online import OnlineLearner


def adapter_run(target: Target, run):
    """A run folder as the offline loop leaves it."""
    for step in (100, 200):
        place = run / "checkpoints" / f"step_{step:06d}"
        place.mkdir(parents=True)
        adapter = Adapter.identity(target, 2)
        adapter.norm.weight.data.fill_(step)
        write_adapter(adapter, place)
        write_json(place / "understudy.json", {"target": {"fingerprint": fingerprint(target)}})
    (run / "best").symlink_to("checkpoints/step_000100", target_is_directory=True)
    (run / "latest").symlink_to("checkpoints/step_000200", target_is_directory=True)


def test_a_run_is_accepted_wherever_a_checkpoint_is(tmp_path):
    target = tiny.target("llama")
    adapter_run(target, tmp_path)
    found = {"": 100, "/best": 100, "/latest": 200, "/checkpoints/step_000200": 200}
    for where, step in found.items():
        assert build(f"kangaroo:{tmp_path}{where}", target).adapter.norm.weight[0] == step
    drafter = build(f"dvi,dvi_online=true,rank=3,save_lora_path={tmp_path / 'checkpoints'}", target)
    torch.nn.init.normal_(drafter.drafter_head.proj.B)
    OnlineLearner(drafter).close()
    for where in ("", "/checkpoints", "/checkpoints/final.pt"):
        assert torch.equal(build(f"dvi:{tmp_path}{where}", target).drafter_head.proj.B, drafter.drafter_head.proj.B)
    with pytest.raises(UserError, match="holds no checkpoint"):
        find(tmp_path / "checkpoints" / "step_000100")
    with pytest.raises(UserError, match=r"was trained with rank 3.*not 5"):
        build(f"dvi:{tmp_path},rank=5", target)


def test_weights_of_another_target_are_refused_unless_asked_for(tmp_path):
    target, other = tiny.target("llama"), Target(copy.deepcopy(tiny.model("llama")), None, "other")
    with torch.no_grad():
        other.decoder.layers[0].mlp.up_proj.weight += 0.5
    adapter_run(target, tmp_path)
    OnlineLearner(build(f"dvi,dvi_online=true,save_lora_path={tmp_path / 'checkpoints'}", target)).close()
    for text in (f"kangaroo:{tmp_path}", f"dvi:{tmp_path}"):
        build(text, target)
        with pytest.raises(UserError, match=r"was trained for another target than other.*any_target=true"):
            build(text, other)
        build(f"{text},any_target=true", other)
    (tmp_path / "best" / "understudy.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        build(f"kangaroo:{tmp_path}", target)


def test_the_fingerprint_follows_weights_and_architecture_and_not_dtype_or_name():
    target = tiny.target("qwen3")
    own = fingerprint(target)
    rounded = copy.deepcopy(target.model).to(torch.bfloat16)
    assert fingerprint(Target(rounded, None, "x")) == fingerprint(Target(copy.deepcopy(rounded).float(), None, "y"))
    changed = copy.deepcopy(target.model)
    with torch.no_grad():
        changed.get_decoder().norm.weight[0] += 1
    assert fingerprint(Target(changed)) != own == fingerprint(Target(copy.deepcopy(target.model)))


def test_samples_lie_inside_large_weights():
    for count in (1, 2, 63, 64, 65, 2**24 + 3, 131_072_000, 622_329_856):
        found = places(count)
        assert found[0] == 0 and found[-1] == count - 1 and found == sorted(set(found)) and len(found) == min(64, count)
