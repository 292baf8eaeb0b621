"""One load: Locust sends it in processes of its own, and what they saw is read back."""

from __future__ import annotations

import math
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
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
from loadtest.loads import Load
from loadtest.prompts import Prompts
from loadtest.records import BlockRecord, Measurements, RequestRecord
from loadtest.resources import sampled
from loadtest.settings import Block, LoadTestSettings
from loadtest.workload import draw_requests, save_requests
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


def run_load(endpoint: Endpoint, bench: Bench, block: Block, load: Load) -> Measurements:
    """Lets Locust send one load; prompts and arrivals depend on pair and load, not on the arm.

    A server that stays, as one given by its URL does, may have seen these prompts: in another arm
    that is the same model, or in an earlier test. So that it does not answer from its prefix cache,
    each load has a salt of its own.
    """
    settings = bench.settings
    count, name = settings.requests_at(load), f"{block.pair}-{load.name}"
    salt = secrets.token_hex(8)
    requests = draw_requests(bench.prompts, name, count, load, settings.workload.seed, salt)
    stay = {WARM_UP_PAIR: "warm-up", SEARCH_PAIR: "search"}.get(
        block.pair, f"pair {block.pair + 1}"
    )
    showing = bench.board.load(block.arm, stay, load, count)
    records: list[RequestRecord] = []
    with (
        showing as shown,
        TemporaryDirectory(dir=bench.out.resolve(), prefix=LOAD_PREFIX) as directory,
    ):
        files = {kind: Path(directory, kind) for kind in ("requests", "records", "usage")}
        save_requests(files["requests"], requests)
        files["records"].mkdir()
        files["usage"].mkdir()
        arriving = RecordFiles(files["records"])

        def look() -> None:
            records.extend(arriving.read_new())
            shown.update(records)

        counted_before = read_counter(endpoint)
        limit_s = BLOCK_TIMEOUT_S + math.ceil(requests[-1].due_s or 0)
        command = _locust_command(
            endpoint, block, load, settings.processes_at(load), files, limit_s
        )
        with sampled(block.arm, block.pair, load.name) as resources:
            _run_locust(command, look, Path(directory), bench.out)
        look()  # what it wrote between the last look and its end
        busy = [read_json(path)["client_cpu"] for path in files["usage"].iterdir()]
    if len(busy) != settings.processes_at(load):
        raise _could_not_write(bench.out)
    records.sort(key=lambda record: record.sent_s)
    seen = sum(record.completion_tokens for record in records)
    server_tokens = None if counted_before is None else tokens_since(endpoint, counted_before, seen)
    place = {"arm": block.arm, "pair": block.pair, "load": load.name}
    described = BlockRecord(**place, client_cpu=max(busy), server_tokens=server_tokens)
    return Measurements(tuple(records), (described,), tuple(resources))


def _locust_command(
    endpoint: Endpoint,
    block: Block,
    load: Load,
    processes: int,
    files: Mapping[str, Path],
    limit_s: int,
) -> list[str]:
    users = processes if load.is_open else int(load.level)
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"),
        *("--users", str(users), "--spawn-rate", str(users), "--host", endpoint.url),
        *(argument for kind, path in files.items() for argument in (f"--{kind}", str(path))),
        *(
            f"--model={endpoint.model}",
            "--arm",
            block.arm,
            "--pair",
            str(block.pair),
            "--load",
            load.name,
        ),
        # failed requests are in the records; Locust itself must not fail for them
        *("--run-time", f"{limit_s}s", "--exit-code-on-error", "0"),
        *(_worker_flags(processes) if processes > 1 else ()),
        "OpenLoopUser" if load.is_open else "ClosedLoopUser",
    ]


def _worker_flags(processes: int) -> tuple[str, ...]:
    """Locust's own workers, with a master that only this machine can reach."""
    port = str(free_port())
    here = ("--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port)
    return ("--processes", str(processes), "--expect-workers-max-wait", str(WORKERS_WAIT_S), *here)


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
