r"""Zero-shot evaluation: lm-evaluation-harness with its own transformers model against ours, on the
same documents.

    python -m benchmarks.evaluation --model DIR [--gguf-file NAME] --task-data DIR \
        [--tasks paper] [--limit 100]
                                    [--rounds 2] [--run harness@float32] [--run ours@bfloat16]

`harness` is its default: one request at a time. `harness, batch 16` is its other usual setting.
Prompts, targets and metrics are the harness's in all of them. Every run is a process of its own,
and they take turns. Timed is the evaluation of each task, with the rendering of its prompts, after
a warm-up; loading is not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from gradmap.cli import quiet_libraries
from gradmap.common.console import print_table, say
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.evaluation.comparison import mean_estimate
from gradmap.evaluation.scoring import Scorer
from gradmap.evaluation.table import with_error
from gradmap.evaluation.tasks import LoadedTask, expand_names, load_task, score_task_with
from gradmap.evaluation.transformers_backend import TransformersBackend
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.loading import load_model, load_tokenizer
from gradmap.model.precision import computing_in

DEFAULT_RUNS = ["harness@float32", "harness, batch 16@bfloat16", "ours@float32", "ours@bfloat16"]
WARM_UP = "openbookqa"


@dataclass(frozen=True)
class TaskRun:
    """One task, evaluated once. seconds: of the task. value: accuracy by the task's main metric."""

    seconds: float
    documents: int
    value: float
    stderr: float | None


def harness_model(model: Any, tokenizer: Any, dtype: str, batch_size: int = 1) -> Any:
    """The harness's own model class around the same weights."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)


def our_model(model: Any, tokenizer: Any, dtype: str) -> Any:
    """The harness's model class that `gradmap eval` uses, without the cache."""
    from gradmap.evaluation.harness_model import HarnessModel

    return HarnessModel(Scorer(TransformersBackend(model, dtype), None, dtype), tokenizer, "ours")


METHODS: dict[str, Callable[[Any, Any, str], Any]] = {
    "harness": harness_model,
    "harness, batch 16": partial(harness_model, batch_size=16),
    "ours": our_model,
}


def main(
    model: Annotated[str, typer.Option()],
    task_data: Annotated[Path, typer.Option()],
    gguf_file: str | None = None,
    tasks: str = "paper",
    limit: Annotated[
        int | None, typer.Option(help="Documents of each task; all if not given.")
    ] = None,
    run: Annotated[
        list[str] | None, typer.Option(help="METHOD@DTYPE; all if none is given.")
    ] = None,
    rounds: int = 1,
    out: Path = Path("out/benchmark/evaluation.json"),
    worker: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    if worker:
        assert run is not None
        loaded = [
            load_task(name, task_data, limit, seed=0) for name in expand_names(tasks.split(","))
        ]
        measured = _measure(
            run[0], model, gguf_file, load_task(WARM_UP, task_data, 8, seed=0), loaded
        )
        print(json.dumps(_described(measured)))
        return
    source = ["--model", model, "--task-data", str(task_data), "--tasks", tasks]
    source += ["--gguf-file", gguf_file] if gguf_file else []
    source += ["--limit", str(limit)] if limit else []
    names = run or DEFAULT_RUNS
    runs: dict[str, list[dict[str, TaskRun]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            command = [
                sys.executable,
                "-m",
                "benchmarks.evaluation",
                *source,
                "--worker",
                "--run",
                name,
            ]
            finished = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ
            )
            result = json.loads(finished.stdout.splitlines()[-1])
            runs[name].append({task: TaskRun(**found) for task, found in result.items()})
            say(f"round {number + 1}/{rounds}, {name}: {_seconds(runs[name][-1]):.1f} s")
            described = {name: list(map(_described, rounds_of)) for name, rounds_of in runs.items()}
            write_json(
                out, {"environment": describe_environment(), "limit": limit, "runs": described}
            )
    _print(runs)


def _measure(
    name: str, path: str, gguf_file: str | None, warm_up: LoadedTask, tasks: Sequence[LoadedTask]
) -> dict[str, TaskRun]:
    quiet_libraries()
    method, _, dtype = name.partition("@")
    checkpoint = open_checkpoint(path, gguf_file)
    tokenizer, model = load_tokenizer(checkpoint.directory), load_model(checkpoint, dtype)
    evaluated = METHODS[method](model, tokenizer, dtype)
    measured = {}
    with computing_in(dtype, model):
        score_task_with(warm_up, evaluated)
        for task in tasks:
            started = time.perf_counter()
            scores = score_task_with(task, evaluated)
            seconds = time.perf_counter() - started
            estimate = mean_estimate(np.array(scores.values[scores.metric]))
            measured[task.name] = TaskRun(
                seconds, len(scores.documents), estimate.value, estimate.stderr
            )
            say(f"{name}, {task.name}: {estimate.value:.4f} in {seconds:.1f} s")
    return measured


def _described(run: Mapping[str, TaskRun]) -> dict[str, dict[str, Any]]:
    return {task: asdict(of_task) for task, of_task in run.items()}


def _seconds(run: Mapping[str, TaskRun]) -> float:
    return sum(of_task.seconds for of_task in run.values())


def _print(runs: Mapping[str, Sequence[Mapping[str, TaskRun]]]) -> None:
    """Prints accuracies of the first round; seconds of all rounds; ratios to the first run in the
    same round."""
    base, *_ = runs.values()
    columns = ("%", *runs)
    rows: list[tuple[str, ...]] = []
    for task in base[0]:
        accuracies = [with_error(asdict(of_run[0][task]), 100, 2) for of_run in runs.values()]
        rows.append((task, *accuracies))
    for number, of_base in enumerate(base):
        seconds = [_seconds(of_run[number]) for of_run in runs.values()]
        base_s = _seconds(of_base)
        speed_ups = [f"{run_s:.1f} s, {base_s / run_s:.2f}x" for run_s in seconds]
        rows.append((f"round {number + 1}", *speed_ups))
    print_table("Evaluation", columns, rows)


if __name__ == "__main__":
    typer.run(main)
