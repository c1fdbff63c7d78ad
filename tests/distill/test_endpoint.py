"""Answers from a server: what is asked of it, what is made of its answers, and what happens when it does not answer."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import pytest

from distill.chat import END, STOPS, style, talk
from distill.serving import Fake, completion, serving
from understudy.assets import pocket_path
from understudy.cli import main
from understudy.core.errors import UserError
from understudy.distill import endpoint
from understudy.distill.dialogue import Dialogue
from understudy.distill.endpoint import Failed, RemoteWriter, Server, request_options
from understudy.target.params import SamplingParams


@pytest.fixture(autouse=True)
def pauses(monkeypatch) -> list[float]:
    """Seconds that were slept between tries; nobody really sleeps."""
    slept: list[float] = []

    class Quick(threading.Event):
        def wait(self, timeout=None):
            slept.append(timeout)
            return self.is_set()

    monkeypatch.setattr(endpoint, "Event", Quick)
    return slept


def echo(body: dict[str, Any]):
    """Says the question's last number plus one."""
    return completion([body["prompt"][-4] + 1, END])


def answered(fake: Fake, talks, law=SamplingParams(), concurrency=4, limit=200, **options: Any) -> list[Dialogue]:
    with serving(fake):
        server = Server(fake.url, retries=options.pop("retries", 2), timeout=options.pop("timeout", 10))
        writer = RemoteWriter(server, law, style(limit=limit), 9, concurrency)
        done = list(writer.answer(Dialogue(each, i, writer.style) for i, each in enumerate(talks)))
    return sorted(done, key=lambda each: each.number)


def test_turns_are_asked_as_ids_and_answers_kept_as_ids():
    fake = Fake(echo)
    (dialogue,) = answered(fake, [talk("10", "20")], limit=18)
    (row,) = dialogue.rows()
    first, second = fake.bodies
    assert first["prompt"] == row["input_ids"][:5] and second["prompt"] == row["input_ids"][: len(second["prompt"])]
    assert row["input_ids"][5:7] == [11, END] and row["input_ids"][-2:] == [21, END]
    assert row["finished"] == ["stop", "stop"]
    assert first["max_tokens"] == 9 and second["max_tokens"] == 18 - len(second["prompt"]), "no further than the limit"
    assert first["model"] == "m" and first["return_token_ids"] is True and first["stop_token_ids"] == [END]
    assert first["temperature"] == 0.0 and "seed" not in first


def test_the_law_is_said_in_full():
    law = SamplingParams(temperature=0.7, top_p=0.9, top_k=5, logit_bias={7: 1.5}, allowed_tokens=(7, 8), seed=3)
    options = request_options(law, STOPS)
    assert {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.0}.items() <= options.items()
    assert options["logit_bias"] == {"7": 1.5} and options["allowed_token_ids"] == [7, 8]
    with pytest.raises(UserError, match="suppress_tokens"):
        request_options(SamplingParams(suppress_tokens=(3,)), STOPS)
    with pytest.raises(UserError, match="-inf"):
        request_options(SamplingParams(logit_bias={3: float("-inf")}), STOPS)


def test_every_sampled_turn_has_a_seed_of_its_own():
    seeds = []
    for seed in (0, 0, 1):
        fake = Fake(echo)
        answered(fake, [talk("10", "20"), talk("10")], SamplingParams(temperature=1.0, seed=seed))
        seeds.append(sorted(body["seed"] for body in fake.bodies))
    assert seeds[0] == seeds[1] != seeds[2] and len(set(seeds[0])) == 3


def test_many_conversations_are_asked_at_once():
    company = threading.Barrier(3, timeout=10)

    def together(body):
        company.wait()
        return echo(body)

    fake = Fake(together)
    done = answered(fake, [talk(str(10 + i)) for i in range(6)], concurrency=3)
    assert fake.busiest == 3 and [next(d.rows())["input_ids"][5] for d in done] == [11 + i for i in range(6)]


def test_passing_faults_are_tried_again_later_and_later(pauses):
    said = [(503, {}), (429, {}), None]

    def reply(body):
        return said.pop(0) or echo(body)

    fake = Fake(reply)
    (dialogue,) = answered(fake, [talk("10")])
    assert dialogue.failure is None and len(fake.bodies) == 3
    first, second = pauses
    assert 0.5 <= first <= 1.0 <= second <= 2.0


