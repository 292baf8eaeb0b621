"""Streams one completion and notes when every token arrived.

Locust's bundled OpenAI user reads the whole body before it looks, and its FastHttp `iter_lines`
waits for full buffers, so both stamp tokens too late; this reads line by line from the socket.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from geventhttpclient import HTTPClient

from gradmap.runtimes.openai_api import authorization
from loadtest.driver.stream import Stream, StreamError, error_in, server_sent_events, shortened
from loadtest.metrics import E2EL, OF_REQUESTS, measure
from loadtest.records import Cell, RequestRecord
from loadtest.urls import base_url, completions_path
from loadtest.workload import CompletionRequest

CONNECT_TIMEOUT_S = 10.0
DONE = "[DONE]"
# Of an error's body, so much is read.
KEPT_BYTES = 1 << 14


@dataclass(frozen=True)
class Client:
    """Connections to a server, the path of its completions, and one of its models."""

    http: HTTPClient
    path: str
    model: str


def connect(url: str, model: str, connections: int, timeout_s: float) -> Client:
    """connections: kept, at most so many. timeout_s: longest silence of the server."""
    url = base_url(url)
    http = HTTPClient.from_url(
        url,
        concurrency=connections,
        connection_timeout=CONNECT_TIMEOUT_S,
        network_timeout=timeout_s,
    )
    return Client(http, completions_path(url), model)


def stream_completion(
    client: Client, request: CompletionRequest, cell: Cell, scheduled_s: float | None
) -> RequestRecord:
    """Whatever goes wrong is in the record."""
    stream = Stream()
    body = _request_body(client.model, request)
    headers = {"Content-Type": "application/json", **authorization()}
    sent_s = time.monotonic()
    try:
        response = client.http.request("POST", client.path, body=body, headers=headers)
        error = _follow(response, stream)
    except StreamError as bad:
        error = str(bad)
    # whatever else broke, it is a failed request and not the end of the test
    except Exception as failure:
        error = shortened(f"{type(failure).__name__}: {failure}")
    ended_s = time.monotonic()
    arrivals, error = _settle(stream, error, request)
    return RequestRecord(
        arm=cell.arm,
        pair=cell.pair,
        load=cell.load,
        request=request.id,
        prompt_tokens=len(request.prompt),
        requested_tokens=request.output_tokens,
        scheduled_s=scheduled_s,
        sent_s=sent_s,
        ended_s=ended_s,
        chunk_times_s=tuple(arrived_s for arrived_s, _ in arrivals),
        chunk_tokens=tuple(tokens for _, tokens in arrivals),
        completion_tokens=arrivals[-1][1] if arrivals else 0,
        error=error,
    )


def _request_body(model: str, request: CompletionRequest) -> bytes:
    body: dict[str, Any] = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if request.cache_salt is not None:
        body["cache_salt"] = request.cache_salt
    return json.dumps(body).encode()


def _follow(response: Any, stream: Stream) -> str | None:
    """Notes every event when it arrives, to the end. Returns what the server says went wrong.
    Raises StreamError."""
    if response.status_code != 200:
        said = _said(response.read(KEPT_BYTES))
        return f"HTTP {response.status_code}" + (f": {said}" if said else "")
    lines = _Lines(response)
    none_came = True
    for data in server_sent_events(lines.read):
        now_s = time.monotonic()
        none_came = False
        if data.strip() not in ("", DONE):
            stream.note(_parse(data), now_s)
    return f"no stream of events came, but: {_said(lines.start)}" if none_came else None


class _Lines:
    """The lines of a body as they arrive; also the last one, which may lack its end. start: the
    body's beginning."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self.start = b""

    def read(self) -> bytes:
        line: bytes = self._response.readline(b"\n") or self._response.read()
        if len(self.start) < KEPT_BYTES:
            self.start += line[:KEPT_BYTES]
        return line


def _parse(data: str) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        raise StreamError(f"the server sent {shortened(data)} as an event") from None


def _said(body: bytes) -> str:
    """The message of an error's body, or its beginning."""
    text = body.decode(errors="replace")
    try:
        return error_in(json.loads(text)) or shortened(text)
    except ValueError:
        return shortened(text)


def _settle(
    stream: Stream, error: str | None, request: CompletionRequest
) -> tuple[list[tuple[float, int]], str | None]:
    """When how many tokens had come, and what went wrong, first of all what was noticed before."""
    try:
        arrivals = stream.arrivals()
    except StreamError as bad:
        return [], error or str(bad)
    tokens = arrivals[-1][1] if arrivals else 0
    if error is None and tokens != request.output_tokens:
        error = f"{tokens} tokens came, {request.output_tokens} were asked for"
    return arrivals, error


def report_to_locust(environment: Any, record: RequestRecord) -> None:
    """Shows TTFT, TPOT and E2EL as named entries on Locust's own pages, in milliseconds."""
    fire = environment.events.request.fire
    common = {
        "request_type": "completion",
        "response_length": record.completion_tokens,
        "context": {},
    }
    if record.error is not None:
        error = RuntimeError(record.error)
        fire(name=E2EL.label, response_time=None, exception=error, **common)
        return
    for metric in OF_REQUESTS:
        for value_s in metric.values([measure(record)]):
            fire(name=metric.label, response_time=1000 * value_s, exception=None, **common)
