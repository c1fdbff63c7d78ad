"""Does learning while decoding pay? Streams of prompts through a frozen head, a head trained offline, and heads that learn.

    python benchmarks/learning.py pay   --output benchmarks/results/learning-pay      # one new domain, 1,000 prompts, three seeds
    python benchmarks/learning.py drift --output benchmarks/results/learning-drift    # standard library, then other packages

Single-threaded float32. A seed decides the order of the stream, the head's start and its replay. Heads run over the very same
prompts, and their outputs are compared token by token. Settings were chosen on other prompts of the same kind (`DEV_SEED`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import streams
import torch

from understudy.assets import pocket_path
from understudy.core.files import check_writable, write_json, write_text
from understudy.core.provenance import environment
from understudy.decoding.acceptance import perplexity
from understudy.drafters.early_exit.drafter import ExitDrafter
from understudy.drafters.early_exit.objective import ExitObjective, ExitObjectiveConfig
from understudy.drafting.objective import Batch
from understudy.drafting.protocols import Drafter
from understudy.drafting.spec import build
from understudy.features.live import LiveFeatures
from understudy.report.plots import Series, lines
from understudy.target.loading import load_target
from understudy.target.target import Target
from understudy.telemetry.repeats import repeat_share
from understudy.training.online import OnlineLearner
from understudy.training.streaming import PromptRecord, stream, summed

DEV_SEED, DEV_PROMPTS = 99, 700  # where the settings below were chosen; these prompts are in no stream here
SETTINGS = {
    "exit_layer": 2,
    "rank": 32,
    "alpha": 32,
    "threshold": 0.6,
    "steps": 6,
    "dvi_lr": 2e-3,
    # KD and cross-entropy, constant: what policy gradient and fading KD do instead, the ablations show
    "dvi_kd_lambdamin": 0.5,
    "dvi_ce_lambda": 0.5,
    "dvi_pg_lambda_max": 0.0,
    "dvi_kl_lambda0": 0.0,
    "dvi_kl_lambdamin": 0.0,
}
TOKENS = 48  # most new tokens per prompt
ENDS = 100  # prompts at either end of a stream
WINDOW = 50  # prompts of the rolling mean in the figures
OFFLINE_PASSES, OFFLINE_ROWS, OFFLINE_LR = 1, 8, 2e-3


def drafter_of(target: Target, seed: int, online: bool, **more: Any) -> ExitDrafter:
    values = {**SETTINGS, **more, "dvi_online": online, "lora_seed": seed}
    drafter = build("dvi," + ",".join(f"{key}={value}" for key, value in values.items()), target)
    assert isinstance(drafter, ExitDrafter)
    return drafter


Records = list[PromptRecord]
Outputs = list[list[int]]


def decoded(
    target: Target, drafter: Drafter, prompts: Sequence[list[int]], learner: OnlineLearner | None = None
) -> tuple[Records, Outputs]:
    """What decoding took per prompt, and the new tokens."""
    outputs: Outputs = []
    result = stream(
        target, drafter, prompts, learner, max_new_tokens=TOKENS, on_prompt=lambda _, output: outputs.append(output)
    )
    return result.records, outputs


def side_by_side(
    target: Target, prompts: Sequence[list[int]], seed: int
) -> tuple[dict[str, Records], dict[str, Outputs], OnlineLearner]:
    """The frozen start and a head that learns, `WINDOW` prompts each in turn: what the machine does meanwhile falls on both."""
    drafters = {"frozen start": drafter_of(target, seed, False), "online": drafter_of(target, seed, True)}
    learner = OnlineLearner(drafters["online"], seed=seed)
    records: dict[str, Records] = {label: [] for label in drafters}
    outputs: dict[str, Outputs] = {label: [] for label in drafters}
    for start in range(0, len(prompts), WINDOW):
        for label, drafter in drafters.items():
            part = decoded(target, drafter, prompts[start : start + WINDOW], learner if label == "online" else None)
            records[label] += part[0]
            outputs[label] += part[1]
    return records, outputs, learner


def train_offline(
    target: Target, drafter: ExitDrafter, texts: Sequence[tuple[list[int], list[int]]], seed: int
) -> float:
    """The same head on the same number of tokens, all at once: KD at every token of the target's own answers, shuffled. Seconds."""
    objective = ExitObjective(drafter, ExitObjectiveConfig())
    features = LiveFeatures(target, objective.needs)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=OFFLINE_LR, weight_decay=0.01)
    began = time.perf_counter()
    for epoch in range(OFFLINE_PASSES):
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed * 97 + epoch)).tolist()
        for start in range(0, len(order), OFFLINE_ROWS):
            out = objective(features(batch_of([texts[i] for i in order[start : start + OFFLINE_ROWS]])))
            if not out.count:
                continue
            optimizer.zero_grad()
            (out.loss / out.count).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    return time.perf_counter() - began


