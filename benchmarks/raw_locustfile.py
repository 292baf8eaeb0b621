"""Locust's own HTTP users on a streaming endpoint: what one would write without our driver.

Loaded beside loadtest/driver/locustfile.py, whose options these users share. Times are taken where
Locust hands out a line of the stream. The CPU time of the whole test goes to the file that
--cpu-time names, whichever user sends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from locust import FastHttpUser, HttpUser, constant, events

from gradmap.common.files import write_json

PATH = "/v1/completions"
started_cpu_s = 0.0


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument("--cpu-time", required=True, help="JSON file")


@events.test_start.add_listener
def note_start(environment: Any, **_: Any) -> None:
    global started_cpu_s
    started_cpu_s = time.process_time()


@events.test_stop.add_listener
def note_cpu_time(environment: Any, **_: Any) -> None:
    write_json(
        Path(environment.parsed_options.cpu_time), {"cpu_s": time.process_time() - started_cpu_s}
    )


def complete(user: Any) -> None:
    note_times(user.environment, user.lines())


class Requests(HttpUser):
    tasks: ClassVar[list[Any]] = [complete]
    wait_time = constant(0)

    def lines(self) -> Iterable[bytes]:
        body = body_of(self.environment.parsed_options)
        yield from self.client.post(PATH, json=body, stream=True).iter_lines()


class FastHttp(FastHttpUser):
    tasks: ClassVar[list[Any]] = [complete]
    wait_time = constant(0)

    def lines(self) -> Iterable[str]:
        yield from self.client.iter_lines(
            PATH, "POST", json=body_of(self.environment.parsed_options)
        )


def body_of(options: Any) -> dict[str, Any]:
    prompt = list(range(options.prompt_tokens))
    return {"model": "fake", "prompt": prompt, "max_tokens": options.output_tokens, "stream": True}


def note_times(environment: Any, lines: Iterable[str | bytes]) -> None:
    """Notes TTFT, TPOT and E2EL of one stream, as entries of Locust's statistics. Asking for the
    first line sends it."""
    sent_s = time.monotonic()
    arrivals_s, tokens = [], 0
    for line in lines:
        text = line if isinstance(line, str) else line.decode()
        if text.startswith("data: {"):
            tokens = json.loads(text[6:])["usage"]["completion_tokens"]
            arrivals_s.append(time.monotonic())
    ttft_s, tpot_s = arrivals_s[0] - sent_s, (arrivals_s[-1] - arrivals_s[0]) / (tokens - 1)
    for name, seconds in (("TTFT", ttft_s), ("TPOT", tpot_s), ("E2EL", time.monotonic() - sent_s)):
        environment.events.request.fire(
            request_type="raw",
            name=name,
            response_time=1000 * seconds,
            response_length=tokens,
            exception=None,
        )
