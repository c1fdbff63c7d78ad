"""Proof that a vLLM server writes the data that this process writes: `understudy data regenerate`, here and through `--endpoint`.

    python tests/engines/vllm_regenerate.py --samples 24

Serves the built-in model with vLLM's own `serve` (float32, greedy) and answers the same held-out conversations twice. These must hold:

1. every conversation is over in both, with the same turns answered, and every prompt was read by the server as it was sent;
2. at least `--agree` of the answers are the same, token by token (two engines round differently, and where two logits nearly tie, an
   answer may part; answers that follow a different one in its conversation are not compared);
3. each row of the server reads as a row to train on.

The last line of stdout is the result as one JSON document; exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from serve_vllm import SETTINGS
from vllm_drafters import LAST_WORDS, made_environment, timed

from understudy.assets import pocket_path
from understudy.cli import main as understudy
from understudy.cli.common import ModelOptions, load
from understudy.core.errors import UserError
from understudy.core.files import write_json
from understudy.core.provenance import environment
from understudy.data.options import DataOptions
from understudy.data.stdlib import write_corpus
from understudy.data.stream import open_stream

START = 600.0  # seconds that vLLM may take to begin


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
    write_corpus(scratch / "corpus")
    data = scratch / "corpus" / "eval.jsonl"
    common = ["--data-path", data, "--num-samples", args.samples, "--max-new-tokens", args.max_new_tokens]
    common += ["--temperature", 0, "--max-repeat-share", 1]
    with timed("Understudy in this process"):
        regenerate("--output-dir", scratch / "here", "--dtype", "float32", *common)
    with server(args.python or made_environment(), scratch / "served.log") as url, timed("Understudy through vLLM"):
        regenerate("--output-dir", scratch / "there", "--endpoint", url, "--concurrency", 8, *common)
    here, there = (by_conversation(scratch / name) for name in ("here", "there"))
    same, compared, turns = agreement(here, there)
    failures = []
    if here.keys() != there.keys() or not turns:
        failures.append("the two did not answer the same turns")
    if same < args.agree * compared:
        failures.append(f"{same} of {compared} answers are the same, fewer than {args.agree:.0%}")
    read = readable(scratch / "there")
    if read != sum(len(rows) for rows in there.values()):
        failures.append(f"only {read} of the server's rows can be trained on")
    return {
        "conversations": len(here),
        "answers": compared,
        "same": same,
        "rows_read": read,
        "failures": failures,
        "environment": environment(),
    }


def regenerate(*options: Any) -> None:
    if understudy([*map(str, ("data", "regenerate", *options))]):
        raise UserError("understudy data regenerate failed, see above")


def by_conversation(folder: Path) -> dict[int, list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for line in (folder / "train-0.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["number"], []).append(row)
    return found


def answers(rows: list[dict[str, Any]]) -> list[list[int]]:
    """The supervised runs of a conversation's rows, in order."""
    runs = []
    for row in rows:
        mask = [0, *row["loss_mask"], 0]
        edges = [i - 1 for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
        runs += [row["input_ids"][a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return runs


def agreement(here: dict[int, Any], there: dict[int, Any]) -> tuple[int, int, bool]:
    """(answers that are the same, answers compared, whether conversations that agree throughout have the same number of answers)."""
    same = compared = 0
    turns = True
    for number, rows in here.items():
        a, b = answers(rows), answers(there.get(number, []))
        parted = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        same += min(len(a), len(b)) if parted is None else parted
        compared += min(len(a), len(b)) if parted is None else parted + 1
        turns = turns and (parted is not None or len(a) == len(b))
    return same, compared, turns


def readable(folder: Path) -> int:
    """How many rows the reader of every trainer takes."""
    target = load(ModelOptions(device="cpu"))
    options = DataOptions(train_data_path=folder, pack=False)
    stream = open_stream(
        options, [folder / "train-0.jsonl"], target.tokenizer, batch_size=1, shuffle=False, stop_ids=target.eos_ids
    )
    return sum(1 for _ in stream)


@contextmanager
def server(python: str, log: Path) -> Iterator[str]:
    """vLLM serving the built-in model; its address. Ends with all processes that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", pocket_path()]
    command += ["--served-model-name", "pocket", "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1"]
    command += ["--port", port, "--max-num-seqs", 8, "--generation-config", "vllm"]
    # what this process was started with is of another environment
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    inherited |= {key: value for key, value in SETTINGS.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT, env=inherited, start_new_session=True
        )
    try:
        with timed("vLLM starting"):
            await_start(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def await_start(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """UserError if vLLM ends or takes too long, after the end of its log."""
    end = time.monotonic() + START
    while process.poll() is None and time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    print(log.read_text(encoding="utf-8", errors="replace")[-LAST_WORDS:], file=sys.stderr)
    raise UserError("vLLM did not start, see above")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Regenerate in this process and through vLLM, and compare.")
    parser.add_argument("--samples", type=int, default=24, help="conversations")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--agree", type=float, default=0.98, help="share of answers that must be the same")
    parser.add_argument(
        "--python", help="Python of an environment with vLLM; default: the one that environment.sh makes"
    )
    parser.add_argument("--output", type=Path, help="file for the JSON document")
    return parser.parse_args()


if __name__ == "__main__":
    main()