def batch_of(texts: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """A row per text; the answer is supervised."""
    width = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask, documents = torch.zeros_like(ids, dtype=torch.bool), torch.full_like(ids, -1)
    positions = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(texts):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, len(prompt) : end] = True
        documents[row, :end], positions[row, :end] = 0, torch.arange(end)
    return Batch(ids, mask, documents, positions)


def figures(records: Sequence[PromptRecord]) -> dict[str, float]:
    total = summed(records)
    return {"prompts": total.index, "acc_1": total.acc_1, "tau": total.tau, "tokens_per_s": total.tokens_per_s}


def ends(records: Sequence[PromptRecord]) -> dict[str, Any]:
    spent = sum(r.decode_s + r.learning_s for r in records)
    return {
        "first": figures(records[:ENDS]),
        "last": figures(records[-ENDS:]),
        "all": figures(records),
        "learning_share": sum(r.learning_s for r in records) / spent,
    }


def paid_at(online: Sequence[PromptRecord], frozen: Sequence[PromptRecord]) -> int | None:
    """The prompt from which on the learning head's total time, learning included, stays below the frozen head's; None = never."""
    ahead, behind = 0.0, None
    for index, (a, b) in enumerate(zip(online, frozen, strict=True)):
        ahead += (b.decode_s + b.learning_s) - (a.decode_s + a.learning_s)
        if ahead <= 0:
            behind = index
    return None if ahead <= 0 else (0 if behind is None else behind + 1)


def rolling(records: Sequence[PromptRecord], value: Callable[[PromptRecord], float]) -> tuple[list[float], list[float]]:
    """(prompts, value over the last `WINDOW` prompts)."""
    at = range(WINDOW, len(records) + 1, 10)
    return [float(i) for i in at], [value(summed(records[i - WINDOW : i])) for i in at]


def figure(
    path: Path, runs: dict[str, list[Records]], name: str, ylabel: str, title: str, markers: dict[str, float]
) -> None:
    """Curves of a field of the records: the mean over seeds, rolling over prompts."""
    drawn = {}
    for label, seeds in runs.items():
        curves = [rolling(records, lambda record: getattr(record, name)) for records in seeds]
        mean = [sum(ys) / len(ys) for ys in zip(*(y for _, y in curves), strict=True)]
        drawn[label] = Series(curves[0][0], mean)
    lines(path, drawn, f"prompts (rolling over {WINDOW})", ylabel, title, markers=markers)


def figures_of(output: Path, runs: dict[str, list[Records]], title: str, markers: dict[str, float]) -> None:
    figure(output / "acceptance.png", runs, "acc_1", "first draft accepted", title, markers)
    figure(output / "tau.png", runs, "tau", "tokens per cycle", title, markers)