def test_a_server_says_how_long_to_wait(pauses):
    said = [(429, {"retry": 7}), None]
    answered(Fake(lambda body: said.pop(0) or echo(body)), [talk("10")])
    assert len(pauses) == 1 and 3.5 <= pauses[0] <= 7


@pytest.mark.parametrize(
    ("reply", "tries", "reason"),
    [
        ((500, {"error": "cuda"}), 3, "the server says 500 Internal Server Error .*cuda.*, 3 times"),
        ((400, {"error": "too long"}), 1, "400 Bad Request .*too long"),
        ((200, {"choices": []}), 1, "no completion"),
        (completion([20], "abort"), 1, "'abort'"),
        (completion([20], "stop"), 1, "without a stop token"),
        (completion([], "length"), 1, "without a stop token"),
    ],
)
def test_a_request_that_fails_fails_one_conversation(reply, tries, reason):
    fake = Fake(lambda body: reply if body["prompt"][1] == 10 else echo(body))
    bad, good = answered(fake, [talk("10", "11"), talk("12")])
    assert bad.failure is not None and re.search(reason, bad.failure)
    assert good.failure is None and len(list(good.rows())) == 1
    assert len(fake.bodies) == tries + 1


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((200, {"choices": [{"text": "hi", "finish_reason": "stop"}]}), "without token ids"),
        (completion([20, END], prompt_token_ids=[1]), "read another prompt"),
        ((404, {}), "404"),
        ((500, {}), "in a row failed"),
    ],
)
def test_a_server_that_cannot_do_it_ends_the_run(reply, says):
    with pytest.raises(UserError, match=says):
        answered(Fake(lambda body: reply), [talk(str(10 + i)) for i in range(20)], retries=0)


def test_a_server_that_is_slower_than_the_timeout_fails():
    late = threading.Event()
    with serving(Fake(lambda body: (late.wait(20), echo(body))[1])) as fake:
        server = Server(fake.url, timeout=0.5, retries=1)
        with pytest.raises(Failed, match=r"did not answer \(ReadTimeout.*2 times"):
            server.complete([1, 2, 3, 4], 4, {})
        late.set()


def test_the_model_at_the_server():
    two = [{"id": "a", "max_model_len": 50}, {"id": "b"}]
    with serving(Fake(echo, models=two)) as fake:
        with pytest.raises(UserError, match="serves a, b: name one"):
            Server(fake.url)
        with pytest.raises(UserError, match="does not serve 'c', but a, b"):
            Server(fake.url, "c")
        assert Server(fake.url + "/v1/", "a").longest == 50 and Server(fake.url, "b").longest is None
    with serving(Fake(echo, models=None)) as fake, pytest.raises(UserError, match="no list of models"):
        Server(fake.url)


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    with serving(Fake(echo, key="secret")) as fake:
        assert Server(fake.url, key_env="A_KEY").model == "m"
        with pytest.raises(UserError, match="401"):
            Server(fake.url)
        with pytest.raises(UserError, match="no such environment variable"):
            Server(fake.url, key_env="NO_KEY")


def test_the_command_asks_a_server_and_tries_again_what_failed(tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    said = tokenizer("return 1", add_special_tokens=False)["input_ids"]
    talks = tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(5)))
    broken = True

    def reply(body):
        bad = broken and "number 3" in tokenizer.decode(body["prompt"])
        return (400, {}) if bad else completion([*said, 3])

    with serving(Fake(reply, models=[{"id": "pocket", "max_model_len": 64}])) as fake:
        args = ["data", "regenerate", "--output-dir", tmp_path / "out", "--data-path", talks, "--endpoint", fake.url]
        args += ["--endpoint-model", "pocket", "--concurrency", 2, "--retries", 0, "--timeout", 5]
        assert main(list(map(str, args))) == 0
        first = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert first["rows"] == 4 and first["failed"] == 1 and first["done"] == 4
        failed = (tmp_path / "out" / "train-0.failed.jsonl").read_text()
        assert "400" in failed and '"number": 3' in failed
        broken = False
        assert main(list(map(str, args))) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert second["rows"] == 5 and second["failed"] == 0 and len(fake.bodies) == 6
    assert (tmp_path / "out" / "train-0.failed.jsonl").read_text() == ""
    rows = [json.loads(line) for line in (tmp_path / "out" / "train-0.jsonl").read_text().splitlines()]
    assert all(row["made"]["endpoint_model"] == "pocket" and row["made"]["target"] is None for row in rows)
    assert all(row["messages"][-1]["content"] == "return 1" for row in rows)
