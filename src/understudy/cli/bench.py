"""`understudy bench`: drafters side by side."""

from __future__ import annotations

from understudy.bench.config import BenchConfig
from understudy.cli.common import DraftOptions, ModelOptions, draft_defaults, load
from understudy.cli.options import config_command
from understudy.core.files import check_writable


class BenchOptions(BenchConfig, DraftOptions, ModelOptions):
    """Options of `understudy bench`."""


@config_command(BenchOptions)
def command(config: BenchOptions) -> int:
    """Compare drafters on the same prompts and weights: speed, acceptance, identical output.

    The table ends with one line of JSON that holds all figures. Plain decoding in this engine (none) is what every speed-up is
    measured against; null, a drafter that is always wrong, must come out below 1, or the run is reported as invalid.
    """
    from understudy.bench.lineup import drafters
    from understudy.bench.run import read_prompts, run

    for path in (config.output, config.metrics_out, config.output_dir and config.output_dir / "results.json"):
        if path:
            check_writable(path)
    defaults = draft_defaults(config, drafters(config))
    prompts = read_prompts(config)  # before the weights: what is wrong with them is said at once
    return run(config, load(config), prompts, **defaults)[1]
