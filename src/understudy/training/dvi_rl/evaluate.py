"""Accept rate, throughput and perplexity of held-out prompts, with plain decoding and the bare exit beside the drafter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from understudy.core.errors import UserError
from understudy.decoding.acceptance import WARM_TOKENS, Acceptance, measure_acceptance, perplexity
from understudy.drafters.early_exit.config import ExitConfig
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import build
from understudy.target.target import Target
from understudy.training.dvi_rl.config import DviRlExperimentConfig
from understudy.training.dvi_rl.learner import Learner
from understudy.training.dvi_rl.rollout import Prompts, Sample

PLAIN, BARE, OURS = "none", "early-exit", "dvi-rl"


def held_out(config: DviRlExperimentConfig, path: Path, target: Target) -> list[Sample]:
    """The first `eval_num_prompts` usable prompts of a file. UserError where it has none."""
    prompts = Prompts(path, target, config.max_prompt_tokens, config.max_new_tokens)
    samples = list(islice(prompts, config.eval_num_prompts))
    if not samples:
        raise UserError(
            f"{path} has no prompt to evaluate on: {prompts.skipped.count} lines give none, {prompts.too_long} prompts are too long"
        )
    return samples


def evaluate(learner: Learner, samples: Sequence[Sample], max_new_tokens: int) -> dict[str, Any]:
    """What the drafter is worth now, JSON-ready.

    `perplexity` is of prompts and answers as the data has them, under the verifier: it moves only with `lora_D`. Per drafter:
    `accept_rate` = accepted of judged drafts (a cycle's drafts up to and including the first reject), `accepted_of_drafted`, `tau`,
    `tokens_per_s`, and `identical`, the share of prompts whose output is that of plain decoding with the same verifier.
    """
    target = learner.adapters.target
    config = learner.config
    bare = ExitConfig(exit_layer=config.exit_layer, threshold=config.threshold, steps=config.steps)
    drafters: dict[str, Drafter] = {
        PLAIN: build(PLAIN, target),
        BARE: ExitDrafter(target, bare),  # drafts in the target's own cache, so it runs no layer twice
        OURS: learner.drafter,
    }
    prompts = [sample.prompt for sample in samples]
    for drafter in drafters.values():  # first passes are slower: keep them out of the figures
        measure_acceptance(target, drafter, prompts[:1], WARM_TOKENS)
    measured = {name: Acceptance() for name in drafters}
    for prompt in prompts:  # drafter after drafter on each prompt: a machine that slows down slows all of them
        for name, drafter in drafters.items():
            _add(measured[name], measure_acceptance(target, drafter, [prompt], max_new_tokens))
    plain = measured[PLAIN]
    return {
        "step": learner.progress.step,
        "prompts": len(prompts),
        "dtype": str(target.dtype).removeprefix("torch."),
        "perplexity": perplexity(target, [sample.prompt + sample.reference for sample in samples]),
        "repeat_share": plain.repeat_share,
        "drafters": {name: _figures(result, plain) for name, result in measured.items()},
        "plain_outputs": plain.outputs,
    }


def _add(total: Acceptance, more: Acceptance) -> None:
    total.stats.merge(more.stats)
    total.outputs += more.outputs
    total.tried_at.update(more.tried_at)
    total.accepted_at.update(more.accepted_at)


def _figures(result: Acceptance, plain: Acceptance) -> dict[str, float | None]:
    tried, stats = sum(result.tried_at.values()), result.stats
    same = [ours == theirs for ours, theirs in zip(result.outputs, plain.outputs, strict=True)]
    return {
        "accept_rate": sum(result.accepted_at.values()) / tried if tried else None,
        "accepted_of_drafted": stats.acceptance_rate if stats.drafted else None,
        "tau": stats.tau,
        "tokens": float(result.tokens),
        "rejected_drafts": float(stats.rejected),
        "tokens_per_s": stats.tokens_per_s,
        "speedup_vs_none": stats.tokens_per_s / plain.stats.tokens_per_s if plain.stats.tokens_per_s else None,
        "identical": sum(same) / len(same),
    }
