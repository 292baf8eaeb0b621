"""A load test from its settings to its reports, and the reports again from its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gradmap.common.environment import describe_environment
from gradmap.common.errors import UserError
from gradmap.common.files import write_json, write_text
from gradmap.common.outputs import results_in
from gradmap.common.reading import first_problem, read_json, read_json_object
from loadtest.conclusions import Facts, SpeedGate, build_report
from loadtest.conversations import RecordCount
from loadtest.ideal import WeightBytes, weight_bytes
from loadtest.page import render_junit, render_page, render_summary
from loadtest.records import (
    RECORDS_FILE,
    REPORT_CASES,
    REPORT_FILE,
    REPORT_PAGE,
    REPORT_SUMMARY,
    RequestRecord,
    read_measurements,
)
from loadtest.schema import SCHEMA_VERSION, Report
from loadtest.session import Session, run_session
from loadtest.settings import LoadTestSettings
from loadtest.urls import is_url


def run_load_test(settings: LoadTestSettings, gate: SpeedGate, out: Path) -> dict[str, Any]:
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


def _write_report(session: Session, settings: LoadTestSettings, gate: SpeedGate) -> dict[str, Any]:
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
    required = before["required_speedup"] if required_speed_up is None else required_speed_up
    gate = SpeedGate(required, earlier)
    gate.require_earlier(before["candidates"])
    measured = read_measurements(directory)
    report = build_report(measured, load_settings(before["settings"]), gate, load_facts(before))
    with results_in(directory, RECORDS_FILE):
        write_all(directory, report, measured.requests)
    return report


def load_facts(report: Mapping[str, Any]) -> Facts:
    """Facts as report.json holds them."""
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
    """Arm -> how large its weights are, of the arms that are directories."""
    sizes = {}
    for arm, target in settings.arms.items():
        size = None if is_url(target) else weight_bytes(Path(target))
        if size is not None:
            sizes[arm] = size
    return sizes


def load_settings(stored: Mapping[str, Any]) -> LoadTestSettings:
    """Settings as report.json holds them."""
    return TypeAdapter(LoadTestSettings).validate_python(stored)
