"""Every option of DFlash changes something that can be seen; what nothing would read, or does not fit, is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import tiny
from dflash import drafts, reference
from dflash.test_objective import ROWS
from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.drafters.dflash import objective as module
from understudy.drafters.dflash.config import DFlashConfig, DFlashObjectiveConfig
from understudy.drafters.dflash.drafter import DFlashDrafter
from understudy.drafters.dflash.layout import default_taps, mask_token, taps_of
from understudy.drafters.dflash.start import train_dflash
from understudy.drafting.spec import configured
from understudy.target.target import Target

# -- drafting


def test_steps_are_at_most_what_was_trained() -> None:
    drafter = drafts.drafter(block_size=5)
    for steps, most in ((None, 4), (4, 4), (2, 2)):
        other = DFlashDrafter(drafter.target, drafter.model, DFlashConfig(steps=steps))
        assert other.steps == most and len(drafts.proposed(drafts.at(other, drafts.text(9)))) == most
    with pytest.raises(
        UserError, match=r"^5 drafts per cycle: this DFlash drafter was trained for blocks of 4 at most$"
    ):
        DFlashDrafter(drafter.target, drafter.model, DFlashConfig(steps=5))


def test_a_threshold_cuts_where_confidence_ends() -> None:
    """After the last draft whose chance, with all before it, is high enough; the first draft is always verified."""
    drafter, text = drafts.drafter(block_size=6, markov_rank=3, confidence_head=True, spread=0.5), drafts.text(9)
    whole, lengths = drafts.proposed(drafts.at(drafter, text)), []
    slow = drafts.Slow(drafter, text)
    sure = []
    for k, out in enumerate(slow.outs()):
        sure.append(float(slow.plain.confidence(out, [text[-1], *whole][k]).sigmoid()))
    chances = [math.prod(sure[: k + 1]) for k in range(6)]
    thresholds = [0.0, *(c * 0.999 for c in chances), *(min(c * 1.001, 1.0) for c in chances), 1.0]
    for threshold in thresholds:
        cut = DFlashDrafter(drafter.target, drafter.model, DFlashConfig(threshold=threshold))
        found = drafts.proposed(drafts.at(cut, text))
        want = next((k for k in range(1, 6) if chances[k] < threshold), 6) if threshold else 6
        assert found == whole[:want]
        lengths.append(want)
    assert lengths[0] == 6 and lengths[-1] == 1 and len(set(lengths)) > 2
    with pytest.raises(UserError, match=r"^a threshold needs a confidence head"):
        DFlashDrafter(drafter.target, drafts.drafter(markov_rank=3).model, DFlashConfig(threshold=0.1))


def test_another_targets_drafter_is_taken_when_asked(tmp_path: Path) -> None:
    target = tiny.target("llama")
    objective = reference.objective(target, mask_token_id=3)
    objective.save(tmp_path)
    write_json(
        tmp_path / "understudy.json", {"drafter": "dflash", "target": {"name": "other", "fingerprint": "0" * 64}}
    )
    spec, path, config = configured(f"dflash:{tmp_path}")
    with pytest.raises(UserError, match="another target"):
        spec.build(config, target, path)
    spec, path, config = configured(f"dflash:{tmp_path},any-target=true,num-speculative-tokens=2")
    assert spec.build(config, target, path).steps == 2


# -- the drafter's shape


def made(target: Target | None = None, **options: Any) -> Any:
    """What `train dflash` begins with."""
    config = DFlashObjectiveConfig(**{"taps": [1, 3], **options})
    return train_dflash(config, target or tiny.target("llama"), None, lambda: torch.zeros(1)).drafter


def test_shapes() -> None:
    plain = made()
    assert len(plain.model.layers) == 1 and len(made(num_draft_layers=3).model.layers) == 3
    deep = Target(tiny.fresh_model("llama", num_hidden_layers=28), name="deep")
    assert len(made(deep).model.layers) == 4  # one for every seven
    assert plain.steps == 7 and made(block_size=4).steps == 3 and made(draft_steps=2).steps == 2
    assert plain.model.embed_tokens is None and plain.model.markov_head is None and plain.model.confidence_head is None
    assert plain.model.attentions[0].window is None and not plain.model.attentions[0].causal
    sliding = made(sliding_window=9).model.attentions[0]
    assert sliding.window == 9 and sliding.causal
    marked = made(markov_rank=5).model
    assert marked.markov_head.markov_w1.weight.shape == (tiny.V, 5) and marked.first == 0 and marked.drafts == 8
    assert made(markov_rank=5, confidence_head=True).model.confidence_head.proj.weight.shape == (1, 32 + 5)
    embedded = made(train_embeddings=True)
    assert torch.equal(embedded.model.embed_tokens.weight, embedded.target.embed_tokens.weight)
    assert embedded.model.embed_tokens.weight.requires_grad and not embedded.target.embed_tokens.weight.requires_grad


def test_taps() -> None:
    assert [default_taps(n) for n in (4, 5, 12, 36)] == [[2], [2, 3], [2, 4, 6, 8, 10], [2, 10, 18, 26, 34]]
    with pytest.raises(UserError, match="a target of 3 layers has no default taps"):
        default_taps(3)
    assert taps_of(made(taps=[]).model.config) == (2,)
    assert taps_of(made(taps=[3, 1]).model.config) == (1, 3)
    assert taps_of(made(taps=[], target_layer_ids="0,2").model.config) == (1, 3)
    for taps, message in (([0], "tap 0"), ([4], "tap 4"), ([1, 1], "each one once")):
        with pytest.raises(UserError, match=message):
            made(taps=taps)


class Words:
    """A tokenizer with `count` tokens, of which some have names."""

    def __init__(self, count: int, mask: int | None = None, pad: int | None = 0, **names: int) -> None:
        self.words = {f"t{i}": i for i in range(count) if i not in names.values()} | names
        self.mask_token_id, self.pad_token_id = mask, pad

    def get_vocab(self) -> dict[str, int]:
        return self.words


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [
        (Words(90, mask=7), 7),
        (Words(90, mask=0), 90),  # its mask is its padding: the first row that no token has
        (Words(90), 90),
        (Words(tiny.V, reserved_9=50), 50),
        (Words(tiny.V), None),
        (None, None),
    ],
)
def test_the_mask_token_is_a_row_that_no_text_uses(tokenizer: Any, token: int | None) -> None:
    target = Target(tiny.model("llama"), tokenizer, "words")
    assert mask_token(target, None) == token
    model = made(target).model
    assert (model.mask_embedding is None) == (token is not None)
    if token is not None:
        assert model.config.mask_token_id == token
    assert made(target, mask_token_id=11).model.config.mask_token_id == 11
    for asked, message in (
        (0, "--mask-token-id 0 is padding or a stop token"),
        (tiny.V, "the target's embedding has 97 rows"),
    ):
        with pytest.raises(UserError, match=message):
            made(target, mask_token_id=asked)


# -- the objective


def figures(**options: Any) -> dict[str, float]:
    objective = reference.objective(reference.small(), **{"mask_token_id": 3, **options}).train()
    torch.manual_seed(0)
    out = objective(reference.features(objective, reference.pack(ROWS)))
    assert out.divisor is not None
    return {"loss": float(out.loss.detach()), "divisor": float(out.divisor), "count": int(out.count),
            **{name: float(total) for name, (total, _) in out.metrics.items()}}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"mask_token_id": 4}, {}),
        ({"sliding_window": 3}, {}),
        ({"sliding_window": 3}, {"sliding_window": 4}),
        ({"loss_type": "kl"}, {}),
        ({"loss_type": "ce+kl"}, {"loss_type": "kl"}),
        ({"teacher": "target"}, {}),
        ({"teacher": "target", "loss_type": "ce+kl"}, {"loss_type": "ce+kl"}),
        ({"position_weights": "none"}, {}),
        ({"position_weights": "dpace"}, {"position_weights": "none"}),
        ({"gamma": 1.0}, {}),
        ({"position_weights": "dpace", "dpace_alpha": 0.1}, {"position_weights": "dpace"}),
        ({"markov_rank": 2, "confidence_head": True}, {"markov_rank": 2}),
        ({"anchors": 2}, {}),
    ],
)
def test_what_the_loss_depends_on(options: dict[str, Any], other: dict[str, Any]) -> None:
    assert abs(figures(**options)["loss"] - figures(**other)["loss"]) > 1e-3


def test_anchors_are_counted_per_row() -> None:
    assert [figures(anchors=n)["count"] for n in (1, 2, 512)] == sorted(
        {figures(anchors=n)["count"] for n in (1, 2, 512)}
    )
    assert figures(anchors=1)["coverage"] < figures(anchors=3)["coverage"]


def test_default_gammas_are_those_of_the_paper() -> None:
    """7 for blocks of 16, 4 for blocks of 8."""
    asks = torch.ones(1, 9, dtype=torch.bool)
    for block, gamma in ((8, 4.0), (16, 7.0)):
        objective = reference.objective(reference.small(), block_size=block, num_draft_layers=1)
        assert objective._weights(torch.zeros(1, 9), asks)[0].tolist() == pytest.approx(
            [math.exp(-k / gamma) for k in range(9)]
        )


def test_kl_over_64_tokens_or_all() -> None:
    losses = []
    for full in (False, True):
        objective = reference.objective(tiny.target("llama"), loss_type="kl", full_vocab=full, num_draft_layers=1)
        losses.append(float(objective(reference.features(objective, reference.pack(ROWS))).loss.detach()))
    assert abs(losses[0] - losses[1]) > 1e-2


def test_loss_chunk_bounds_the_rows_whose_logits_exist() -> None:
    sizes, logits = list[int](), module.DFlashObjective._logits

    def seen(self: Any, states: Any, before: Any) -> Any:
        sizes.append(before.numel())
        return logits(self, states, before)

    with patch.object(module.DFlashObjective, "_logits", seen):
        for chunk in (3, 9, 1024):
            sizes.clear()
            figures(loss_chunk=chunk)
            assert max(sizes) == min(chunk, 3 * 18)


# -- what does not fit together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": [1], "target_layer_ids": "2"}, "name the same layers in two ways"),
        ({"target_layer_ids": "1,x"}, "must be layers counted from 0"),
        ({"confidence_head": True}, "give --markov-rank with it"),
        ({"gamma": 2.0, "position_weights": "dpace"}, "--gamma belongs to --position-weights exp"),
        ({"dpace_alpha": 0.2}, "--dpace-alpha belongs to --position-weights dpace"),
        ({"full_vocab": True}, "--full-vocab belongs to --loss-type kl"),
        ({"teacher": "target", "loss_type": "kl"}, "--teacher belongs to --loss-type ce"),
        ({"block_size": 1}, "greater than or equal to 2"),
        ({"anchors": 0}, "greater than or equal to 1"),
        ({"dpace_alpha": 1.0, "position_weights": "dpace"}, "less than 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DFlashObjectiveConfig(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_draft_layers": 5}, "num_draft_layers 2"),
        ({"block_size": 9}, "block_size 4"),
        ({"taps": [2]}, r"taps \[1, 3\]"),
        ({"mask_token_id": 7}, "mask_token_id 3"),
        ({"sliding_window": 4}, "sliding_window None"),
        ({"markov_rank": 4}, "markov_rank 2"),
        ({"confidence_head": False}, "confidence_head True"),
        ({"train_embeddings": True}, "train_embeddings False"),
    ],
)
def test_a_warm_start_keeps_its_shape(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    target = tiny.target("llama")
    objective = reference.objective(target, markov_rank=2, confidence_head=True, mask_token_id=3)
    objective.save(tmp_path)
    with pytest.raises(UserError, match=named):
        train_dflash(DFlashObjectiveConfig(**options), target, tmp_path, lambda: torch.zeros(1))
    same = DFlashObjectiveConfig(block_size=4, taps=[3, 1], markov_rank=2, confidence_head=True)
    as_default = DFlashObjectiveConfig(
        num_draft_layers=None, taps=[], mask_token_id=None
    )  # a file with all options says these
    for config in (same, as_default):
        warm = train_dflash(config, target, tmp_path, lambda: torch.zeros(1)).drafter.model
        assert all(
            torch.equal(a, b) for a, b in zip(warm.parameters(), objective.drafter.model.parameters(), strict=True)
        )
