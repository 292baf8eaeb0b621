"""The pipeline's results on one page: result.json, report.html (self-contained), report.md (for a
pull request)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from export.integrity import read_record
from gradmap.common.environment import describe_environment
from gradmap.common.files import ARTIFACT_FILE, sha256_file, write_json, write_text
from gradmap.common.quoting import markdown, visible
from gradmap.common.verdict import Verdict, worst
from gradmap.evaluation.answers import NEW_TOKENS
from gradmap.evaluation.result import read_evaluation
from gradmap.evaluation.table import describe_retained, tabulate
from gradmap.pruning.plan import Plan, load_plan
from loadtest import figures
from loadtest.load_figures import Drawing, draw_load_test
from loadtest.outcome import read_report
from loadtest.page import as_markup, markdown_row, render_template
from loadtest.records import REPORT_FILE, read_measurements
from loadtest.table import speed_up_lines


def write_report(out: Path, timings_s: dict[str, float]) -> dict[str, Any]:
    """Reads the stages' results below `out`, writes the three files and returns the contents of
    result.json.

    timings_s: seconds each stage took when it last ran.
    """
    plan = load_plan(out / "plan")
    load_report = read_report(out / "loadtest" / REPORT_FILE)
    result = build_result(out, load_report, timings_s)
    write_json(out / "result.json", result)
    records = read_measurements(out / "loadtest").requests
    drawings = {
        "importance": figures.draw_importance(plan),
        "perplexity": figures.draw_perplexity(result) if result["texts"] else "",
        "accuracy": figures.draw_accuracy(result) if result["tasks"] else "",
    }
    load_drawings = draw_load_test(load_report, records)
    write_text(out / "report.html", render_html(plan, result, drawings, load_report, load_drawings))
    write_text(out / "report.md", render_markdown(plan, result))
    return result


def build_result(
    out: Path, load_report: dict[str, Any], timings_s: dict[str, float]
) -> dict[str, Any]:
    """Assembles result.json. Sizes are of the vLLM-ready weights, the ones that were served."""
    evaluation = read_evaluation(out / "eval.json", of_two=True)
    artifacts = {"pruned": out / "vllm", "dense": out / "dense" / "vllm"}
    sides = {
        arm: evaluation[arm] | {"bytes": read_record(artifacts[arm]).weight_bytes}
        for arm in ("dense", "pruned")
    }
    quality = evaluation["quality"]
    verdicts = [judged["verdict"] for judged in (load_report, quality) if judged]
    return {
        "schema_version": 3,
        "verdict": str(worst(map(Verdict, verdicts))),
        "model": evaluation["model"],
        **sides,
        **{key: evaluation[key] for key in ("texts", "tasks", "comparison", "quality", "answers")},
        "segment": evaluation["settings"]["segment"],
        "loadtest": {
            key: load_report[key]
            for key in ("verdict", "reason", "required_speedup", "speedup", "arms")
        },
        "artifacts": {
            str(path.relative_to(out)): {
                "gradmap_json_sha256": sha256_file(path / ARTIFACT_FILE),
                **read_record(path).model_dump(mode="json", include={"files", "verification"}),
            }
            for path in sorted(marker.parent for marker in out.glob(f"**/{ARTIFACT_FILE}"))
        },
        "timings_s": timings_s,
        "environment": describe_environment(),
    }


def judgements(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Gate -> its verdict and reason; quality only if the recipe asks for some."""
    gates = {"speed": result["loadtest"], "quality": result["quality"]}
    return {name: judged for name, judged in gates.items() if judged}


def summary_rows(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table: what is measured, dense, pruned, and pruned over dense."""
    dense, pruned = result["dense"], result["pruned"]
    rows = [
        _row("layers", "{:.0f}", dense["layers"], pruned["layers"]),
        _row("parameters (M)", "{:.1f}", dense["parameters"] / 1e6, pruned["parameters"] / 1e6),
        _row("weights served (MB)", "{:.0f}", dense["bytes"] / 1e6, pruned["bytes"] / 1e6),
    ]
    for name in dense["perplexity"]:
        values = [side["perplexity"][name]["value"] for side in (dense, pruned)]
        rows.append(_row(f"perplexity, {name}", "{:.1f}", *values))
    if result["tasks"]:
        averages = [100 * side["average_accuracy"]["value"] for side in (dense, pruned)]
        rows.append(
            _row(
                f"average accuracy (%), {_count(len(result['tasks']), 'task')}", "{:.1f}", *averages
            )
        )
    for level, summaries in _levels(result).items():
        for metric in ("ttft_s", "tpot_s"):
            if all(summary[metric] for summary in summaries):
                medians = [summary[metric]["median"] * 1000 for summary in summaries]
                rows.append(_row(f"{metric[:4].upper()} median (ms), {level}", "{:.1f}", *medians))
        if all(summary["output_throughput"] for summary in summaries):
            rates = [summary["output_throughput"] for summary in summaries]
            rows.append(_row(f"output tokens/s, {level}", "{:.1f}", *rates))
    return rows


def _levels(result: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    arms = result["loadtest"]["arms"]
    return {
        level.replace("_", " "): (arms["dense"][level], arms["pruned"][level])
        for level in arms["dense"]
    }


def _row(name: str, form: str, dense: float, pruned: float) -> tuple[str, str, str, str]:
    return name, form.format(dense), form.format(pruned), f"{pruned / dense:.2f}"


def render_html(
    plan: Plan,
    result: dict[str, Any],
    drawings: dict[str, str],
    load_report: dict[str, Any],
    load_drawings: Sequence[Drawing],
) -> str:
    """One page without scripts or outside resources. All text is escaped; only our own drawings are
    markup."""
    return render_template(
        "report.html.j2",
        plan=plan,
        result=result,
        judgements=judgements(result),
        rows=summary_rows(result),
        speed_up_lines=speed_up_lines(load_report),
        figures=as_markup(load_drawings),
        quality_table=tabulate(result),
        retained=describe_retained(result),
        answer_tokens=NEW_TOKENS,
        drawings={name: Markup(svg) for name, svg in drawings.items()},
    )


def render_markdown(plan: Plan, result: dict[str, Any]) -> str:
    """The summary for a pull request."""
    quality = tabulate(result)
    lines = [
        f"## gradmap: {_code(result['model'])} without {len(plan.removal_order)} of "
        f"{plan.base_model.layers} layers",
        "",
        *(
            f"- {gate}: **{judged['verdict']}**: {markdown(judged['reason'])}."
            for gate, judged in judgements(result).items()
        ),
        "",
        "| | dense | pruned | pruned / dense |",
        "|---|---:|---:|---:|",
        *map(markdown_row, summary_rows(result)),
        "",
        markdown_row(quality.columns),
        "|---|" + "---:|" * (len(quality.columns) - 1),
        *map(markdown_row, quality.rows),
        "",
        f"Removed layers, in order: {', '.join(map(str, plan.removal_order))}.",
    ]
    for metric, value in result["loadtest"]["speedup"].items():
        spread = (
            ""
            if value["low"] is None
            else f" (95% interval {value['low']:.2f} to {value['high']:.2f})"
        )
        lines.append(f"- speed-up, {metric.replace('_', ' ')}: {value['value']:.2f}x{spread}")
    return "\n".join(lines) + "\n"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _code(text: str) -> str:
    return "`" + visible(text).replace("`", "'").replace("\n", " ") + "`"
