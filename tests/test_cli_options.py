"""The command line's base: every field a flag and a YAML key, flag > YAML > default, and one clear line for every mistake."""

from __future__ import annotations

import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Literal

import click
import pydantic
import pytest

import understudy
from understudy import cli
from understudy.cli.options import config_command
from understudy.cli.settings import kind_of
from understudy.core.config import CommaList, Config, option
from understudy.core.errors import UserError


class ProbeConfig(Config):
    """One field of every kind."""

    model: str = option("pocket", "the model", "model-id", "model-path", min_length=1)
    max_new_tokens: int = option(64, "most new tokens", "max-tokens", ge=1)
    temperature: float = option(0.0, "temperature; 0 = greedy", ge=0, le=2)
    learning_rate: float | None = option(None, "step size", "lr", gt=0)
    verbose: bool = option(False, "print more", "chatty")
    dvi_online: bool = option(True, "learn while decoding")
    dtype: Literal["auto", "float32", "full_half"] = option("auto", "number format")
    level: Literal[1, 2] = option(1, "a level")
    store: Literal["full", "topk"] | None = option(None, "what is stored")
    drafter: list[str] = option([], "drafters; repeatable", "draft-model")
    layers: list[int] = option([], "layers; repeatable")
    baselines: CommaList = option(["none", "null"], "baselines, separated by commas; repeatable")
    modes: list[Literal["kd", "ce"]] = option([], "modes; repeatable")
    bias: dict[int, float] = option({}, "what is added to logits, by token id; repeatable")
    output: Path | None = option(None, "where results go")
    seed: int = option(0, "seed")

    @pydantic.field_validator("seed")
    @classmethod
    def _even(cls, seed: int) -> int:
        if seed % 2:
            raise ValueError("an odd seed is not supported")
        return seed

    @pydantic.model_validator(mode="after")
    def _together(self) -> ProbeConfig:
        if self.model == "none" and self.verbose:
            raise ValueError("--verbose needs a model")
        return self


class RequiredConfig(Config):
    output: Path = option(..., "where it goes", "outdir")


class Probe:
    """A command under test: runs it through `main` and keeps the config that its function received."""

    def __init__(self, config: type[Config]) -> None:
        self.config: ProbeConfig | None = None
        self.action = lambda: None

        @config_command(config)
        def command(config: ProbeConfig) -> int | None:
            """Probe the options.

            A second paragraph.
            """
            self.config = config
            return self.action()

        self.command = command

    def __call__(self, *argv: str) -> ProbeConfig:
        self.config = None
        assert cli.main(["probe", *argv]) == 0
        assert self.config is not None
        return self.config


def _install(monkeypatch: pytest.MonkeyPatch, config: type[Config]) -> Probe:
    probe = Probe(config)
    module = types.ModuleType("probe_command")
    module.command = probe.command
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "Probe the options."))
    return probe


@pytest.fixture
def probe(monkeypatch):
    return _install(monkeypatch, ProbeConfig)


@pytest.fixture
def refusal(probe, capsys):
    """Run the probe and return its one error line."""

    def run(*argv: str) -> str:
        return _error_line(capsys, "probe", *argv)

    return run


