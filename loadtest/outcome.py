"""From a session's records to report.json: summaries, speed-ups, verdict. All of it can be computed
again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gradmap.common.environment import describe_environment
from gradmap.common.errors import UserError
from gradmap.common.files import write_json, write_text
from gradmap.common.outputs import results_in
from gradmap.common.reading import first_problem, read_json, read_json_object
from gradmap.common.verdict import Judgement, Verdict, worst
from loadtest.conversations import RecordCount
from loadtest.driving import SEARCH_PAIR
from loadtest.ideal import WeightBytes, ideal_speed_ups, weight_bytes
from loadtest.loads import Load
from loadtest.metrics import summarise_load
from loadtest.page import render_junit, render_page, render_summary
from loadtest.prompts import Workload
from loadtest.records import (
    RECORDS_FILE,
    REPORT_CASES,
    REPORT_FILE,
    REPORT_PAGE,
    REPORT_SUMMARY,
    Measurements,
    RequestRecord,
    read_measurements,
)
from loadtest.resources import summarise_resources
from loadtest.schema import SCHEMA_VERSION, Comparison, Ideal, LoadReport, Report
from loadtest.session import Session, run_session
from loadtest.settings import DENSE, DENSE_AGAIN, LoadTestSettings
from loadtest.slo import Slo
from loadtest.soundness import find_faults
from loadtest.statistics import (
    compute_speed_ups,
    find_held_back,
    find_losses,
    headline,
    judge,
    main_load,
)
from loadtest.urls import is_url


@dataclass(frozen=True)
class Facts:
    """What is known besides the records: of the machine, how large the arms' weights are, where
    that is known, and how much of the prompts' file is of use."""

    environment: dict[str, str]
    sizes: dict[str, WeightBytes]
    prompts: RecordCount | None = None


