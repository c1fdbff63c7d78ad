"""Speed and memory of a training step, by width and vocabulary, and what bounds them.

    python benchmarks/training.py --output benchmarks/results/training.json
    python benchmarks/training.py --drafter dflash --vocabulary 4096 --output benchmarks/results/training-dflash.json

Targets with random weights (12 layers; width and vocabulary as named), float32, packed rows of two documents, 65 % of them supervised:
2 rows of 512 tokens for EAGLE-3 (7 unrolled steps, at most 32,000 draft tokens), 1 row of 1,536 for DFlash (three layers, 256 blocks of 7,
KL over the whole vocabulary). Each case is a process of its own, because the most memory that a process ever held cannot be taken back.
Times are seconds of one CPU thread, so that other jobs on the machine count little. `memory_gb` is what a step adds to the weights of
target and drafter, gradients included. `whole` is the same in one piece: for EAGLE-3 head and loss, for DFlash the attention of all
blocks of a row.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from understudy.core.files import write_json
from understudy.core.provenance import environment
from understudy.drafters.dflash import attention
from understudy.drafters.dflash.config import DFlashObjectiveConfig
from understudy.drafters.dflash.start import train_dflash
from understudy.drafters.eagle3.config import Eagle3ObjectiveConfig
from understudy.drafters.eagle3.objective import Eagle3Objective
from understudy.drafters.eagle3.start import train_eagle3
from understudy.drafting.objective import Batch, Objective
from understudy.features.live import LiveFeatures
from understudy.target.target import Target
from understudy.training.optimizer import adamw
from understudy.training.options import TrainOptions

WIDTHS, VOCABULARIES = (256, 1024), (4_096, 131_072)
SHAPES = {"eagle3": (2, 512), "dflash": (1, 1536)}  # rows, tokens
SUPERVISED, REPEATS = 0.65, 2


def target_of(width: int, vocabulary: int) -> Target:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=12,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        head_dim=64,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    return Target(Qwen3ForCausalLM(config).float())


def batch_of(vocabulary: int, rows: int, length: int) -> Batch:
    """Rows of two documents; the first third of each is a prompt."""
    torch.manual_seed(1)
    half = length // 2
    documents = torch.arange(length).div(half, rounding_mode="floor").repeat(rows, 1)
    positions = torch.arange(length).remainder(half).repeat(rows, 1)
    return Batch(
        torch.randint(0, vocabulary, (rows, length)), positions >= (1 - SUPERVISED) * half, documents, positions
    )


def objective_of(drafter: str, target: Target, whole: bool) -> Objective:
    counts = partial(torch.arange, target.vocab_size, 0, -1)  # every token occurs
    if drafter == "dflash":
        attention.TOGETHER = 2**30 if whole else attention.TOGETHER
        config = DFlashObjectiveConfig(
            num_draft_layers=3, block_size=7, anchors=256, loss_type="kl", full_vocab=True, loss_chunk=16_384
        )
        return train_dflash(config, target, None, counts)
    options = {"loss_chunk": 2**30} if whole else {}
    return train_eagle3(Eagle3ObjectiveConfig(**options), target, None, counts)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(drafter: str, width: int, vocabulary: int, whole: bool) -> dict[str, Any]:
    """One case: seconds of the parts of a step (medians), tokens per second, memory."""
    rows, length = SHAPES[drafter]
    target, batch = target_of(width, vocabulary), batch_of(vocabulary, rows, length)
    objective = objective_of(drafter, target, whole).train()
    features = LiveFeatures(target, objective.needs)
    params = [p for p in objective.parameters() if p.requires_grad]
    optimizer = adamw(params, TrainOptions())
    held = peak()
    parts: dict[str, list[float]] = {name: [] for name in ("target", "forward", "backward", "optimizer")}
    supervised = 0
    for _ in range(REPEATS + 1):
        at = [time.process_time()]
        given = features(batch)
        at.append(time.process_time())
        out = objective(given)
        at.append(time.process_time())
        (out.loss / out.count).backward()
        memory = peak() - held
        at.append(time.process_time())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        at.append(time.process_time())
        supervised = int(out.count)
        for name, (begin, end) in zip(parts, pairwise(at), strict=True):
            parts[name].append(end - begin)
    seconds = {name: statistics.median(values[1:]) for name, values in parts.items()}  # the first step warms up
    total = sum(seconds.values())
    trained = sum(p.numel() for p in params)
    head = objective.drafter.model.lm_head.weight if isinstance(objective, Eagle3Objective) else params[0][:0]
    return {
        "drafter": drafter,
        "width": width,
        "vocabulary": vocabulary,
        "draft_vocabulary": len(head) or vocabulary,
        "whole": whole,
        "trained_weights": trained,
        "head_share": head.numel() / trained,
        "seconds": seconds,
        "tokens_per_s": rows * length / total,
        "supervised_per_s": supervised / total,
        "memory_gb": memory,
        "memory_kb_per_supervised_token": memory * 2**20 / supervised,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--drafter", choices=sorted(SHAPES), default="eagle3")
    parser.add_argument("--vocabulary", type=int, action="append", help="repeatable; default: both")
    parser.add_argument(
        "--case", nargs=3, type=int, metavar=("WIDTH", "VOCABULARY", "WHOLE"), help="one case, in this process"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        width, vocabulary, whole = args.case
        print(json.dumps(measure(args.drafter, width, vocabulary, bool(whole))))
        return
    cases = []
    for case in product(WIDTHS, args.vocabulary or VOCABULARIES, (0, 1)):
        command = [sys.executable, __file__, "--threads", str(args.threads), "--drafter", args.drafter, "--case"]
        done = subprocess.run([*command, *map(str, case)], capture_output=True, text=True, check=True)
        cases.append(json.loads(done.stdout.splitlines()[-1]))
        print(cases[-1], flush=True)
    results = {"cases": cases, "env": environment(0)}
    if args.output:
        write_json(args.output, results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
