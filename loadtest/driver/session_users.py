"""The Locust users of `gradmap loadtest`: they send the requests of a file and write a record of
each.

ClosedLoopUser sends the next request as soon as its last one has ended, until none is left.
OpenLoopUser, of which there is one in every process, sends every request when it is due, however
many are under way: Locust's own wait times begin when a request ends, so that a slow server would
be asked less often.

With --processes, Locust's workers share the requests like cards, and each writes files of its own.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any

import gevent
from gevent.pool import Group
from locust import User, constant, events, task
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

from gradmap.common.files import write_json
from gradmap.common.parent_death import end_with_parent
from loadtest.driver.completions import connect, report_to_locust, stream_completion
from loadtest.records import Cell, RequestRecord, to_json_line
from loadtest.workload import CompletionRequest, load_requests

MAX_CONNECTIONS = 4096
FINISHED, FAILED = "finished", "failed"


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    parser.add_argument(
        "--requests", required=True, help="JSON file of requests (loadtest.workload)"
    )
    parser.add_argument(
        "--records", required=True, help="directory for JSON lines files, one line per request"
    )
    parser.add_argument(
        "--usage", required=True, help="directory for JSON files: the CPU time of each process"
    )
    parser.add_argument(
        "--model", dest="served_model", required=True, help="name of the served model"
    )
    parser.add_argument("--arm", required=True, help="label of the records")
    parser.add_argument(
        "--pair", type=int, required=True, help="index of the block, for the records"
    )
    parser.add_argument("--load", required=True, help="name of the load, for the records")
    parser.add_argument(
        "--request-timeout-s", type=float, default=300.0, help="longest silence of the server"
    )


@events.init_command_line_parser.add_listener
def end_with_the_master(**_: Any) -> None:
    """Ties workers to their master from their first moment on: one looks for its master for
    minutes. It is forked after its options were read."""
    os.register_at_fork(after_in_child=partial(end_with_parent, os.getpid()))


class Work:
    """The requests still to send, and the file that records go to. Shared by all users of the
    process."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.options = environment.parsed_options
        self.cell = Cell(self.options.arm, self.options.pair, self.options.load)
        worker = (
            environment.runner.worker_index if isinstance(environment.runner, WorkerRunner) else 0
        )
        self.waiting = deque(
            load_requests(Path(self.options.requests))[worker :: self.options.processes or 1]
        )
        self.unfinished = len(self.waiting)
        self.name = f"{worker}.json"
        self.file: IO[str] = Path(self.options.records, self.name).open("w", encoding="utf-8")  # noqa: SIM115 - closed by close
        self.started_s, self.started_cpu_s = time.monotonic(), time.process_time()

    def finish(self, record: RequestRecord) -> None:
        self.file.write(to_json_line(record))
        self.file.flush()
        report_to_locust(self.environment, record)
        self.unfinished -= 1
        if self.unfinished == 0:
            self.end()

    def end(self) -> None:
        """Ends the test, of several processes when the last one says so."""
        runner = self.environment.runner
        if isinstance(runner, WorkerRunner):
            runner.send_message(FINISHED)
        else:
            gevent.spawn(runner.quit)  # from outside: quitting waits for all users, so for this one

    def close(self) -> None:
        self.file.close()
        busy_s = time.process_time() - self.started_cpu_s
        length_s = time.monotonic() - self.started_s
        write_json(Path(self.options.usage, self.name), {"client_cpu": busy_s / length_s})


@contextmanager
def ending_at_failures(environment: Any) -> Iterator[None]:
    """Ends the test at once where something breaks: without a record, it would wait for one until
    its time is over."""
    try:
        yield
    except Exception as error:
        end_as_failed(environment, os.EX_IOERR if isinstance(error, OSError) else os.EX_SOFTWARE)
        raise  # for Locust's log


def end_as_failed(environment: Any, exit_code: int) -> None:
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.send_message(FAILED, exit_code)
        return
    environment.process_exit_code = exit_code
    gevent.spawn(environment.runner.quit)


@events.init.add_listener
def end_with_the_last_worker(environment: Any, **_: Any) -> None:
    runner, finished = environment.runner, count(1)
    if isinstance(runner, MasterRunner):

        def note(**_: Any) -> None:
            if next(finished) == environment.parsed_options.processes:
                gevent.spawn(runner.quit)

        def note_failure(msg: Any, **_: Any) -> None:
            end_as_failed(environment, msg.data)

        runner.register_message(FINISHED, note)
        runner.register_message(FAILED, note_failure)


@events.test_start.add_listener
def open_work(environment: Any, **_: Any) -> None:
    if not isinstance(environment.runner, MasterRunner):
        with ending_at_failures(environment):
            environment.work = Work(environment)


@events.test_stop.add_listener
def close_work(environment: Any, **_: Any) -> None:
    if not isinstance(environment.runner, MasterRunner):
        try:
            environment.work.close()
        except OSError:
            environment.process_exit_code = os.EX_IOERR
            raise  # for Locust's log


class FileUser(User):
    """Completes requests over `connections` connections, which are kept."""

    abstract = True
    wait_time = constant(0)
    connections = 1

    def on_start(self) -> None:
        self.work: Work = self.environment.work
        options = self.work.options
        self.client = connect(
            self.host, options.served_model, self.connections, options.request_timeout_s
        )

    def on_stop(self) -> None:
        self.client.http.close()

    def complete(self, request: CompletionRequest, scheduled_s: float | None) -> None:
        with ending_at_failures(self.environment):
            self.work.finish(stream_completion(self.client, request, self.work.cell, scheduled_s))


class ClosedLoopUser(FileUser):
    """Has at most one request under way."""

    @task
    def complete_next(self) -> None:
        if not self.work.waiting:
            raise StopUser
        self.complete(self.work.waiting.popleft(), None)


class OpenLoopUser(FileUser):
    """Spawns every request when it is due."""

    connections = MAX_CONNECTIONS

    @task
    def dispatch(self) -> None:
        started_s = time.monotonic()
        requests = Group()
        while self.work.waiting:
            request = self.work.waiting.popleft()
            assert request.due_s is not None
            scheduled_s = started_s + request.due_s
            gevent.sleep(max(0.0, scheduled_s - time.monotonic()))
            requests.spawn(self.complete, request, scheduled_s)
        requests.join()
        raise StopUser
