"""One load: Locust sends it in a process of its own, and what it saw is read back."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from gradmap.console import progress
from gradmap.errors import UserError
from gradmap.files import read_json
from gradmap.openai_api import authorization
from loadtest.loads import Load
from loadtest.prompts import Prompts
from loadtest.records import BlockRecord, RequestRecord, read_records
from loadtest.settings import Block, LoadTestSettings
from loadtest.workload import draw_requests, save_requests

# In a folder of its own: Locust puts the folder of its file first on sys.path.
LOCUSTFILE = Path(__file__).parent / "driver" / "session_users.py"
# Numbers of what is no pair: below zero, so that records of pairs can be told apart.
WARM_UP_PAIR, SEARCH_PAIR = -1, -2
# No block may run longer than this, whatever the server does.
BLOCK_TIMEOUT_S = 900
# vLLM counts a token a moment after it has sent it.
COUNTER_WAIT_S = 3.0


@dataclass(frozen=True)
class Endpoint:
    url: str
    model: str


def run_load(
    endpoint: Endpoint, settings: LoadTestSettings, prompts: Prompts, block: Block, load: Load, out: Path
) -> tuple[list[RequestRecord], BlockRecord]:
    """Lets Locust send one load; prompts and arrivals depend on pair and load, not on the arm."""
    count = settings.requests_at(load)
    requests = draw_requests(prompts, f"{block.pair}-{load.name}", count, load, settings.workload.seed)
    stay = {WARM_UP_PAIR: "warm-up", SEARCH_PAIR: "search"}.get(block.pair, f"pair {block.pair + 1}")
    with TemporaryDirectory(dir=out, prefix=".load-") as directory:
        files = {kind: Path(directory, f"{kind}.json") for kind in ("requests", "records", "usage")}
        save_requests(files["requests"], requests)
        files["records"].write_text("")
        tokens_before = generated_tokens(endpoint.url)
        with progress(f"{block.arm}: {stay}, {load.label} (requests)", count) as advance:
            command = _locust_command(endpoint, block, load, files)
            _run_locust(command, files["records"], advance, out / "locust.log")
        records, usage = read_records(files["records"]), read_json(files["usage"])
    seen = sum(record.completion_tokens for record in records)
    server_tokens = None if tokens_before is None else _tokens_since(endpoint.url, tokens_before, seen)
    measured = {"client_cpu": usage["client_cpu"], "server_tokens": server_tokens}
    return records, BlockRecord(arm=block.arm, pair=block.pair, load=load.name, **measured)


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


def _locust_command(endpoint: Endpoint, block: Block, load: Load, files: Mapping[str, Path]) -> list[str]:
    users = 1 if load.is_open else int(load.level)
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"),
        *("--users", str(users), "--spawn-rate", str(users), "--host", endpoint.url),
        *(argument for kind, path in files.items() for argument in (f"--{kind}", str(path))),
        *("--model", endpoint.model, "--arm", block.arm, "--pair", str(block.pair), "--load", load.name),
        # failed requests are in the records; Locust itself must not fail for them
        *("--run-time", f"{BLOCK_TIMEOUT_S}s", "--exit-code-on-error", "0"),
        "OpenLoopUser" if load.is_open else "ClosedLoopUser",
    ]


def _run_locust(command: list[str], records_file: Path, advance: Callable[[int], None], log: Path) -> None:
    seen = 0
    with log.open("ab") as log_file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file)
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                lines = records_file.read_text().count("\n")
                advance(lines - seen)
                seen = lines
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise UserError(f"Locust ended with code {process.returncode}; its log is {log}.")
