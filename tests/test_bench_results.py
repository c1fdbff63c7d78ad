"""`understudy bench`: the arithmetic of its figures, and how differing outputs are judged. Turns are made by hand here."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import tiny
from understudy.bench import results
from understudy.bench.check import Checker, Divergence, first_difference, ulps, verdict
from understudy.bench.efficiency import Alone, Sample, _mean
from understudy.bench.measure import order
from understudy.bench.modes import Turn
from understudy.decoding.stats import Stats
from understudy.target.params import SamplingParams

OURS = SimpleNamespace(name="prompt-lookup", ours=True)


def turn(
    decode_s: float, cycles: int = 4, accepted: int = 6, drafted: int = 16, prefill_s: float = 1.0, output=None
) -> Turn:
    """`cycles` cycles that accepted `accepted` of `drafted` drafts; half the time in verify, a quarter in draft."""
    tokens = cycles + accepted
    stats = Stats(turns=1, cycles=cycles, tokens=tokens, drafted=drafted, accepted=accepted)
    stats.accept_hist.update({0: cycles - 2, accepted // 2: 2})
    stats.seconds.update(draft=decode_s / 4, verify=decode_s / 2, sample=decode_s / 20)
    return Turn(list(range(tokens + 1)) if output is None else output, prefill_s, decode_s, stats)


def test_modes_take_turns_and_each_goes_first():
    ran = list(order(modes=3, prompts=4, repeats=2))
    assert sorted(ran) == [(r, p, m) for r in range(2) for p in range(4) for m in range(3)]
    assert [(r, p) for r, p, _ in ran] == [(r, p) for r in range(2) for p in range(4) for _ in range(3)]
    assert [m for r, p, m in ran if (r, p) == (0, 1)] == [1, 2, 0]
    assert Counter(m for _, _, m in ran[::3]) == {0: 3, 1: 3, 2: 2}


def test_speedups_compare_decoded_tokens_per_second_of_the_median_repeat():
    mine = [[turn(5.0)], [turn(1.0)], [turn(9.0)]]  # 10 tokens each
    plain = [[turn(20.0, cycles=10, accepted=0, drafted=0)] for _ in range(3)]
    hf = [[turn(40.0, cycles=10, accepted=0, drafted=0)] for _ in range(3)]
    row = results.row(OURS, {"prompt-lookup": mine, "none": plain, "hf": hf}, None, [], sections=True)
    assert (row["decode_s"], row["prefill_s"], row["total_s"]) == (5.0, 1.0, 6.0)
    assert (row["tokens"], row["decode_tokens"], row["tokens_per_s"]) == (11, 10, 2.0)
    assert (row["speedup_vs_none"], row["speedup_vs_hf"]) == (4.0, 8.0)
    assert (row["tau"], row["acceptance_rate"], row["rejected_drafts"]) == (2.5, 6 / 16, 10)
    assert row["accept_hist"] == {"0": 2, "3": 2}
    assert row["acc_at"] == [0.5, 0.5, 0.5]
    assert row["repeat_share"] == 0.0


def test_sections_add_up_to_the_decode_time():
    row = results.row(OURS, {"prompt-lookup": [[turn(4.0)]], "none": [[turn(4.0)]]}, None, [], sections=True)
    parts = row["breakdown"]
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(4.0)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1.0)
    assert parts["other"]["share"] == pytest.approx(0.2)
    assert row["overhead"] == pytest.approx(0.25)
    assert (
        results.row(OURS, {"prompt-lookup": [[turn(4.0)]], "none": [[turn(4.0)]]}, None, [], False)["breakdown"] is None
    )


def test_a_draft_that_runs_no_model_is_overhead():
    alone = Alone(one=1.0, draft=0.5, verify=1.5, states=3, runs_model=False)
    turns = {"prompt-lookup": [[turn(4.0)]], "none": [[turn(8.0, cycles=10, accepted=0)]]}
    row = results.row(OURS, turns, alone, [], sections=True)
    assert row["overhead"] == pytest.approx(0.5)
    # measured speed-up 2 of tau * t(1) / (t_draft + t_verify) = 2.5 * 1 / 2
    assert row["efficiency"] == pytest.approx(2 / 1.25)
    assert row["alone"] == {"one_row_ms": 1000.0, "draft_ms": 500.0, "verify_ms": 1500.0, "states": 3}


def test_times_alone_are_weighted_by_how_often_a_draft_length_occurred():
    samples = [Sample(0, one=1.0, draft=0.0, verify=1.0), Sample(4, one=3.0, draft=1.0, verify=3.0)]
    alone = _mean(samples, Counter({0: 3, 4: 1}), True)
    assert (alone.one, alone.draft, alone.verify) == (2.0, 0.25, 1.5)
    assert _mean(samples, Counter({5: 2}), True).verify == 3.0  # a length never sampled: the nearest one
    assert _mean([], Counter(), False) is None


def test_the_interval_covers_the_speedup_and_needs_two_prompts():
    plain = [[turn(8.0), turn(8.0), turn(8.0)]]
    same = [[turn(4.0), turn(4.0), turn(4.0)]]
    assert results.interval(same, plain) == [2.0, 2.0]
    low, high = results.interval([[turn(2.0), turn(4.0), turn(8.0)]], plain)
    assert 1.0 <= low < 24 / 14 < high <= 4.0
    assert results.interval([[turn(1.0)]], [[turn(1.0)]]) is None


@pytest.mark.parametrize(("gain", "valid"), [(0.7, True), (1.0, False), (1.2, False), (None, None)])
def test_a_run_in_which_null_gains_is_invalid(gain, valid):
    rows = [{"name": "none", "speedup_vs_none": 1.0}, {"name": "null,steps=3", "speedup_vs_none": gain}]
    assert results.validity(rows)[0] is valid
    assert results.validity(rows[:1])[0] is None


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_units_in_the_last_place():
    assert ulps(0.125, 17.0, torch.bfloat16) == 1.0  # bf16 has 8 bits: 1/8 between numbers in [16, 32)
    assert ulps(2**-19, 31.0, torch.float32) == 1.0
    assert ulps(0.0, 0.0, torch.float32) == 0.0


def test_a_wrong_token_is_found_and_measured():
    """A planted wrong mode: plain decoding's own output with one token replaced by the least likely one, or cut short."""
    target, prompt = tiny.target("qwen3"), tiny.prompt(12)
    output = tiny.reference("qwen3", prompt, 8)
    logits = tiny.logits(tiny.model("qwen3"), [*prompt, *output[:5]])[-1]
    wrong = [*output[:5], int(logits.argmin()), *output[6:]]
    checker = Checker(target, SamplingParams(), ())
    plain = [[turn(1.0, output=output)]]
    assert checker.compare([prompt], plain, plain) == []
    (found,) = checker.compare([prompt], plain * 2, [plain[0], [turn(1.0, output=wrong)]])
    assert (found.prompt, found.position, found.tokens) == (0, 5, (output[5], wrong[5]))
    assert found.gap_raw == pytest.approx((logits.max() - logits.min()).item(), rel=1e-4)
    assert found.gap > 1e4
    assert not found.excusable
    (short,) = checker.compare([prompt], plain, [[turn(1.0, output=output[:6])]])
    assert (short.position, short.gap, short.excusable) == (6, None, False)


