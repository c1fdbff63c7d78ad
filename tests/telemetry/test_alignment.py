"""Alignment telemetry on real decoding: every number against the model itself, the planted shift, budgets, files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from contract.runs import MAKERS, NEW, Listener, Maker, decoded, finish, open_run, scripted, truth_of
from contract.scripted import Wrapped, chain
from online.fake import World
from understudy.cli.options import options as flags_of
from understudy.core.config import Config
from understudy.core.errors import UserError
from understudy.core.records import Budget, Cycle, Needs, Proposal
from understudy.decoding.engine import decode
from understudy.decoding.stops import StopRule
from understudy.drafting.protocols import Drafter, DraftSampler, View
from understudy.drafting.stateless import StatelessSession
from understudy.target.params import SamplingParams
from understudy.telemetry.alignment import AlignTelemetry, alignment, as_dict
from understudy.telemetry.options import AlignTelemetryParams

FAMILY = "qwen3"
ALL = {"telemetry_debug": True, "telemetry_prints_budget": 0, "telemetry_max_blocks": 1000}


class ShiftedSession(StatelessSession):
    def __init__(self, view: View, truth: list[int], by: int) -> None:
        super().__init__(view)
        self.truth, self.by = truth, by

    def propose(self, budget: Budget, sampler: DraftSampler) -> Proposal:
        at = len(self.view.tokens) + self.by
        return Proposal(torch.tensor(self.truth[at : at + budget.depth], dtype=torch.int64))

    def fork(self, view: View) -> ShiftedSession:
        return ShiftedSession(view, self.truth, self.by)


class Shifted(Drafter):
    """Drafts the right tokens, `by` places late in the text."""

    steps = 4
    needs = Needs()

    def __init__(self, truth: list[int], by: int) -> None:
        super().__init__()
        self.truth, self.by = truth, by

    def session(self, view: View) -> ShiftedSession:
        return ShiftedSession(view, self.truth, self.by)


def shifted(by: int) -> Maker:
    return Maker(f"shifted-{by}", lambda target, truth: Shifted(truth, by))


@dataclass
class Kept:
    """What a test keeps of a cycle."""

    text: list[int]  # committed tokens when the cycle began
    cycle: Cycle
    logits: torch.Tensor


def watched(maker: Maker, folder: Path, **settings: Any) -> tuple[list[Kept], list[dict[str, Any]], list[str], Any]:
    """A decoding with telemetry: its cycles with index >= 1, the dumps in the order of steps, the lines, the run."""
    extra = settings.pop("extra", None)
    sampling = settings.pop("sampling", SamplingParams())
    lines: list[str] = []
    listener = alignment(AlignTelemetryParams(**{**ALL, **settings}), "run", "eval", extra, lines.append, folder)
    assert listener is not None
    kept: list[Kept] = []
    prompt = tiny.prompt()
    run = open_run(FAMILY, maker, prompt, listeners=[listener], sampling=sampling)
    text = list(run.sequence.tokens)
    for cycle in decode(run.sequence):
        if cycle.index:
            kept.append(Kept(list(text), cycle, cycle.rows.logits.clone()))
        text += cycle.committed
    listener.close()
    return kept, dumps(folder), lines, run


def dumps(folder: Path) -> list[dict[str, Any]]:
    return sorted((json.loads(path.read_text()) for path in folder.glob("*.json")), key=lambda dump: dump["step"])


def said(text: list[int]) -> list[int]:
    """The model's argmax after every position of a text, from the whole text at once."""
    return tiny.logits(tiny.model(FAMILY), text).argmax(-1).tolist()


