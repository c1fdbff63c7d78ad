"""Stored features: the same as live, whole shards after a crash, and one clear line for a folder that is not what it should be."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tiny
from test_features_live import pack
from understudy.cli.data_capture import capture_command
from understudy.core.errors import UserError
from understudy.core.records import Needs
from understudy.drafting.objective import Batch, Features
from understudy.features import capture as capturing
from understudy.features.capture import capture
from understudy.features.live import LiveFeatures
from understudy.features.store import StoredBatches, StoredFeatures, fingerprint, read_manifest, shard_name
from understudy.target.target import Target

NEEDS = Needs(taps=frozenset({0, 2, 4}), last=True)
SETTINGS = {"files": ["a.jsonl"], "max_length": 24}


def batches(count: int = 7, seed: int = 0) -> list[Batch]:
    rng = random.Random(seed)
    return [
        pack([[rng.randint(1, 12), rng.randint(1, 12)], [rng.randint(3, 24)]], 24, seed + i)[0] for i in range(count)
    ]


def source(needs: Needs = NEEDS, target: Target | None = None) -> LiveFeatures:
    return LiveFeatures(target or tiny.target("llama"), needs)


def run(folder: Path, given=None, live=None, **options):
    given = batches() if given is None else given
    options = {"settings": SETTINGS, "total": len(given), "shard_mb": 1} | options
    return capture(given, live or source(), folder, **options)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Shards of three batches: a batch is said to take a third of a MiB."""
    monkeypatch.setattr(capturing, "_batch_bytes", lambda *_: 2**20 // 3)


def equal(a: Features, b: Features) -> bool:
    names = ("ids", "mask", "documents", "positions")
    same = all(torch.equal(getattr(a.batch, n), getattr(b.batch, n)) for n in names)
    same &= a.taps.keys() == b.taps.keys() and all(torch.equal(a.taps[t], b.taps[t]) for t in a.taps)
    return same and (a.last is b.last or torch.equal(a.last, b.last))


def at(stored: StoredFeatures, index: int) -> Features:
    """Features of a stored batch after the way that training sends it."""
    return stored(stored.batch(index).to("cpu"))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_stored_is_live(tmp_path, dtype):
    manifest = run(tmp_path, dtype=dtype)
    assert manifest.complete and manifest.batches == 7 and manifest.batches_per_shard == 3
    assert manifest.tokens == manifest.supervised == sum(int((b.documents >= 0).sum()) for b in batches())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", *map(shard_name, range(3))]
    stored, live = StoredFeatures(tmp_path), source()
    stored.check(tiny.target("llama"))
    kept = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    for i, batch in enumerate(batches()):
        want = live(batch)
        rounded = Features(batch, {t: x.to(kept).float() for t, x in want.taps.items()}, want.last.to(kept).float())
        assert equal(at(stored, i), rounded)
    assert load_file(tmp_path / shard_name(0))["0.last"].dtype == kept


def test_a_half_precision_target_stores_itself(tmp_path):
    live = source(target=Target(tiny.fresh_model("llama").bfloat16()))
    assert run(tmp_path, live=live).dtype == "bfloat16"
    stored = StoredFeatures(tmp_path)
    assert all(equal(at(stored, i), live(batch)) for i, batch in enumerate(batches()))


def test_fewer_needs_than_stored(tmp_path):
    run(tmp_path)
    features = at(StoredFeatures(tmp_path, Needs(taps=frozenset({2}), exit=4)), 3)
    assert list(features.taps) == [2, 4] and features.last is None
    with pytest.raises(UserError, match=r"lacks tap 3 \(it has taps \[0, 2, 4\] and the last hidden state\)"):
        StoredFeatures(tmp_path, Needs(taps=frozenset({2, 3})))
    run(tmp_path / "taps", live=source(Needs(taps=frozenset({1}))))
    with pytest.raises(UserError, match="lacks the last hidden state"):
        StoredFeatures(tmp_path / "taps", Needs(last=True))
    with pytest.raises(AssertionError, match="take them from StoredBatches"):
        StoredFeatures(tmp_path)(batches()[0])


# Going on


class Stop(Exception):
    pass


class Failing(LiveFeatures):
    """Counts its batches, and dies after `most`."""

    calls, most = 0, 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls > self.most:
            raise Stop
        return super().__call__(batch)


def failing(after: int) -> Failing:
    live = Failing(tiny.target("llama"), NEEDS)
    live.most = after
    return live


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_goes_on_after_a_crash(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path / "a", live=failing(4))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["manifest.json", shard_name(0)]
    with pytest.raises(UserError, match="is not finished: run it again"):
        StoredFeatures(tmp_path / "a")
    counted = failing(99)
    run(tmp_path / "a", live=counted)
    assert counted.calls == 4 + 4  # the batches that were missing, and the check
    run(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")

    calls = counted.calls
    assert run(tmp_path / "a", live=counted).complete
    assert counted.calls == calls


@pytest.mark.slow
def test_kill_9_leaves_whole_shards(tmp_path):
    """Killed in the middle of writing a shard: a hidden part of it stays, is never read, and goes with the next run."""
    script = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        import test_features_store as t
        from understudy.features import capture as c
        save = c.save_file
        def dying(tensors, path, metadata):
            save(tensors, path, metadata)
            if "00001" in str(path):
                os.truncate(path, 100)
                os.kill(os.getpid(), signal.SIGKILL)
        c.save_file, c._batch_bytes = dying, lambda *_: 2**20 // 3
        t.run(Path({str(tmp_path / "a")!r}))
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=env, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names[0].startswith(".shard-00001") and names[1:] == ["manifest.json", shard_name(0)]
    run(tmp_path / "a")
    run(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_cut_off_shard_is_made_anew(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, live=failing(6))
    os.truncate(tmp_path / shard_name(0), 500)
    run(tmp_path)
    assert equal(at(StoredFeatures(tmp_path), 0), source()(batches()[0]))


def test_ranks_share_the_work(tmp_path):
    lines: list[str] = []
    assert not run(tmp_path / "a", rank=1, world_size=2, say=lines.append).complete
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["manifest.json", shard_name(1)]
    assert lines[-1] == "2 shards of other processes are still to come"
    assert run(tmp_path / "a", rank=0, world_size=2).complete
    run(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": SETTINGS | {"max_length": 32}}, "was begun with max length 24, not 32"),
        ({"settings": SETTINGS | {"seed": 1}}, "was begun with seed None, not 1"),
        ({"dtype": "bfloat16"}, "was begun with dtype float32, not bfloat16"),
        ({"live": {"needs": Needs(taps=frozenset({1}), last=True)}}, r"was begun with taps \[0, 2, 4\], not \[1\]"),
        (
            {"live": {"target": Target(tiny.fresh_model("llama", seed=5))}},
            r"was begun with target llama \(float32\), not",
        ),
        ({"given": batches(seed=1)}, "shard-00000.safetensors holds other texts than the data gives now"),
        ({"shard_mb": 2}, "was begun with shard mb 1, not 2"),
    ],
)
def test_going_on_with_something_else(tmp_path, change, message):
    with pytest.raises(Stop):
        run(tmp_path, live=failing(4))
    if "live" in change:
        change = {"live": source(**change["live"])}
    with pytest.raises(UserError, match=message):
        run(tmp_path, **change)


def test_less_data_than_before(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, live=failing(6))
    with pytest.raises(UserError, match=r"holds shard-00001.safetensors, which the data does not reach any more"):
        run(tmp_path, given=batches()[:3])


# Size and checks


def test_size_is_estimated_first(tmp_path, monkeypatch):
    monkeypatch.undo()
    lines: list[str] = []
    run(tmp_path / "a", say=lines.append)
    said = float(lines[0].split("(")[1].split(" MiB")[0])
    written = sum(p.stat().st_size for p in (tmp_path / "a").glob("shard-*")) / 7 / 2**20
    assert said == pytest.approx(written, abs=0.06)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"need 0.00 GiB more, 0.00 GiB are free .* or --force"):
        run(tmp_path / "b")
    assert not list((tmp_path / "b").glob("shard-*"))
    assert run(tmp_path / "b", force=True).complete


def test_a_full_disk(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(capturing, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*shard-00000.safetensors: the disk is full; run this again"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def damage(path: Path) -> None:
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("taps.2"):
            tensors[name] = tensors[name].roll(1, dims=1)
    save_file(tensors, path, {"batches": "3"})


def test_the_check_finds_wrong_states(tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, live=failing(6))
    damage(tmp_path / shard_name(1))
    with pytest.raises(UserError, match=r"shard-00001.safetensors failed the check: batch \d differs"):
        run(tmp_path, checks=7)
    assert not read_manifest(tmp_path).complete
    (tmp_path / shard_name(1)).unlink()
    assert run(tmp_path, checks=7).complete


def test_values_that_a_dtype_cannot_hold(tmp_path):
    model = tiny.fresh_model("llama")
    model.get_input_embeddings().weight.mul_(1e6)
    live = source(target=Target(model))
    with pytest.raises(UserError, match=r"taps.0 of the target has values that float16 cannot hold"):
        run(tmp_path / "a", live=live, dtype="float16")
    assert run(tmp_path / "b", live=live, dtype="bfloat16").complete


# Bad folders


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match=r"holds no captured features \(manifest.json is missing\)"):
        StoredFeatures(tmp_path / "none")
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="is not a manifest of captured features: target Field required"):
        StoredFeatures(tmp_path)
    (tmp_path / "manifest.json").write_text("nonsense")
    with pytest.raises(UserError, match="is not a manifest of captured features"):
        run(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / shard_name(0)).touch()
    with pytest.raises(UserError, match=r"holds shard-00000.safetensors but no manifest.json"):
        run(tmp_path)
    with pytest.raises(UserError, match="the data gave no batch"):
        run(tmp_path / "empty", given=[])


def test_another_target_and_a_lost_shard(tmp_path):
    run(tmp_path)
    stored = StoredFeatures(tmp_path)
    with pytest.raises(UserError, match=r"are those of another target \(llama, in float32\): load that one"):
        stored.check(Target(tiny.fresh_model("llama", seed=5)))
    (tmp_path / shard_name(1)).unlink()
    assert at(stored, 0).last is not None
    with pytest.raises(UserError, match=r"cannot read .*shard-00001.safetensors"):
        stored.batch(3)


def test_fingerprint():
    one, same = (fingerprint(Target(tiny.fresh_model("qwen3"), name=name)) for name in ("a", "b"))
    assert one == same
    model = tiny.fresh_model("qwen3")
    model.get_decoder().layers[3].mlp.down_proj.weight.mul_(1.001)
    assert fingerprint(Target(model)) != one
    other = tiny.fresh_model("qwen3", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert fingerprint(Target(other)) != one


# The order of batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("features")
    run(path)
    return path


def key(batch: Batch) -> tuple[int, ...]:
    return tuple(batch.ids.flatten().tolist())


@given(st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_every_rank_gets_its_share(folder, world, seed):
    stored = StoredFeatures(folder, Needs())
    for epoch in range(2):
        orders = [StoredBatches(stored, seed, rank, world).order(epoch) for rank in range(world)]
        assert {len(order) for order in orders} == {7 // world}
        seen = [i for order in orders for i in order]
        assert len(set(seen)) == len(seen) and set(seen) <= set(range(7))
        step_by_step = [order[i] for i in range(7 // world) for order in orders]
        assert step_by_step == StoredBatches(stored, seed).order(epoch)[: len(seen)]


def test_goes_on_exactly(folder):
    stored = StoredFeatures(folder, Needs())
    whole = StoredBatches(stored, seed=3)
    assert whole.steps_per_epoch == 7
    want = [key(f) for _ in range(2) for f in whole]
    assert (
        sorted(want[:7]) == sorted(want[7:]) == sorted(key(stored.batch(i)) for i in range(7)) and want[:7] != want[7:]
    )
    for stop in (0, 3, 7, 10):
        first = StoredBatches(stored, seed=3)
        got = []
        while len(got) < stop:
            for batch in first:
                got.append(key(batch))
                if len(got) == stop:
                    break
        state = json.loads(json.dumps(first.state_dict()))
        second = StoredBatches(stored, seed=3)
        second.load_state_dict(state)
        while len(got) < 14:
            got += [key(f) for f in second]
        assert got == want
    assert StoredBatches(stored, seed=4).order(0) != StoredBatches(stored, seed=3).order(0)
    with pytest.raises(UserError, match=r"cannot resume, .*: seed was 3, is 4"):
        StoredBatches(stored, seed=4).load_state_dict(state)
    with pytest.raises(UserError, match="holds 7 batches: too few for 8 processes"):
        StoredBatches(stored, world_size=8)


# The command


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Write f{i}."},
                {"role": "assistant", "content": f"def f{i}(): pass"},
            ]
        }
        for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(capsys, *argv: object) -> tuple[int, list[str], str]:
    """(exit code, lines, error) of `understudy data capture`, with the exit of every command."""
    try:
        capture_command.main([str(arg) for arg in argv], standalone_mode=False)
        code, error = 0, ""
    except UserError as wrong:
        code, error = 2, str(wrong)
    return code, capsys.readouterr().out.splitlines(), error


def test_capture_command(tmp_path, corpus, capsys):
    options = ["--data", corpus, "--eval-data", corpus, "--taps", 3, "--taps", 0, "--max-length", 64, "--batch-size", 2]
    folder = tmp_path / "out"
    code, lines, _ = command(capsys, *options, "--output-dir", folder, "--store-dtype", "float16", "--seed", 5)
    assert code == 0 and lines[0].startswith("features take about 0.00 GiB")
    done = json.loads(lines[-1])
    assert done["folder"] == str(folder) and done["data"]["complete"] and done["data"] == done["eval"]
    assert done["data"]["tokens"] > done["data"]["supervised"] > 0

    stored = StoredFeatures(folder)
    assert stored.manifest.taps == [0, 3] and stored.manifest.last and stored.manifest.dtype == "float16"
    batch = stored.batch(0)
    assert batch.ids.shape == (2, 64) and len(stored) == len(StoredFeatures(folder / "eval")) == done["data"]["batches"]
    target = stored.manifest.target_dtype, stored(batch).last.dtype, stored(batch).taps[3].shape[-1]
    assert target == ("bfloat16", torch.bfloat16, stored.manifest.hidden_size)

    assert command(capsys, *options, "--output-dir", folder, "--store-dtype", "float16", "--seed", 5)[0] == 0
    code, _, error = command(capsys, *options, "--output-dir", folder, "--store-dtype", "float16")
    assert code == 2 and "was begun with seed 5, not 0" in error


def test_options_of_the_command(tmp_path, corpus, capsys, monkeypatch):
    """What reaches `capture`."""
    seen = {}

    def spy(batches, source, folder, **options):
        batch = next(iter(batches))
        seen.update(options, folder=folder, rows=batch.ids.shape[0], documents=int(batch.documents.max()) + 1)
        seen.update(needs=source.needs, supervised=int(batch.mask.sum()))
        return capturing.Manifest(
            target="", fingerprint="", target_dtype="", dtype="", taps=[], last=True, hidden_size=1, settings={},
            shard_mb=1, batches_per_shard=1,
        )  # fmt: skip

    monkeypatch.setattr(capturing, "capture", spy)
    base = ["--data", corpus, "--output", tmp_path / "o", "--max-length", 128]
    command(capsys, *base)
    assert seen["rows"] == 4 and seen["documents"] > 1 and seen["needs"] == Needs(last=True)
    assert seen["settings"]["max_length"] == 128 and seen["shard_mb"] == 256 and not seen["force"]
    command(capsys, *base, "--no-pack", "--no-last", "--layers", 2, "--force", "--shard-mb", 7, "--checks", 1, "--rank", 1,
            "--world-size", 3, "--batch-size", 2)  # fmt: skip
    assert seen["rows"] == 2 and seen["documents"] == 1 and seen["needs"] == Needs(taps=frozenset({2}))
    assert (seen["force"], seen["shard_mb"], seen["checks"], seen["rank"], seen["world_size"]) == (True, 7, 1, 1, 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--no-last"], "nothing is asked for: give --taps"),
        (["--rank", 2, "--world-size", 2], "with --world-size 2 it is at most 1"),
        (["--max-length", 10**6], "is beyond the target's context of"),
        (["--taps", 99], "there is no tap 99: pocket has taps 0"),
    ],
)
def test_mistakes_of_the_command(tmp_path, corpus, capsys, argv, message):
    code, _, error = command(capsys, "--data", corpus, "--output", tmp_path / "o", *argv)
    assert code == 2 and message in error
