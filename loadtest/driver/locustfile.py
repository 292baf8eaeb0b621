"""The Locust users: they stream completions and write down when every token arrived.

    locust -f loadtest/driver/locustfile.py --headless --users 8 --spawn-rate 8 --host http://127.0.0.1:8000 \
        --requests requests.json --records records.jsonl --model NAME ClosedLoopUser

ClosedLoopUser sends the next request of the file as soon as its last one has ended, until none is left. OpenLoopUser,
of which there is one, sends every request when it is due, however many are under way: Locust's own wait times begin
when a request ends, so that a slow server is asked less often.
Locust's bundled OpenAI user reads the whole body before it looks, and its FastHttp `iter_lines` waits for full
buffers, so both stamp tokens too late; these read line by line from the socket.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import gevent
from gevent.pool import Group
from geventhttpclient import HTTPClient
from locust import User, constant, events, task
from locust.exception import StopUser

from gradmap.files import write_json
from gradmap.openai_api import authorization
from loadtest.metrics import RequestMetrics, measure
from loadtest.records import RequestRecord, to_json_line
from loadtest.workload import Request, load_requests

CONNECT_TIMEOUT_S = 10.0
MAX_CONNECTIONS = 4096


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument("--requests", required=True, help="JSON file of requests (loadtest.workload)")
    parser.add_argument("--records", required=True, help="JSON lines file to write, one line per request")
    parser.add_argument("--model", dest="served_model", required=True, help="name of the served model")
    parser.add_argument("--arm", default="endpoint", help="label of the records")
    parser.add_argument("--pair", type=int, default=0, help="index of the block, for the records")
    parser.add_argument("--load", default="load", help="name of the load, for the records")
    parser.add_argument("--usage", default=None, help="JSON file to write: the CPU time of this process")
    parser.add_argument("--request-timeout-s", type=float, default=300.0, help="longest silence of the server")


class Block:
    """The requests still to send, and the file that records go to. Shared by all users of the process."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.options = environment.parsed_options
        self.waiting = deque(load_requests(Path(self.options.requests)))
        self.unfinished = len(self.waiting)
        self.file: IO[str] = Path(self.options.records).open("w")  # noqa: SIM115 - closed by close
        self.started_s, self.started_cpu_s = time.monotonic(), time.process_time()

    def finish(self, record: RequestRecord) -> None:
        self.file.write(to_json_line(record))
        self.file.flush()
        _report_to_locust(self.environment, record)
        self.unfinished -= 1
        if self.unfinished == 0:
            gevent.spawn(self.environment.runner.quit)  # from outside: quitting waits for all users, so for this one

    def close(self) -> None:
        self.file.close()
        if self.options.usage:
            busy_s, length_s = time.process_time() - self.started_cpu_s, time.monotonic() - self.started_s
            write_json(Path(self.options.usage), {"client_cpu": busy_s / length_s})


@events.test_start.add_listener
def open_block(environment: Any, **_: Any) -> None:
    environment.block = Block(environment)


@events.test_stop.add_listener
def close_block(environment: Any, **_: Any) -> None:
    environment.block.close()


class CompletionUser(User):
    """Completes requests over `connections` connections, which are kept."""

    abstract = True
    wait_time = constant(0)
    connections = 1

    def on_start(self) -> None:
        self.block: Block = self.environment.block
        timeout_s = self.block.options.request_timeout_s
        self.http = HTTPClient.from_url(
            self.host,
            concurrency=self.connections,
            connection_timeout=CONNECT_TIMEOUT_S,
            network_timeout=timeout_s,
        )

    def on_stop(self) -> None:
        self.http.close()

    def complete(self, request: Request, scheduled_s: float | None) -> None:
        arrivals: list[tuple[float, int]] = []
        options = self.block.options
        body = _request_body(options.served_model, request)
        headers = {"Content-Type": "application/json", **authorization()}
        sent_s = time.monotonic()
        try:
            response = self.http.request("POST", "/v1/completions", body=body, headers=headers)
            for event in _server_sent_events(response):
                _note_arrival(arrivals, event)
            error = _what_went_wrong(response.status_code, arrivals, request)
        except Exception as failure:  # whatever broke, it is a failed request and not the end of the test
            error = f"{type(failure).__name__}: {failure}"
        record = RequestRecord(
            arm=options.arm,
            pair=options.pair,
            load=options.load,
            request=request.id,
            prompt_tokens=len(request.prompt),
            requested_tokens=request.output_tokens,
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            ended_s=time.monotonic(),
            chunk_times_s=tuple(arrived_s for arrived_s, _ in arrivals),
            chunk_tokens=tuple(tokens for _, tokens in arrivals),
            completion_tokens=arrivals[-1][1] if arrivals else 0,
            error=error,
        )
        self.block.finish(record)


class ClosedLoopUser(CompletionUser):
    """Has at most one request under way."""

    @task
    def complete_next(self) -> None:
        if not self.block.waiting:
            raise StopUser
        self.complete(self.block.waiting.popleft(), None)


class OpenLoopUser(CompletionUser):
    """Spawns every request when it is due."""

    connections = MAX_CONNECTIONS

    @task
    def dispatch(self) -> None:
        started_s = time.monotonic()
        requests = Group()
        while self.block.waiting:
            request = self.block.waiting.popleft()
            assert request.due_s is not None
            scheduled_s = started_s + request.due_s
            gevent.sleep(max(0.0, scheduled_s - time.monotonic()))
            requests.spawn(self.complete, request, scheduled_s)
        requests.join()
        raise StopUser


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
