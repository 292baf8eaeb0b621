"""vLLM's own count of the tokens it generated, read before and after a load."""

from __future__ import annotations

import math
import re
import time
from contextlib import suppress
from dataclasses import dataclass

import httpx

from gradmap.runtimes.openai_api import open_client
from loadtest.endpoints import Endpoint

TOKENS = re.compile(r"^vllm:generation_tokens_total(?:\{(.*)\})?\s+(\S+)", flags=re.MULTILINE)
STARTED = re.compile(r"^process_start_time_seconds(?:\{.*\})?\s+(\S+)", flags=re.MULTILINE)
# What takes longer to tell is not waited for: nothing but a check depends on it.
METRICS_TIMEOUT_S = 5.0
# vLLM counts a token a moment after it has sent it.
COUNTER_WAIT_S = 3.0
POLL_S = 0.1


@dataclass(frozen=True)
class Counter:
    """tokens: since the server started. started: when its processes did, as they write it."""

    tokens: int
    started: frozenset[str]


def read_counter(endpoint: Endpoint) -> Counter | None:
    """None if the server does not tell, or not in time, or tells what is no count."""
    text = _metrics(endpoint.url)
    rows = TOKENS.findall(text)
    # where several models are counted
    own = [row for row in rows if f'model_name="{endpoint.model}"' in row[0]]
    try:
        tokens = sum(float(count) for _, count in own or rows)
    except ValueError:
        return None
    if not rows or not math.isfinite(tokens) or tokens < 0:
        return None
    return Counter(int(tokens), frozenset(STARTED.findall(text)))


def tokens_since(endpoint: Endpoint, before: Counter, expected: int) -> int | None:
    """By how much the count has risen; waits a little for it to be what is expected.

    None if the server does not tell, or if several do: behind a balancer, each replica counts what
    it made itself. Then the count falls from one look to the next, or processes answer that started
    at other times.
    """
    deadline_s, latest = time.monotonic() + COUNTER_WAIT_S, before
    while True:
        now = read_counter(endpoint)
        if now is None or now.started != before.started or now.tokens < latest.tokens:
            return None
        risen, latest = now.tokens - before.tokens, now
        if risen == expected or time.monotonic() > deadline_s:
            return risen
        time.sleep(POLL_S)


def _metrics(url: str) -> str:
    """The text of /metrics; nothing if it is not had in time, however slowly it trickles."""
    deadline_s, parts = time.monotonic() + METRICS_TIMEOUT_S, []
    client = open_client(url, METRICS_TIMEOUT_S)
    with suppress(httpx.HTTPError), client, client.stream("GET", "/metrics") as response:
        for part in response.iter_bytes():
            parts.append(part)
            if time.monotonic() > deadline_s:
                return ""
        if response.status_code == httpx.codes.OK:
            return b"".join(parts).decode(errors="replace")
    return ""
