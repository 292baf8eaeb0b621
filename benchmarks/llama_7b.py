"""A drill on one GPU: what pruning LLaMA-2-7B's shape takes, step by step within minutes, beside
what costs predict.

    python -m benchmarks.llama_7b --no-serve [--minutes 12]
    # and a load test of two servers
    python -m benchmarks.llama_7b --tokenizer DIR --calibration SPEC --minutes 60
    # to try the drill, on a CPU
    python -m benchmarks.llama_7b --no-serve --shape pico

A quarter of the layers goes, with 128 x 128 tokens. The steps are those of `gradmap prune`, what is
known least first, then a profile of the slowest. Each stands alone, so that one that fails spoils
no other: what a step would get from those before it (which layers go) is the same for all. Weights
and samples are random, for time depends on sizes alone; they are made on the GPU in bfloat16, and
nothing is read from a disk or a hub.

Every result is in the file as soon as it exists. A drill that is started again does what is not
there yet; no step is begun once the minutes are over. The load test needs 30 GB of disk and vLLM,
see benchmarks.llama_7b_serving. For the first step the paper has 123 s and 13.7 GB, on an A40.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.llama_7b_steps import STEPS, DrillStep, Facts, Task, make_case
from benchmarks.profiling import RECORDED_S, profile_tables
from benchmarks.scaling import HARDWARE, LLAMA_2_7B, SHAPES
from gradmap.common.console import print_table, say
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.common.reading import read_json
from gradmap.costs.steps import CalibrationSize, Hardware
from gradmap.model.shape import Shape

PICO = Shape("pico", width=64, inner=96, layers=8, kv_share=0.5, vocabulary=200)
KNOWN_SHAPES = {shape.name.lower(): shape for shape in (*SHAPES, PICO)}
KNOWN_HARDWARE = (*HARDWARE, Hardware("H200", 989e12, 4.8e12, 141e9))
PROFILE, LOAD_TEST = "profile", "load test"
PROFILE_AFTER_AT_MOST_S = 60.0


def machine() -> str:
    environment = describe_environment()
    return environment.get("gpu", environment["cpu"])


@dataclass(frozen=True)
class Record:
    """The file with all results so far, step by step: facts with `seconds`, an `error`, or why it
    was `not_begun`.

    task: what was done on which machine, which is the same for all of them.
    """

    path: Path
    task: dict[str, Any]
    steps: dict[str, Facts]

    @classmethod
    def open(cls, path: Path, task: dict[str, Any]) -> Record:
        """The results so far, read from the file where there is one. Raises BadParameter if the
        file is about another task."""
        known = read_json(path) if path.exists() else {"task": task, "steps": {}}
        if known["task"] != task:
            raise typer.BadParameter(
                f"{path} holds a drill of {known['task']}, not of {task}; name another file"
            )
        return cls(path, task, known["steps"])

    def add(self, name: str, facts: Facts) -> None:
        self.steps[name] = facts
        write_json(
            self.path,
            {"environment": describe_environment(), "task": self.task, "steps": self.steps},
        )

    def has(self, name: str) -> bool:
        return "seconds" in self.steps.get(name, {})

    def run(self, name: str, ends: float, work: Callable[[], Facts]) -> None:
        """Does the work and records what came of it, unless that is known, or the time is over."""
        if self.has(name):
            say(f"{name}: measured before")
            return
        if time.monotonic() > ends:
            say(f"{name}: not begun, the minutes are over")
            self.add(name, {"not_begun": "the minutes were over"})
            return
        try:
            self.add(name, work())
            say(f"{name}: {self.steps[name]['seconds']:.1f} s")
        except Exception as error:
            traceback.print_exc()
            self.add(name, {"error": f"{type(error).__name__}: {error}"})


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(KNOWN_SHAPES)}.")] = "llama-2-7b",
    samples: int = 128,
    tokens: int = 128,
    minutes: Annotated[float, typer.Option(help="No step is begun after so many.")] = 12.0,
    out: Path = Path("out/benchmark/llama_7b.json"),
    serve: Annotated[
        bool, typer.Option(help="End with a load test of the dense and the pruned model.")
    ] = True,
    tokenizer: Annotated[
        Path | None, typer.Option(help="To serve: a model directory with a tokenizer.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="To serve: a text source, see gradmap/data/text_specs.py.")
    ] = None,
    directory: Annotated[Path, typer.Option(help="To serve: where models are written.")] = Path(
        "out/benchmark/llama-7b"
    ),
    prompt_tokens: int = 1024,
    pairs: int = 6,
) -> None:
    ends = time.monotonic() + 60 * minutes
    if shape.lower() not in KNOWN_SHAPES:
        raise typer.BadParameter(
            f"{shape} is none of {', '.join(KNOWN_SHAPES)}", param_hint="--shape"
        )
    if serve and (tokenizer is None or calibration is None):
        raise typer.BadParameter(
            "the load test needs --tokenizer and --calibration; give both, or --no-serve"
        )
    task = Task(KNOWN_SHAPES[shape.lower()], CalibrationSize(samples, tokens))
    if serve and task.shape is not LLAMA_2_7B:
        raise typer.BadParameter(
            f"the load test is of {LLAMA_2_7B.name}'s shape; give --no-serve with another"
        )
    record = Record.open(out, task.described() | {"machine": machine()})
    for name, step in STEPS.items():
        record.run(name, ends, partial(measure, step, task))
    record.run(PROFILE, ends, partial(profile_slowest, record, task))
    if serve:
        assert tokenizer is not None and calibration is not None
        record.run(
            LOAD_TEST,
            ends,
            partial(load_test, task, directory, tokenizer, calibration, prompt_tokens, pairs),
        )
    report(record, task)
    if any("error" in facts for facts in record.steps.values()):
        raise typer.Exit(1)


def measure(step: DrillStep, task: Task) -> Facts:
    """The step's facts, its seconds, and the most memory that was held on the GPU meanwhile."""
    case, on_gpu = make_case(task), torch.cuda.is_available()
    free_memory()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    found = step.run(case)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        **found,
    }


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def profile_slowest(record: Record, task: Task) -> Facts:
    """A profile of the step that took longest; not of its beginning, which is special."""
    measured_s = {name: record.steps[name]["seconds"] for name in STEPS if record.has(name)}
    if not measured_s:
        raise RuntimeError("no step was measured, so that none can be profiled")
    started = time.perf_counter()
    slowest = max(measured_s, key=measured_s.__getitem__)
    case, after_s = make_case(task), min(measured_s[slowest] / 3, PROFILE_AFTER_AT_MOST_S)
    layers = case.model.layers
    tables = profile_tables(lambda: STEPS[slowest].run(case), layers, after_s)
    return {"seconds": time.perf_counter() - started, "step": slowest, **tables}


