"""The contents of eval.json as a table for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table for people. columns: the headings. rows: cells as text, as many as there are
    columns."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def tabulate(result: dict[str, Any]) -> Table:
    """The table of an eval.json: what was measured, the value of each model and, for two models,
    how they compare."""
    arms = [arm for arm in ("dense", "pruned") if arm in result]
    columns = ("± standard error", *arms)
    if result["comparison"]:
        columns += ("pruned against dense (95% interval)",)
    rows = _rows(result, [result[arm] for arm in arms])
    return Table(columns, [row[: len(columns)] for row in rows])


def describe_retained(result: dict[str, Any]) -> str | None:
    """The sentence about the average over tasks; None if there is none to compare, or nothing that
    was retained."""
    average = result["comparison"] and result["comparison"]["average"]
    if not (average and average["retained"]):
        return None
    return f"Retained of the dense average: {_with_interval(average['retained'], 100, 1)} %"


def _rows(result: dict[str, Any], sides: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    comparison = result["comparison"] or {}
    rows = []
    for name in result["texts"]:
        change = (
            f"x {_with_interval(comparison['perplexity_ratio'][name], 1, 2)}" if comparison else ""
        )
        rows.append(
            (
                f"perplexity, {name}",
                *(with_error(side["perplexity"][name], 1, 2) for side in sides),
                change,
            )
        )
    for name in result["tasks"]:
        metric = sides[0]["accuracy"][name]["metric"]
        change = (
            _with_interval(comparison["tasks"][name]["difference"], 100, 1) if comparison else ""
        )
        rows.append(
            (
                f"{name}, {metric} (%)",
                *(with_error(side["accuracy"][name], 100, 1) for side in sides),
                change,
            )
        )
    if result["tasks"]:
        change = _with_interval(comparison["average"]["difference"], 100, 1) if comparison else ""
        rows.append(
            (
                "average (%)",
                *(with_error(side["average_accuracy"], 100, 1) for side in sides),
                change,
            )
        )
    for rate in ("empty", "repetition") if result["answers"] else ():
        rows.append((f"answers, {rate}", *(f"{side['answers'][rate]:.2f}" for side in sides), ""))
    return rows


def with_error(estimate: dict[str, Any], factor: float, digits: int) -> str:
    """An estimate as text, times `factor`: `71.3 ± 1.2`, or `71.3` if the error is not known."""
    value, error = estimate["value"], estimate["stderr"]
    return f"{value * factor:.{digits}f}" + (
        "" if error is None else f" ± {error * factor:.{digits}f}"
    )


def _with_interval(interval: dict[str, float], factor: float, digits: int) -> str:
    value, low, high = (
        f"{interval[name] * factor:.{digits}f}" for name in ("value", "low", "high")
    )
    return f"{value} ({low} to {high})"
