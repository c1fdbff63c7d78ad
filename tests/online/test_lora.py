"""The LoRA head, and its tensors on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from online.fake import World
from understudy.core.errors import UserError
from understudy.drafters.early_exit.saved import read_saved
from understudy.drafting.lora import LoRALinear, load_lora_state_dict, lora_state_dict

NAMES = ["drafter_head.proj.A", "drafter_head.proj.B"]


def test_it_begins_as_the_base_and_shares_its_weights() -> None:
    weight, bias = torch.randn(20, 6), torch.randn(20)
    layer = LoRALinear(weight, bias, r=3, alpha=6.0)
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, weight, bias))
    assert layer.base.weight.data_ptr() == weight.data_ptr() and layer.base.bias.data_ptr() == bias.data_ptr()
    assert [p.shape for p in layer.trainable_params()] == [(3, 6), (20, 3)]
    assert {id(p) for p in layer.trainable_params()} == {id(p) for p in layer.parameters() if p.requires_grad}
    nn.init.normal_(layer.B)
    expected = x @ weight.T + bias + 2.0 * (layer.B @ layer.A @ x.T).T  # alpha / r = 2
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.view(2, 2, 6)), expected.view(2, 2, 20))
    assert torch.equal(layer.frozen(x), nn.functional.linear(x, weight, bias))


def test_a_half_precision_base_has_a_lora_in_fp32() -> None:
    weight = torch.randn(20, 6, dtype=torch.bfloat16)
    layer = LoRALinear(weight, r=2)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert layer.A.dtype == layer.B.dtype == layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), (x @ weight.T).float() + 4.0 * x.float() @ layer.A.T @ layer.B.T)
    before = weight.clone()
    torch.autograd.grad(layer(x.float()).sum(), layer.trainable_params())
    layer.to(torch.float64)  # moves what is the layer's, not what it shares
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, before)


def test_one_that_is_built_in_inference_mode_learns() -> None:
    weight, x = torch.randn(20, 6), torch.randn(4, 6)
    with torch.inference_mode():
        layer = LoRALinear(weight, torch.zeros(20), r=3)
    optimizer = torch.optim.AdamW(layer.trainable_params(), lr=0.1)
    for _ in range(2):  # the first moves B alone, which is zero
        optimizer.zero_grad()
        layer(x)[:, 0].sum().backward()
        before = [p.detach().clone() for p in layer.trainable_params()]
        optimizer.step()
    assert all(not torch.equal(old, p) for old, p in zip(before, layer.trainable_params(), strict=True))


def test_only_a_and_b_are_saved_and_loaded_by_name() -> None:
    world = World()
    one, other = world.drafter(seed=1), world.drafter(seed=2)
    nn.init.normal_(one.drafter_head.proj.B)
    saved = lora_state_dict(one)
    assert sorted(saved) == NAMES
    load_lora_state_dict(other, saved)
    x = world.states(3)
    assert torch.equal(one.head_logits(x), other.head_logits(x))
    with torch.no_grad():
        one.drafter_head.proj.B.zero_()
    assert saved[NAMES[1]].any()  # a copy


def test_what_does_not_fit_is_named_and_nothing_is_written() -> None:
    world = World()
    drafter = world.drafter()
    start, good = lora_state_dict(drafter), {k: v + 1 for k, v in lora_state_dict(drafter).items()}
    wrong = [
        ({NAMES[0]: good[NAMES[0]]}, r"lack drafter_head\.proj\.B"),
        (good | {"other.proj.A": good[NAMES[0]]}, r"other\.proj\.A"),
        (good | {NAMES[1]: good[NAMES[1]][:, :4]}, r"\[50, 4\].*\[50, 8\]"),
        (good | {NAMES[1]: good[NAMES[1]] * torch.nan}, "no numbers"),
    ]
    for sd, message in wrong:
        with pytest.raises(UserError, match=message):
            load_lora_state_dict(drafter, sd)
        assert all(torch.equal(start[k], v) for k, v in lora_state_dict(drafter).items())
    load_lora_state_dict(drafter, good)
    assert all(torch.equal(good[k], v) for k, v in lora_state_dict(drafter).items())


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must not run",)


def test_files_that_are_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match="no LoRA checkpoint at"):
        read_saved(path)
    for content in ([1, 2], {"lora": {}}, {"weight": torch.zeros(2)}, {"lora": {"a.proj.A": 3}}, {"a.proj.A": Evil()}):
        torch.save(content, path)
        with pytest.raises(UserError, match="is no LoRA checkpoint"):
            read_saved(path)
    torch.save(lora_state_dict(World().drafter()), path)
    assert sorted(read_saved(path).lora) == NAMES  # A and B alone are one, too
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no LoRA checkpoint"):
            read_saved(path)
    with pytest.raises(UserError, match="is no LoRA checkpoint"):
        read_saved(tmp_path)
    assert capsys.readouterr().out == ""
