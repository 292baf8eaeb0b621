"""A Locust file for any OpenAI-compatible endpoint, with TTFT, TPOT and E2EL as entries of their
own.

    locust -f loadtest/driver/locustfile.py --host http://127.0.0.1:8000 --users 8

Every user completes random prompts, one after the other. All of Locust works with it: its web page
(leave out --headless), --processes, --master and --worker.
"""

from __future__ import annotations

import logging
import secrets
from itertools import count
from typing import Any

import gevent
import httpx
from locust import User, constant, events, task

from gradmap.runtimes.openai_api import choose_model, open_client, served_models
from loadtest.driver.completions import connect, report_to_locust, stream_completion
from loadtest.loads import ClosedLoop
from loadtest.prompts import RandomPrompts, Workload
from loadtest.records import Cell
from loadtest.urls import base_url
from loadtest.workload import draw_requests

CELL = Cell("endpoint", 0, "locust")
ONE = ClosedLoop(1)


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "--model",
        dest="served_model",
        default="",
        help="name of the served model, where there are several",
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, help="random token ids per prompt"
    )
    parser.add_argument(
        "--output-tokens", type=int, default=64, help="tokens to generate per request"
    )
    parser.add_argument("--vocabulary", type=int, default=1000, help="token ids are below this")
    parser.add_argument(
        "--request-timeout-s", type=float, default=300.0, help="longest silence of the server"
    )


class CompletionUser(User):
    """Has one request under way."""

    wait_time = constant(0)
    model = ""
    # what an earlier test sent is not answered from the server's prefix cache
    cache_salt = secrets.token_hex(8)
    _numbers = count()

    def on_start(self) -> None:
        options = self.environment.parsed_options
        self.client = connect(self.host, self.model, 1, options.request_timeout_s)
        # prompts of no two users, of no two workers, are the same
        worker = getattr(self.environment.runner, "worker_index", 0)
        workload = Workload(options.prompt_tokens, options.output_tokens, seed=worker)
        self.prompts = RandomPrompts(workload, options.vocabulary)

    def on_stop(self) -> None:
        self.client.http.close()

    @task
    def complete(self) -> None:
        (request,) = draw_requests(
            self.prompts, str(next(self._numbers)), 1, ONE, 0, self.cache_salt
        )
        record = stream_completion(self.client, request, CELL, None)
        report_to_locust(self.environment, record)


@events.test_start.add_listener
def ask_for_the_model(environment: Any, **_: Any) -> None:
    """Once in a process, and not for every user: an HTTPS client takes longer to make than a
    request to send."""
    try:
        with open_client(base_url(environment.host), 30.0) as client:
            names = served_models(client)
        CompletionUser.model = choose_model(names, environment.parsed_options.served_model or None)
    except (httpx.HTTPError, ValueError) as error:
        logging.error(f"{environment.host}: {error}; --model says which one is meant.")
        environment.process_exit_code = 1
        gevent.spawn(environment.runner.quit)  # from outside: quitting ends what calls this
