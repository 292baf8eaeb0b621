"""A recipe's result on one page: report.html (self-contained), and report.md for a pull request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gradmap.common.files import write_json, write_text
from gradmap.common.quoting import markdown, visible
from gradmap.evaluation.comparison import AnswersComparison
from gradmap.evaluation.prompts import NEW_TOKENS, SHOWN
from gradmap.evaluation.table import describe_retained, tabulate
from gradmap.healing.scaling import forecasts
from gradmap.pruning.plan import Plan, load_plan
from loadtest.figures import draw_load_test
from loadtest.loads import load_labels
from loadtest.metrics import BY_NAME, MAIN, Distribution, Metric
from loadtest.outcome import read_report
from loadtest.page import as_markup, markdown_table, render_template
from loadtest.pipeline.figures import draw_accuracy, draw_perplexity
from loadtest.pipeline.healing_figure import draw_healing
from loadtest.pipeline.removal_figure import draw_removal
from loadtest.pipeline.result import RESULT_FILE, Result, Side, build_result
from loadtest.pipeline.stages import Places
from loadtest.records import REPORT_FILE, RequestRecord, read_measurements
from loadtest.schema import LoadReport
from loadtest.table import speed_up_lines

PAGE, SUMMARY = "report.html", "report.md"
TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
SUMMARY_COLUMNS = ("", "dense", "pruned", "pruned / dense")

Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class Findings:
    """What the page shows: the result, and what of the stages is not in it."""

    result: Result
    plan: Plan
    load_report: Mapping[str, Any]
    records: tuple[RequestRecord, ...]


def write_report(
    out: Path, timings_s: dict[str, float], environment: dict[str, str] | None = None
) -> Findings:
    """Reads the stages' results below `out` and writes the three files.

    timings_s: seconds each stage took when it last ran. environment: of the run; by default this
    machine's.
    """
    places = Places(out)
    load_report = read_report(places.load_test / REPORT_FILE)
    result = build_result(out, load_report, timings_s, environment)
    records = read_measurements(places.load_test).requests
    findings = Findings(result, load_plan(places.plan), load_report, records)
    write_json(out / RESULT_FILE, result.model_dump(mode="json"))
    write_text(out / PAGE, render_html(findings))
    write_text(out / SUMMARY, render_markdown(findings))
    return findings


def summary_rows(findings: Findings) -> list[Row]:
    """What is measured, dense, pruned, and pruned over dense."""
    dense, pruned = findings.result.dense, findings.result.pruned
    return [
        _row("layers", "{:.0f}", dense.layers, pruned.layers),
        _row("parameters (M)", "{:.1f}", dense.parameters / 1e6, pruned.parameters / 1e6),
        _row("weights served (MB)", "{:.0f}", dense.bytes / 1e6, pruned.bytes / 1e6),
        *_quality_rows(dense, pruned),
        *_agreement_row(findings.result.comparison.answers),
        *_speed_rows(findings),
    ]


def _quality_rows(dense: Side, pruned: Side) -> list[Row]:
    rows = []
    for name, estimate in dense.perplexity.items():
        perplexities = (estimate.value, pruned.perplexity[name].value)
        rows.append(_row(f"perplexity, {name}", "{:.1f}", *perplexities))
    if dense.average_accuracy and pruned.average_accuracy:
        averages = (100 * dense.average_accuracy.value, 100 * pruned.average_accuracy.value)
        tasks = _count(len(dense.accuracy), "task")
        rows.append(_row(f"average accuracy (%), {tasks}", "{:.1f}", *averages))
    return rows


def _agreement_row(followed: AnswersComparison | None) -> list[Row]:
    """Whether it still writes what dense writes."""
    if followed is None:
        return []
    shares = (100 * followed.dense_agreement, 100 * followed.agreement.value)
    return [_row("agreement with dense's answers (%)", "{:.1f}", *shares)]


def _speed_rows(findings: Findings) -> list[Row]:
    arms, rows = findings.result.loadtest.arms, []
    for load, label in load_labels(findings.load_report).items():
        for metric in MAIN:
            dense, pruned = (_number(metric, arms[arm][load]) for arm in ("dense", "pruned"))
            if dense and pruned:
                rows.append(_row(f"{metric.title}, {label}", "{:.1f}", dense, pruned))
    return rows


def _number(metric: Metric, summary: LoadReport) -> float | None:
    """The number, or a distribution's median, in the unit for people; None where it is not
    known."""
    value = getattr(summary, metric.key)
    number = value.median if isinstance(value, Distribution) else value
    return None if number is None else metric.factor * number


def _row(name: str, form: str, dense: float, pruned: float) -> Row:
    return name, form.format(dense), form.format(pruned), f"{pruned / dense:.2f}"


def render_html(findings: Findings) -> str:
    """One page without scripts or outside resources. All text is escaped; only our own drawings are
    markup."""
    result, plan = findings.result, findings.plan
    contents = result.model_dump()
    drawings = {
        "importance": draw_removal(plan),
        "perplexity": draw_perplexity(result) if result.texts else "",
        "accuracy": draw_accuracy(result) if result.tasks else "",
    }
    return render_template(
        TEMPLATE,
        plan=plan,
        healings=[(healing, Markup(draw_healing(healing))) for healing in plan.healing],
        forecasts=forecasts(plan.healing[-1].curve) if plan.healing else [],
        result=result,
        rows=summary_rows(findings),
        speed_up_lines=speed_up_lines(findings.load_report),
        figures=as_markup(draw_load_test(findings.load_report, findings.records)),
        quality_table=tabulate(contents),
        retained=describe_retained(contents),
        answer_tokens=NEW_TOKENS,
        shown_answers=SHOWN,
        drawings={name: Markup(svg) for name, svg in drawings.items()},
    )


def render_markdown(findings: Findings) -> str:
    """The summary for a pull request."""
    result, plan = findings.result, findings.plan
    quality = tabulate(result.model_dump())
    removed = f"{len(plan.removal_order)} of {plan.base_model.layers} layers"
    lines = [f"## gradmap: {_code(result.model_name)} without {removed}", ""]
    for gate, judged in result.judgements.items():
        lines.append(f"- {gate}: **{judged.verdict}**: {markdown(judged.reason)}.")
    lines += ["", *markdown_table(SUMMARY_COLUMNS, summary_rows(findings))]
    lines += ["", *markdown_table(quality.columns, quality.rows)]
    lines += ["", f"Removed layers, in order: {', '.join(map(str, plan.removal_order))}."]
    for name, speed_up in result.loadtest.speedup.items():
        spread = ""
        if speed_up.low is not None:
            spread = f" (95% interval {speed_up.low:.2f} to {speed_up.high:.2f})"
        lines.append(f"- speed-up, {BY_NAME[name].label}: {speed_up.value:.2f}x{spread}")
    return "\n".join(lines) + "\n"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _code(text: str) -> str:
    return "`" + visible(text).replace("`", "'").replace("\n", " ") + "`"
