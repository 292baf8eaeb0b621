"""`gradmap run`: the stages of a recipe, each in its own process, none repeated while its inputs
stay the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export.formats import ExportSettings, choose_target
from export.integrity import SCHEMA_VERSION as ARTIFACT_SCHEMA
from gradmap.common.console import print_table
from gradmap.common.errors import UserError
from gradmap.common.files import cache_directory, write_text
from gradmap.common.outputs import refuse_foreign_directory, results_in
from gradmap.common.quoting import visible
from gradmap.common.reading import read_text
from gradmap.common.stages import Stage, as_flags, is_done, is_within, run_stage, stage_record
from gradmap.costs.speed import measure_disk
from gradmap.data.text_specs import source_files
from gradmap.evaluation.result import SCHEMA_VERSION as EVALUATION_SCHEMA
from gradmap.evaluation.result import records_beside
from gradmap.evaluation.tasks import expand_names, require_tasks
from gradmap.model.checkpoint import open_checkpoint, read_config
from gradmap.model.loading import resolve_device
from gradmap.model.precision import weights_dtype
from gradmap.pruning.plan import SCHEMA_VERSION as PLAN_SCHEMA
from loadtest.estimates import Estimate, Speeds, estimate_cells, estimate_stages
from loadtest.outcome import measured_facts, read_report, report_again
from loadtest.recipe import Recipe, load_recipe
from loadtest.records import REPORTS
from loadtest.report import judgements, summary_rows, write_report
from loadtest.schema import SCHEMA_VERSION as LOAD_TEST_SCHEMA
from loadtest.settings import REQUIRED_SPEED_UP

RECIPE_COPY = "recipe.yaml"


def plan_stages(recipe: Recipe, out: Path) -> list[Stage]:
    """Turns a recipe into command lines. `baseline` is the dense model, exported as the pruned one
    is."""
    model = (
        "--model",
        recipe.model,
        *as_flags({"gguf_file": recipe.gguf_file, "allow_pickle": recipe.allow_pickle}),
    )
    model_files = (Path(recipe.model, recipe.gguf_file or ""),)
    plan, evaluation = out / "plan", out / "eval.json"
    task_data = () if recipe.eval.task_data is None else (Path(recipe.eval.task_data),)
    earlier = [Path(recipe.loadtest.against)] if recipe.loadtest.against else []
    prompt_files = source_files(recipe.loadtest.prompts) if recipe.loadtest.prompts else ()
    text_files = tuple(
        path for source in recipe.eval.perplexity.values() for path in source_files(source)
    )
    return [
        Stage(
            "prune",
            ("prune", *model, *as_flags(recipe.prune.model_dump()), "--out", str(plan)),
            (*model_files, *source_files(recipe.prune.calibration)),
            (plan,),
            schema=PLAN_SCHEMA,
        ),
        Stage(
            "eval",
            (
                *("eval", *model, "--plan", str(plan), "--out", str(evaluation)),
                *as_flags(_evaluation_options(recipe)),
            ),
            (*model_files, plan, *text_files, *task_data),
            (evaluation, records_beside(evaluation)),
            schema=EVALUATION_SCHEMA,
            verdicts=True,
        ),
        Stage(
            "export",
            (
                *(
                    "export",
                    *model,
                    "--plan",
                    str(plan),
                    "--eval",
                    str(evaluation),
                    "--out",
                    str(out),
                ),
                *as_flags(_export_options(recipe, recipe.export.formats)),
            ),
            (*model_files, plan, evaluation),
            tuple(out / name for name in recipe.export.formats),
            schema=ARTIFACT_SCHEMA,
        ),
        Stage(
            "baseline",
            (
                *("export", *model, "--eval", str(evaluation), "--out", str(out / "dense")),
                *as_flags(_export_options(recipe, ["vllm"])),
            ),
            (*model_files, evaluation),
            (out / "dense" / "vllm",),
            schema=ARTIFACT_SCHEMA,
        ),
        Stage(
            "loadtest",
            (
                *(
                    "loadtest",
                    "--dense",
                    str(out / "dense" / "vllm"),
                    "--pruned",
                    str(out / "vllm"),
                ),
                *(*as_flags(recipe.loadtest.model_dump()), "--out", str(out / "loadtest")),
            ),
            (
                out / "dense" / "vllm" / "gradmap.json",
                out / "vllm" / "gradmap.json",
                *earlier,
                *prompt_files,
            ),
            (out / "loadtest",),
            schema=LOAD_TEST_SCHEMA,
            verdicts=True,
            redrawn=tuple(out / "loadtest" / name for name in REPORTS),
            facts=partial(measured_facts, out / "loadtest"),
        ),
    ]


def _export_options(recipe: Recipe, formats: list[str]) -> dict[str, Any]:
    options = recipe.export.model_dump(exclude={"formats", "check_vllm"})
    return {"format": formats, **options, "no_check_vllm": not recipe.export.check_vllm}


def _evaluation_options(recipe: Recipe) -> dict[str, Any]:
    texts = [f"{name}={source}" for name, source in recipe.eval.perplexity.items()]
    tasks = ",".join(recipe.eval.tasks) or None
    return (
        recipe.eval.model_dump()
        | {"perplexity": texts, "tasks": tasks}
        | recipe.quality.model_dump()
    )


def require_inputs(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises UserError for what a late stage would not find, before the first one has taken its
    hours."""
    model = Path(
        recipe.model, recipe.gguf_file or ""
    )  # open_checkpoint looks for it, and it may be on the hub
    written: list[Path] = []
    for stage in stages:
        for path in stage.inputs:
            if path != model and not is_within(path, written) and not path.exists():
                raise UserError(f"{path}, which the recipe names, does not exist; check the path.")
        written += stage.outputs


