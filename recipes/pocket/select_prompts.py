"""Choose the default prompts: held-out questions that the model answers without looping and ends by itself.

A small model that loops makes every drafter look good, so a prompt is kept only if the model's plain greedy answer ends within
256 tokens, is 24 tokens long at least and repeats less than 30 % of its 4-grams. Half of the prompts are single questions, half
have the earlier turns of their conversation as context, as far as there are enough. The candidates and their order are drawn
from a fixed seed, and they are tried in rounds until there are enough, so the same model and corpus give the same prompts.

    python recipes/pocket/select_prompts.py --model runs/pocket --corpus runs/stdlib --output prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from understudy.core.files import write_text
from understudy.data.conversations import Conversation, Message, read
from understudy.data.prompts import render
from understudy.data.stdlib import module_of
from understudy.telemetry.repeats import repeat_share

SINGLE, CONTEXT = "single turn", "with context"
LONGEST = 1200  # tokens of a prompt
PER_CONVERSATION = 3  # the most candidates from one conversation
SHORTEST, LONGEST_ANSWER = 24, 256  # tokens of an answer: without the end token, and with it
REPEATS = 0.3  # an answer's repeat_share is below this
ROUND = 4  # batches between two looks at how many are still wanted


@dataclass(frozen=True)
class Candidate:
    id: str
    messages: tuple[Message, ...]
    ids: list[int]

    @property
    def kind(self) -> str:
        return SINGLE if len(self.messages) == 1 else CONTEXT


def candidates(corpus: Path, tokenizer, seed: int) -> list[Candidate]:
    """Questions of the held-out conversations, each asked once in the whole set, in a seeded order."""
    rng = random.Random(seed)
    seen: set[str] = set()
    found = [c for conversation in read(corpus / "eval.jsonl") for c in _drawn(conversation, tokenizer, rng, seen)]
    rng.shuffle(found)
    return found


def _drawn(conversation: Conversation, tokenizer, rng: random.Random, seen: set[str]) -> Iterator[Candidate]:
    """A few questions of a conversation, alone or after the earlier turns.

    A question that differs from an earlier one in the module's name only is the same question: every codec asks for the same
    five methods, and would fill half of the set with them.
    """
    questions = [i for i, message in enumerate(conversation.messages) if message.role == "user"]
    rng.shuffle(questions)
    taken = 0
    for i in questions:
        question = conversation.messages[i].content.replace(module_of(conversation.id), "")
        alone = rng.random() < 0.5
        messages = conversation.messages[i : i + 1] if alone else conversation.messages[: i + 1]
        if question not in seen and taken < PER_CONVERSATION:
            ids = render(tokenizer, messages)
            if len(ids) <= LONGEST:
                seen.add(question)
                taken += 1
                yield Candidate(f"{conversation.id}#{i // 2}", messages, ids)


@torch.inference_mode()
def answers(model, batch: Sequence[Candidate]) -> list[list[int]]:
    """The plain greedy answer to each candidate, up to the token that decides its verdict: the row then leaves the batch."""
    end, width = model.generation_config.eos_token_id, max(len(candidate.ids) for candidate in batch)
    ids = torch.tensor([[end] * (width - len(c.ids)) + c.ids for c in batch], device=model.device)
    mask = torch.tensor([[0] * (width - len(c.ids)) + [1] * len(c.ids) for c in batch], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    found: list[list[int]] = [[] for _ in batch]
    live = list(range(len(batch)))
    while live:
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits
        drawn = logits[:, -1].argmax(-1)
        for i, token in zip(live, drawn.tolist(), strict=True):
            found[i].append(token)
        rows = [r for r, i in enumerate(live) if verdict(found[i], end) is None]
        if len(rows) < len(live):
            live = [live[r] for r in rows]
            keep = torch.tensor(rows, device=model.device, dtype=torch.long)
            cache.batch_select_indices(keep)
            drawn, mask, positions = drawn[keep], mask[keep], positions[keep]
        ids, positions = drawn[:, None], positions[:, -1:] + 1
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return found


def verdict(tokens: Sequence[int], end: int) -> str | None:
    """Whether an answer is "kept" or why not; None as long as it goes on and can still become good."""
    if tokens[-1] == end:
        text = tokens[:-1]
        if len(text) < SHORTEST:
            return "too short"
        return "kept" if repeat_share(text) < REPEATS else "repeats itself"
    if len(tokens) == LONGEST_ANSWER:
        return "does not end"
    # repeats never become fewer: with too many for the longest answer, no answer that begins like this is good
    repeats = repeat_share(tokens) * max(len(tokens) - 3, 0)
    return "loops" if repeats >= REPEATS * (LONGEST_ANSWER - 3) else None


def good(model, pool: Sequence[Candidate], batch: int, tally: Counter[str]) -> Iterator[Candidate]:
    """The candidates of `pool` with a good answer, in its order, as long as somebody asks for more."""
    end = model.generation_config.eos_token_id
    for start in range(0, len(pool), ROUND * batch):
        tried = pool[start : start + ROUND * batch]
        by_length = sorted(tried, key=lambda candidate: len(candidate.ids))  # little padding in a batch
        found: dict[str, str | None] = {}
        for i in range(0, len(tried), batch):
            rows = by_length[i : i + batch]
            found |= {c.id: verdict(tokens, end) for c, tokens in zip(rows, answers(model, rows), strict=True)}
        tally.update(found.values())
        print(f"{sum(tally.values())} tried: {dict(sorted(tally.items()))}", flush=True)
        yield from (candidate for candidate in tried if found[candidate.id] == "kept")


def select(model, pool: Sequence[Candidate], count: int, batch: int) -> list[Candidate]:
    """Half of `count` from either kind; where one runs out the other fills up."""
    tallies = {kind: Counter[str]() for kind in (SINGLE, CONTEXT)}
    single, context = (good(model, [c for c in pool if c.kind == k], batch, t) for k, t in tallies.items())
    chosen = list(islice(single, count - count // 2))
    chosen += islice(context, count - len(chosen))
    chosen += islice(single, count - len(chosen))
    for kind, tally in tallies.items():
        tried = tally.total()
        shares = ", ".join(f"{reason} {n} ({n / tried:.0%})" for reason, n in tally.most_common())
        print(f"{kind}: {sum(c.kind == kind for c in pool)} candidates, {tried} tried: {shares}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model, with its tokenizer")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with eval.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="the JSON Lines file to write")
    parser.add_argument("--count", type=int, default=200, help="prompts to choose")
    parser.add_argument("--batch", type=int, default=32, help="prompts answered at once")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    chosen = select(model, candidates(args.corpus, tokenizer, args.seed), args.count, args.batch)
    random.Random(args.seed).shuffle(chosen)  # the first rows of the file are a fair sample too
    rows = [{"id": c.id, "messages": [message.as_dict() for message in c.messages]} for c in chosen]
    write_text(args.output, "".join(json.dumps(row) + "\n" for row in rows))
    kinds = Counter(c.kind for c in chosen)
    print(f"{len(rows)} of {args.count} prompts ({dict(kinds)}) in {args.output}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