@dataclass(frozen=True)
class Gate:
    """What the verdict asks for: a TPOT speed-up, and no loss against `earlier`, another
    report.json."""

    required_speed_up: float
    earlier: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises UserError if no speed-up could be compared with what is required."""
        if not 0 < self.required_speed_up < math.inf:
            raise UserError(
                f"--require-speedup is {self.required_speed_up}; give a finite number above 0."
            )

    def require_earlier(self, candidates: Iterable[str]) -> None:
        """Raises UserError unless the earlier report, if there is one, has an interval for every
        candidate."""
        if self.earlier is None:
            return
        for arm in candidates:
            before = self.earlier["candidates"].get(arm, {"speedup": {}})
            if before["speedup"].get("tpot", {}).get("low") is None:
                raise UserError(
                    f"The report of --against has no speed-up of {arm} with an interval (its "
                    f"verdict is {self.earlier['verdict']}), so that nothing can be lower; give "
                    "another."
                )


def run_load_test(settings: LoadTestSettings, gate: Gate, out: Path) -> dict[str, Any]:
    """Runs the session and writes its records and reports into `out`; returns report.json.

    A session that breaks off leaves a report too, which says INVALID.
    """
    gate.require_earlier(settings.candidates)
    session = Session(out)
    with results_in(out, RECORDS_FILE):
        try:
            run_session(settings, session)
        except BaseException:  # an interruption too
            if session.measured.requests:
                _write_report(session, settings, gate)
            raise
        return _write_report(session, settings, gate)


def _write_report(session: Session, settings: LoadTestSettings, gate: Gate) -> dict[str, Any]:
    facts = Facts(describe_environment(), measure_sizes(settings), session.prompts)
    report = build_report(session.measured, replace(settings, models=session.models), gate, facts)
    write_all(session.directory, report, session.measured.requests)
    return report


def report_again(
    directory: Path, required_speed_up: float | None, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """Computes report.json anew from the records beside it, with another requirement if one is
    given.

    Raises UserError if there is no load test in `directory`.
    """
    before = read_report(directory / REPORT_FILE)
    gate = Gate(
        before["required_speedup"] if required_speed_up is None else required_speed_up, earlier
    )
    gate.require_earlier(before["candidates"])
    measured = read_measurements(directory)
    report = build_report(measured, load_settings(before["settings"]), gate, load_facts(before))
    with results_in(directory, RECORDS_FILE):
        write_all(directory, report, measured.requests)
    return report


def load_facts(report: Mapping[str, Any]) -> Facts:
    """What report.json holds of them."""
    sizes = {arm: WeightBytes(**size) for arm, size in report["weight_bytes"].items()}
    prompts = report.get("prompts")
    return Facts(report["environment"], sizes, RecordCount(**prompts) if prompts else None)


def measured_facts(directory: Path) -> dict[str, Any]:
    """What report.json holds besides what follows from the records beside it. Raises UserError if
    it is no JSON."""
    report = read_json_object(directory / REPORT_FILE)
    keys = ("schema_version", "settings", "environment", "weight_bytes", "prompts")
    return {key: report.get(key) for key in keys}


def read_report(path: Path) -> dict[str, Any]:
    """Raises UserError if it is no report.json of this version, or not whole."""
    report = read_json(path)
    if not isinstance(report, dict) or report.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path} is no load test of this version; run gradmap loadtest again.")
    try:
        TypeAdapter(Report).validate_python(report)
    except ValidationError as error:
        raise UserError(
            f"{path} is no whole report of a load test: {first_problem(error)}."
        ) from None
    return report


def write_all(directory: Path, report: dict[str, Any], records: Sequence[RequestRecord]) -> None:
    """report.json, and for people report.html and report.md, for CI junit.xml."""
    write_json(directory / REPORT_FILE, report)
    write_text(directory / REPORT_PAGE, render_page(report, records))
    write_text(directory / REPORT_SUMMARY, render_summary(report))
    write_text(directory / REPORT_CASES, render_junit(report))


def measure_sizes(settings: LoadTestSettings) -> dict[str, WeightBytes]:
    """Of the arms that are directories."""
    sizes = {
        arm: weight_bytes(Path(target))
        for arm, target in settings.arms.items()
        if not is_url(target)
    }
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
    measured: Measurements, settings: LoadTestSettings, gate: Gate, facts: Facts
) -> dict[str, Any]:
    """Computes report.json, a Report, from what was measured. Nothing but faults is concluded if
    there are any."""
    of_search = [record for record in measured.requests if record.pair == SEARCH_PAIR]
    measured = measured.of_pairs()
    records = measured.requests
    faults = find_faults(measured, settings)
    candidates = {
        arm: _invalid(faults) if faults else _compare(records, arm, settings, gate, facts.sizes)
        for arm in settings.candidates
    }
    first = next(iter(candidates.values()))
    report = Report(
        schema_version=SCHEMA_VERSION,
        verdict=str(worst(Verdict(one.verdict) for one in candidates.values())),
        reason=first.reason,
        required_speedup=gate.required_speed_up,
        speedup=first.speedup,
        candidates=candidates,
        highest_rate={
            arm: _highest_rate(of_search, arm, settings) for arm in settings.arms if of_search
        },
        noise={} if faults else _noise(records, settings),
        arms={arm: _summarise_arm(measured, arm, settings) for arm in settings.arms},
        weight_bytes=dict(facts.sizes),
        settings=settings,
        environment=facts.environment,
        prompts=facts.prompts,
    )
    return asdict(report)


def _compare(
    records: Sequence[RequestRecord],
    arm: str,
    settings: LoadTestSettings,
    gate: Gate,
    sizes: Mapping[str, WeightBytes],
) -> Comparison:
    if held_back := find_held_back(records, arm, DENSE, main_load(settings.loads)):
        return _invalid([held_back])
    by_load = {load.name: compute_speed_ups(records, arm, DENSE, load) for load in settings.loads}
    main = headline(by_load, settings.loads)
    before = gate.earlier["candidates"].get(arm, {}).get("speedup", {}) if gate.earlier else {}
    judgement = judge(main["tpot"], gate.required_speed_up)
    if lost := find_losses(main, before):
        judgement = Judgement(Verdict.FAIL, f"less than in the earlier test: {'; '.join(lost)}")
    ideal = {
        metric: Ideal(ceiling, main[metric].value / ceiling)
        for metric, ceiling in ideal_speed_ups(sizes, arm, DENSE).items()
    }
    return Comparison(str(judgement.verdict), judgement.reason, main, before, ideal, by_load)


def _invalid(faults: Sequence[str]) -> Comparison:
    return Comparison(str(Verdict.INVALID), "; ".join(faults), {}, {}, {}, {})


def _noise(
    records: Sequence[RequestRecord], settings: LoadTestSettings
) -> dict[str, dict[str, float]]:
    """Load -> metric -> what one more block of the dense model differs by from its first: 1 without
    any noise."""
    if not any(record.arm == DENSE_AGAIN for record in records):
        return {}
    measured = {
        load.name: compute_speed_ups(records, DENSE_AGAIN, DENSE, load) for load in settings.loads
    }
    return {
        name: {metric: one.value for metric, one in of_load.items()}
        for name, of_load in measured.items()
    }


def _highest_rate(records: Sequence[RequestRecord], arm: str, settings: LoadTestSettings) -> float:
    """Requests a second: the highest of the rates that were tried and met the SLOs; 0 if none
    did."""
    of_arm = [record for record in records if record.arm == arm]
    rates = {float(load.rpartition("_")[2]): load for load in {record.load for record in of_arm}}
    return max(
        (
            rate
            for rate, load in rates.items()
            if summarise_load(
                [one for one in of_arm if one.load == load], load, settings.slos
            ).meets_slos
        ),
        default=0.0,
    )


def _summarise_arm(
    measured: Measurements, arm: str, settings: LoadTestSettings
) -> dict[str, LoadReport]:
    summaries = {}
    for load in settings.loads:
        records = [
            record for record in measured.requests if (record.arm, record.load) == (arm, load.name)
        ]
        summary = summarise_load(records, load.name, settings.slos)
        summaries[load.name] = LoadReport(
            **vars(summary), resources=summarise_resources(measured, arm, load.name)
        )
    return summaries
