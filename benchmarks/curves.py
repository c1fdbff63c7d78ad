"""Curves of offline training runs: loss, simulated, replayed and measured accept length, over the tokens that were read.

    python benchmarks/curves.py runs/eagle3 --output benchmarks/results/eagle3-train
    python benchmarks/curves.py runs/dflash runs/dspark --output benchmarks/results/dflash-train

Copies each run's settings and its figures beside the pictures, so that they can be drawn again from what is there. Several runs get a
folder each, and one picture with the measured accept length of all.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from understudy.core.files import write_json
from understudy.report.plots import Series, lines
from understudy.telemetry.run import read_table

TAUS = {
    "simulated, training text": "train/tau_sim",
    "simulated, held-out text": "eval/tau_sim",
    "measured by decoding": "measured/tau",
}
LOSSES = {"training text": "train/loss", "held-out text": "eval/loss"}
KEPT = (
    "step",
    "train/tokens",
    "train/supervised",
    "train/lr",
    "perf/tokens_per_s",
    "measured/tau_replayed",
    "measured/repeat_share",
)
AXIS = "millions of tokens read"


class Run:
    """One run's figures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        table = read_table(folder / "metrics" / "training.csv")
        self.rows = [{k: float(v) for k, v in row.items() if v is not None} for row in table]
        self.tokens_at = {row["step"]: row["train/tokens"] for row in self.rows if "train/tokens" in row} | {0.0: 0.0}

    def series(self, key: str) -> Series:
        """A figure over millions of tokens."""
        points = [
            (self.tokens_at[row["step"]] / 1e6, row[key])
            for row in self.rows
            if key in row and row["step"] in self.tokens_at
        ]
        return Series(*map(list, zip(*points, strict=True)))

    def keep(self, output: Path) -> dict[str, float | None]:
        """Draw the run alone, and copy it: its last figures."""
        output.mkdir(parents=True, exist_ok=True)
        taus, losses = ({label: self.series(key) for label, key in keys.items()} for keys in (TAUS, LOSSES))
        lines(output / "tau.png", taus, AXIS, "tokens per cycle", "Accept length while training")
        lines(output / "loss.png", losses, AXIS, "loss", "Loss while training")
        wanted = {*KEPT, *TAUS.values(), *LOSSES.values()}
        wanted |= {
            key
            for row in self.rows
            for key in row
            if key.startswith(("train/acc_", "train/ploss_", "eval/joint_acc_", "measured/joint_"))
        }
        write_json(output / "curves.json", [{k: v for k, v in row.items() if k in wanted} for row in self.rows])
        for name in ("run.yaml", "env.json"):
            shutil.copy(self.folder / name, output / name)
        return {key: next((row[key] for row in reversed(self.rows) if key in row), None) for key in sorted(wanted)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    runs = [Run(folder) for folder in args.runs]
    if len(runs) == 1:
        print(json.dumps(runs[0].keep(args.output)))
        return
    last = {run.folder.name: run.keep(args.output / run.folder.name) for run in runs}
    measured = {run.folder.name: run.series("measured/tau") for run in runs}
    lines(args.output / "tau.png", measured, AXIS, "tokens per cycle", "Measured accept length while training")
    print(json.dumps(last))


if __name__ == "__main__":
    main()
