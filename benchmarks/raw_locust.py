"""Our Locust user against Locust's own HTTP users: what they measure of known times, and what a
request costs them.

    python -m benchmarks.raw_locust [--rounds 3] [--users 16] [--run-time 20s]

The endpoint streams tokens at times it was told (benchmarks.fake_endpoint, a process of its own).
All users send in a closed loop, read every token's event, and take turns. Times are means over a
run, as Locust counts them; CPU time is of Locust's process from the test's start to its end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import typer

from benchmarks.load_generator import Case, fake_endpoint
from gradmap.common.console import print_table, say
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.common.reading import read_json
from loadtest.loads import ClosedLoop

LOCUSTFILES = "benchmarks/raw_locustfile.py,loadtest/driver/locustfile.py"
USERS = {
    "CompletionUser": "ours",
    "Requests": "HttpUser, iter_lines",
    "FastHttp": "FastHttpUser, iter_lines",
}


@dataclass(frozen=True)
class Run:
    """One run of Locust: means in ms, and the CPU time of one request in ms."""

    requests: int
    ttft_ms: float
    tpot_ms: float
    e2el_ms: float
    cpu_ms: float


def main(
    rounds: int = 3,
    users: int = 16,
    run_time: str = "20s",
    out: Path = Path("out/benchmark/raw_locust.json"),
) -> None:
    case = Case("closed loop", ClosedLoop(users), ttft_ms=200, itl_ms=20, tokens=32)
    found: dict[str, list[Run]] = {user: [] for user in USERS}
    for number in range(rounds):
        say(f"Round {number + 1} of {rounds}")
        for user in USERS:
            found[user].append(run_locust(user, case, run_time))
    runs = {USERS[user]: list(map(asdict, of_user)) for user, of_user in found.items()}
    write_json(out, {"environment": describe_environment(), "case": asdict(case), "runs": runs})
    title = f"{users} at a time: measured - truth in ms, medians of {rounds} rounds (range)"
    columns = ("", "requests", "TTFT", "TPOT", "E2EL", "CPU ms / request")
    print_table(title, columns, [row(USERS[user], found[user], case) for user in found])


def run_locust(user: str, case: Case, run_time: str) -> Run:
    with TemporaryDirectory() as directory, fake_endpoint(case) as url:
        cpu_time = Path(directory, "cpu.json")
        options: dict[str, object] = {
            "-f": LOCUSTFILES,
            "--host": url,
            "--users": case.load.level,
            "--spawn-rate": case.load.level,
        }
        options |= {"--run-time": run_time, "--stop-timeout": "10s", "--cpu-time": cpu_time}
        options |= {"--prompt-tokens": 64, "--output-tokens": case.tokens}
        flags = map(str, chain.from_iterable(options.items()))
        finished = subprocess.run(
            [sys.executable, "-m", "locust", "--headless", "--json", *flags, user],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": "."},
        )
        entries = {entry["name"]: entry for entry in json.loads(finished.stdout)}
        means = {
            name: entries[name]["total_response_time"] / entries[name]["num_requests"]
            for name in entries
        }
        requests = entries["E2EL"]["num_requests"]
        cpu_ms = 1000 * read_json(cpu_time)["cpu_s"] / requests
        return Run(requests, means["TTFT"], means["TPOT"], means["E2EL"], cpu_ms)


def row(name: str, runs: Sequence[Run], case: Case) -> tuple[str, ...]:
    errors = [
        [run.ttft_ms - case.ttft_ms for run in runs],
        [run.tpot_ms - case.itl_ms for run in runs],
        [run.e2el_ms - case.e2el_ms for run in runs],
        [run.cpu_ms for run in runs],
    ]
    cells = [f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in errors]
    return name, f"{median(run.requests for run in runs):.0f}", *cells


if __name__ == "__main__":
    typer.run(main)
