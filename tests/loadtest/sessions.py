"""Small load tests of a fake server, run in this process."""

from typing import Any

from loadtest.loads import ClosedLoop
from loadtest.prompts import Workload
from loadtest.records import read_measurements
from loadtest.session import Session, run_session
from loadtest.settings import LoadTestSettings

ONE = ClosedLoop(1)


def settings(fake, **changes):
    defaults: dict[str, Any] = {
        "pairs": 2,
        "interleaved": False,
        "loads": (ONE, ClosedLoop(3)),
        "requests_per_load": 2,
        "workload": Workload(prompt_tokens=5, output_tokens=4),
        "vocabulary": 10**9,  # so that a prompt's first token tells it apart
    }
    return LoadTestSettings(fake.url, {"pruned": fake.url}, **(defaults | changes))


def run(options, out):
    session = Session(out)
    run_session(options, session)
    assert read_measurements(out) == session.measured
    return session.measured.requests
