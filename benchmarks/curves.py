"""Curves of an offline training run: loss, simulated, replayed and measured accept length, over the tokens that were read.

    python benchmarks/curves.py runs/eagle3 --output benchmarks/results/eagle3-train

Copies the run's settings and its figures beside the pictures, so that they can be drawn again from what is there.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = [
        {k: float(v) for k, v in row.items() if v is not None}
        for row in read_table(args.run / "metrics" / "training.csv")
    ]
    tokens_at = {row["step"]: row["train/tokens"] for row in rows if "train/tokens" in row} | {0.0: 0.0}
    args.output.mkdir(parents=True, exist_ok=True)

    def series(names: dict[str, str]) -> dict[str, Series]:
        """Every figure over millions of tokens."""
        found = {}
        for label, key in names.items():
            points = [
                (tokens_at[row["step"]] / 1e6, row[key]) for row in rows if key in row and row["step"] in tokens_at
            ]
            found[label] = Series(*map(list, zip(*points, strict=True)))
        return found

    axis = "millions of tokens read"
    lines(args.output / "tau.png", series(TAUS), axis, "tokens per cycle", "Accept length while training")
    lines(args.output / "loss.png", series(LOSSES), axis, "loss, summed over draft positions", "Loss while training")
    wanted = {*KEPT, *TAUS.values(), *LOSSES.values()}
    wanted |= {
        key
        for row in rows
        for key in row
        if key.startswith(("train/acc_", "train/ploss_", "eval/joint_acc_", "measured/joint_"))
    }
    write_json(args.output / "curves.json", [{k: v for k, v in row.items() if k in wanted} for row in rows])
    for name in ("run.yaml", "env.json"):
        shutil.copy(args.run / name, args.output / name)
    last = {key: next((row[key] for row in reversed(rows) if key in row), None) for key in sorted(wanted)}
    print(json.dumps(last))


if __name__ == "__main__":
    main()
