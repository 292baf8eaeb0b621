"""Does the load generator measure what happens, and how much can it send? Against an endpoint with
known times.

    python -m benchmarks.load_generator [--rounds 3]

Truth is what the endpoint was told to do (benchmarks.fake_endpoint, a process of its own). Run on
an idle machine: what the endpoint is late by counts as an error of the load generator here.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import typer

from benchmarks.one_load import send_load
from gradmap.common.console import print_table, say
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.common.loopback import own_transport
from loadtest.endpoints import Endpoint
from loadtest.loads import ClosedLoop, Load, OpenLoop
from loadtest.prompts import Workload
from loadtest.records import Measurements
from loadtest.soundness import mean_in_flight
from loadtest.summaries import summarise_load
from serving.ports import free_port


@dataclass(frozen=True)
class Case:
    """An endpoint and a load. seconds: length of an open loop. truth_s and rates are compared with
    what is measured."""

    name: str
    load: Load
    ttft_ms: float
    itl_ms: float
    tokens: int
    requests: int = 8
    seconds: float = 10.0
    jitter: float = 0.0
    error_share: float = 0.0
    processes: int = 1

    @property
    def e2el_ms(self) -> float:
        return self.ttft_ms + (self.tokens - 1) * self.itl_ms


CASES = (
    Case("one at a time", ClosedLoop(1), 200, 20, 32, requests=10),
    Case("8 at a time, jitter", ClosedLoop(8), 200, 20, 32, requests=48, jitter=0.5),
    Case(
        "8 at a time, every 8th fails",
        ClosedLoop(8),
        100,
        20,
        16,
        requests=64,
        error_share=0.125,
    ),
    Case("constant 20/s, 0.5 s each", OpenLoop("constant", 20), 250, 25, 11),
    Case("Poisson 20/s, 0.5 s each", OpenLoop("poisson", 20), 250, 25, 11),
    Case("Poisson 50/s", OpenLoop("poisson", 50), 200, 20, 32),
    Case(
        "1,000 streams, two processes",
        ClosedLoop(1000),
        1000,
        500,
        20,
        requests=2000,
        processes=2,
    ),
)


def run_case(case: Case) -> dict[str, Any]:
    """The measured values by name, in ms, requests/s, or shares."""
    workload = Workload(prompt_tokens=64, output_tokens=case.tokens)
    with fake_endpoint(case) as url:
        measured = send_load(
            Endpoint(url, "fake"),
            case.load,
            workload,
            vocabulary=1000,
            requests_per_load=1 if isinstance(case.load, OpenLoop) else case.requests,
            open_loop_s=case.seconds,
            processes=case.processes,
        )
        return describe(measured, case)


def describe(measured: Measurements, case: Case) -> dict[str, Any]:
    summary = summarise_load(measured.requests, case.load.name)
    sent = sorted(record.sent_s for record in measured.requests)
    assert summary.ttft_s and summary.tpot_s and summary.e2el_s
    return {
        "requests": summary.requests,
        "failed": summary.errors,
        "ttft_ms": 1000 * summary.ttft_s.median,
        "tpot_ms": 1000 * summary.tpot_s.median,
        "e2el_ms": 1000 * summary.e2el_s.median,
        "sent_per_s": (len(sent) - 1) / (sent[-1] - sent[0]),
        "in_flight": mean_in_flight(measured.requests),
        "client_cpu": measured.blocks[0].client_cpu,
    }


@contextmanager
def fake_endpoint(case: Case) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.fake_endpoint", "--port", str(port)]
    options = {"--ttft-ms": case.ttft_ms, "--itl-ms": case.itl_ms, "--jitter": case.jitter}
    options["--error-share"] = case.error_share
    flags = map(str, chain.from_iterable(options.items()))
    process = subprocess.Popen([*command, *flags])
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(transport=own_transport(url)) as client:
            while process.poll() is None:
                try:
                    client.get(f"{url}/v1/models")
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def main(rounds: int = 3, out: Path = Path("out/benchmark/load_generator.json")) -> None:
    found: dict[str, list[dict[str, Any]]] = {case.name: [] for case in CASES}
    for number in range(rounds):
        say(f"Round {number + 1} of {rounds}")
        for case in CASES:
            found[case.name].append(run_case(case))
    write_json(
        out,
        {
            "environment": describe_environment(),
            "cases": [asdict(case) for case in CASES],
            "rounds": found,
        },
    )
    rows = [row(case, found[case.name]) for case in CASES]
    columns = (
        "",
        "TTFT (ms)",
        "TPOT (ms)",
        "E2EL (ms)",
        "failed",
        "sent/s",
        "in flight",
        "client CPU",
    )
    print_table("Measured / truth: median of the rounds", columns, rows)


def _median_of(name: str, rounds: Sequence[dict[str, Any]]) -> Any:
    return median(found[name] for found in rounds)


def row(case: Case, rounds: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    middle = {name: _median_of(name, rounds) for name in rounds[0]}
    truths = {"ttft_ms": case.ttft_ms, "tpot_ms": case.itl_ms, "e2el_ms": case.e2el_ms}
    latencies = [f"{middle[name]:.1f} / {truth:.1f}" for name, truth in truths.items()]
    failing = round(case.error_share * middle["requests"])
    rate, in_flight = "-", f"{middle['in_flight']:.1f} / {case.load.level:g}"
    if isinstance(case.load, OpenLoop):
        rate, in_flight = f"{middle['sent_per_s']:.2f} / {case.load.level:g}", "-"
    return (
        case.name,
        *latencies,
        f"{middle['failed']:.0f} / {failing}",
        rate,
        in_flight,
        f"{100 * middle['client_cpu']:.0f}%",
    )


if __name__ == "__main__":
    typer.run(main)