def load_test(
    task: Task, directory: Path, tokenizer: Path, calibration: str, prompt_tokens: int, pairs: int
) -> Facts:
    # what it needs is not on every machine that prunes
    from benchmarks.llama_7b_serving import load_test_both

    # the servers need the memory
    make_case.cache_clear()
    free_memory()
    started = time.perf_counter()
    found = load_test_both(directory, tokenizer, calibration, task.removed, prompt_tokens, pairs)
    return {"seconds": time.perf_counter() - started, **found}


def report(record: Record, task: Task) -> None:
    """Prints what is recorded; predictions where the hardware is known."""
    hardware = next((known for known in KNOWN_HARDWARE if known.name in machine()), None)
    columns = ("step", "seconds", "goal", "peak GB", "predicted", "predicted / measured - 1")
    rows = [describe_step(name, record.steps[name], task, hardware) for name in STEPS]
    print_table(
        f"{task.shape.name}'s shape, {task.remove} of {task.shape.layers} layers removed",
        columns,
        rows,
    )
    if record.has(PROFILE):
        profiled = record.steps[PROFILE]
        print(
            f"{profiled['step']}, {RECORDED_S:g} s of it:",
            profiled["device"],
            profiled["cpu"],
            sep="\n",
        )
    if record.has(LOAD_TEST):
        from benchmarks.llama_7b_serving import print_both

        print_both(record.steps[LOAD_TEST], hardware, task.remove)


def describe_step(
    name: str, facts: Facts, task: Task, hardware: Hardware | None
) -> tuple[str, ...]:
    step = STEPS[name]
    seconds, peak_bytes = facts.get("seconds"), facts.get("peak_bytes")
    predicted_s = None if hardware is None else step.predict(task, hardware)
    return (
        name,
        f"{seconds:.1f}" if seconds is not None else "failed" if "error" in facts else "not begun",
        f"{step.goal_s}" if step.goal_s is not None and task.shape is LLAMA_2_7B else "",
        f"{peak_bytes / 1e9:.1f}" if peak_bytes is not None else "",
        f"{predicted_s:.1f}" if predicted_s is not None else "",
        f"{predicted_s / seconds - 1:+.0%}"
        if predicted_s is not None and seconds is not None
        else "",
    )


if __name__ == "__main__":
    typer.run(main)
