"""Streams one completion and notes when every token arrived.

Locust's bundled OpenAI user reads the whole body before it looks, and its FastHttp `iter_lines` waits for full
buffers, so both stamp tokens too late; this reads line by line from the socket.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from geventhttpclient import HTTPClient

from gradmap.openai_api import authorization
from loadtest.metrics import RequestMetrics, measure
from loadtest.records import RequestRecord
from loadtest.workload import Request

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Labels:
    """What a record says of where it belongs."""

    arm: str
    pair: int
    load: str


def connect(url: str, connections: int, timeout_s: float) -> HTTPClient:
    """connections: kept, at most so many. timeout_s: longest silence of the server."""
    return HTTPClient.from_url(
        url, concurrency=connections, connection_timeout=CONNECT_TIMEOUT_S, network_timeout=timeout_s
    )


def stream_completion(
    http: HTTPClient, model: str, request: Request, labels: Labels, scheduled_s: float | None
) -> RequestRecord:
    """Whatever goes wrong is in the record."""
    arrivals: list[tuple[float, int]] = []
    body = _request_body(model, request)
    headers = {"Content-Type": "application/json", **authorization()}
    sent_s = time.monotonic()
    try:
        response = http.request("POST", "/v1/completions", body=body, headers=headers)
        for event in _server_sent_events(response):
            _note_arrival(arrivals, event)
        error = _what_went_wrong(response.status_code, arrivals, request)
    except Exception as failure:  # whatever broke, it is a failed request and not the end of the test
        error = f"{type(failure).__name__}: {failure}"
    return RequestRecord(
        arm=labels.arm,
        pair=labels.pair,
        load=labels.load,
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


def _request_body(model: str, request: Request) -> bytes:
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


def report_to_locust(environment: Any, record: RequestRecord) -> None:
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
