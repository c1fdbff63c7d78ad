"""Who takes part: the modes of a run, from its options."""

from __future__ import annotations

from typing import Any

from understudy.bench.config import BenchConfig
from understudy.bench.huggingface import METHODS, HuggingFaceMode
from understudy.bench.modes import EngineMode, Mode
from understudy.core.errors import UserError
from understudy.decoding.request import DecodeParams
from understudy.decoding.stops import StopRule
from understudy.drafting.spec import build, specs
from understudy.target.params import SamplingParams, params_from_generation_config
from understudy.target.target import Target

PLAIN, WRONG = "none", "null"  # the baselines that are drafters of ours: the denominator, and the one that must lose


def law(config: BenchConfig, target: Target) -> SamplingParams:
    """What the target's generation config and the options ask for together."""
    return params_from_generation_config(getattr(target.model, "generation_config", None), **config.sampling())


def drafters(config: BenchConfig) -> list[str]:
    """The drafters as given; without any, all that need no files."""
    able = [name for name, spec in specs().items() if not spec.takes_path and name not in (PLAIN, WRONG)]
    return config.drafters() or able


def line_up(config: BenchConfig, target: Target, **defaults: Any) -> list[Mode]:
    """All modes: baselines first, `none` before all, then the drafters as given. A name stands once.

    `defaults` are draft options that apply where a drafter's text does not say and the drafter has them.
    """
    sampling = law(config, target)
    if config.draft_sampling == "sample" and sampling.temperature == 0:
        raise UserError("--draft-sampling sample draws drafts, which needs a --temperature above 0")
    if getattr(getattr(target.model, "generation_config", None), "stop_strings", None):
        raise UserError("the model's generation_config has stop_strings, which bench does not compare: unset them")
    stop_ids = () if config.ignore_eos else target.eos_ids
    given = drafters(config)
    defaults["steps"] = config.steps

    def engine(text: str, adaptive: bool = False, **options: Any) -> EngineMode:
        params = DecodeParams(
            max_new_tokens=config.max_new_tokens,
            adaptive=adaptive,
            draft_sampling=config.draft_sampling,
            detailed_timing=config.detailed_timing,
        )
        drafter = build(text, target, **(defaults | options))
        return EngineMode(text, target, drafter, params, sampling, StopRule(stop_ids), config.verbose)

    try:
        compared = [engine(text, config.adaptive) for text in given if text != PLAIN]
    except UserError as error:
        if config.preset is None or "drafter" in config.preset_changed():
            raise
        hint = f"--preset {config.preset} takes drafters of the built-in model; with another one, give --drafter"
        raise UserError(f"{error} ({hint})") from None
    # the honest loser drafts as many tokens as the widest drafter beside it
    widest = max((mode.drafter.steps for mode in compared), default=config.steps)
    beside: list[Mode] = []
    for name in config.all_baselines():
        if name in METHODS:
            beside.append(HuggingFaceMode(name, target, sampling, stop_ids, given, **defaults))
        elif name == PLAIN or name not in given:
            beside.append(engine(name, steps=widest))
    return [*beside, *compared]
