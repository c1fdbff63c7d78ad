"""Serve token-id prompts in vLLM, with or without a drafter, and write what came out. Runs inside vLLM's own environment.

    PYTHON serve_vllm.py --model DIR --drafter DIR --prompts ids.json --steps 5 --max-tokens 64 --output out.json

Imports nothing of this project: what serves here is what any user of vLLM has. Greedy, past stop tokens, one text at a time, so
that counts can be compared with those of another engine. `--prompts` is a JSON list of lists of token ids.

The output file: `outputs`, new token ids per prompt; and with a drafter `counts`, vLLM's own counters of speculative decoding per
prompt (drafts, draft_tokens, accepted_tokens, accepted_at), and `drafts`, the tokens [K] of every verified draft per prompt.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

NAMES = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted_tokens",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "accepted_at",
}
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS counts, and no core is taken for itself
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: its end is the end of everything it started
}


def main() -> None:
    args = arguments()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    prompts = json.loads(args.prompts.read_text(encoding="utf-8"))
    drafts: list[list[int]] = []
    llm = loaded(args, max(map(len, prompts)), drafts)
    made = [served(llm, prompt, args.max_tokens, drafts) for prompt in prompts]
    document: dict[str, Any] = {"vllm": version(), "outputs": [each["output"] for each in made]}
    if args.drafter is not None:
        document |= {name: [each[name] for each in made] for name in ("counts", "drafts")}
    temporary = args.output.with_suffix(".part")
    temporary.write_text(json.dumps(document), encoding="utf-8")
    temporary.replace(args.output)


def loaded(args: argparse.Namespace, longest: int, drafts: list[list[int]]) -> Any:
    """vLLM's engine. What its drafter proposes is appended to `drafts`."""
    from vllm import LLM
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    propose = SpecDecodeBaseProposer.propose

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = propose(self, *args, **kwargs)  # [sequences, K]
        drafts.extend(tokens.tolist())
        return tokens

    SpecDecodeBaseProposer.propose = recorded
    speculative = None
    if args.drafter is not None:
        speculative = {"method": args.method, "model": str(args.drafter), "num_speculative_tokens": args.steps}
    room = longest + args.max_tokens + 2 * (args.steps + 1)  # near the context's end vLLM would draft less
    return LLM(
        model=str(args.model),
        dtype=args.dtype,
        enforce_eager=True,
        speculative_config=speculative,
        generation_config="vllm",  # none of the model's: greedy, and nothing beside it
        max_num_seqs=1,
        max_model_len=room,
        max_num_batched_tokens=room,  # a prompt is one pass
        enable_prefix_caching=False,
        disable_log_stats=False,
    )


def served(llm: Any, prompt: list[int], length: int, drafts: list[list[int]]) -> dict[str, Any]:
    """One text of `length` new tokens, and what was counted and drafted for it."""
    from vllm import SamplingParams

    drafts.clear()
    before = counters(llm)
    params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
    (result,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    counts = {name: difference(value, before[name]) for name, value in counters(llm).items()}
    verified = drafts[: counts.get("drafts", 0)]  # the last proposal of a text is made for nobody
    return {"output": list(result.outputs[0].token_ids), "counts": counts, "drafts": verified}


def counters(llm: Any) -> dict[str, Any]:
    """vLLM's counters of speculative decoding since it was loaded; empty without a drafter."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name in NAMES:
            many = hasattr(metric, "values")
            found[NAMES[metric.name]] = [int(v) for v in metric.values] if many else int(metric.value)
    return found


def difference(now: Any, before: Any) -> Any:
    return [a - b for a, b in zip(now, before, strict=True)] if isinstance(now, list) else now - before


def version() -> str:
    """Of the package that vLLM was installed from."""
    names = metadata.packages_distributions()["vllm"]
    return f"{names[0]} {metadata.version(names[0])}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve prompts in vLLM and write outputs, counts and drafts.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, help="a drafter's folder; without it vLLM decodes plainly")
    parser.add_argument("--method", default="eagle3", help="vLLM's name of the drafter's method")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: a list of lists of token ids")
    parser.add_argument("--steps", type=int, default=5, help="drafts per pass")
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
