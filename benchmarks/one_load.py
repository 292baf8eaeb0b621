"""One load, sent to one endpoint with our load generator: what benchmarks of it have in common."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loadtest.board import Board
from loadtest.driving import Bench, run_load
from loadtest.endpoints import Endpoint
from loadtest.loads import Load
from loadtest.prompts import RandomPrompts, Workload
from loadtest.records import Measurements
from loadtest.settings import Block, LoadTestSettings


def send_load(
    endpoint: Endpoint, load: Load, workload: Workload, vocabulary: int, **settings: Any
) -> Measurements:
    """Sends one load to an endpoint, and returns what was measured. settings: of LoadTestSettings.
    Prompts are random, and new for each seed of the workload."""
    arms = {"pruned": endpoint.url}  # no load test is without one; only the dense endpoint is asked
    chosen = LoadTestSettings(endpoint.url, arms, loads=(load,), workload=workload, **settings)
    with TemporaryDirectory() as directory:
        bench = Bench(
            chosen, RandomPrompts(workload, vocabulary), Board(starts=0, loads=1), Path(directory)
        )
        return run_load(endpoint, bench, Block("dense", 0), load)
