"""Proof that drafters serve in vLLM as they lie: the same text as vLLM alone, and as many drafts accepted as in our engine.

    python tests/engines/vllm_drafters.py --drafter runs/eagle3 --output results.json
    python tests/engines/vllm_drafters.py --method dflash --drafter runs/dflash --steps 6

Three decodings of the same prompts (held-out ones of the built-in set), greedy, past stop tokens, one text at a time, K drafts:
vLLM alone, vLLM with the drafter, and our engine with the drafter. In float32 these must hold:

1. vLLM with the drafter writes what vLLM writes alone;
2. passes with drafts, and accepted drafts per position, agree with ours within `--tolerance` of the passes;
3. of the drafted tokens themselves, compared pass by pass, at least 99 % are the same (a drafter that is read wrongly but accepts
   as often by chance does not get through);
4. at least `--enough` drafts were accepted, and as many rejected: else all of that says little.

vLLM counts accepted drafts before it cuts a text at its length, and drafts K tokens to the very end (`counting` has its rules). So
our engine decodes K tokens more than are asked for, and of its passes those count that vLLM would have run.

Whether our text is vLLM's too is reported: two engines round differently, and where two logits nearly tie their texts may part.
In bfloat16 the same holds for vLLM with and without drafts, so there 1 to 3 are reported, with the gap between the two tokens' logits
at the first difference, and only 4 is required. `--reduced N` also serves a copy of the drafter whose vocabulary is cut to N tokens.

The last line of stdout is the result as one JSON document; exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from comparing import Limits, compare, table
from counting import Round, within
from safetensors.torch import load_file, save_file

from understudy.assets import drafter_path, pocket_path, prompts_path
from understudy.cli.common import ModelOptions, load
from understudy.core.checkpoints import find_checkpoint
from understudy.core.errors import UserError
from understudy.core.files import check_writable, write_json
from understudy.core.provenance import environment
from understudy.data.prompts import load_prompts, render
from understudy.decoding.acceptance import evaluating
from understudy.decoding.engine import decode
from understudy.decoding.request import DecodeParams
from understudy.decoding.sequence import DecodeSequence
from understudy.decoding.stops import StopRule
from understudy.drafters.eagle3.vocab import membership, most_frequent, offsets
from understudy.drafting.spec import build
from understudy.target.target import Target

SERVE, ENVIRONMENT = (Path(__file__).with_name(name) for name in ("serve_vllm.py", "environment.sh"))
LAST_WORDS = 4000  # characters of vLLM's log that are shown when it fails
Passes = tuple[list[list[int]], list[list[Round]]]


def main() -> None:
    args = arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="understudy-vllm-") as scratch:
            document = prove(args, Path(scratch))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    if args.output is not None:
        write_json(args.output, document)
    print(json.dumps(document))
    if document["failures"]:
        raise SystemExit("\n".join(f"error: {line}" for line in document["failures"]))


def prove(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything: the JSON document, with `failures`."""
    if args.output is not None:
        check_writable(args.output)
    drafters = named(args.drafter or [drafter_path(args.method)])
    target = load(ModelOptions(model=args.model, dtype=args.dtype, device="cpu"))
    targets = [target]
    if args.dtype != "float32":
        targets.insert(0, load(ModelOptions(model=args.model, dtype="float32", device="cpu")))
    limits = Limits(args.steps, args.tolerance, args.enough, strict=args.dtype == "float32")
    prompts = chosen(target, args)
    if args.reduced and args.method != "eagle3":
        raise UserError("--reduced cuts EAGLE-3 drafters only: leave it out")
    if args.reduced:
        drafters |= {
            f"{name}-{args.reduced}": reduced(folder, args.reduced, target, scratch / f"{name}-{args.reduced}")
            for name, folder in list(drafters.items())
        }
    (scratch / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    args.python = args.python or made_environment()
    plain = serve(args, scratch, None)
    rows, failures = [], list[str]()
    for name, folder in drafters.items():
        served = serve(args, scratch, folder)
        row, faults = compare(
            limits,
            targets,
            prompts,
            plain["outputs"],
            served,
            decoded(target, f"{args.method}:{folder}", prompts, args.steps, args.max_tokens),
        )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rows.append({"drafter": name, "vocabulary": config.get("draft_vocab_size") or config["vocab_size"], **row})
        failures += [f"{name}: {fault}" for fault in faults]
    print(table(rows))
    keys = ("dtype", "steps", "max_tokens", "tolerance")
    return {
        "engine": plain["vllm"],
        **{key: getattr(args, key) for key in keys},
        "prompts": len(prompts),
        "drafters": rows,
        "failures": failures,
        "environment": environment(),
    }


def named(paths: Sequence[Path]) -> dict[str, Path]:
    """The drafters' folders by the names that results give them. A run stands for its best checkpoint."""
    found = {path.resolve().name: find_checkpoint(path) for path in paths}
    if len(found) < len(paths):
        raise UserError("two drafters' folders have the same name: results could not tell them apart")
    return found


def chosen(target: Target, args: argparse.Namespace) -> list[list[int]]:
    """The first prompts, as token ids, that leave room for everything drafted."""
    room = target.context - args.max_tokens - 2 * (args.steps + 1)
    rendered = (render(target.tokenizer, prompt.messages) for prompt in load_prompts(args.prompts))
    fitting = [ids for ids in rendered if len(ids) <= room][: args.count]
    if len(fitting) < args.count:
        raise UserError(f"only {len(fitting)} prompts leave room for {args.max_tokens} tokens: ask for fewer, --count")
    return fitting


def reduced(folder: Path, size: int, target: Target, copy: Path) -> Path:
    """A copy of a full-vocabulary drafter that can say the `size` most frequent tokens of the prompts only."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    if "d2t" in weights or size >= config["vocab_size"]:
        raise UserError(f"--reduced {size} cuts drafters over a full vocabulary of more tokens; {folder} is none")
    counts = torch.zeros(config["vocab_size"], dtype=torch.int64)
    for prompt in load_prompts(prompts_path()):
        counts += torch.bincount(torch.tensor(render(target.tokenizer, prompt.messages)), minlength=len(counts))
    ids = most_frequent(counts, size)
    weights["lm_head.weight"] = weights["lm_head.weight"][ids].contiguous()
    weights |= {"d2t": offsets(ids), "t2d": membership(ids, config["vocab_size"])}
    copy.mkdir()
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    write_json(copy / "config.json", config | {"draft_vocab_size": size})
    if (folder / "understudy.json").exists():
        shutil.copy(folder / "understudy.json", copy)
    return copy


def made_environment() -> str:
    """Python of vLLM's environment, which is made if it is not there. UserError if it cannot be."""
    made = subprocess.run([ENVIRONMENT, sys.executable], stdout=subprocess.PIPE, text=True, check=False)
    if made.returncode:
        raise UserError(
            "without vLLM nothing is proved: let environment.sh make its environment, or name one, --python"
        )
    return made.stdout.strip()


def serve(args: argparse.Namespace, scratch: Path, drafter: Path | None) -> dict[str, Any]:
    """What `serve_vllm.py` writes, run by vLLM's own Python. UserError if it fails, after the end of its log."""
    output, log = scratch / "served.json", scratch / "served.log"
    output.unlink(missing_ok=True)
    model = pocket_path() if args.model == "pocket" else args.model
    command = [args.python, SERVE, "--model", model, "--prompts", scratch / "prompts.json", "--output", output]
    command += ["--steps", args.steps, "--max-tokens", args.max_tokens, "--dtype", args.dtype]
    if drafter is not None:
        command += ["--drafter", drafter.resolve(), "--method", args.method]
    # what this process was started with is of another environment
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with timed(f"vLLM with {drafter.name}" if drafter else "vLLM alone"), log.open("wb") as stream:
        try:
            code = subprocess.run(
                list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT, env=inherited, check=False
            ).returncode
        except OSError as error:
            raise UserError(f"cannot run {args.python}: {error.strerror}") from None
    if code or not output.exists():
        words = log.read_text(encoding="utf-8", errors="replace").strip()
        print(words[-LAST_WORDS:], file=sys.stderr)
        what = "alone" if drafter is None else f"with {drafter}"
        raise UserError(f"vLLM {what} ended with code {code}: {words.rpartition(chr(10))[2] or 'it said nothing'}")
    document: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return document


def decoded(target: Target, text: str, prompts: Sequence[list[int]], steps: int, length: int) -> Passes:
    """Our engine with the drafter that `text` names: (texts of `length` tokens, the passes that vLLM would have run for each)."""
    drafter = build(f"{text},steps={steps}", target)
    texts, passes = [], []
    with timed(f"Understudy with {text}"), evaluating(target.model, drafter):
        for prompt in prompts:
            # K tokens more, so that every pass that counts has room for K drafts
            params = DecodeParams(max_new_tokens=length + steps)
            sequence = DecodeSequence(target, drafter, params, stop=StopRule())
            sequence.prefill(prompt)
            rounds = [Round(tuple(cycle.drafted), cycle.accepted) for cycle in decode(sequence) if cycle.index]
            texts.append(sequence.output[:length])
            passes.append(within(rounds, length))
    return texts, passes


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say on stderr how long it took: people wait for this."""
    begin = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prove that drafters serve in vLLM.")
    parser.add_argument("--python", help="Python of vLLM's environment; default: environment.sh makes one")
    parser.add_argument("--model", default="pocket", help="the built-in target, 'pocket', or a folder")
    parser.add_argument("--drafter", type=Path, action="append", help="folder, repeatable; default: the built-in one")
    parser.add_argument("--method", choices=["eagle3", "dflash"], default="eagle3", help="what kind of drafters")
    parser.add_argument(
        "--reduced", type=int, default=0, metavar="N", help="of eagle3: serve copies cut to N tokens too"
    )
    parser.add_argument("--prompts", type=Path, default=prompts_path(), help="prompt set; default: the built-in one")
    parser.add_argument("--count", type=int, default=8, help="prompts")
    parser.add_argument("--steps", type=int, default=5, help="drafts per pass, K")
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens per prompt")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of counts, as a share of the passes")
    parser.add_argument("--enough", type=int, default=50, help="accepted and rejected drafts that make a proof")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
