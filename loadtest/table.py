"""The numbers of a load test as rows of a table, for the terminal, a pull request and a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loadtest.loads import load_labels
from loadtest.metrics import BY_NAME, METRICS, Metric
from loadtest.resources import USES, Use

Row = tuple[str, ...]


def load_rows(report: Mapping[str, Any]) -> list[Row]:
    """What was measured at each load, and its value for every arm; without what no arm has."""
    rows = []
    for load, label in load_labels(report).items():
        summaries = [loads[load] for loads in report["arms"].values()]
        used = [summary["resources"] or {} for summary in summaries]
        rows += [_row(label, metric, summaries) for metric in METRICS]
        rows += [_row(label, use, used) for use in USES]
    return [row for row in rows if any(row[1:])]


def _row(label: str, quantity: Metric | Use, summaries: list[dict[str, Any]]) -> Row:
    """summaries: of each arm."""
    values = [summary.get(quantity.key) for summary in summaries]
    return (f"{label}: {quantity.title}", *(_cell(value, quantity.factor) for value in values))


def _cell(value: Any, factor: float) -> str:
    """A distribution by its median, a number by itself."""
    if value is None:
        return ""
    number = value["median"] if isinstance(value, dict) else value
    return f"{factor * number:.2f}"


def speed_up_lines(report: Mapping[str, Any]) -> list[str]:
    """One sentence for every candidate and metric, and one for the highest rates."""
    lines = []
    for arm, compared in report["candidates"].items():
        for name in compared["speedup"]:
            label = BY_NAME[name].label
            lines.append(f"speed-up of {arm}, {label}: {_describe_speed_up(compared, name)}")
    rates = rate_line(report)
    return lines if rates is None else [*lines, rates]


def _describe_speed_up(compared: Mapping[str, Any], name: str) -> str:
    """With all that report.json has beside it, of the metric of this name."""
    value = compared["speedup"][name]
    described = f"{value['value']:.2f}x"
    if value["low"] is not None:
        described += f" (95% interval {value['low']:.2f}-{value['high']:.2f})"
    if name in compared["ideal"]:
        ideal = compared["ideal"][name]
        described += f", {100 * ideal['fraction']:.0f}% of the ideal {ideal['value']:.2f}x"
    if name in compared["before"]:
        described += f" (was {compared['before'][name]['value']:.2f}x)"
    return described


def rate_line(report: Mapping[str, Any]) -> str | None:
    """The highest rates that meet the SLOs; None if they were not looked for."""
    rates = [f"{arm} {rate:g}/s" for arm, rate in report["highest_rate"].items()]
    return f"highest rate that meets the SLOs: {', '.join(rates)}" if rates else None


def model_lines(report: Mapping[str, Any]) -> list[str]:
    """Which model was asked, for every arm that was a URL."""
    return [f"{arm} is {model!r}" for arm, model in report["settings"]["models"].items()]


def noise_line(report: Mapping[str, Any]) -> str | None:
    """What two blocks of the same model differ by; None if that was not measured."""
    differences = []
    for of_load in report["noise"].values():
        differences += [abs(ratio - 1) for ratio in of_load.values()]
    if not differences:
        return None
    return f"two blocks of the dense model differ by at most {100 * max(differences):.1f}%"
