"""Cost per decoded token at a short and a long context, beside transformers' own `generate`, and where the growth comes from.

    python benchmarks/context.py --output benchmarks/results/context.json

Plain decoding of the built-in model from a prompt of N tokens of held-out text, `--tokens` new ones, medians over repeats, the two
implementations in turn. `attention` is our attention function timed alone at both lengths, for all layers: what growth must cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from understudy.api import load
from understudy.assets import prompts_path
from understudy.core.files import write_json
from understudy.core.provenance import environment
from understudy.data.prompts import load_prompts, render
from understudy.decoding.engine import decode
from understudy.target.attention import Pass, PassHolder, attention


class _Clock:
    """A streamer that only notes when tokens come."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def ours(engine, ids: list[int], tokens: int) -> float:
    sequence = engine.sequence(stop=engine.stop_rule(ignore_eos=True), max_new_tokens=tokens, temperature=0.0)
    sequence.prefill(ids)
    at = []
    for _ in decode(sequence):
        at.append(time.perf_counter())
    return (at[-1] - at[0]) / (len(at) - 1)


def theirs(engine, ids: list[int], tokens: int) -> float:
    clock = _Clock()
    prompt = torch.tensor([ids])
    engine.target.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        streamer=clock,
    )
    new = clock.at[1:]  # the first call brings the prompt
    return (new[-1] - new[0]) / (len(new) - 1)


def attention_alone(target, length: int, repeats: int = 200) -> float:
    """Seconds that one row's attention over `length` keys takes in all layers, each with keys and values of its own: reading them
    is most of the cost."""
    config = target.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = torch.randn(1, config.num_attention_heads, 1, size, dtype=target.dtype)
    slabs = torch.randn(target.layers, 2, 1, config.num_key_value_heads, 2048, size, dtype=target.dtype)
    module = torch.nn.Module()
    module.understudy_pass = holder = PassHolder()
    holder.current = Pass(length - 1, 1)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for keys, values in slabs:
            attention(module, query, keys[:, :, :length], values[:, :, :length], None, scaling=size**-0.5)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: the built-in model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs=2, default=[256, 2000])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    engine = load(args.model, "none", dtype=args.dtype)
    text = [t for p in load_prompts(prompts_path()) for t in render(engine.target.tokenizer, p.messages)]
    modes = {"understudy": ours, "transformers": theirs}
    times: dict[str, dict[int, list[float]]] = {m: {n: [] for n in args.lengths} for m in modes}
    with torch.inference_mode():
        for repeat in range(args.repeats + 1):
            for length in args.lengths:
                for name, run in modes.items():
                    seconds = run(engine, text[:length], args.tokens)
                    if repeat:  # the first round warms up
                        times[name][length].append(seconds)
        alone = {n: 1000 * attention_alone(engine.target, n) for n in args.lengths}
    short, long = args.lengths
    per_token = {m: {str(n): 1000 * statistics.median(t) for n, t in by.items()} for m, by in times.items()}
    result = {
        "env": environment(),
        "ms_per_token": per_token,
        "growth_ms": {m: v[str(long)] - v[str(short)] for m, v in per_token.items()},
        "attention_alone_ms": {str(n): v for n, v in alone.items()},
        "attention_growth_ms": alone[long] - alone[short],
    }
    if args.output:
        write_json(args.output, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