def require_formats(recipe: Recipe, config: dict[str, Any]) -> None:
    """Likewise for what cannot be exported of a model with this config."""
    settings = ExportSettings(recipe.export.formats, recipe.export.dtype, recipe.export.quantise)
    for name in recipe.export.formats:
        choose_target(name, settings, config)


def require_evaluation(recipe: Recipe) -> None:
    """Likewise for what cannot be evaluated anywhere, or not on this machine."""
    asked = recipe.eval
    resolve_device(asked.device or "auto")
    if asked.dtype not in (None, "auto"):
        weights_dtype(asked.dtype)
    require_tasks(expand_names(",".join(asked.tasks)))


def run_recipe(recipe_path: Path, out: Path, from_stage: str | None, fresh: bool) -> dict[str, Any]:
    """Runs what is not done yet, writes the reports, prints the table; returns result.json.

    Raises UserError if the recipe is wrong or a stage fails; finished stages stay finished.
    """
    recipe = load_recipe(recipe_path)
    stages = plan_stages(recipe, out)
    names = [stage.name for stage in stages]
    forced_from = _forced_from(names, from_stage, fresh)
    require_inputs(recipe, stages)
    require_evaluation(recipe)
    require_formats(
        recipe, open_checkpoint(recipe.model, recipe.gguf_file, bool(recipe.allow_pickle)).config
    )
    with results_in(out, RECIPE_COPY):
        write_text(out / RECIPE_COPY, read_text(recipe_path))
        for number, stage in enumerate(stages):
            run_stage(stage, f"[{number + 1}/{len(stages)}]", out, forced=number >= forced_from)
        timings_s = {name: stage_record(out, name)["seconds"] for name in names}
        judge_as_asked(recipe, out)
        result = write_report(out, timings_s)
    print_table(
        "Dense against pruned", ("", "dense", "pruned", "pruned / dense"), summary_rows(result)
    )
    for gate, judgement in judgements(result).items():
        print(visible(f"Verdict on {gate}: {judgement['verdict']}: {judgement['reason']}"))
    print(f"Report: {out / 'report.html'}")
    return result


def judge_as_asked(recipe: Recipe, out: Path) -> None:
    """Draws the load test's report anew by the recipe's gate: `gradmap report` may have left it
    with another one."""
    asked = recipe.loadtest
    earlier = read_report(Path(asked.against)) if asked.against else None
    report_again(out / "loadtest", asked.require_speedup or REQUIRED_SPEED_UP, earlier)


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
    return [
        (stage.name, "runs", *estimate_cells(stage.estimate, stage.estimate.seconds))
        if stage.runs
        else (stage.name, "done, inputs unchanged", "", "", "")
        for stage in planned
    ]


def _forced_from(names: Sequence[str], from_stage: str | None, fresh: bool) -> int:
    """The number of the first stage that runs whatever is done. Raises UserError for an unknown
    one."""
    if from_stage is not None and from_stage not in names:
        raise UserError(f"Unknown stage {from_stage!r} for --from; stages are {', '.join(names)}.")
    return 0 if fresh else names.index(from_stage) if from_stage else len(names)
