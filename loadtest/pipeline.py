"""`gradmap run`: the stages of a recipe, each in its own process, none repeated while its inputs stay the same."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gradmap.console import print_table, say
from gradmap.errors import UserError
from gradmap.files import read_json, refuse_foreign_directory, sha256_file, sha256_json, write_json
from gradmap.verdict import EXIT_CODES
from loadtest.recipe import Recipe, load_recipe
from loadtest.report import judgements, summary_rows, write_report

RECIPE_COPY = "recipe.yaml"
STAGES_DIRECTORY = ".stages"


@dataclass(frozen=True)
class Stage:
    """One `gradmap` command. inputs: files and directories it reads; output: what must exist when it is done.

    verdicts: whether exit codes other than 0 are results of a gate and not failures.
    """

    name: str
    arguments: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path
    verdicts: bool = False


def plan_stages(recipe: Recipe, out: Path) -> list[Stage]:
    """Turns a recipe into command lines. `baseline` is the dense model, exported as the pruned one is."""
    model = ("--model", recipe.model, *_flags({"gguf_file": recipe.gguf_file, "allow_pickle": recipe.allow_pickle}))
    model_files = (Path(recipe.model, recipe.gguf_file or ""),)
    plan, evaluation = out / "plan", out / "eval.json"
    export_flags = [flag for name in recipe.export.formats for flag in ("--format", name)]
    task_data = () if recipe.eval.task_data is None else (Path(recipe.eval.task_data),)
    text_files = tuple(path for source in recipe.eval.perplexity.values() for path in _source_files(source))
    return [
        Stage(
            "prune",
            ("prune", *model, *_flags(recipe.prune.model_dump()), "--out", str(plan)),
            (*model_files, *_source_files(recipe.prune.calibration)),
            plan / "plan.json",
        ),
        Stage(
            "eval",
            (
                *("eval", *model, "--plan", str(plan), "--out", str(evaluation)),
                *_flags(_evaluation_options(recipe)),
            ),
            (*model_files, plan, *text_files, *task_data),
            evaluation,
            verdicts=True,
        ),
        Stage(
            "export",
            ("export", *model, "--plan", str(plan), *export_flags, "--eval", str(evaluation), "--out", str(out)),
            (*model_files, plan, evaluation),
            out / "vllm" / "gradmap.json",
        ),
        Stage(
            "baseline",
            ("export", *model, "--format", "vllm", "--eval", str(evaluation), "--out", str(out / "dense")),
            (*model_files, evaluation),
            out / "dense" / "vllm" / "gradmap.json",
        ),
        Stage(
            "loadtest",
            (
                *("loadtest", "--dense", str(out / "dense" / "vllm"), "--pruned", str(out / "vllm")),
                *(*_flags(recipe.loadtest.model_dump()), "--out", str(out / "loadtest")),
            ),
            (out / "dense" / "vllm" / "gradmap.json", out / "vllm" / "gradmap.json"),
            out / "loadtest" / "report.json",
            verdicts=True,
        ),
    ]


def _evaluation_options(recipe: Recipe) -> dict[str, Any]:
    texts = [f"{name}={source}" for name, source in recipe.eval.perplexity.items()]
    tasks = ",".join(recipe.eval.tasks) or None
    return recipe.eval.model_dump() | {"perplexity": texts, "tasks": tasks} | recipe.quality.model_dump()


def run_recipe(recipe_path: Path, out: Path, from_stage: str | None, fresh: bool) -> dict[str, Any]:
    """Runs what is not done yet, writes the reports, prints the table; returns result.json.

    Raises UserError if the recipe is wrong or a stage fails; finished stages stay finished.
    """
    recipe = load_recipe(recipe_path)
    stages = plan_stages(recipe, out)
    names = [stage.name for stage in stages]
    if from_stage is not None and from_stage not in names:
        raise UserError(f"Unknown stage {from_stage!r} for --from; stages are {', '.join(names)}.")
    refuse_foreign_directory(out, RECIPE_COPY)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(recipe_path, out / RECIPE_COPY)
    forced_from = 0 if fresh else names.index(from_stage) if from_stage else len(stages)
    for number, stage in enumerate(stages):
        _run_stage(stage, f"[{number + 1}/{len(stages)}]", out, forced=number >= forced_from)
    timings_s = {name: read_json(_marker(out, name))["seconds"] for name in names}
    result = write_report(out, timings_s)
    print_table("Dense against pruned", ("", "dense", "pruned", "pruned / dense"), summary_rows(result))
    for gate, judgement in judgements(result).items():
        print(f"Verdict on {gate}: {judgement['verdict']}: {judgement['reason']}")
    print(f"Report: {out / 'report.html'}")
    return result


def stage_key(stage: Stage) -> str:
    """Hashes all that a stage's result depends on: its command, its inputs' bytes, and our version."""
    inputs = {str(path): _hash_path(path) for path in stage.inputs}
    return sha256_json([version("gradmap"), stage.arguments, inputs])


def _run_stage(stage: Stage, label: str, out: Path, forced: bool) -> None:
    key = stage_key(stage)
    marker = _marker(out, stage.name)
    if not forced and stage.output.exists() and marker.exists() and read_json(marker)["key"] == key:
        say(f"{label} {stage.name}: done before, inputs unchanged")
        return
    say(f"{label} {stage.name}")
    started = time.monotonic()
    marker.unlink(missing_ok=True)
    code = subprocess.run([sys.executable, "-m", "gradmap", *stage.arguments], check=False).returncode
    accepted = set(EXIT_CODES.values()) if stage.verdicts else {0}
    if code not in accepted or not stage.output.exists():
        raise UserError(f"Stage {stage.name} failed with exit code {code}; mend it and run again to go on from there.")
    write_json(marker, {"key": key, "seconds": round(time.monotonic() - started, 1)})


def _marker(out: Path, stage_name: str) -> Path:
    return out / STAGES_DIRECTORY / f"{stage_name}.json"


def _hash_path(path: Path) -> Any:
    """A file's SHA-256; of a directory, those of its files by name; None if there is nothing (a hub id)."""
    if path.is_dir():
        return {str(file.relative_to(path)): sha256_file(file) for file in sorted(path.rglob("*")) if file.is_file()}
    return sha256_file(path) if path.is_file() else None


def _source_files(source: str) -> tuple[Path, ...]:
    """The path in a text SPEC, if it names one."""
    kind, _, rest = source.partition(":")
    if kind == "file":
        return (Path(rest.partition("#")[0]),)
    return (Path(rest.rpartition(":")[0]),) if kind == "disk" else ()


def _flags(values: dict[str, Any]) -> list[str]:
    """{"one_shot": True, "remove": 8, "limit": None, "x": [1, 2]} -> --one-shot --remove=8 --x=1 --x=2."""
    flags: list[str] = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags += [option] if value else []
        elif value is not None:
            each: Sequence[Any] = value if isinstance(value, list) else [value]
            flags += [f"{option}={one}" for one in each]
    return flags