def expected(kept: Kept, text: list[int]) -> dict[str, Any]:
    """The definitions, written out: `text` is the whole text as it ended up."""
    cycle, start = kept.cycle, len(kept.text)
    parents = cycle.parents if cycle.parents is not None else range(-1, len(cycle.drafted) - 1)
    paths: list[list[int]] = [[]]  # drafts from the start of the block to each row
    for draft, parent in zip(cycle.drafted, parents, strict=True):
        paths.append([*paths[parent + 1], draft])
    verifier = [said([*kept.text, *path])[-1] for path in paths]
    deepest = max(map(len, paths))
    onwards = said(text)[start - 1 : len(text) - 1][: deepest + 1]
    same = [path[-1] == verifier[parent + 1] for path, parent in zip(paths[1:], parents, strict=True)]
    later = [path[-1] == onwards[len(path)] for path in paths[1:] if len(path) < len(onwards)]
    best = max(len(path) for path in paths if path == onwards[1 : len(path) + 1])
    match_0 = sum(same) / len(same) if same else None
    match_p1 = sum(later) / len(later) if later else None
    tie = best == cycle.accepted and match_p1 is not None and match_p1 > match_0
    return {
        "match_0": match_0,
        "match_p1": match_p1,
        "best_offset": 1 if best > cycle.accepted or tie else 0,
        "accept_len_default": cycle.accepted,
        "accept_len_best": max(best, cycle.accepted),
        "kv_before": cycle.kv_before,
        "kv_after": cycle.kv_after,
        "drafted": cycle.drafted,
        "verifier": verifier,
        "onwards": onwards,
    }


SAMPLED = SamplingParams(temperature=1.3, seed=3)


@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["ragged", "ragged-resumed", "random", "ragged-tree", "random-tree", "shifted"])
def test_every_number_is_what_the_model_says(name, sampling, tmp_path):
    maker = shifted(1) if name == "shifted" else MAKERS[name]
    kept, found, _, run = watched(maker, tmp_path, sampling=sampling, telemetry_auto_offset=True)
    assert [dump["step"] for dump in found] == [*range(1, len(kept) + 1)]
    assert sum(k.cycle.accepted < len(k.cycle.drafted) for k in kept) >= 2
    for one, dump in zip(kept, found, strict=True):
        diag = dump["diag"]
        assert (diag.pop("parents", None) is None) == (one.cycle.parents is None)
        assert diag == expected(one, run.sequence.tokens), f"step {dump['step']}"


def test_a_planted_one_token_shift_is_best_offset_1(tmp_path):
    _, found, lines, _ = watched(shifted(1), tmp_path, telemetry_auto_offset=True, telemetry_prints_budget=5)
    whole = [dump["diag"] for dump in found if len(dump["diag"]["onwards"]) == 5]
    assert len(whole) >= 20
    assert {d["best_offset"] for d in whole} == {1}
    assert {d["match_p1"] for d in whole} == {1.0}
    assert {d["accept_len_best"] for d in whole} == {4}
    assert sum(d["accept_len_default"] == 0 for d in whole) >= 15  # the text says a token twice in places
    assert len(lines) == 5
    assert all("(best 4)" in line and "best_offset 1" in line for line in lines)


def test_right_drafts_are_at_offset_0(tmp_path):
    _, found, lines, _ = watched(shifted(0), tmp_path, telemetry_prints_budget=3)
    drafting = [dump["diag"] for dump in found if dump["diag"]["drafted"]]
    assert {(d["match_0"], d["best_offset"]) for d in drafting} == {(1.0, 0)}
    assert all("best " not in line for line in lines)


def test_without_auto_offset_nothing_of_it_is_written(tmp_path):
    _, found, _, _ = watched(shifted(1), tmp_path)
    assert found
    assert all("accept_len_best" not in dump["diag"] and dump["diag"]["best_offset"] in (0, 1) for dump in found)


def test_auto_offset_changes_nothing_that_is_committed(tmp_path):
    for maker in (shifted(1), MAKERS["ragged-tree"]):
        kept, _, _, run = watched(maker, tmp_path / maker.name, telemetry_auto_offset=True, telemetry_dump_tensors=True)
        bare = decoded(FAMILY, maker, tiny.prompt())
        assert run.output == bare.output == tiny.reference(FAMILY, tiny.prompt(), NEW)
        assert [k.cycle.committed for k in kept] == [c.committed for c in bare.cycles if c.index]


