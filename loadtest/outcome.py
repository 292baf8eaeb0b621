"""From a session's records to report.json: summaries, speed-ups, verdict. All of it can be computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradmap.environment import describe_environment
from gradmap.errors import UserError
from gradmap.files import read_json, refuse_foreign_directory, write_json, write_text
from gradmap.verdict import Judgement, Verdict, worst
from loadtest.driving import SEARCH_PAIR
from loadtest.ideal import WeightBytes, ideal_speed_ups, weight_bytes
from loadtest.loads import Load
from loadtest.metrics import summarise_load
from loadtest.page import render_junit, render_page, render_summary
from loadtest.prompts import Workload
from loadtest.records import BLOCKS_FILE, RECORDS_FILE, BlockRecord, RequestRecord, read_blocks, read_records
from loadtest.session import Measured, run_session
from loadtest.settings import DENSE, DENSE_AGAIN, LoadTestSettings, is_url
from loadtest.slo import Slo
from loadtest.statistics import SpeedUp, compute_speed_ups, find_faults, find_losses, headline, judge

REPORT_FILE = "report.json"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Facts:
    """What is known besides the records: of the machine, and how large the arms' weights are, where that is known."""

    environment: dict[str, str]
    sizes: dict[str, WeightBytes]


@dataclass(frozen=True)
class Gate:
    """What the verdict asks for: a TPOT speed-up, and no loss against `earlier`, another report.json."""

    required_speed_up: float
    earlier: dict[str, Any] | None = None


def run_load_test(settings: LoadTestSettings, gate: Gate, out: Path) -> dict[str, Any]:
    """Runs the session and writes its records and reports into `out`; returns report.json.

    A session that breaks off leaves a report too, which says INVALID.
    """
    refuse_foreign_directory(out, RECORDS_FILE)
    measured = Measured(out)
    try:
        run_session(settings, measured)
    except BaseException:  # an interruption too
        if measured.records:
            _write_report(measured, settings, gate)
        raise
    return _write_report(measured, settings, gate)


def _write_report(measured: Measured, settings: LoadTestSettings, gate: Gate) -> dict[str, Any]:
    facts = Facts(describe_environment(), measure_sizes(settings))
    report = build_report(measured.records, measured.blocks, settings, gate, facts)
    write_all(measured.directory, report, measured.records)
    return report


