"""The contents of eval.json as a table for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradmap.evaluation.result import TaskRecord

# What an eval.json says of a model's answers: what that is called, by what factor it is shown, and
# with how many digits.
ANSWER_ROWS = {
    "empty": ("answers, empty (%)", 100, 1),
    "repetition": ("answers, repeated 4-grams (%)", 100, 1),
    "ended": ("answers, ended by the model (%)", 100, 1),
    "median_tokens": ("answers, median length (tokens)", 1, 0),
    "p90_tokens": ("answers, 90th percentile of length (tokens)", 1, 0),
}


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
        asked = TaskRecord(**result["tasks"][name]).asked
        change = (
            _with_interval(comparison["tasks"][name]["difference"], 100, 1) if comparison else ""
        )
        rows.append(
            (
                f"{name}, {asked}, {metric} (%)",
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
    return rows + (_answer_rows(comparison, sides) if result["answers"] else [])


def _answer_rows(comparison: dict[str, Any], sides: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = [
        (title, *(f"{side['answers'][key] * factor:.{digits}f}" for side in sides), "")
        for key, (title, factor, digits) in ANSWER_ROWS.items()
    ]
    followed = comparison.get("answers")
    if followed is None:
        return rows
    agreement, divergence = followed["agreement"], followed["divergence"]
    shares = (followed["dense_agreement"], agreement["value"])
    rows.append(
        (
            "agreement with dense's answers (%)",
            *(f"{100 * share:.1f}" for share in shares),
            _with_interval(agreement, 100, 1),
        )
    )
    if divergence is not None:
        change = _with_interval(divergence, 1, 3)
        rows.append(
            ("KL from dense on its answers (nats)", "0", f"{divergence['value']:.3f}", change)
        )
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
