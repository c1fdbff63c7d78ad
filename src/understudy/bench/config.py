"""The options of `understudy bench`, and its presets. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic

from understudy.core.config import option, split_commas
from understudy.data.options import ThinkingOptions
from understudy.telemetry.options import AlignTelemetryParams

Baseline = Literal["none", "null", "hf", "hf-prompt-lookup", "hf-early-exit", "hf-dflash"]
BASELINES: tuple[str, ...] = get_args(Baseline)

# What a preset fixes, with the built-in model. Every published figure is measured with one of them as it stands here; an
# option given beside it wins, and results.json then says so in `env.preset_changed`.
PRESETS: dict[str, dict[str, Any]] = {
    "pocket": {
        "prompts": None,  # the shipped set, from its first row on
        "num_prompts": 24,
        "max_new_tokens": 96,
        "steps": 6,
        "temperature": 0.0,
        "repeats": 3,
        "drafter": ["prompt-lookup", "early-exit", "eagle3", "eagle3,tree=true", "dflash"],
        "baselines": list(BASELINES),
    },
}


def _listed(value: Any) -> Any:
    """Baselines by name, each once; an unknown one is refused with the list of known ones."""
    names = split_commas(value)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return value
    names = [name.replace("_", "-") for name in names]
    if unknown := [name for name in names if name not in BASELINES]:
        raise ValueError(f"unknown baseline {unknown[0]!r}; known baselines: {', '.join(BASELINES)}")
    return list(dict.fromkeys(names))


class BenchConfig(AlignTelemetryParams, ThinkingOptions):
    """Who is compared on what, and how. Which model, and how it is loaded, the command line adds (`understudy.cli.bench`)."""

    drafter: list[str] = option(
        [], "NAME[:PATH][,key=value...], repeatable; default: every drafter that needs no files"
    )
    draft_model: str | None = option(None, "folder of a DFlash drafter: the same as --drafter dflash:DIR", min_length=1)
    baselines: Annotated[list[str], pydantic.BeforeValidator(_listed)] = option(
        ["none", "null"], f"what stands beside the drafters, separated by commas: {', '.join(BASELINES)}"
    )
    compare: bool = option(False, "add hf, and print each drafter beside it with its time by component")
    preset: Literal["pocket"] | None = option(None, "fixed prompts, lengths and K, as for every published figure")

    prompts: Path | None = option(None, "JSON Lines file of prompts; default: the built-in set")
    num_prompts: int | None = option(None, "prompts to use, from the first on; default: all", "num-samples", ge=1)
    max_new_tokens: int = option(128, "most new tokens per prompt", "max-tokens", ge=1)
    ignore_eos: bool = option(False, "go on after stop tokens, so that every output has the full length")
    repeats: int = option(3, "times that every prompt is run; the median repeat counts", ge=1)

    steps: int | None = option(
        None,
        "K: most drafts in a row per cycle, where the drafter's text does not say; default: each drafter's own",
        ge=1,
    )
    adaptive: bool = option(False, "choose the draft length per cycle from running costs and acceptance")
    draft_sampling: Literal["argmax", "sample"] = option(
        "argmax", "at a temperature: drafts are argmax and verified by matching, or drawn and verified by rejection"
    )
    temperature: float = option(0.0, "divides the logits before sampling; 0 = greedy", ge=0)
    top_k: int | None = option(None, "keep the k most probable tokens; 0 = off; default: the model's own", ge=0)
    top_p: float | None = option(
        None, "keep the most probable tokens that together reach this probability; default: the model's own", ge=0, le=1
    )
    min_p: float | None = option(
        None, "remove tokens below this share of the most probable one; default: the model's own", ge=0, le=1
    )
    repetition_penalty: float | None = option(
        None, "divides logits of tokens in prompt or output; default: the model's own", gt=0
    )
    presence_penalty: float | None = option(None, "subtracted from the logit of every token in the output", ge=-2, le=2)
    frequency_penalty: float | None = option(None, "the same, once for each time that it is there", ge=-2, le=2)
    seed: int = option(0, "seed of all random streams", ge=0)

    check: bool = option(False, "fail (exit code 1) when an output differs from plain decoding's beyond a near tie")
    detailed_timing: bool = option(False, "on CUDA: time every section with events, for the breakdown; costs a little")
    verbose: bool = option(False, "print each cycle's draft and what was accepted")
    metrics_out: Path | None = option(
        None, "CSV file of the one drafter's rolling acceptance and speed, a row per verify pass, over all repeats"
    )
    output: Path | None = option(None, "write the results to this JSON file")
    output_dir: Path | None = option(None, "write results.json and a README.md into this folder", "outdir")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        name = values.get("preset") if isinstance(values, dict) else None
        return {**PRESETS[name], **values} if isinstance(name, str) and name in PRESETS else values

    def preset_changed(self) -> list[str]:
        """Options in which this run is not the preset it names."""
        fixed = PRESETS[self.preset] if self.preset else {}
        return [name for name, value in fixed.items() if getattr(self, name) != value]

    def drafters(self) -> list[str]:
        """The drafters as given, each once."""
        more = [f"dflash:{self.draft_model}"] if self.draft_model else []
        return list(dict.fromkeys([*self.drafter, *more]))

    def all_baselines(self) -> list[str]:
        """Baselines in order: `none` is always first, because it is what every speed-up is measured against."""
        names = ["none", *self.baselines, *(["hf"] if self.compare else [])]
        return list(dict.fromkeys(names))

    def sampling(self) -> dict[str, Any]:
        """What was asked of the target's law; None = not given."""
        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        return {name: getattr(self, name) for name in (*names, "seed")}
