"""One load: Locust sends it in processes of its own, and what they saw is read back."""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from gradmap.common.children import kill_group
from gradmap.common.errors import UserError
from gradmap.common.failures import require_not_killed
from gradmap.common.parent_death import bound_to_us
from gradmap.common.reading import read_json
from loadtest.board import Board
from loadtest.counters import read_counter, tokens_since
from loadtest.endpoints import Endpoint
from loadtest.loads import Load, OpenLoop
from loadtest.metrics import count_tokens
from loadtest.prompts import Prompts
from loadtest.records import BlockRecord, Cell, Measurements, RequestRecord
from loadtest.resources import sampled
from loadtest.settings import Block, LoadTestSettings
from loadtest.workload import CompletionRequest, draw_requests, save_requests
from serving.ports import free_port

# In a folder of its own: Locust puts the folder of its file first on sys.path.
LOCUSTFILE = Path(__file__).parent / "driver" / "session_users.py"
# Numbers of what is no pair: below zero, so that records of pairs can be told apart.
WARM_UP_PAIR, SEARCH_PAIR = -1, -2
# Of the directory that a load's processes write into.
LOAD_PREFIX = ".load-"
# No load may run longer than this after its last request was due, whatever the server does.
BLOCK_TIMEOUT_S = 900
POLL_S = 0.5
# Its exit code where a record cannot be written (EX_IOERR).
CANNOT_WRITE = 74
# For Locust's processes to find each other.
WORKERS_WAIT_S = 60


@dataclass(frozen=True)
class Bench:
    """What is the same for all loads of a session. out: directory for logs."""

    settings: LoadTestSettings
    prompts: Prompts
    board: Board
    out: Path


@dataclass
class RecordFiles:
    """Records that Locust's processes are writing into a directory, each into a file of its own."""

    directory: Path
    _seen: dict[Path, int] = field(default_factory=dict)

    def read_new(self) -> list[RequestRecord]:
        """Whole lines that were written since the last call."""
        records = []
        for path in sorted(self.directory.iterdir()):
            with path.open("rb") as file:
                file.seek(self._seen.get(path, 0))
                written = file.read()
            whole = written[: written.rfind(b"\n") + 1]
            self._seen[path] = self._seen.get(path, 0) + len(whole)
            records += [RequestRecord.model_validate_json(line) for line in whole.splitlines()]
        return records


@dataclass(frozen=True)
class LoadFiles:
    """What Locust's processes get of a load, and where they write what they saw: below a directory
    of the load's own."""

    directory: Path

    @property
    def requests(self) -> Path:
        return self.directory / "requests"

    @property
    def records(self) -> Path:
        return self.directory / "records"

    @property
    def usage(self) -> Path:
        return self.directory / "usage"

    def prepare(self, requests: list[CompletionRequest]) -> None:
        save_requests(self.requests, requests)
        self.records.mkdir()
        self.usage.mkdir()

    def shares_busy(self) -> list[float]:
        """Which share of the time a process was busy, for each that came to its end."""
        return [read_json(path)["client_cpu"] for path in self.usage.iterdir()]


def run_load(endpoint: Endpoint, bench: Bench, block: Block, load: Load) -> Measurements:
    """Lets Locust send one load; prompts and arrivals depend on pair and load, not on the arm.

    A server that stays, as one given by its URL does, may have seen these prompts: in another arm
    that is the same model, or in an earlier test. So that it does not answer from its prefix cache,
    each load has a salt of its own.
    """
    settings, cell = bench.settings, Cell(block.arm, block.pair, load.name)
    count, name = settings.requests_at(load), f"{block.pair}-{load.name}"
    salt = secrets.token_hex(8)
    requests = draw_requests(bench.prompts, name, count, load, settings.workload.seed, salt)
    records: list[RequestRecord] = []
    with (
        bench.board.load(block.arm, _describe_stay(block), load, count) as progress,
        TemporaryDirectory(dir=bench.out.resolve(), prefix=LOAD_PREFIX) as directory,
    ):
        files = LoadFiles(Path(directory))
        files.prepare(requests)
        arriving = RecordFiles(files.records)

        def look() -> None:
            records.extend(arriving.read_new())
            progress.update(records)

        counted_before = read_counter(endpoint)
        limit_s = BLOCK_TIMEOUT_S + math.ceil(requests[-1].due_s or 0)
        processes = settings.processes_at(load)
        command = _locust_command(endpoint, cell, load, processes, files, limit_s)
        with sampled(cell) as resources:
            _run_locust(command, look, Path(directory), bench.out)
        look()  # what it wrote between the last look and its end
        busy = files.shares_busy()
    if len(busy) != processes:
        raise _could_not_write(bench.out)
    records.sort(key=lambda record: record.sent_s)
    seen = count_tokens(records)
    server_tokens = None if counted_before is None else tokens_since(endpoint, counted_before, seen)
    described = BlockRecord(
        arm=cell.arm,
        pair=cell.pair,
        load=cell.load,
        client_cpu=max(busy),
        server_tokens=server_tokens,
    )
    return Measurements(tuple(records), (described,), tuple(resources))


def _describe_stay(block: Block) -> str:
    names = {WARM_UP_PAIR: "warm-up", SEARCH_PAIR: "search"}
    return names.get(block.pair, f"pair {block.pair + 1}")


def _locust_command(
    endpoint: Endpoint, cell: Cell, load: Load, processes: int, files: LoadFiles, limit_s: int
) -> list[str]:
    is_open = isinstance(load, OpenLoop)
    users = processes if is_open else int(load.level)
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += ["--only-summary", "--users", str(users), "--spawn-rate", str(users)]
    command += ["--host", endpoint.url, f"--model={endpoint.model}"]
    command += ["--requests", str(files.requests), "--records", str(files.records)]
    command += ["--usage", str(files.usage)]
    command += ["--arm", cell.arm, "--pair", str(cell.pair), "--load", cell.load]
    # failed requests are in the records; Locust itself must not fail for them
    command += ["--run-time", f"{limit_s}s", "--exit-code-on-error", "0"]
    command += _worker_flags(processes) if processes > 1 else []
    return [*command, "OpenLoopUser" if is_open else "ClosedLoopUser"]


def _worker_flags(processes: int) -> list[str]:
    """Locust's own workers, with a master that only this machine can reach."""
    port = str(free_port())
    flags = ["--processes", str(processes), "--expect-workers-max-wait", str(WORKERS_WAIT_S)]
    flags += ["--master-bind-host", "127.0.0.1", "--master-bind-port", port]
    return [*flags, "--master-port", port]


def _locust_environment(home: Path) -> dict[str, str]:
    """Without what Locust reads besides its arguments: its variables, and `.locust.conf` in the
    home directory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    return kept | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}


def _run_locust(command: list[str], look: Callable[[], None], home: Path, out: Path) -> None:
    """home: an empty place, for Locust also reads `locust.conf` and `pyproject.toml` of the current
    directory."""
    log = out / "locust.log"
    with log.open("ab") as log_file:
        process = subprocess.Popen(
            bound_to_us(command),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            cwd=home,
            env=_locust_environment(home),
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                look()
        finally:
            kill_group(process.pid)  # the workers too
            process.wait()
    if process.returncode == CANNOT_WRITE:
        raise _could_not_write(out)
    require_not_killed(process.returncode, "Locust")
    if process.returncode != 0:
        raise UserError(f"Locust ended with code {process.returncode}; its log is {log}.")


def _could_not_write(out: Path) -> UserError:
    return UserError(
        f"The load generator could not write below {out} (its log there is locust.log); is the "
        "disk full, or the size of files limited?"
    )
