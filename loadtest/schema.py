"""What report.json holds. Its JSON schema, and those of the raw records, are in docs/schemas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loadtest.conversations import RecordCount
from loadtest.ideal import WeightBytes
from loadtest.metrics import LoadSummary
from loadtest.resources import ResourceUse
from loadtest.settings import LoadTestSettings
from loadtest.statistics import SpeedUp

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Ideal:
    """value: the ceiling of a speed-up (loadtest.ideal); fraction: what share of it was
    measured."""

    value: float
    fraction: float


@dataclass(frozen=True)
class SpeedComparison:
    """One candidate against the dense model.

    speedup: by metric, TTFT and TPOT at the lowest concurrency, output throughput at the highest.
    before: the same of an earlier test, where it had this candidate. ideal: by metric, where the
    sizes are known. loads: by load and metric. All but verdict and reason are empty if the test is
    INVALID.
    """

    verdict: str
    reason: str
    speedup: dict[str, SpeedUp]
    before: dict[str, dict[str, Any]]
    ideal: dict[str, Ideal]
    loads: dict[str, dict[str, SpeedUp]]


@dataclass(frozen=True)
class LoadReport(LoadSummary):
    """resources: what the machine did meanwhile; None if that was too short for a sample."""

    resources: ResourceUse | None


@dataclass(frozen=True)
class Report:
    """verdict: the worst of the candidates'; reason and speedup: of the first one.

    highest_rate: requests a second that meet the SLOs, by arm, if it was looked for. noise: by load
    and metric, what one more block of the dense model differs by from its first; 1 without any.
    arms: by arm and load. weight_bytes: of the arms that were directories. settings: with what it
    was run. environment: name -> text. prompts: of their file, how many records were skipped; None
    where none can be.
    """

    schema_version: int
    verdict: str
    reason: str
    required_speedup: float
    speedup: dict[str, SpeedUp]
    candidates: dict[str, SpeedComparison]
    highest_rate: dict[str, float]
    noise: dict[str, dict[str, float]]
    arms: dict[str, dict[str, LoadReport]]
    weight_bytes: dict[str, WeightBytes]
    settings: LoadTestSettings
    environment: dict[str, str]
    prompts: RecordCount | None = None
