"""One load: Locust sends it in processes of its own, and what they saw is read back."""

from __future__ import annotations

import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from gradmap.errors import UserError
from gradmap.openai_api import authorization
from gradmap.reading import read_json
from loadtest.board import Board
from loadtest.loads import Load
from loadtest.prompts import Prompts
from loadtest.records import BlockRecord, Measurements, RequestRecord
from loadtest.resources import sampled
from loadtest.settings import Block, LoadTestSettings
from loadtest.workload import draw_requests, save_requests
from serving.server import free_port, kill_group

# In a folder of its own: Locust puts the folder of its file first on sys.path.
LOCUSTFILE = Path(__file__).parent / "driver" / "session_users.py"
# Numbers of what is no pair: below zero, so that records of pairs can be told apart.
WARM_UP_PAIR, SEARCH_PAIR = -1, -2
# No block may run longer than this, whatever the server does.
BLOCK_TIMEOUT_S = 900
POLL_S = 0.5
# vLLM counts a token a moment after it has sent it.
COUNTER_WAIT_S = 3.0


@dataclass(frozen=True)
class Endpoint:
    url: str
    model: str


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

    A server that stays, as one given by its URL does, may have seen these prompts: in another arm that is the same
    model, or in an earlier test. So that it does not answer from its prefix cache, each load has a salt of its own.
    """
    settings = bench.settings
    count, name = settings.requests_at(load), f"{block.pair}-{load.name}"
    salt = secrets.token_hex(8)
    requests = draw_requests(bench.prompts, name, count, load, settings.workload.seed, salt)
    stay = {WARM_UP_PAIR: "warm-up", SEARCH_PAIR: "search"}.get(block.pair, f"pair {block.pair + 1}")
    showing = bench.board.load(block.arm, stay, load, count)
    records: list[RequestRecord] = []
    with showing as shown, TemporaryDirectory(dir=bench.out, prefix=".load-") as directory:
        files = {kind: Path(directory, kind) for kind in ("requests", "records", "usage")}
        save_requests(files["requests"], requests)
        files["records"].mkdir()
        files["usage"].mkdir()
        arriving = RecordFiles(files["records"])

        def look() -> None:
            records.extend(arriving.read_new())
            shown.update(records)

        tokens_before = generated_tokens(endpoint.url)
        with sampled(block.arm, block.pair, load.name) as resources:
            _run_locust(_locust_command(endpoint, block, load, settings.processes_at(load), files), look, bench.out)
        look()  # what it wrote between the last look and its end
        busy = [read_json(path)["client_cpu"] for path in files["usage"].iterdir()]
    records.sort(key=lambda record: record.sent_s)
    seen = sum(record.completion_tokens for record in records)
    server_tokens = None if tokens_before is None else _tokens_since(endpoint.url, tokens_before, seen)
    place = {"arm": block.arm, "pair": block.pair, "load": load.name}
    described = BlockRecord(**place, client_cpu=max(busy), server_tokens=server_tokens)
    return Measurements(tuple(records), (described,), tuple(resources))


def generated_tokens(url: str) -> int | None:
    """vLLM's count of generated tokens since it started; None if the server does not tell."""
    with suppress(httpx.HTTPError):
        text = httpx.get(f"{url}/metrics", headers=authorization(), timeout=10.0).text
        counts = re.findall(r"^vllm:generation_tokens_total(?:{[^}]*})? (\S+)$", text, flags=re.MULTILINE)
        return int(sum(map(float, counts))) if counts else None
    return None


def _tokens_since(url: str, before: int, expected: int) -> int | None:
    """By how much the count has risen; waits a little for it to reach what is expected."""
    deadline = time.monotonic() + COUNTER_WAIT_S
    while (now := generated_tokens(url)) is not None:
        if now - before >= expected or time.monotonic() > deadline:
            return now - before
        time.sleep(0.1)
    return None


def _locust_command(
    endpoint: Endpoint, block: Block, load: Load, processes: int, files: Mapping[str, Path]
) -> list[str]:
    users = processes if load.is_open else int(load.level)
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"),
        *("--users", str(users), "--spawn-rate", str(users), "--host", endpoint.url),
        *(argument for kind, path in files.items() for argument in (f"--{kind}", str(path))),
        *("--model", endpoint.model, "--arm", block.arm, "--pair", str(block.pair), "--load", load.name),
        # failed requests are in the records; Locust itself must not fail for them
        *("--run-time", f"{BLOCK_TIMEOUT_S}s", "--exit-code-on-error", "0"),
        *(_worker_flags(processes) if processes > 1 else ()),
        "OpenLoopUser" if load.is_open else "ClosedLoopUser",
    ]


def _worker_flags(processes: int) -> tuple[str, ...]:
    """Locust's own workers, with a master that only this machine can reach."""
    port = str(free_port())
    here = ("--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port)
    return ("--processes", str(processes), *here)


def _run_locust(command: list[str], look: Callable[[], None], out: Path) -> None:
    log = out / "locust.log"
    with log.open("ab") as log_file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, start_new_session=True
        )
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                look()
        finally:
            kill_group(process.pid)  # the workers too
            process.wait()
    if process.returncode != 0:
        raise UserError(f"Locust ended with code {process.returncode}; its log is {log}.")
