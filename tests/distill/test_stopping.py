"""Stopping a run that a server answers: nobody waits for requests under way or for pauses between tries."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from distill.chat import END
from distill.serving import Fake, completion, serving
from understudy.distill.endpoint import Failed, Server

SOON = 20.0  # seconds; a request lasts 120, a pause at least 30
ASKS = """
import signal, sys
from distill.chat import style, talk
from understudy.core.errors import UserError
from understudy.distill.dialogue import Dialogue
from understudy.distill.endpoint import RemoteWriter, Server
from understudy.target.params import SamplingParams

signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts the tests in the background may have it ignored
writer = RemoteWriter(Server(sys.argv[1], timeout=120), SamplingParams(), style(), 9, 2)
try:
    for done in writer.answer(Dialogue(talk(str(10 + i)), i, writer.style) for i in range(8)):
        print(done.number, flush=True)
except (KeyboardInterrupt, UserError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize(
    ("sixth", "says"),
    [((503, {"retry": 60}), "KeyboardInterrupt"), ((404, {}), "UserError: .*404")],
    ids=["interrupted", "refused"],
)
def test_a_run_ends_at_once_and_with_all_that_was_answered(sixth, says):
    """Of eight conversations, two at a time, four are answered, the fifth never is; the sixth is put off, or ends the run."""
    late, both = threading.Event(), threading.Event()

    def reply(body):
        number = body["prompt"][-4] - 10
        if len(fake.bodies) == 6:
            both.set()
        if number == 4:
            late.wait(120)
        if number == 5:
            both.wait(60)
            return sixth
        return completion([20, END])

    fake = Fake(reply)
    with serving(fake):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-c", ASKS, fake.url],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        try:
            assert both.wait(60), "the fifth and the sixth are under way"
            if sixth[0] == 503:
                process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=SOON)
        finally:
            process.kill()
            process.communicate()
            late.set()
    assert process.returncode == 1 and re.match(says, err), err
    assert sorted(out.split()) == ["0", "1", "2", "3"]


def test_closing_ends_the_pause_before_another_try():
    def reply(body):
        threading.Timer(0.2, server.close).start()
        return 503, {"retry": 60}

    with serving(Fake(reply)) as fake:
        server = Server(fake.url)
        began = time.monotonic()
        with pytest.raises(Failed, match="503"):
            server.complete([1, 2, 3, 4], 4, {})
        assert time.monotonic() - began < SOON and len(fake.bodies) == 1
