"""From a session's records to report.json: summaries, speed-ups, verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gradmap.environment import describe_environment
from gradmap.files import write_json
from gradmap.verdict import Judgement, Verdict
from loadtest.metrics import summarise_load
from loadtest.records import RequestRecord
from loadtest.session import ARMS, LoadTestSettings, run_session
from loadtest.statistics import compute_speed_ups, find_faults, judge

REPORT_FILE = "report.json"
RECORDS_FILE = "records.jsonl"


def run_load_test(settings: LoadTestSettings, required_speed_up: float, out: Path) -> dict[str, Any]:
    """Runs the session and writes `out`/records.jsonl and `out`/report.json; returns the report."""
    records = run_session(settings, out)
    report = build_report(records, settings, required_speed_up)
    write_json(out / REPORT_FILE, report)
    return report


def build_report(
    records: Sequence[RequestRecord], settings: LoadTestSettings, required_speed_up: float
) -> dict[str, Any]:
    """Computes report.json from raw records. Nothing but faults is concluded from records with faults."""
    faults = find_faults(records, settings.expected_records)
    speed_ups = {} if faults else compute_speed_ups(records)
    judgement = Judgement(Verdict.INVALID, "; ".join(faults)) if faults else judge(speed_ups["tpot"], required_speed_up)
    return {
        "schema_version": 1,
        "verdict": str(judgement.verdict),
        "reason": judgement.reason,
        "required_speedup": required_speed_up,
        "speedup": {metric: asdict(value) for metric, value in speed_ups.items()},
        "arms": {arm: _summarise_arm(records, arm, settings.concurrency) for arm in ARMS},
        "settings": asdict(settings),
        "environment": describe_environment(),
    }


def _summarise_arm(records: Sequence[RequestRecord], arm: str, levels: Sequence[int]) -> dict[str, Any]:
    of_arm = [record for record in records if record.arm == arm]
    return {
        f"concurrency_{level}": asdict(
            summarise_load([record for record in of_arm if record.concurrency == level], level)
        )
        for level in sorted(levels)
    }
