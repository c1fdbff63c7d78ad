"""What must hold for any drafter on any family, as plain functions that raise AssertionError. Tests call them, mutants must fail them.

    check_greedy("gemma2", MAKERS["ragged-tree"])

Every check compares with `tiny.reference`: the whole prefix through the unpatched model, without a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import tiny
from contract.runs import NEW, Maker, Run, close, decoded, same, truth_of
from contract.scripted import Wrapped
from understudy.core.records import Commit, Needs
from understudy.decoding.stops import StopRule
from understudy.ops.trees import depths
from understudy.target.params import SamplingParams


def check_greedy(
    family: str, maker: Maker, prompt: Sequence[int] | None = None, count: int = NEW, **options: Any
) -> Run:
    """The output is the reference's, token for token, and the cycles say how it came about."""
    prompt = tiny.prompt() if prompt is None else prompt
    want = tiny.reference(family, prompt, count)
    run = decoded(family, maker, prompt, max_new_tokens=count, **options)
    same(run.output, want, f"{maker.name} on {family}")
    check_cycles(run, len(prompt))
    return run


def check_cycles(run: Run, prompt: int) -> None:
    """Every field of every cycle, against the output and each other."""
    sequence, at = run.sequence, prompt
    stages = set(sequence.target.lengths())
    for i, cycle in enumerate(run.cycles):
        assert cycle.index == i
        assert sequence.tokens[at : at + len(cycle.committed)] == cycle.committed
        assert set(cycle.kv_before) == set(cycle.kv_after) == stages
        if i:
            assert set(cycle.kv_before.values()) == {at - 1}, (
                f"cycle {i} begins with {cycle.kv_before}, {at} tokens committed"
            )
            assert cycle.rows.start == at - 1
        at += len(cycle.committed)
        assert set(cycle.kv_after.values()) == {at - 1}, f"cycle {i} leaves {cycle.kv_after}, {at} tokens committed"
        width = len(cycle.drafted) + 1
        assert sum(cycle.seconds.values()) > 0
        if i == 0:
            assert (
                not cycle.drafted
                and not cycle.accepted
                and cycle.choices == cycle.committed
                and len(cycle.committed) == 1
            )
            continue
        assert cycle.rows.width == width == len(cycle.choices) and cycle.rows.tokens[1:].tolist() == cycle.drafted
        assert cycle.parents is None or len(cycle.parents) == width - 1
        if not cycle.stopped:
            assert len(cycle.committed) == cycle.accepted + 1, (
                "a cycle commits its accepted drafts and the target's own token"
            )
        assert len(cycle.committed) <= cycle.accepted + 1 and cycle.stopped == (
            sequence.finished == "stop" and cycle is run.cycles[-1]
        )
    assert at == len(sequence.tokens)


def check_rejections(family: str, makers: Iterable[Maker], rejections: int = 150, acceptances: int = 40) -> None:
    """Over all these drafters at least so many drafts are rejected and accepted, and the text varies: else equality is vacuous."""
    runs = [check_greedy(family, maker) for maker in makers]
    rejected, accepted = sum(run.rejected for run in runs), sum(run.accepted for run in runs)
    assert rejected >= rejections, f"only {rejected} drafts were rejected on {family}"
    assert accepted >= acceptances, f"only {accepted} drafts were accepted on {family}"
    assert len(set(runs[0].output)) >= 10, f"{family} says only {set(runs[0].output)}"


def check_max_new_tokens(family: str, maker: Maker, counts: Iterable[int] = range(1, 8)) -> None:
    prompt = tiny.prompt()
    want = tiny.reference(family, prompt, NEW)
    for count in counts:
        run = decoded(family, maker, prompt, max_new_tokens=count)
        same(run.output, want[:count], f"max_new_tokens={count}")
        assert run.sequence.finished == "length"
        check_cycles(run, len(prompt))


def check_stop_token(family: str, maker: Maker, limit: int = 5) -> list[int]:
    """The output ends with the stop token wherever it falls in a block, and cache and text end with it. -> its place in each block."""
    prompt = tiny.prompt()
    whole = tiny.reference(family, prompt, NEW)
    first_seen = [i for i, token in enumerate(whole) if token not in whole[:i]]
    places = []
    for end in first_seen[1 : limit + 1]:
        stop = StopRule((whole[end],))
        run = decoded(family, maker, prompt, stop=stop)
        same(run.output, whole[: end + 1], f"stop token at {end}")
        assert run.sequence.finished == "stop" and run.cycles[-1].stopped
        check_cycles(run, len(prompt))
        check_cache(family, run)
        places.append(len(run.cycles[-1].committed) - 1)
    return places


