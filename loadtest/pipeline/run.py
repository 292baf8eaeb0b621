"""`gradmap run`: the stages of a recipe, each in its own process, none repeated while its inputs
stay the same; and its report, again from what they left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradmap.common.console import print_table
from gradmap.common.errors import UserError
from gradmap.common.files import cache_directory, write_text
from gradmap.common.outputs import refuse_foreign_directory, results_in
from gradmap.common.quoting import visible
from gradmap.common.reading import read_text
from gradmap.common.stages import is_done, is_within, run_stage, stage_record
from gradmap.costs.speed import measure_disk
from gradmap.model.checkpoint import open_checkpoint, read_config
from loadtest.outcome import read_report, report_again
from loadtest.pipeline.estimates import Estimate, Speeds, estimate_cells, estimate_stages
from loadtest.pipeline.recipe import Recipe, load_recipe
from loadtest.pipeline.report import PAGE, SUMMARY_COLUMNS, Findings, summary_rows, write_report
from loadtest.pipeline.result import RESULT_FILE, Result, read_result
from loadtest.pipeline.stages import (
    Places,
    plan_stages,
    require_evaluation,
    require_formats,
    require_inputs,
    require_schedule,
)

RECIPE_COPY = "recipe.yaml"


def is_run(directory: Path) -> bool:
    """Whether `gradmap run` made it."""
    return (directory / RECIPE_COPY).is_file()


def run_recipe(recipe_path: Path, out: Path, from_stage: str | None, fresh: bool) -> Result:
    """Runs what is not done yet, writes the reports, prints the table; returns what result.json
    holds.

    Raises UserError if the recipe is wrong or a stage fails; finished stages stay finished.
    """
    recipe = load_recipe(recipe_path)
    stages = plan_stages(recipe, out)
    names = [stage.name for stage in stages]
    forced_from = _forced_from(names, from_stage, fresh)
    require_inputs(recipe, stages)
    require_evaluation(recipe)
    config = open_checkpoint(recipe.model, recipe.gguf_file, bool(recipe.allow_pickle)).config
    require_schedule(recipe, config)
    require_formats(recipe, config)
    with results_in(out, RECIPE_COPY):
        write_text(out / RECIPE_COPY, read_text(recipe_path))
        for number, stage in enumerate(stages):
            run_stage(stage, f"[{number + 1}/{len(stages)}]", out, forced=number >= forced_from)
        judge_as_asked(recipe, out)
        findings = write_report(out, _timings_s(out, names))
    _print_findings(findings, out)
    return findings.result


def run_report_again(
    out: Path, required_speed_up: float | None, earlier: dict[str, Any] | None
) -> Result:
    """Computes the load test's report and the recipe's anew from what the stages left below `out`;
    returns what result.json holds.

    Times and environment stay those of the run, where it got as far as result.json. Raises
    UserError if a stage's result is missing or damaged.
    """
    if (out / RESULT_FILE).exists():
        before = read_result(out)
        timings_s, environment = before.timings_s, before.environment
    else:
        stages = plan_stages(load_recipe(out / RECIPE_COPY), out)
        timings_s, environment = _timings_s(out, [stage.name for stage in stages]), None
    with results_in(out, RECIPE_COPY):
        report_again(Places(out).load_test, required_speed_up, earlier)
        findings = write_report(out, timings_s, environment)
    _print_findings(findings, out)
    return findings.result


def _timings_s(out: Path, stages: Sequence[str]) -> dict[str, float]:
    return {name: stage_record(out, name)["seconds"] for name in stages}


def _print_findings(findings: Findings, out: Path) -> None:
    print_table("Dense against pruned", SUMMARY_COLUMNS, summary_rows(findings))
    for gate, judged in findings.result.judgements.items():
        print(visible(f"Verdict on {gate}: {judged.verdict}: {judged.reason}"))
    print(f"Report: {out / PAGE}")


def judge_as_asked(recipe: Recipe, out: Path) -> None:
    """Draws the load test's report anew by the recipe's gate: `gradmap report` may have left it
    with another one."""
    asked = recipe.loadtest
    earlier = read_report(asked.against) if asked.against else None
    report_again(Places(out).load_test, asked.require_speedup, earlier)


@dataclass(frozen=True)
class PlannedStage:
    """What a stage would do: run, or nothing because it is done and no input of it would change."""

    name: str
    runs: bool
    estimate: Estimate


def plan_run(
    recipe_path: Path, out: Path, from_stage: str | None, fresh: bool
) -> list[PlannedStage]:
    """What `run_recipe` would do, and how long it would take. Nothing is written, and no weights
    are read or fetched.

    Raises UserError as that does before the first stage.
    """
    recipe = load_recipe(recipe_path)
    stages = plan_stages(recipe, out)
    forced_from = _forced_from([stage.name for stage in stages], from_stage, fresh)
    require_inputs(recipe, stages)
    require_evaluation(recipe)
    config = read_config(recipe.model, recipe.gguf_file)
    require_schedule(recipe, config)
    require_formats(recipe, config)
    refuse_foreign_directory(out, RECIPE_COPY)
    estimates = estimate_stages(recipe, Speeds(config, measure_disk(cache_directory())))
    planned: list[PlannedStage] = []
    changed: list[Path] = []
    for number, stage in enumerate(stages):
        affected = any(is_within(path, changed) for path in stage.inputs)
        runs = number >= forced_from or affected or not is_done(stage, out)
        changed += stage.outputs if runs else ()
        planned.append(PlannedStage(stage.name, runs, estimates[stage.name]))
    return planned


def planned_rows(planned: Sequence[PlannedStage]) -> list[tuple[str, ...]]:
    """Stage, whether it runs, minutes, memory and what is available."""
    rows: list[tuple[str, ...]] = []
    for stage in planned:
        if stage.runs:
            cells = estimate_cells(stage.estimate, stage.estimate.seconds)
            rows.append((stage.name, "runs", *cells))
        else:
            rows.append((stage.name, "done, inputs unchanged", "", "", ""))
    return rows


def _forced_from(names: Sequence[str], from_stage: str | None, fresh: bool) -> int:
    """The number of the first stage that runs whatever is done. Raises UserError for an unknown
    one."""
    if from_stage is not None and from_stage not in names:
        raise UserError(f"Unknown stage {from_stage!r} for --from; stages are {', '.join(names)}.")
    if fresh:
        return 0
    return len(names) if from_stage is None else names.index(from_stage)
