"""Train the built-in pocket model: a small, deep Qwen3 that writes Python functions.

The corpus is what `understudy data stdlib` writes (train.jsonl, eval.jsonl). Matrices inside the layers are trained with Muon
(Jordan et al., 2024), everything else with AdamW; the learning rate is held, then falls linearly, and is scheduled by elapsed
time, so that a run of H hours ends after H hours on any machine. Sequences are half as long until the learning rate has
fallen a while: attention is a third of a step at full length. The loss weighs assistant tokens 1.0 and the others 0.3. With
`--teacher DIR` (a model with the same tokenizer) half of it is the forward KL to the teacher's law.

    python recipes/pocket/train.py --corpus runs/stdlib --tokenizer TOKENIZER --output runs/pocket --hours 2
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
OTHER_WEIGHT = 0.3  # weight of tokens that are not the assistant's
MUON_LR, ADAMW_LR = 1e-2, 2e-3
FINAL = (6, 768, 60)  # sequences, tokens and batches of the loss that models are compared by


def pack(path: Path, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and assistant mask of all conversations of `path`, end to end: two [N] tensors.

    The chat template opens each conversation with BOS, so nothing is added between them.
    """
    ids: list[int] = []
    mask: list[int] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            turns = [{"role": ROLES[t["from"]], "content": t["value"]} for t in json.loads(line)["conversations"]]
            out = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
            ids += out["input_ids"]
            mask += out["assistant_masks"]
    return torch.tensor(np.array(ids, dtype=np.int64)), torch.tensor(np.array(mask, dtype=np.float32))


def losses(model, ids, mask, rows, length, teacher=None) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted loss, mean nats per assistant token) over the windows of `length` tokens that start at `rows`."""
    window = torch.stack([ids[r : r + length + 1] for r in rows])
    assistant = torch.stack([mask[r : r + length + 1] for r in rows])[:, 1:].reshape(-1)
    device = next(model.parameters()).device
    window, assistant = window.to(device), assistant.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = model(input_ids=window[:, :-1]).logits
    log_q = logits.float().flatten(0, 1).log_softmax(-1)
    nats = F.nll_loss(log_q, window[:, 1:].reshape(-1), reduction="none")
    per_token = nats
    if teacher is not None:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            p = teacher(input_ids=window[:, :-1]).logits.float().flatten(0, 1).softmax(-1)
        # the teacher's entropy is a constant of the KL and left out
        per_token = 0.5 * nats - 0.5 * (p * log_q).sum(-1)
    weight = OTHER_WEIGHT + (1 - OTHER_WEIGHT) * assistant
    return (per_token * weight).sum() / weight.sum(), (nats * assistant).sum() / assistant.sum()


@torch.no_grad()
def evaluate(model, ids, mask, batch, length, batches) -> float:
    """Mean nats per assistant token over the first `batches` x `batch` windows of the held-out tokens."""
    total = 0.0
    for i in range(batches):
        rows = range(i * length * batch, (i + 1) * length * batch, length)
        total += losses(model, ids, mask, rows, length)[1].item()
    return total / batches


def build(args, tokenizer) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        intermediate_size=args.mlp,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_theta=10000.0,
        use_sliding_window=False,
    )
    torch.manual_seed(args.seed)
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:  # residual branches start at zero: depth then costs nothing early in training
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def optimizers(model) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if n.startswith("model.layers") and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if not (n.startswith("model.layers") and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, momentum=0.95),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule(elapsed: float, step: int, hold: float) -> float:
    """Learning-rate factor at `elapsed` (share of the run, 0 to 1): 100 steps of warm-up, flat until `hold`, linear to 2 %."""
    return min(1.0, (step + 1) / 100) * (1.0 if elapsed < hold else max(0.02, (1 - elapsed) / (1 - hold)))


def report(args, tokenizer) -> None:
    """The held-out loss of a finished model: the figure that models are compared by."""
    ids, mask = pack(args.corpus / "eval.jsonl", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(args.evaluate, dtype=torch.bfloat16).to(args.device)
    print(f"{args.evaluate} final held out {evaluate(model, ids, mask, *FINAL):.4f}", flush=True)


def train(args) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.evaluate is not None:
        return report(args, tokenizer)
    ids, mask = pack(args.corpus / "train.jsonl", tokenizer)
    held_ids, held_mask = pack(args.corpus / "eval.jsonl", tokenizer)
    model = build(args, tokenizer).to(args.device)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(ids)} tokens, {len(held_ids)} held out",
        flush=True,
    )
    steps_of = torch.compile(model) if args.compile else model
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher).to(args.device) if args.teacher else None
    opts = optimizers(model)
    base = [o.param_groups[0]["lr"] for o in opts]
    rng = np.random.default_rng(args.seed)
    starts: list[int] = []
    began, step = time.monotonic(), 0
    while (elapsed := (time.monotonic() - began) / (args.hours * 3600)) < 1:
        half = elapsed < args.half_length
        length, batch = (args.length // 2, args.batch * 2) if half else (args.length, args.batch)
        if len(starts) < batch:
            offset = rng.integers(0, args.length)
            starts = list(rng.permutation(np.arange(0, len(ids) - 2 * args.length, length) + offset))
        rows, starts = starts[:batch], starts[batch:]
        for opt, lr in zip(opts, base, strict=True):
            opt.param_groups[0]["lr"] = lr * schedule(elapsed, step, args.hold)
        loss, assistant = losses(steps_of, ids, mask, rows, length, teacher)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if math.isfinite(norm.item()):
            for opt in opts:
                opt.step()
        model.zero_grad(set_to_none=True)
        step += 1
        if step % 25 == 0:
            rate = step * args.batch * args.length / (time.monotonic() - began)
            print(
                f"{step} loss {loss.item():.3f} assistant {assistant.item():.3f} {rate:.0f} tokens/s {elapsed:.1%}",
                flush=True,
            )
        if step % 500 == 0:
            print(
                f"{step} held out {evaluate(model, held_ids, held_mask, args.batch, args.length, 16):.4f}", flush=True
            )
            model.save_pretrained(args.output / "last")
    model = model.to(torch.bfloat16)
    final = evaluate(model, held_ids, held_mask, *FINAL)
    print(f"{step} final held out {final:.4f} after {step * args.batch * args.length / 1e6:.2f} M tokens", flush=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.jsonl and eval.jsonl")
    parser.add_argument("--tokenizer", required=True, help="folder with the tokenizer and its chat template")
    parser.add_argument("--output", type=Path, default=Path("runs/pocket"), help="where the model is saved")
    parser.add_argument("--evaluate", help="train nothing: print the held-out loss of the model in this folder")
    parser.add_argument("--hours", type=float, default=2.0, help="length of the run")
    parser.add_argument("--hold", type=float, default=0.4, help="share of the run before the learning rate falls")
    parser.add_argument(
        "--half-length", type=float, default=0.6, help="share of the run on sequences of half the length"
    )
    parser.add_argument("--teacher", help="folder of a model with the same tokenizer to learn from as well")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=6, help="sequences per step")
    parser.add_argument("--length", type=int, default=768, help="tokens per sequence")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
