"""The Locust user: streams completions and writes down when every token arrived.

    locust -f loadtest/driver/locustfile.py --headless --users 8 --spawn-rate 8 --host http://127.0.0.1:8000 \
        --requests requests.json --records records.jsonl --model NAME

A closed loop: each user sends the next request of the file as soon as its last one has ended, until none is left.
Locust's bundled OpenAI user reads the whole body before it looks, and its FastHttp `iter_lines` waits for full
buffers, so both stamp tokens too late; this one reads line by line from the socket.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import gevent
from geventhttpclient import HTTPClient
from locust import User, constant, events, task
from locust.exception import StopUser

from gradmap.openai_api import authorization
from loadtest.metrics import RequestMetrics, measure
from loadtest.records import RequestRecord, to_json_line
from loadtest.workload import Request, load_requests

CONNECT_TIMEOUT_S = 10.0


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument("--requests", required=True, help="JSON file of requests (loadtest.workload)")
    parser.add_argument("--records", required=True, help="JSON lines file to write, one line per request")
    parser.add_argument("--model", dest="served_model", required=True, help="name of the served model")
    parser.add_argument("--arm", default="endpoint", help="label of the records")
    parser.add_argument("--pair", type=int, default=0, help="index of the block, for the records")
    parser.add_argument("--request-timeout-s", type=float, default=300.0, help="longest silence of the server")


class Block:
    """The requests still to send, and the file that records go to. Shared by all users of the process."""

    def __init__(self, options: Any, users: int) -> None:
        self.options = options
        self.users = users
        self.waiting = deque(load_requests(Path(options.requests)))
        self.unfinished = len(self.waiting)
        self.file: IO[str] = Path(options.records).open("w")  # noqa: SIM115 - closed by close_block

    def write(self, record: RequestRecord) -> None:
        self.file.write(to_json_line(record))
        self.file.flush()
        self.unfinished -= 1


@events.test_start.add_listener
def open_block(environment: Any, **_: Any) -> None:
    environment.block = Block(environment.parsed_options, environment.parsed_options.num_users)


@events.test_stop.add_listener
def close_block(environment: Any, **_: Any) -> None:
    environment.block.file.close()


class CompletionUser(User):
    """One connection that has at most one request in flight."""

    wait_time = constant(0)

    def on_start(self) -> None:
        timeout_s = self.environment.parsed_options.request_timeout_s
        self.http = HTTPClient.from_url(self.host, connection_timeout=CONNECT_TIMEOUT_S, network_timeout=timeout_s)

    def on_stop(self) -> None:
        self.http.close()

    @task
    def complete_next(self) -> None:
        block: Block = self.environment.block
        if not block.waiting:
            raise StopUser
        record = self._complete(block, block.waiting.popleft())
        block.write(record)
        _report_to_locust(self.environment, record)
        if block.unfinished == 0:
            gevent.spawn(self.environment.runner.quit)  # from outside: quitting waits for all users, so for this one

    def _complete(self, block: Block, request: Request) -> RequestRecord:
        arrivals: list[tuple[float, int]] = []
        body = _request_body(block.options.served_model, request)
        headers = {"Content-Type": "application/json", **authorization()}
        sent_s = time.monotonic()
        try:
            response = self.http.request("POST", "/v1/completions", body=body, headers=headers)
            for event in _server_sent_events(response):
                _note_arrival(arrivals, event)
            error = _what_went_wrong(response.status_code, arrivals, request)
        except Exception as failure:  # whatever broke, it is a failed request and not the end of the test
            error = f"{type(failure).__name__}: {failure}"
        return RequestRecord(
            arm=block.options.arm,
            pair=block.options.pair,
            concurrency=block.users,
            request=request.id,
            prompt_tokens=len(request.prompt),
            requested_tokens=request.output_tokens,
            sent_s=sent_s,
            ended_s=time.monotonic(),
            chunk_times_s=tuple(arrived_s for arrived_s, _ in arrivals),
            chunk_tokens=tuple(tokens for _, tokens in arrivals),
            completion_tokens=arrivals[-1][1] if arrivals else 0,
            error=error,
        )


def _request_body(model: str, request: Request) -> bytes:
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    return json.dumps(body).encode()


def _server_sent_events(response: Any) -> Iterator[dict[str, Any]]:
    """Yields the JSON of each `data:` line as it arrives."""
    while line := response.readline(b"\n"):
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def _note_arrival(arrivals: list[tuple[float, int]], event: dict[str, Any]) -> None:
    """Stamps a chunk that brought tokens. Its usage tells, and not its text: a token may decode to nothing yet."""
    now = time.monotonic()
    tokens = (event.get("usage") or {}).get("completion_tokens", 0)
    if tokens > (arrivals[-1][1] if arrivals else 0):
        arrivals.append((now, tokens))


def _what_went_wrong(status: int, arrivals: list[tuple[float, int]], request: Request) -> str | None:
    if status != 200:
        return f"HTTP {status}"
    tokens = arrivals[-1][1] if arrivals else 0
    if tokens != request.output_tokens:
        return f"{tokens} tokens came, {request.output_tokens} were asked for"
    return None


def _report_to_locust(environment: Any, record: RequestRecord) -> None:
    """Shows TTFT, TPOT and E2EL as named entries on Locust's own pages."""
    common = {"request_type": "completion", "response_length": record.completion_tokens, "context": {}}
    if record.error is not None:
        error = RuntimeError(record.error)
        environment.events.request.fire(name="E2EL", response_time=None, exception=error, **common)
        return
    metrics: RequestMetrics = measure(record)
    for name, value_s in (("TTFT", metrics.ttft_s), ("TPOT", metrics.tpot_s), ("E2EL", metrics.e2el_s)):
        if value_s is not None:
            environment.events.request.fire(name=name, response_time=value_s * 1000, exception=None, **common)