def _error_line(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, f"one line, not: {err}"
    assert err.endswith("\n")
    return err.removeprefix("error: ").rstrip("\n")


def _yaml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


# --- values ---------------------------------------------------------------------------------------------------------------------


def test_defaults_without_any_flag(probe):
    assert probe() == ProbeConfig()


def test_every_field_is_a_flag(probe):
    config = probe(
        *("--model", "m", "--max-new-tokens", "7", "--temperature", "0.5", "--learning-rate", "5e-5", "--verbose"),
        *("--no-dvi-online", "--dtype", "float32", "--level", "2", "--store", "topk", "--drafter", "a:b,k=1"),
        *(
            "--layers",
            "3",
            "--baselines",
            "hf",
            "--modes",
            "kd",
            "--bias",
            "3=-1.5",
            "--output",
            "out/x.json",
            "--seed",
            "-2",
        ),
    )
    assert config == ProbeConfig(
        model="m",
        max_new_tokens=7,
        temperature=0.5,
        learning_rate=5e-5,
        verbose=True,
        dvi_online=False,
        dtype="float32",
        level=2,
        store="topk",
        drafter=["a:b,k=1"],
        layers=[3],
        baselines=["hf"],
        modes=["kd"],
        bias={3: -1.5},
        output=Path("out/x.json"),
        seed=-2,
    )


@pytest.mark.parametrize(
    "flag", ["--max-new-tokens", "--max_new_tokens", "--max_new-tokens", "--max-tokens", "--max_tokens"]
)
@pytest.mark.parametrize("joined", [False, True])
def test_underscores_equal_hyphens_and_aliases_name_the_same(probe, flag, joined):
    assert probe(*([f"{flag}=9"] if joined else [flag, "9"])).max_new_tokens == 9


def test_underscores_in_values_stay(probe):
    assert probe("--model", "my_model", "--output=run_1/a_b", "--drafter", "x_y").model == "my_model"
    assert probe("--output=run_1/a_b").output == Path("run_1/a_b")
    assert probe("--drafter", "x_y").drafter == ["x_y"]


def test_choices_take_either_spelling_and_give_the_declared_one(probe):
    assert probe("--dtype", "full-half").dtype == "full_half"
    assert probe("--dtype", "full_half").dtype == "full_half"


@pytest.mark.parametrize(
    ("argv", "verbose", "dvi_online"),
    [
        ([], False, True),
        (["--verbose", "--dvi-online"], True, True),
        (["--verbose", "true", "--dvi-online", "false"], True, False),
        (["--verbose", "1", "--dvi-online", "0"], True, False),
        (["--verbose=True", "--dvi-online=False"], True, False),
        (["--no-verbose", "--no-dvi-online"], False, False),
        (["--verbose", "false", "--dvi_online", "true"], False, True),
        (["--no_dvi_online", "--chatty"], True, False),
        (["--no-chatty"], False, True),
        (["--verbose", "--model", "m"], True, True),  # what follows is an option, not the value
    ],
)
def test_booleans(probe, argv, verbose, dvi_online):
    config = probe(*argv)
    assert (config.verbose, config.dvi_online) == (verbose, dvi_online)


def test_repeated_list_flags_keep_their_order_across_aliases(probe):
    config = probe("--drafter", "a", "--draft-model", "b", "--drafter", "c,k=1", "--layers", "3", "--layers", "1")
    assert config.drafter == ["a", "b", "c,k=1"]
    assert config.layers == [3, 1]


def test_only_a_comma_list_splits_at_commas(probe):
    assert probe("--baselines", "none, hf", "--baselines", "null,").baselines == ["none", "hf", "null"]
    assert probe("--drafter", "a,b=1").drafter == ["a,b=1"]


def test_a_mapping_takes_pairs_or_a_yaml_mapping(probe, tmp_path):
    assert probe("--bias", "3=1", "--bias", "7 = -inf").bias == {3: 1.0, 7: float("-inf")}
    assert probe("--config", _yaml(tmp_path, "bias: {3: 1, 7: -.inf}")).bias == {3: 1.0, 7: float("-inf")}
    assert probe("--config", _yaml(tmp_path, "bias: 3=1")).bias == {3: 1.0}


def test_a_flag_given_twice_takes_its_last_value(probe):
    assert probe("--model", "a", "--model", "b").model == "b"


# --- YAML -----------------------------------------------------------------------------------------------------------------------


def test_flag_beats_yaml_beats_default(probe, tmp_path):
    path = _yaml(tmp_path, "max-new-tokens: 5\ntemperature: 0.7\nverbose: true\ndvi_online: false\n")
    config = probe("--config", path, "--temperature", "0.2", "--no-verbose")
    assert config == ProbeConfig(max_new_tokens=5, temperature=0.2, verbose=False, dvi_online=False)


def test_a_flag_at_its_default_still_beats_yaml(probe, tmp_path):
    path = _yaml(tmp_path, "max_new_tokens: 5\ndrafter: [a, b]\n")
    config = probe("--config", path, "--max-new-tokens", "64", "--drafter", "c")
    assert (config.max_new_tokens, config.drafter) == (64, ["c"])


def test_an_alias_flag_beats_the_canonical_yaml_key(probe, tmp_path):
    assert probe("--config", _yaml(tmp_path, "model: a"), "--model-path", "b").model == "b"


@pytest.mark.parametrize("key", ["learning-rate", "learning_rate", "lr"])
def test_yaml_keys_take_hyphens_underscores_and_aliases(probe, tmp_path, key):
    assert probe("--config", _yaml(tmp_path, f"{key}: 3e-4")).learning_rate == 3e-4


def test_yaml_lists_scalars_and_nulls(probe, tmp_path):
    path = _yaml(
        tmp_path, "drafter: prompt-lookup\nlayers: [1, 2]\nbaselines: none,hf\nlearning_rate: null\noutput: a/b\n"
    )
    config = probe("--config", path)
    assert config.drafter == ["prompt-lookup"]
    assert config.layers == [1, 2]
    assert config.baselines == ["none", "hf"]
    assert config.learning_rate is None
    assert config.output == Path("a/b")


def test_an_empty_yaml_file_changes_nothing(probe, tmp_path):
    assert probe("--config", _yaml(tmp_path, "# only a comment\n")) == ProbeConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_new_tokns: 3", "unknown key 'max_new_tokns' in {}; did you mean 'max-new-tokens'?"),
        ("qqq: 3", "unknown key 'qqq' in {}; --help lists the known ones"),
        ("config: other.yaml", "unknown key 'config' in {}; --help lists the known ones"),
        ("max-new-tokens: 0", "max-new-tokens in {} must be at least 1 (got 0)"),
        ("temperature: [1]", "temperature in {} must be a number (got [1])"),
        ("model: 7", "model in {} must be text (got 7; quote it in YAML to mean the word)"),
        ("drafter: [none, null]", "drafter in {} must be text (got null; quote it in YAML to mean the word)"),
        (
            "lr: 1\nlearning-rate: 2",
            "lr in {0} and learning-rate in {0} are one option and have different values; give one",
        ),
        ("lr: 1\nlr: 2", "{} is not valid YAML: line 2: 'lr' stands twice"),
        ("lr: [1\nseed: 2", "{} is not valid YAML: line 2: expected ',' or ']', but got ':'"),
        ("just words", "{} must hold `option: value` lines, not a str"),
        ("- a\n- b", "{} must hold `option: value` lines, not a list"),
    ],
)
def test_yaml_mistakes(refusal, tmp_path, text, message):
    path = _yaml(tmp_path, text)
    assert refusal("--config", path) == message.format(path)


