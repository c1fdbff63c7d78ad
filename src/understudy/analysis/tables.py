"""The findings for a person: one row per layer, and what is proposed."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

WIDTH = 120  # of what goes to a file or pipe
RULES = {
    "equal_steps": "proposed (equal steps of progress)",
    "lowest_loss": "lowest early-exit loss",
    "even": "default (evenly spaced)",
}


def console() -> Console:
    """Standard output: as wide as the terminal, or WIDTH where there is none."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=WIDTH)


def shown(found: dict[str, Any]) -> Group:
    """Table and proposals."""
    return Group(_curves(found), *map(Text, [*_taps(found), *_exits(found)]))


def _curves(found: dict[str, Any]) -> Table:
    settings, gains = found["settings"], {one["layer"]: one for one in found["exits"]}
    proposed = found["taps"][0]["taps"]
    table = Table(
        title=f"{settings['model']}: {settings['layers']} layers, {found['samples']} samples,"
        f" {found['tokens']:,} answer tokens",
        caption=Text("layer: 0 = embeddings, i = output of the i-th; layers[i] counts from 0. Losses in nats"),
        caption_justify="left",
    )
    columns = ("layer", "layers[i]", "cosine", "exit CE", "agrees", "KL", "tap", "drafts", "tau", "predicted")
    for column in columns:
        table.add_column(Text(column), justify="right")
    for row in found["curves"]:
        early, gain = row["early_exit"], gains.get(row["layer"])
        table.add_row(
            str(row["layer"]),
            "-" if row["target_layer_id"] is None else str(row["target_layer_id"]),
            f"{row['cosine']:.3f}",
            *([f"{early['ce']:.3f}", f"{early['agreement']:.1%}", f"{early['kl']:.3f}"] if early else ["-"] * 3),
            "tap" if row["layer"] in proposed else "",
            *([str(gain["steps"]), f"{gain['tau']:.2f}", f"{gain['speedup']:.2f}x"] if gain else ["-"] * 3),
        )
    return table


def _taps(found: dict[str, Any]) -> list[str]:
    names = {one["rule"]: RULES[one["rule"]] for one in found["taps"]}
    width = max(map(len, names.values()))
    return [
        f"taps, {names[one['rule']]:{width}}  --taps {_list(one['taps'])}   --target-layer-ids {_list(one['target_layer_ids'])}"
        for one in found["taps"]
    ]


def _exits(found: dict[str, Any]) -> list[str]:
    if found["no_split"]:
        return [f"no exit layer: {found['no_split']}"]
    if not found["exits"]:
        return ["no exit layer: step B looked at none between the embeddings and the last layer"]
    best = found["exits"][0]
    drafts = f"{best['steps']} draft{'s' if best['steps'] > 1 else ''}"
    says = f"exit_layer {best['layer']} with {drafts}: {best['speedup']:.2f}x predicted (tau {best['tau']:.2f})"
    if best["speedup"] <= 1:
        return [f"no exit layer pays as it is; the best is {says}. A trained adapter or head raises agreement"]
    return [f"exit: {says}"]


def _list(values: list[int]) -> str:
    return ",".join(map(str, values)) or "-"