def test_gaps_are_those_of_the_processed_logits():
    target, prompt = tiny.target("qwen3"), tiny.prompt(12)
    params = SamplingParams(repetition_penalty=1.7, presence_penalty=0.4)
    prefix = tiny.reference("qwen3", prompt, 4)
    raw = tiny.logits(tiny.model("qwen3"), [*prompt, *prefix])[-1]
    mine = Checker(target, params, ()).logits(prompt, prefix)
    torch.testing.assert_close(mine, tiny.adjusted(raw, params, prompt, prefix, ()), rtol=1e-4, atol=1e-4)


def test_the_check_fails_above_two_ulp_only_and_warns_when_it_proves_little():
    modes = [SimpleNamespace(name="a"), SimpleNamespace(name="b"), SimpleNamespace(name="c")]
    near, far, short = (Divergence(0, 3, gap, gap, (1, 2)) for gap in (2.0, 2.5, None))
    passed = verdict(modes, {"a": [], "b": [near], "c": []}, {"a": None, "b": 200, "c": 199})
    assert passed["passed"]
    assert [w.split()[0] for w in passed["warnings"]] == ["c"]
    failed = verdict(modes, {"a": [near, far], "b": [short], "c": []}, {"a": 300, "b": 300, "c": 300})
    assert [f.split(":")[0] for f in failed["failures"]] == ["a", "b"]
    assert "2.5 ulp" in failed["failures"][0]
    assert "ended early" in failed["failures"][1]
