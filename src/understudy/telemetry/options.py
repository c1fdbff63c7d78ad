"""Options of what a run shows and writes. Commands read these without loading torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from understudy.core.config import Config, option, split_commas

TrackerName = Literal["none", "wandb", "tensorboard", "trackio"]


class AlignTelemetryParams(Config):
    """Options of alignment telemetry. It is off unless `telemetry_debug` is on; then the other five say what it does."""

    telemetry_debug: bool = option(False, "look block by block at how drafts line up with the verifier's tokens")
    telemetry_prints_budget: int = option(
        6, "with --telemetry-debug: most lines printed, one per block (verify pass)", ge=0
    )
    telemetry_max_blocks: int = option(12, "with --telemetry-debug: most blocks (verify passes) written to files", ge=0)
    telemetry_save_dir: Path | None = option(
        None, "with --telemetry-debug: folder of the dumps; none = telemetry/ in the run folder, if there is one"
    )
    telemetry_dump_tensors: bool = option(
        False, "with --telemetry-debug: beside each dump, a .pt file with drafts, verifier logits and exit states"
    )
    telemetry_auto_offset: bool = option(
        False,
        "with --telemetry-debug: also give the longest accepted prefix over the offsets 0 and +1; changes no output",
    )


class TrackerOptions(Config):
    """Where a run's figures go besides its folder."""

    report_to: Annotated[list[TrackerName], pydantic.BeforeValidator(split_commas)] = option(
        ["none"], "trackers, separated by commas: none, wandb, tensorboard (in the run folder), trackio"
    )
    wandb_project: str = option("understudy", "project of the run in wandb and trackio", min_length=1)
    wandb_run_name: str | None = option(
        None, "name of the run in wandb and trackio; none = the run folder's name", min_length=1
    )

    @pydantic.field_validator("report_to")
    @classmethod
    def _none_is_alone(cls, names: list[str]) -> list[str]:
        if "none" in names and len(names) > 1:
            raise ValueError(f"none goes with no other tracker (got {', '.join(names)})")
        return names