def report_again(directory: Path, required_speed_up: float | None, earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Computes report.json anew from the records beside it, with another requirement if one is given.

    Raises UserError if there is no load test in `directory`.
    """
    before = read_report(directory / REPORT_FILE)
    gate = Gate(before["required_speedup"] if required_speed_up is None else required_speed_up, earlier)
    records, blocks = read_records(directory / RECORDS_FILE), read_blocks(directory / BLOCKS_FILE)
    facts = Facts(before["environment"], {arm: WeightBytes(**size) for arm, size in before["weight_bytes"].items()})
    report = build_report(records, blocks, load_settings(before["settings"]), gate, facts)
    write_all(directory, report, records)
    return report


def read_report(path: Path) -> dict[str, Any]:
    """Raises UserError if it is no report.json of this version."""
    report = read_json(path)
    if not isinstance(report, dict) or report.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path} is no load test of this version; run gradmap loadtest again.")
    return report


def write_all(directory: Path, report: dict[str, Any], records: Sequence[RequestRecord]) -> None:
    """report.json, and for people report.html and report.md, for CI junit.xml."""
    write_json(directory / REPORT_FILE, report)
    write_text(directory / "report.html", render_page(report, records))
    write_text(directory / "report.md", render_summary(report))
    write_text(directory / "junit.xml", render_junit(report))


def measure_sizes(settings: LoadTestSettings) -> dict[str, WeightBytes]:
    """Of the arms that are directories."""
    sizes = {arm: weight_bytes(Path(target)) for arm, target in settings.arms.items() if not is_url(target)}
    return {arm: size for arm, size in sizes.items() if size is not None}


def load_settings(stored: Mapping[str, Any]) -> LoadTestSettings:
    """Settings as report.json holds them."""
    changes = {
        "loads": tuple(Load(**load) for load in stored["loads"]),
        "slos": tuple(Slo(**slo) for slo in stored["slos"]),
        "workload": Workload(**stored["workload"]),
        "vllm_flags": tuple(stored["vllm_flags"]),
    }
    return LoadTestSettings(**{**stored, **changes})


def build_report(
    records: Sequence[RequestRecord],
    blocks: Sequence[BlockRecord],
    settings: LoadTestSettings,
    gate: Gate,
    facts: Facts,
) -> dict[str, Any]:
    """Computes report.json from raw records. Nothing but faults is concluded from records with faults.

    `speedup` and `reason` are those of the first candidate; the verdict is the worst of all.
    """
    of_search = [record for record in records if record.pair == SEARCH_PAIR]
    records = [record for record in records if record.pair >= 0]
    faults = find_faults(records, [block for block in blocks if block.pair >= 0], settings.expected_records)
    invalid = Judgement(Verdict.INVALID, "; ".join(faults))
    candidates = {
        arm: _describe_invalid(invalid) if faults else _compare(records, arm, settings, gate, facts.sizes)
        for arm in settings.candidates
    }
    first = next(iter(candidates.values()))
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": str(worst(Verdict(one["verdict"]) for one in candidates.values())),
        "reason": first["reason"],
        "required_speedup": gate.required_speed_up,
        "speedup": first["speedup"],
        "candidates": candidates,
        "highest_rate": {arm: _highest_rate(of_search, arm, settings) for arm in settings.arms if of_search},
        "noise": {} if faults else _noise(records, settings),
        "arms": {arm: _summarise_arm(records, arm, settings) for arm in settings.arms},
        "weight_bytes": {arm: asdict(size) for arm, size in facts.sizes.items()},
        "settings": asdict(settings),
        "environment": facts.environment,
    }


def _compare(
    records: Sequence[RequestRecord],
    arm: str,
    settings: LoadTestSettings,
    gate: Gate,
    sizes: Mapping[str, WeightBytes],
) -> dict[str, Any]:
    """ideal: metric -> the ceiling of the speed-up, and what share of it was measured, where sizes are known.

    before: the speed-ups of an earlier test, where it had the same candidate.
    """
    by_load = {load.name: compute_speed_ups(records, arm, DENSE, load) for load in settings.loads}
    main = headline(by_load, settings.loads)
    before = gate.earlier["candidates"].get(arm, {}).get("speedup", {}) if gate.earlier else {}
    judgement = judge(main["tpot"], gate.required_speed_up)
    if lost := find_losses(main, before):
        judgement = Judgement(Verdict.FAIL, f"less than in the earlier test: {'; '.join(lost)}")
    ceilings = ideal_speed_ups(sizes, arm, DENSE)
    return {
        "verdict": str(judgement.verdict),
        "reason": judgement.reason,
        "speedup": _described(main),
        "before": before,
        "ideal": {
            metric: {"value": ceiling, "fraction": main[metric].value / ceiling} for metric, ceiling in ceilings.items()
        },
        "loads": {name: _described(speed_ups) for name, speed_ups in by_load.items()},
    }


def _describe_invalid(judgement: Judgement) -> dict[str, Any]:
    return {
        "verdict": str(judgement.verdict),
        "reason": judgement.reason,
        "speedup": {},
        "before": {},
        "ideal": {},
        "loads": {},
    }


def _noise(records: Sequence[RequestRecord], settings: LoadTestSettings) -> dict[str, dict[str, float]]:
    """Load -> metric -> what one more block of the dense model differs by from its first: 1 without any noise."""
    if not any(record.arm == DENSE_AGAIN for record in records):
        return {}
    measured = {load.name: compute_speed_ups(records, DENSE_AGAIN, DENSE, load) for load in settings.loads}
    return {name: {metric: one.value for metric, one in of_load.items()} for name, of_load in measured.items()}


def _described(speed_ups: Mapping[str, SpeedUp]) -> dict[str, Any]:
    return {metric: asdict(value) for metric, value in speed_ups.items()}


def _highest_rate(records: Sequence[RequestRecord], arm: str, settings: LoadTestSettings) -> float:
    """Requests a second: the highest of the rates that were tried and met the SLOs; 0 if none did."""
    of_arm = [record for record in records if record.arm == arm]
    rates = {float(load.rpartition("_")[2]): load for load in {record.load for record in of_arm}}
    return max(
        (
            rate
            for rate, load in rates.items()
            if summarise_load([one for one in of_arm if one.load == load], load, settings.slos).meets_slos
        ),
        default=0.0,
    )


def _summarise_arm(records: Sequence[RequestRecord], arm: str, settings: LoadTestSettings) -> dict[str, Any]:
    of_arm = [record for record in records if record.arm == arm]
    return {
        load.name: asdict(
            summarise_load([record for record in of_arm if record.load == load.name], load.name, settings.slos)
        )
        for load in settings.loads
    }