def pay(target: Target, count: int, seeds: Sequence[int], output: Path) -> None:
    asked = streams.packages()
    dev = {tuple(ids) for ids in streams.stream(target, asked, DEV_PROMPTS, DEV_SEED)}
    entries: list[dict[str, Any]] = []
    runs: dict[str, list[Records]] = {"frozen start": [], "online": []}
    for seed in seeds:
        prompts = streams.stream(target, asked, count, seed, dev)
        others = streams.stream(target, asked, count, seed + 1000, dev | {tuple(ids) for ids in prompts})
        records, outputs, learner = side_by_side(target, prompts, seed)
        for label in runs:
            runs[label].append(records[label])
        frozen, online = records["frozen start"], records["online"]
        plain = build("none", target)
        answers = decoded(target, plain, others)[1]
        offline = drafter_of(target, seed, False)
        spent = train_offline(target, offline, list(zip(others, answers, strict=True)), seed)
        ended = prompts[:ENDS] + prompts[-ENDS:]
        tested, tested_outputs = decoded(target, offline, ended)
        plainly, plain_outputs = decoded(target, plain, ended)
        mine = outputs["frozen start"][:ENDS] + outputs["frozen start"][-ENDS:]
        entries.append(
            {
                "seed": seed,
                "frozen": ends(frozen),
                "online": ends(online),
                "offline": ends(tested) | {"training_s": spent, "tokens": sum(map(len, answers))},
                "plain": figures(plainly),
                "learner": learner.summary(),
                "paid_at": paid_at(online, frozen),
                "net_gain": summed(online).tokens_per_s / summed(frozen).tokens_per_s,
                "outputs_equal": outputs["online"] == outputs["frozen start"]
                and mine == tested_outputs == plain_outputs,
                "rejected": sum(r.drafted - r.accepted for r in online),
                "repeat_share": sum(map(repeat_share, outputs["online"])) / len(prompts),
                "records": {"frozen": brief(frozen), "online": brief(online)},
            }
        )
        save(output, entries, common(target))
        figures_of(output, runs, "A domain the head has not seen", {})


def save(output: Path, entries: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """`results.json`, and `records.json` with a column per figure of every prompt."""
    told = [{k: v for k, v in entry.items() if k != "records"} for entry in entries]
    write_json(output / "results.json", {"seeds": told} | facts)
    write_text(output / "records.json", json.dumps([entry["records"] for entry in entries]) + "\n")
    print(json.dumps(told[-1]), flush=True)


def brief(records: Sequence[PromptRecord]) -> dict[str, list[float]]:
    """Per prompt: what curves are drawn from."""
    names = ("tokens", "cycles", "opened", "accepted_1", "decode_s", "learning_s")
    return {name: [round(getattr(record, name), 5) for record in records] for name in names}


def drift(target: Target, count: int, seeds: Sequence[int], output: Path) -> None:
    """`count` prompts of the standard library's held-out modules, then as many of other packages."""
    kinds = {"standard library": streams.stdlib(), "other packages": streams.packages()}
    dev = {tuple(ids) for ids in streams.stream(target, kinds["other packages"], DEV_PROMPTS, DEV_SEED)}
    entries: list[dict[str, Any]] = []
    runs: dict[str, list[Records]] = {"frozen start": [], "online": []}
    for seed in seeds:
        parts = {kind: streams.stream(target, asked, count, seed, dev) for kind, asked in kinds.items()}
        records, outputs, learner = side_by_side(target, [ids for part in parts.values() for ids in part], seed)
        entry: dict[str, Any] = {"seed": seed, "outputs_equal": outputs["online"] == outputs["frozen start"]}
        for label in runs:
            runs[label].append(records[label])
            entry[label] = {kind: figures(records[label][i * count : (i + 1) * count]) for i, kind in enumerate(parts)}
        entry["records"] = {label: brief(records[label]) for label in runs}
        texts = {kind: outputs["online"][i * count : (i + 1) * count] for i, kind in enumerate(parts)}
        entry["learner"] = learner.summary()
        entry["perplexity"] = {
            kind: {
                "prompts": perplexity(target, part),
                "answers": perplexity(target, [p + a for p, a in zip(part, texts[kind], strict=True)]),
            }
            for kind, part in parts.items()
        }
        entries.append(entry)
        save(output, entries, common(target))
        figures_of(output, runs, "The text changes", {"other packages begin": float(count)})


def common(target: Target) -> dict[str, Any]:
    more = ("sympy", "numpy", "torch", "transformers")
    import importlib.metadata

    return {
        "settings": SETTINGS | {"max_new_tokens": TOKENS, "offline": [OFFLINE_PASSES, OFFLINE_ROWS, OFFLINE_LR]},
        "dtype": str(target.dtype),
        "packages": {name: importlib.metadata.version(name) for name in more},
        "env": environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pay", "drift"))
    parser.add_argument("--prompts", type=int, default=0, help="prompts of the stream (drift: of each kind)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    check_writable(arguments.output / "results.json")
    target = load_target(pocket_path(), dtype="float32", device="cpu")
    if arguments.what == "pay":
        pay(target, arguments.prompts or 1000, arguments.seeds, arguments.output)
    else:
        drift(target, arguments.prompts or 300, arguments.seeds, arguments.output)


if __name__ == "__main__":
    main()