def test_off_makes_no_listener_and_touches_nothing(tmp_path):
    params = AlignTelemetryParams(telemetry_save_dir=tmp_path / "dumps", telemetry_dump_tensors=True)
    assert alignment(params, "run", "serve", folder=tmp_path / "telemetry") is None
    assert list(tmp_path.iterdir()) == []
    assert not AlignTelemetryParams().telemetry_debug


def test_on_asks_for_nothing_of_a_pass():
    assert AlignTelemetry.needs == Needs()


def test_budgets_and_names(tmp_path):
    kept, found, lines, _ = watched(MAKERS["wrong"], tmp_path, telemetry_prints_budget=3, telemetry_max_blocks=2)
    assert len(kept) > 5
    assert [line.split(":")[0] for line in lines] == [f"telemetry eval step {n}" for n in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_eval_step0001.json", "run_eval_step0002.json"]
    assert [(d["run_id"], d["phase"], d["step"], d["cycle"]) for d in found] == [("run", "eval", n, n) for n in (1, 2)]
    assert "diag_extra" not in found[0]


def test_no_budget_for_files_leaves_no_folder(tmp_path):
    watched(MAKERS["wrong"], tmp_path / "none", telemetry_max_blocks=0)
    assert not (tmp_path / "none").exists()


def test_global_steps_grow_beyond_four_digits_and_phases_are_named(tmp_path):
    params = AlignTelemetryParams(**ALL | {"telemetry_save_dir": tmp_path / "own"})
    listener = alignment(params, "r", "train", write=print, folder=tmp_path / "not-here", start=9998)
    for phase in ("train", "timing"):
        listener.phase = phase
        decoded(FAMILY, MAKERS["wrong"], tiny.prompt(), listeners=[listener], max_new_tokens=4)
    listener.close()
    names = sorted(path.name for path in (tmp_path / "own").iterdir())
    assert names == sorted(
        [f"r_train_step{n}.json" for n in (9999, 10000, 10001)]
        + [f"r_timing_step{n}.json" for n in (10002, 10003, 10004)]
    )
    assert not (tmp_path / "not-here").exists()


def test_lines_are_printed_without_a_folder(capsys):
    listener = alignment(AlignTelemetryParams(telemetry_debug=True), "r", "serve")
    decoded(FAMILY, MAKERS["ragged"], tiny.prompt(), listeners=[listener])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == AlignTelemetryParams().telemetry_prints_budget
    assert lines[0].startswith("telemetry serve step 1: drafted 4, accept_len 2, match_0 ")
    assert ", kv target 20->23" in lines[0]


def test_tensors_are_copies_and_load_with_weights_only(tmp_path):
    maker = scripted("resumed", [chain(2, 2)], exit_layer=2)
    traced = Maker(
        "traced",
        lambda target, truth: Wrapped(
            maker.make(target, truth),
            on_propose=lambda p: setattr(p, "trace", SimpleNamespace(hidden=p.resume[1][:-1] * 2)),
        ),
    )
    kept, found, _, _ = watched(traced, tmp_path, telemetry_dump_tensors=True)
    for one, dump in zip(kept, found, strict=True):
        loaded = torch.load(tmp_path / f"run_eval_step{dump['step']:04d}.pt", weights_only=True)
        drafting = one.cycle.proposal is not None
        assert set(loaded) == {"drafted", "verifier", "onwards", "logits", "exit"} | ({"hidden"} if drafting else set())
        assert loaded["drafted"].tolist() == one.cycle.drafted
        assert torch.equal(loaded["logits"], one.logits)
        assert loaded["logits"].argmax(-1).tolist() == loaded["verifier"].tolist() == dump["diag"]["verifier"]
        states = tiny.hidden_states(tiny.model(FAMILY), [*one.text, *one.cycle.drafted])[2]
        rows = states[len(one.text) - 1 :]
        assert torch.allclose(loaded["exit"], rows, atol=1e-4)
        assert not drafting or torch.allclose(loaded["hidden"], 2 * rows[:-1], atol=2e-4)


def test_tensors_of_a_tree_say_its_shape_and_states_only_where_there_are_any(tmp_path):
    kept, _, _, _ = watched(MAKERS["ragged-tree"], tmp_path, telemetry_dump_tensors=True)
    loaded = torch.load(tmp_path / "run_eval_step0001.pt", weights_only=True)
    assert set(loaded) == {"drafted", "parents", "verifier", "onwards", "logits"}
    assert loaded["parents"].tolist() == list(kept[0].cycle.parents)


def test_what_is_kept_of_a_pass_is_copied(tmp_path):
    """A block waits for text that is to come; by then the pass's own tensors may hold something else."""
    params = AlignTelemetryParams(**ALL, telemetry_dump_tensors=True)
    listener = alignment(params, "run", "eval", folder=tmp_path)

    def overwrite(cycle: Cycle) -> None:
        with torch.inference_mode():
            cycle.rows.logits.zero_()

    decoded(FAMILY, shifted(1), tiny.prompt(), listeners=[listener, Listener(overwrite)])
    loaded = torch.load(tmp_path / "run_eval_step0001.pt", weights_only=True)
    assert loaded["logits"].argmax(-1).tolist() == loaded["verifier"].tolist()
    assert loaded["logits"].abs().min() > 0


def test_no_tensors_unless_asked(tmp_path):
    watched(MAKERS["ragged"], tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_policy_figures_stand_in_diag_extra_while_there_are_any(tmp_path):
    given = iter([{}, *({"policy_mean_advantage": 0.25 * n, "policy_mean_kl": float("nan")} for n in range(99))])
    kept, found, _, _ = watched(MAKERS["ragged"], tmp_path, extra=lambda: next(given))
    assert "diag_extra" not in found[0]
    lengths = [k.cycle.accepted for k in kept]
    for n, (one, dump) in enumerate(zip(kept, found, strict=True)):
        if not n:
            continue
        drafted = len(one.cycle.drafted)
        assert dump["diag_extra"] == {
            "eta": one.cycle.accepted / drafted if drafted else None,
            "prefix_hist": [lengths[: n + 1].count(k) for k in range(max(lengths[: n + 1]) + 1)],
            "policy_mean_advantage": 0.25 * (n - 1),
            "policy_mean_kl": "nan",
        }
    assert any(dump["diag_extra"]["eta"] is None for dump in found[1:])


def test_policy_figures_that_are_not_known_yet_are_null(tmp_path):
    unknown = {"policy_mean_advantage": None, "policy_mean_kl": None}
    kept, found, _, _ = watched(MAKERS["ragged"], tmp_path, extra=lambda: unknown)
    assert len(found) == len(kept) > 5
    assert all(dump["diag_extra"].keys() == {"eta", "prefix_hist", *unknown} for dump in found)
    assert all(dump["diag_extra"][name] is None for dump in found for name in unknown)
    assert sum(found[-1]["diag_extra"]["prefix_hist"]) == len(kept)


@pytest.mark.parametrize("blocks", [0, 3])
def test_sequences_without_a_waiting_block_leave_nothing(blocks, tmp_path):
    """A server decodes any number of sequences, and most of them after the budget is spent."""
    params = AlignTelemetryParams(**ALL | {"telemetry_max_blocks": blocks})
    listener = alignment(params, "run", "serve", folder=tmp_path)
    world = World()
    drafter = world.drafter()
    for sequence in range(40):
        listener.on_cycle(world.cycle(drafter, sequence=sequence))
        assert len(listener._waiting) <= blocks and len(listener._cached) <= blocks
    for sequence in range(40):  # nor do blocks that have been shown
        listener.on_cycle(dataclasses.replace(world.cycle(drafter, index=2, sequence=sequence), stopped=True))
    assert not listener._waiting and not listener._cached and len(dumps(tmp_path)) == blocks


def test_sequences_decoded_in_turn_do_not_mix(tmp_path):
    listener = alignment(AlignTelemetryParams(**ALL), "run", "serve", folder=tmp_path)
    runs = [
        open_run(
            FAMILY,
            shifted(1),
            tiny.prompt(seed=n),
            truth_of(FAMILY, tiny.prompt(seed=n)),
            index=n,
            listeners=[listener],
        )
        for n in range(2)
    ]
    for _ in zip_longest(*(decode(run.sequence) for run in runs)):
        pass
    listener.close()
    found = dumps(tmp_path)
    assert [d["sequence"] for d in found[:4]] == [0, 1, 0, 1]
    assert {d["diag"]["match_p1"] for d in found if len(d["diag"]["onwards"]) == 5} == {1.0}


def test_text_that_is_taken_back_is_not_read_on(tmp_path):
    """Blocks before a rewind end where their text ended; those after it start anew. Both orders of what follows."""
    for again in ("decode", "prefill"):
        folder = tmp_path / again
        listener = alignment(AlignTelemetryParams(**ALL), "run", "serve", folder=folder)
        run = open_run(FAMILY, shifted(1), tiny.prompt(), listeners=[listener])
        loop = decode(run.sequence)
        for _ in range(4):  # the first token and three blocks of one token each
            next(loop)
        loop.close()
        run.sequence.rewind(22)
        if again == "prefill":
            run.sequence.prefill([7, 8])
        finish(run)
        listener.close()
        found = dumps(folder)
        assert [len(dump["diag"]["onwards"]) for dump in found[:3]] == [3, 2, 1]
        if again == "decode":
            assert {dump["diag"]["best_offset"] for dump in found[3:-4]} == {1}


def test_a_stop_ends_what_is_known(tmp_path):
    truth = truth_of(FAMILY, tiny.prompt())
    listener = alignment(AlignTelemetryParams(**ALL), "run", "serve", folder=tmp_path)
    first = truth[25]
    stop = StopRule([first])
    length = truth.index(first, 20) - 20 + 1
    run = decoded(FAMILY, shifted(1), tiny.prompt(), stop=stop, listeners=[listener])
    assert run.sequence.finished == "stop"
    found = dumps(tmp_path)  # before close: the stop said that no more will come
    assert [len(d["diag"]["onwards"]) for d in found][-1] == 1
    assert len(found) == length - 1


@pytest.mark.parametrize("setting", ["telemetry_save_dir", "folder"])
def test_a_folder_that_cannot_be_written_is_said_before_decoding(setting, tmp_path):
    (tmp_path / "file").write_text("")
    bad = tmp_path / "file" / "dumps"
    params = {**ALL, **({"telemetry_save_dir": bad} if setting == "telemetry_save_dir" else {})}
    with pytest.raises(UserError, match="cannot write"):
        alignment(AlignTelemetryParams(**params), "run", "eval", folder=bad)


def test_tensors_without_a_folder_are_refused():
    params = AlignTelemetryParams(telemetry_debug=True, telemetry_dump_tensors=True)
    with pytest.raises(UserError, match="--telemetry-save-dir"):
        alignment(params, "run", "eval")


def test_settings_hold_the_six_options_under_their_names(tmp_path):
    class Larger(AlignTelemetryParams, Config):
        other: int = 3

    larger = Larger(telemetry_debug=True, telemetry_save_dir=tmp_path)
    flags = {flag for option in flags_of(AlignTelemetryParams) for flag in option.opts if "telemetry" in flag}
    names = {flag.removeprefix("--no-").removeprefix("--").replace("-", "_") for flag in flags}
    assert names == set(as_dict(larger)) == {
        "telemetry_debug", "telemetry_prints_budget", "telemetry_max_blocks", "telemetry_save_dir",
        "telemetry_dump_tensors", "telemetry_auto_offset",
    }  # fmt: skip
    assert as_dict(larger)["telemetry_save_dir"] == str(tmp_path)
    assert json.loads(json.dumps(as_dict(larger))) == as_dict(larger)
