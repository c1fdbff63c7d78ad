"""Where one pass of the target spends its time, by kind of operation, for 1 row and for W rows.

    python benchmarks/profile_pass.py --output benchmarks/results/profile.json

Operations are timed by torch's profiler; `python` is what is left of the wall-clock time of the same passes without the profiler:
the interpreter, transformers' forward code and the dispatch of small operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from understudy.api import load
from understudy.assets import prompts_path
from understudy.core.files import write_json
from understudy.core.provenance import environment
from understudy.core.records import Proposal
from understudy.data.prompts import load_prompts, render
from understudy.target.session import TargetSession

KINDS = {
    "products": ("mm", "addmm", "bmm", "linear", "matmul"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "cache": ("copy_", "slice", "narrow", "cat"),
}


def kind_of(operation: str) -> str:
    name = operation.removeprefix("aten::")
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")


def session_at(engine, length: int) -> TargetSession:
    """A session whose cache holds `length` tokens of held-out text."""
    text = [t for p in load_prompts(prompts_path()) for t in render(engine.target.tokenizer, p.messages)][: length + 1]
    session = TargetSession(engine.target)
    rows = session.prefill(text[:-1], want_logits=False)
    session.commit(rows, range(rows.width), text)
    return session


def measure(session: TargetSession, width: int, passes: int) -> dict[str, float]:
    """Milliseconds per pass, by kind."""
    drafts = torch.randint(0, session.target.vocab_size, (width - 1,), generator=torch.Generator().manual_seed(0))

    def one() -> None:
        session.verify(Proposal(drafts) if width > 1 else None)
        session.rewind(len(session.tokens))

    times = []
    for _ in range(passes):
        began = time.perf_counter()
        one()
        times.append(time.perf_counter() - began)
    wall = 1000 * statistics.median(times)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for _ in range(passes):
            one()
    kinds: Counter[str] = Counter()
    calls = 0
    for event in watched.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1000 / passes
        calls += event.count
    spent = {kind: kinds[kind] for kind in (*KINDS, "elementwise")}
    return {"wall_ms": wall, **spent, "operations": calls / passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the built-in model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--length", type=int, default=300)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 7, 11, 16])
    parser.add_argument("--passes", type=int, default=60)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    engine = load(args.model, "none", dtype=args.dtype)
    with torch.inference_mode():
        session = session_at(engine, args.length)
        measure(session, max(args.widths), 10)  # warm-up
        by_width = {str(width): measure(session, width, args.passes) for width in args.widths}
    result = {"env": environment(), "length": args.length, "dtype": args.dtype, "ms_per_pass": by_width}
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
