"""`understudy bench`: drafters side by side."""

from __future__ import annotations

from understudy.bench.config import BenchConfig
from understudy.cli.options import config_command


@config_command(BenchConfig, name="bench")
def command(config: BenchConfig) -> int:
    """Compare drafters on the same prompts and weights: speed, acceptance, identical output.

    The table ends with one line of JSON that holds all figures. Plain decoding in this engine (none) is what every speed-up is
    measured against; null, a drafter that is always wrong, must come out below 1, or the run is reported as invalid.
    """
    from understudy.bench.run import run

    return run(config)[1]
