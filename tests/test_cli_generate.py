"""`understudy generate` and `understudy demo` as a person meets them: real output, and one clear line for what is wrong."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
import torch
import transformers
import yaml

import tiny
from understudy import cli
from understudy.assets import pocket_path

PROMPT = "Write `def add(a, b)` in module `operator`."


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = cli.main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *args: str) -> str:
    code, out, err = run(capsys, *args)
    assert code == 2, (out, err)
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    return lines[0]


def test_generate_prints_the_answer_and_statistics(capsys, tmp_path):
    output = tmp_path / "answers.jsonl"
    code, out, _ = run(capsys, "generate", "--prompt", PROMPT, "--max-new-tokens", "24", "--output", str(output))
    assert code == 0
    row = json.loads(output.read_text())
    assert row["answers"][0]["text"] in out
    assert "tau" in out.splitlines()[-1]
    assert row["stats"]["tokens"] + 1 == len(row["answers"][0]["tokens"])


def test_drafters_print_the_same_text(capsys):
    texts = set()
    for drafter in ("none", "prompt-lookup", "early-exit,exitlayer=4"):
        _, out, _ = run(
            capsys, "generate", "--prompt", PROMPT, "--dtype", "float32", "--max-tokens", "24", "--drafter", drafter
        )
        texts.add(out.rsplit("\n", 2)[0])
    assert len(texts) == 1


def test_a_file_of_prompts_and_raw_text(capsys, tmp_path):
    rows = tmp_path / "p.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT}) + "\n" + json.dumps({"turns": [PROMPT, "again"]}) + "\n")
    code, out, _ = run(capsys, "generate", "--file", str(rows), "--max-new-tokens", "6")
    assert code == 0
    assert out.count("tau") == 2
    text = tmp_path / "p.txt"
    text.write_text("def add(a, b):")
    code, out, _ = run(capsys, "generate", "--file", str(text), "--raw", "--max-new-tokens", "6")
    assert code == 0


def test_what_is_printed_ends_before_a_stop_string(capsys):
    _, whole, _ = run(capsys, "generate", "--prompt", PROMPT, "--max-new-tokens", "24")
    for stop in ("f add", "(a, b"):
        _, out, _ = run(capsys, "generate", "--prompt", PROMPT, "--max-new-tokens", "24", "--stop", stop)
        assert out.startswith(whole[: whole.index(stop)] + "\n")


def test_steps_in_the_drafters_text_win(capsys, tmp_path):
    rows = tmp_path / "out.jsonl"
    run(
        capsys, *("generate", "--prompt", PROMPT, "--drafter", "null,steps=1", "--steps", "5"),
        *("--max-tokens", "9", "--output", str(rows)),
    )  # fmt: skip
    stats = json.loads(rows.read_text())["stats"]
    assert stats["rejected_drafts"] <= stats["cycles"]


def test_a_conversation_reuses_what_it_shares(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\nNow `def sub(a, b)`.\n/reset\n"))
    code, out, _ = run(capsys, "generate", "--interactive", "--max-new-tokens", "24")
    assert code == 0
    reused = [
        int(line.split(" of ")[-2].split()[-1])
        for line in out.splitlines()
        if "tokens reused" in line.replace("\n", " ")
    ]
    assert len(reused) == 2
    assert reused[0] == 0
    assert reused[1] > 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "   "], "the prompt is empty"),
        (["--prompt", "x", "--interactive"], "give only one of --prompt"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (
            ["--prompt", "x", "--drafter", "prompt-lokup"],
            "did you mean prompt-lookup.*known drafters: .*early-exit, kangaroo",
        ),
        (["--prompt", "x", "--drafter", "early-exit,exit_layer=12"], "12 layers"),
        (["--prompt", "x", "--drafter", "prompt-lookup,steps={"], "cannot read steps={"),
        (["--prompt", "x", "--output", "/proc/nope/x.jsonl"], "cannot write /proc/nope/x.jsonl"),
        (["--prompt", "x", "--num-prompts", "2"], "--num-prompts goes with"),
        (["--interactive", "--raw"], "--interactive takes no"),
        (["--prompt", "x", "--n", "2"], "--n needs a --temperature"),
        (["--prompt", "x", "--device", "meta"], "embeddings and head must be in memory|cannot put the model"),
        (["--prompt", "x", "--threshold", "0.5"], "--threshold is given, but no drafter here has it"),
        (["--prompt", "x", "--drafter", "early-exit,layer=2"], "has no option 'layer'"),
        (
            ["--prompt", "x", "--drafter", "prompt-lookup,steps=x"],
            "drafter prompt-lookup: steps must be a whole number",
        ),
        (["--prompt", "x", "--drafter", "small-model"], "needs a model: small-model:PATH"),
        (["--prompt", "x", "--device", "nowhere"], "cannot put the model on device 'nowhere'"),
        (["--prompt", "word " * 3000], "the model's context is 2048"),
        (["--file", "missing.jsonl"], "missing.jsonl"),
        (["--prompt", "x", "--model", "/missing/model"], "/missing/model does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, args, message):
    line = refused(capsys, "generate", *args)
    assert line.startswith("error: ")
    assert re.search(message, line), line


def test_a_malformed_prompts_file_names_the_line(capsys, tmp_path):
    rows = tmp_path / "p.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT}) + "\n{broken\n")
    assert f"{rows}:2: " in refused(capsys, "generate", "--file", str(rows))


def test_a_drafter_with_another_tokenizer_is_refused(capsys, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pocket_path(), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[300:302]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refused(capsys, "generate", "--prompt", "x", "--drafter", f"small-model:{other}")
    assert "has another tokenizer than" in line


def test_unsupported_models_are_refused_by_name(capsys, tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**shape, state_size=4))
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    for model, message in (
        (mamba, "is recurrent (linear_attention)"),
        (gpt2, "GPT2LMHeadModel is not supported: its decoder has no .layers"),
    ):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        capsys.readouterr()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(pocket_path() / name, folder)
        assert message in refused(capsys, "generate", "--prompt", "x", "--model", str(folder))


def test_remote_code_and_missing_weights_are_refused(capsys, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    assert "--trust-remote-code" in refused(capsys, "generate", "--prompt", "x", "--model", str(own))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(pocket_path() / "config.json", bare)
    assert "no weights" in refused(capsys, "generate", "--prompt", "x", "--model", str(bare))


def test_an_unsupported_processor_of_the_checkpoint_is_refused(capsys, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(pocket_path(), model)
    config = json.loads((model / "generation_config.json").read_text()) | {"no_repeat_ngram_size": 3}
    (model / "generation_config.json").write_text(json.dumps(config))
    line = refused(capsys, "generate", "--prompt", "x", "--model", str(model))
    assert "no_repeat_ngram_size=3 is not supported" in line


def test_demo_compares_drafters(capsys):
    code, out, _ = run(
        capsys, "demo", "--num-prompts", "2", "--max-new-tokens", "16", "--dtype", "float32", "--learn-seconds", "0"
    )
    assert code == 0 and "Live learning" not in out
    assert "Not one token differs" in out
    for name in ("none", "null", "prompt-lookup", "early-exit"):
        assert name in out


def test_demo_of_another_model_leaves_out_what_does_not_fit(capsys, tmp_path):
    """Of the default drafters only: one that was asked for is refused."""
    model = tmp_path / "model"
    shutil.copytree(pocket_path(), model, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    tiny.build(
        "Qwen3ForCausalLM", "Qwen3Config", vocab_size=4096, eos_token_id=2, max_position_embeddings=2048
    ).save_pretrained(model)
    args = ("demo", "--model", str(model), "--num-prompts", "1", "--max-new-tokens", "4", "--learn-seconds", "0")
    code, out, _ = run(capsys, *args)
    lines = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert code == 0 and len(lines) == 3, out
    assert lines[0].startswith("left out: early-exit,exit_layer=4 (")  # it has 4 layers
    assert lines[1].startswith("left out: eagle3 and eagle3,tree=true (drafter eagle3 has no weights for ")
    assert lines[2].startswith("left out: dflash (drafter dflash has no weights for ")
    assert "prompt-lookup" in out and out.count("eagle3,tree=true") == 1
    assert "drafter eagle3 has no weights for" in refused(capsys, *args, "--drafter", "eagle3")


def test_demo_ends_with_live_learning(capsys):
    code, out, _ = run(
        capsys, "demo", "--drafter", "none", "--num-prompts", "1", "--max-new-tokens", "16", "--learn-seconds", "3"
    )
    assert code == 0 and "Not one token differs" in out
    assert re.search(r"first half: first draft accepted [\d.]+%, tau \d", out) and re.search(
        r"\d+ updates of [\d.]+ ms took", out
    )


def test_generate_learns_watches_and_says_so(capsys, tmp_path):
    args = ("--num-prompts", "5", "--max-new-tokens", "48", "--dtype", "float32", "--threads", "1")
    plain = run(capsys, "generate", "--drafter", "none", *args, "--output", str(tmp_path / "plain.jsonl"))
    learned = run(
        capsys, "generate", "--drafter", "dvi,telemetry_max_blocks=3", "--dvi-online", "true", "--dvi-batch-size", "8", *args,
        "--output", str(tmp_path / "dvi.jsonl"), "--output-dir", str(tmp_path / "run"), "--telemetry-debug", "1",
        "--save-lora-path", str(tmp_path / "lora"),
    )  # fmt: skip
    assert plain[0] == learned[0] == 0
    outputs = [
        [json.loads(line)["answers"][0]["tokens"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("plain.jsonl", "dvi.jsonl")
    ]
    assert outputs[0] == outputs[1]
    assert re.search(r"learned: \d+ judged drafts, [1-9]\d* of \d+ due updates run", learned[1])
    assert "telemetry serve step 1:" in learned[1] and re.search(r"step \d+: acc@1", learned[1])
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert settings["dvi_online"] is True and settings["exit_layer"] == 2 and settings["telemetry_max_blocks"] == 3
    assert settings["telemetry_save_dir"].endswith("telemetry")
    assert len(list((tmp_path / "run" / "telemetry").glob("run_serve_step*.json"))) == 3
    for name in ("acceptance", "speed"):
        assert len((tmp_path / "run" / "metrics" / f"{name}.csv").read_text().splitlines()) > 50
    code, _, err = run(
        capsys, "bench", "--drafter", "dvi", "--load-lora", str(tmp_path / "lora"), "--dvi-online", "false", "--num-prompts", "2",
        "--max-new-tokens", "12", "--repeats", "1", "--metrics-out", str(tmp_path / "m.csv"), "--dtype", "float32",
    )  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "m.csv").read_text().startswith("step,acc@1,acc@2")
    line = refused(
        capsys, "bench", "--drafter", "dvi", "--drafter", "early-exit", "--metrics-out", str(tmp_path / "m.csv")
    )
    assert "--metrics-out is for one drafter, here are 2" in line
    line = refused(capsys, "generate", "--prompt", "x", "--drafter", "dvi", "--save-lora-path", str(tmp_path / "x"))
    assert "nothing is learned" in line