def spell(ids: Sequence[int]) -> str:
    """A pocket tokenizer: token 10 is "k", 36 is "kk"."""
    return "".join("abcdefghijklmnopqrstuvwxyz"[i % 26] * (1 + i // 26 % 2) for i in ids)


def check_stop_string(family: str, maker: Maker) -> None:
    """A stop string that spans tokens ends the output at the token that completes it, as it does without drafts."""
    prompt = tiny.prompt()
    whole = tiny.reference(family, prompt, NEW)
    for at, length in ((2, 2), (5, 3), (9, 4), (13, 2)):
        text = spell(whole[at : at + length])
        stop = StopRule(strings=("~", text[:-1] if len(text) > 4 else text), decode=spell)
        end = next(i for i in range(NEW) if stop.strings[1] in spell(whole[: i + 1]))
        run = decoded(family, maker, prompt, stop=stop)
        same(run.output, whole[: end + 1], f"stop string {stop.strings[1]!r}")
        assert run.sequence.finished == "stop"
        shown = stop.trim(spell(run.output))
        assert stop.strings[1] not in shown and spell(run.output).startswith(shown)
        check_cache(family, run)


def check_prefill(family: str, maker: Maker) -> None:
    prompt = tiny.prompt(23, seed=1)
    for chunk in (1, 3, 64):
        check_greedy(family, maker, prompt, 12, prefill_chunk=chunk)


PENALTIES = SamplingParams(
    repetition_penalty=1.7,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    min_tokens=7,
    logit_bias={11: 2.0, 12: -3.0, 40: 1.5},
)


def check_penalties(family: str, maker: Maker, params: SamplingParams = PENALTIES) -> None:
    """Processors that look at what was said before see, at each draft, the drafts that lead to it."""
    prompt = tiny.prompt()
    whole = tiny.reference(family, prompt, NEW, params)
    assert whole != tiny.reference(family, prompt, NEW), "these penalties change nothing here"
    eos = tiny.reference(family, prompt, 3)[-1]  # what the model would say third, were it allowed
    want = tiny.reference(family, prompt, NEW, params, (eos,))
    truth = [*prompt, *tiny.reference(family, [*prompt], NEW + 8, params, (eos,))]
    truth += [0] * (len(prompt) + NEW + 8 - len(truth))
    run = decoded(family, maker, prompt, truth=truth, sampling=params, stop=StopRule((eos,)))
    same(run.output, want, "with penalties")
    assert eos not in run.output[: params.min_tokens]


def check_adaptive(family: str, maker: Maker) -> None:
    for options in ({"adaptive": True}, {"steps": 0}, {"steps": 1}, {"steps": 2}):
        check_greedy(family, maker, count=16, **options)


# Caches and hidden states


def check_cache(family: str, run: Run) -> None:
    """Each layer's rows equal those of the model's own pass over the same text, in transformers' own cache."""
    sequence = run.sequence
    kept = sequence.tokens[:-1]
    assert sequence.target.length == len(kept), f"{sequence.target.length} rows for {len(kept)} tokens and one"
    assert set(sequence.target.lengths().values()) == {len(kept)}
    fresh = DynamicCache()
    with torch.inference_mode():
        tiny.model(family)(input_ids=torch.tensor([kept]), past_key_values=fresh, use_cache=True)
    for layer, theirs in enumerate(fresh.layers):
        keys, values = sequence.target.cache.rows(layer, len(kept))
        close(keys, theirs.keys, f"keys of layer {layer}")
        close(values, theirs.values, f"values of layer {layer}")


def check_states(family: str, maker: Maker, count: int = 20) -> Run:
    """Taps, exit states, last hidden states and logits of every committed path equal the model's own over the whole text; the paths
    tell the text; the cache is the model's own."""
    prompt = tiny.prompt()
    target = tiny.target(family)
    commits: list[tuple[Commit, dict[str, Tensor]]] = []
    exit_layer = maker.make(target, truth_of(family, prompt)).needs.exit or 2
    needs = Needs(taps=frozenset(range(target.layers + 1)), exit=exit_layer, last=True, logits=True)

    def look(commit: Commit) -> None:
        rows, path = commit.rows, list(commit.path)
        assert rows.exit is not None and rows.last is not None and rows.logits is not None
        assert set(rows.taps) == needs.taps and rows.logits.shape[0] == rows.width
        named = {f"tap {t}": rows.taps[t] for t in rows.taps} | {
            "exit": rows.exit,
            "last": rows.last,
            "logits": rows.logits,
        }
        commits.append((commit, {name: states[path].clone() for name, states in named.items()}))

    run = decoded(family, maker, prompt, max_new_tokens=count, wrap=lambda inner: Wrapped(inner, look, needs=needs))
    text = run.sequence.tokens
    told = [int(commit.rows.tokens[row]) for commit, _ in commits for row in commit.path]
    same(told, text[:-1], "the tokens on the committed paths")
    at = 0
    for commit, _ in commits:
        assert commit.rows.start == at and commit.path[0] == 0
        level = depths([-1, *commit.rows.parents[1:]]) if commit.rows.parents else range(commit.rows.width)
        assert [level[row] for row in commit.path] == list(range(len(commit.path)))
        at += len(commit.path)
        assert commit.next == text[at], "the token that follows the path"
    hidden = tiny.hidden_states(tiny.model(family), text[:-1])
    want = {f"tap {t}": hidden[t] for t in needs.taps}
    want |= {"exit": hidden[exit_layer], "last": hidden[-1], "logits": tiny.logits(tiny.model(family), text[:-1])}
    for name, states in want.items():
        close(torch.cat([kept[name] for _, kept in commits]), states, f"{name} of {maker.name} on {family}")
    check_cycles(run, len(prompt))
    check_cache(family, run)
    return run