def test_yaml_that_cannot_be_read(refusal, tmp_path):
    assert refusal("--config", str(tmp_path / "no.yaml")).endswith("no.yaml: No such file or directory")
    assert refusal("--config", str(tmp_path)).endswith("Is a directory")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00a: 1")
    assert refusal("--config", str(tmp_path / "b.yaml")).endswith("is not a text file in UTF-8")


# --- mistakes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1 (got 0)"),
        (["--max_tokens", "0"], "--max-tokens must be at least 1 (got 0)"),
        (["--max-new-tokens", "many"], "--max-new-tokens must be a whole number (got many)"),
        (["--max-new-tokens", "1.5"], "--max-new-tokens must be a whole number (got 1.5)"),
        (["--max-new-tokens", ""], "--max-new-tokens must be a whole number (got '')"),
        (["--temperature", "hot"], "--temperature must be a number (got hot)"),
        (["--temperature", "2.5"], "--temperature must be at most 2 (got 2.5)"),
        (["--lr", "0"], "--lr must be more than 0 (got 0)"),
        (["--layers", "1", "--layers", "x"], "--layers must be a whole number (got x)"),
        (["--bias", "3"], "--bias must be KEY=VALUE (got 3)"),
        (["--bias", "x=1"], "--bias must be a whole number (got x)"),
        (["--bias", "3=x"], "--bias must be a number (got x)"),
        (["--modes", "pg"], "--modes must be one of 'kd' or 'ce' (got pg)"),
        (["--dtype", "int4"], "--dtype must be one of 'auto', 'float32' or 'full_half' (got int4)"),
        (["--level", "3"], "--level must be one of 1 or 2 (got 3)"),
        (["--verbose", "maybe"], "--verbose must be true, false, 1 or 0 (got maybe)"),
        (["--verbose", "yes"], "--verbose must be true, false, 1 or 0 (got yes)"),
        (["--model", ""], "--model must not be empty"),
        (["--seed", "3"], "--seed: an odd seed is not supported"),
        (["--model", "none", "--verbose"], "--verbose needs a model"),
        (["--seed", "3", "--lr", "-1"], "--lr must be more than 0 (got -1); --seed: an odd seed is not supported"),
        (["--max-new-token", "3"], "no such option '--max-new-token'; did you mean '--max-new-tokens'?"),
        (["--max_new_token", "3"], "no such option '--max-new-token'; did you mean '--max-new-tokens'?"),
        (["--qqq"], "no such option '--qqq'; understudy probe --help lists the options"),
        (["--seed"], "option '--seed' requires an argument"),
        (["--no-verbose", "false"], "got unexpected extra argument (false)"),
        (["stray"], "got unexpected extra argument (stray)"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(refusal, argv, message):
    assert refusal(*argv) == message


@pytest.mark.parametrize(
    ("argv", "first", "second"),
    [
        (["--model", "a", "--model-path", "b"], "--model", "--model-path"),
        (["--model_path", "a", "--model-id", "b"], "--model-id", "--model-path"),
        (["--lr", "1e-4", "--learning-rate", "1e-3"], "--learning-rate", "--lr"),
        (["--verbose", "--no-verbose"], "--verbose", "--no-verbose"),
        (["--verbose", "--chatty", "false"], "--verbose", "--chatty"),
    ],
)
def test_two_names_of_one_option_with_unequal_values(refusal, argv, first, second):
    assert refusal(*argv) == f"{first} and {second} are one option and have different values; give one"


def test_two_names_with_equal_values_are_fine(probe):
    assert probe("--model", "a", "--model-path", "a", "--model_id=a").model == "a"
    assert probe("--lr", "1e-4", "--learning-rate", "0.0001").learning_rate == 1e-4
    assert probe("--verbose", "--chatty", "1").verbose is True


def test_a_required_option(monkeypatch, capsys, tmp_path):
    probe = _install(monkeypatch, RequiredConfig)
    assert _error_line(capsys, "probe") == "--output is required"
    assert probe("--outdir", "x").output == Path("x")
    assert probe("--config", _yaml(tmp_path, "output: y")).output == Path("y")


def test_commands_are_suggested(capsys):
    assert _error_line(capsys, "generat") == "no such command 'generat'; did you mean 'generate'?"
    assert _error_line(capsys, "xyz").startswith("no such command 'xyz'; the commands are demo, generate, bench")
    assert _error_line(capsys, "--qqq") == "no such option '--qqq'; understudy --help lists the options"


def test_a_user_error_of_the_command_is_one_line(probe, refusal):
    def fail() -> None:
        raise UserError("the file\n  is  missing")

    probe.action = fail
    assert refusal() == "the file is missing"


def test_a_programmers_error_keeps_its_traceback(probe):
    def fail() -> None:
        raise ZeroDivisionError

    probe.action = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_the_exit_code_is_what_the_command_returns(probe):
    probe.action = lambda: 1
    assert cli.main(["probe"]) == 1
    probe.action = lambda: None
    assert cli.main(["probe"]) == 0


def test_an_interrupt_exits_with_130(probe, capsys):
    def interrupt() -> None:
        signal.raise_signal(signal.SIGINT)

    probe.action = interrupt
    # a process that was started in the background may have inherited that SIGINT is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["probe"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Traceback" not in capsys.readouterr().err


def test_two_fields_with_one_name_are_a_programmers_error():
    class Clash(Config):
        a: int = option(1, "a", "b")
        b: int = option(2, "b")

    with pytest.raises(AssertionError, match="--b"):
        config_command(Clash)(lambda config: None)


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        (int, (int, False)),
        (int | None, (int, False)),
        (list[int] | None, (int, True)),
        (tuple[str, ...], (str, True)),
        (CommaList, (str, True)),
        (dict[int, float], (dict, True)),
        (int | str, (str, False)),
    ],
)
def test_kind_of(annotation, kind):
    assert kind_of(annotation) == kind


