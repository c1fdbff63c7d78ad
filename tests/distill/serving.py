"""A tiny HTTP server that answers as vLLM's completions route does, or as badly as a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]  # status, JSON


@dataclass
class Fake:
    """`reply` makes the answer to a request's body; what came in is kept."""

    reply: Callable[[dict[str, Any]], Reply]
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "m", "max_model_len": 200}])
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    busy: int = 0
    busiest: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def completion(ids: list[int], finished: str = "stop", **more: Any) -> Reply:
    return 200, {"choices": [{"text": "", "token_ids": ids, "finish_reason": finished, **more}]}


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200, {"data": fake.models}) if self.path == "/v1/models" else self._say(404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.bodies.append(body)
                fake.busy += 1
                fake.busiest = max(fake.busiest, fake.busy)
            status, said = fake.reply(body)
            with fake.lock:
                fake.busy -= 1
            self._say(status, said)

        def _say(self, status: int, said: Any) -> None:
            if fake.key is not None and self.headers["Authorization"] != f"Bearer {fake.key}":
                status, said = 401, {"error": "who are you?"}
            text = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            if isinstance(said, dict) and "retry" in said:
                self.send_header("Retry-After", str(said["retry"]))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
