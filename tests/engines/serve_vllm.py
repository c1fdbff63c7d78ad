"""Serve token-id prompts in vLLM, with or without a drafter, and write what came out. Runs inside vLLM's own environment.

    PYTHON serve_vllm.py --model DIR --drafter DIR --prompts ids.json --steps 6 --max-tokens 64 --output out.json

Imports nothing of this project: what serves here is what any user of vLLM has. Greedy, past stop tokens, one text at a time, so
that counts can be compared with those of another engine. `--prompts` is a JSON list of lists of token ids.

The output file holds `outputs` (new token ids per prompt) and `counts` (vLLM's own counters of speculative decoding: drafts,
draft_tokens, accepted_tokens, accepted_at per position; null without a drafter).
"""

from __future__ import annotations

import argparse
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

COUNTERS = {"num_drafts": "drafts", "num_draft_tokens": "draft_tokens", "num_accepted_tokens": "accepted_tokens"}


def main() -> None:
    args = arguments()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: its end is the end of everything it started
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams

    prompts = json.loads(args.prompts.read_text(encoding="utf-8"))
    speculative = None
    if args.drafter is not None:
        speculative = {"method": args.method, "model": str(args.drafter), "num_speculative_tokens": args.steps}
    llm = LLM(
        model=str(args.model),
        dtype=args.dtype,
        enforce_eager=True,
        speculative_config=speculative,
        skip_tokenizer_init=True,
        max_num_seqs=1,
        # texts end by `max_tokens` and never by the context: near its end vLLM drafts less
        max_model_len=max(map(len, prompts)) + args.max_tokens + 2 * (args.steps + 1),
        enable_prefix_caching=False,
        disable_log_stats=False,
    )
    # no generation config of the model's: this is the greedy law and nothing else
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False)
    results = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    document = {
        "vllm": metadata.version(args.distribution),
        "outputs": [list(result.outputs[0].token_ids) for result in results],
        "counts": counts(llm.get_metrics()) if speculative else None,
    }
    temporary = args.output.with_suffix(".part")
    temporary.write_text(json.dumps(document), encoding="utf-8")
    temporary.replace(args.output)


def counts(metrics: list[Any]) -> dict[str, Any]:
    """vLLM's counters of speculative decoding, since it started."""
    found: dict[str, Any] = {}
    for metric in metrics:
        name = metric.name.removeprefix("vllm:spec_decode_")
        if name in COUNTERS:
            found[COUNTERS[name]] = int(metric.value)
        elif name == "num_accepted_tokens_per_pos":
            found["accepted_at"] = [int(value) for value in metric.values]
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve prompts in vLLM and write outputs and counts.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, help="a drafter's folder; without it vLLM decodes plainly")
    parser.add_argument("--method", default="eagle3", help="vLLM's name of the drafter's method")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: a list of lists of token ids")
    parser.add_argument("--steps", type=int, default=6, help="drafts per cycle")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--distribution", default="vllm-cpu", help="the package that vLLM was installed from")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