# --- help -----------------------------------------------------------------------------------------------------------------------


def test_help_shows_each_option_once_with_names_and_default(probe, capsys):
    assert cli.main(["probe", "-h"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Probe the options. A second paragraph." in text
    assert "--max-new-tokens INT most new tokens (also --max-tokens) [default: 64]" in text
    assert "--verbose / --no-verbose print more (also --chatty) [default: false]" in text
    assert "--drafter TEXT ... drafters; repeatable (also --draft-model)" in text
    assert "--baselines TEXT ... baselines, separated by commas; repeatable [default: none, null]" in text
    assert "--modes [kd|ce] ... modes" in text
    assert "--level [1|2]" in text
    assert "--config FILE" in text
    assert text.count("most new tokens") == 1


def test_a_required_option_says_so_in_help():
    command = config_command(RequiredConfig)(lambda config: None)
    assert "[required]" in command.get_help(click.Context(command))


def test_help_without_arguments(capsys):
    assert cli.main([]) == 0
    bare = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    for name, (_, text) in cli.COMMANDS.items():
        assert name in bare
        assert len(text) <= 68, "one line of help in a terminal of 80 columns"
        assert text in bare


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"understudy {understudy.__version__}\n"


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_root_help_imports_click_and_nothing_heavy():
    loaded = "[m for m in ('torch', 'transformers', 'numpy', 'pydantic', 'yaml', 'rich') if m in sys.modules]"
    out = _run(f"import sys; from understudy.cli import main; assert main(['--help']) == 0; print({loaded})")
    assert out.splitlines()[-1] == "[]"
    assert "generate" in out


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_command_help_imports_no_torch(name):
    loaded = "[m for m in ('torch', 'transformers') if m in sys.modules]"
    out = _run(f"import sys; from understudy.cli import main; assert main(['{name}', '--help']) == 0; print({loaded})")
    assert out.splitlines()[-1] == "[]"


def test_python_m_understudy():
    done = subprocess.run([sys.executable, "-m", "understudy", "nope"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no such command 'nope'")


def test_a_reader_that_leaves_gets_no_complaint():
    code = "import sys; from understudy.cli import main; sys.exit(main(['--help']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 1
