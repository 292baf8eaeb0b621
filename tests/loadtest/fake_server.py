"""An OpenAI-compatible server with known behaviour, for tests of what the load test measures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HTTP_500 = "http 500"


@dataclass
class FakeServer:
    """gap_s: pause before each token. serial: one request after the other. faults: what goes wrong
    with a request, by its first prompt token; bytes are all that is answered. failing: numbers of
    requests that fail, from 1.

    models: what /v1/models lists. prefix: before all paths; others do not exist. metrics: the text
    of /metrics at each look, if there is one. sent_s: for each request, the monotonic times at
    which its tokens were written.
    """

    gap_s: float = 0.0
    serial: bool = False
    faults: dict[int, str | bytes] = field(default_factory=dict)
    failing: Container[int] = ()
    models: Any = field(default_factory=lambda: [{"id": "fake"}])
    prefix: str = ""
    metrics: Callable[[], str] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    sent_s: list[list[float]] = field(default_factory=list)
    url: str = ""
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        sent_s: list[float] = []
        self.bodies.append(body)
        self.sent_s.append(sent_s)
        fault = HTTP_500 if len(self.bodies) in self.failing else self.faults.get(body["prompt"][0])
        if fault == HTTP_500:
            handler.send_error(500)
            return
        if isinstance(fault, bytes):
            respond(handler, 200, fault)
            return
        tokens = body["max_tokens"] - (fault == "too few tokens")
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        with self._turn if self.serial else nullcontext():
            self._stream(handler, tokens, fault, sent_s)

    def _stream(
        self, handler: BaseHTTPRequestHandler, tokens: int, fault: str | None, sent_s: list[float]
    ) -> None:
        for count in range(1, tokens + 1):
            time.sleep(self.gap_s)
            if fault == "cut short" and count == 2:
                return
            text = "" if count == 1 else "x"  # the first token decodes to nothing yet
            event = {"choices": [{"text": text}], "usage": {"completion_tokens": count}}
            sent_s.append(time.monotonic())
            handler.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        handler.wfile.write(b"data: [DONE]\n\n")


def respond(handler: BaseHTTPRequestHandler, status: int, payload: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(payload)))
    handler.end_headers()
    handler.wfile.write(payload)


@contextmanager
def running(fake: FakeServer) -> Iterator[FakeServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == f"{fake.prefix}/v1/completions":
                fake.answer(self, body)
            else:
                respond(self, 404, b'{"detail": "Not Found"}')

        def do_GET(self) -> None:
            if self.path == f"{fake.prefix}/v1/models":
                respond(self, 200, json.dumps({"data": fake.models}).encode())
            elif self.path == f"{fake.prefix}/metrics" and fake.metrics is not None:
                respond(self, 200, fake.metrics().encode())
            else:
                respond(self, 404, b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}{fake.prefix}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
