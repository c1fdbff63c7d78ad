"""`understudy bench`: options, presets, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tiny
from understudy.bench.config import BASELINES, PRESETS, BenchConfig
from understudy.bench.lineup import line_up
from understudy.bench.run import bench
from understudy.cli import main
from understudy.cli.bench import BenchOptions
from understudy.core.errors import UserError
from understudy.target.target import Target


def test_a_preset_fixes_options_and_says_what_was_changed():
    plain = BenchConfig(preset="pocket")
    assert {name: getattr(plain, name) for name in PRESETS["pocket"]} == PRESETS["pocket"]
    assert plain.preset_changed() == []
    changed = BenchConfig(preset="pocket", num_prompts=6, repeats=1)
    assert (changed.num_prompts, changed.steps) == (6, PRESETS["pocket"]["steps"])
    assert changed.preset_changed() == ["num_prompts", "repeats"]
    assert BenchConfig().preset_changed() == []


def test_every_baseline_is_run_after_none_and_once():
    assert BenchConfig(baselines="hf, null,hf").all_baselines() == ["none", "hf", "null"]
    assert BenchConfig(baselines=["hf_early_exit"], compare=True).all_baselines() == ["none", "hf-early-exit", "hf"]
    assert BenchConfig().all_baselines() == ["none", "null"]


def test_draft_model_is_a_drafter():
    assert BenchConfig(drafter=["null"], draft_model="runs/x").drafters() == ["null", "dflash:runs/x"]


def test_settings_survive_yaml_and_json():
    config = BenchOptions(preset="pocket", output=Path("x.json"), exit_layer=3)
    settings = json.loads(json.dumps(config.model_dump(mode="json")))
    assert BenchOptions(**yaml.safe_load(yaml.safe_dump(settings))) == config


def test_help_needs_no_torch():
    code = "import sys, understudy.cli.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--num-prompts", "0"], "--num-prompts must be at least 1 (got 0)"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1 (got 0)"),
        (["--repeats", "0"], "--repeats must be at least 1 (got 0)"),
        (["--baselines", "hf,vllm"], "--baselines: unknown baseline 'vllm'; known baselines: " + ", ".join(BASELINES)),
        (["--preset", "big"], "--preset must be one of 'pocket' (got big)"),
    ],
)
def test_bad_options_are_one_line(arguments, line, capsys):
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_malformed_prompts_file_names_the_line(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"turns": []}\n')
    assert main(["bench", "--prompts", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}:2: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drafter": ["lookup"]}, "unknown drafter 'lookup'.*known drafters: .*prompt-lookup"),
        ({"draft_model": "somewhere"}, "no checkpoint: somewhere does not exist"),
        (
            {"drafter": ["early-exit,exit_layer=4"]},
            "exit_layer 4 leaves nothing to verify with: the target has 4 layers",
        ),
        ({"drafter": ["null"], "baselines": ["hf-early-exit"], "steps": 2}, None),
        ({"baselines": ["hf"], "presence_penalty": 0.5}, "leave hf out of --baselines"),
    ],
)
def test_what_cannot_be_run_is_refused_before_measuring(options, reason):
    config = BenchConfig(**options)
    if reason is None:
        assert len(line_up(config, tiny.target("qwen3"))) == 3
        return
    with pytest.raises(UserError, match=reason):
        line_up(config, tiny.target("qwen3"))


def test_a_prompt_beyond_the_context_is_refused_before_measuring():
    target = tiny.target("qwen3")
    with pytest.raises(UserError, match="prompt 1 has 512 tokens, the model's context is 512"):
        bench(BenchConfig(drafter=["null"]), target, [tiny.prompt(8), tiny.prompt(target.context)])


def test_modes_stand_as_given_and_null_drafts_as_many_as_the_widest():
    config = BenchConfig(drafter=["early-exit,steps=3", "prompt-lookup"], baselines="hf,null", steps=5)
    modes = line_up(config, tiny.target("qwen3"))
    assert [mode.name for mode in modes] == ["none", "hf", "null", "early-exit,steps=3", "prompt-lookup"]
    steps = {mode.name: mode.drafter.steps for mode in modes if mode.ours}
    assert steps == {"none": 0, "null": 5, "early-exit,steps=3": 3, "prompt-lookup": 5}


def test_a_draft_option_applies_to_every_drafter_that_has_it_and_does_not_say():
    config = BenchConfig(drafter=["early-exit", "early-exit,exit_layer=1", "prompt-lookup"], baselines="hf-early-exit")
    modes = {mode.name: mode for mode in line_up(config, tiny.target("qwen3"), exit_layer=3)}
    assert modes["early-exit"].drafter.config.exit_layer == 3
    assert modes["early-exit,exit_layer=1"].drafter.config.exit_layer == 1
    assert modes["hf-early-exit"].call == {"assistant_early_exit": 3}


def test_a_draft_option_that_no_drafter_has_is_an_error(capsys):
    assert main(["bench", "--drafter", "prompt-lookup", "--exit-layer", "2"]) == 2
    assert "--exit-layer is given, but no drafter here has it" in capsys.readouterr().err


def test_every_decoding_option_reaches_the_engine():
    given = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 4}
    config = BenchConfig(
        drafter=["prompt-lookup"], baselines="null,hf", adaptive=True, draft_sampling="sample", **given
    )
    modes = {mode.name: mode for mode in line_up(config, tiny.target("qwen3"))}
    for name in ("none", "null", "prompt-lookup"):
        assert modes[name].sampling.model_dump(include=set(given)) == given
        assert modes[name].params.draft_sampling == "sample"
    assert [modes[name].params.adaptive for name in ("none", "null", "prompt-lookup")] == [False, False, True]
    theirs = modes["hf"].config
    assert {name: getattr(theirs, name) for name in given if name != "seed"} == {
        k: v for k, v in given.items() if k != "seed"
    }
    assert theirs.do_sample
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.2}
    assert (
        line_up(BenchConfig(**penalties), tiny.target("qwen3"))[0].sampling.model_dump(include=set(penalties))
        == penalties
    )


def test_ignore_eos_takes_the_stop_tokens_away():
    model = tiny.fresh_model("qwen3")
    model.generation_config.eos_token_id = 11
    for ignore, want in ((False, {11}), (True, set())):
        config = BenchConfig(drafter=["null"], baselines="hf", ignore_eos=ignore)
        ours, theirs, _ = line_up(config, Target(model))
        assert (ours.stop.ids, theirs.stop_ids) == (want, want)


def test_without_drafters_all_that_need_no_files_run():
    names = [mode.name for mode in line_up(BenchConfig(), tiny.target("qwen3"))]
    assert names[:2] == ["none", "null"]
    assert {"prompt-lookup", "early-exit"} <= set(names[2:])
    assert "small-model" not in names


def test_transformers_gets_the_settings_of_our_drafter_of_the_same_method():
    config = BenchConfig(
        drafter=["prompt-lookup,max_ngram=2", "early-exit,exit_layer=3,threshold=0.2,steps=2"],
        baselines=["hf-prompt-lookup", "hf-early-exit"],
        steps=5,
    )
    modes = {mode.name: mode for mode in line_up(config, tiny.target("qwen3"))}
    assert modes["hf-prompt-lookup"].call == {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 2}
    early = modes["hf-early-exit"]
    assert early.call == {"assistant_early_exit": 3}
    assert (early.config.num_assistant_tokens, early.config.assistant_confidence_threshold) == (2, 0.2)
    assert early.config.num_assistant_tokens_schedule == "constant"
