r"""Tokens per second of one stream, artifact against artifact, in transformers, ONNX Runtime,
genai, vLLM and llama.cpp.

    gradmap export --model M --plan PLAN --format hf --format onnx --format onnx-genai \
        --format vllm --out pruned
    python -m benchmarks.generation dense/* pruned/* [--rounds 5] [--prompt-tokens 128] \
        [--new-tokens 64]

All artifacts stay loaded, each in its own process, and generate in turn, round after round: what
disturbs the machine disturbs all. Done once with one thread and once with all cores. Ratios are
taken within a round; the table has their median and range, against the first `hf` artifact of the
same model, and of a model with fewer layers against the deepest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from export.formats.gguf import GGUF, LLAMA_CPP
from export.integrity import read_record
from gradmap.common.console import print_table, progress, say
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json


@dataclass(frozen=True)
class Contestant:
    """An artifact with a number of threads."""

    directory: Path
    model: str
    form: str
    stored: str
    layers: int
    threads: int


@dataclass(frozen=True)
class Result:
    """The speed of a contestant, per round: tokens per second after the first one, and seconds
    until the first one."""

    contestant: Contestant
    tokens_per_s: list[float]
    prefill_s: list[float]


def main(
    artifacts: Annotated[
        list[Path], typer.Argument(help="Directories that gradmap export has written.")
    ],
    rounds: int = 5,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    out: Path = Path("out/benchmark/generation.json"),
) -> None:
    results = []
    for threads in sorted({1, len(os.sched_getaffinity(0))}):
        contestants = [describe(directory, threads) for directory in artifacts]
        say(f"{threads} thread(s): loading {len(contestants)} artifacts")
        results += compete(contestants, rounds, prompt_tokens, new_tokens)
    title = f"Tokens per second after {prompt_tokens}, median of {rounds} interleaved rounds"
    columns = (
        "artifact",
        "threads",
        "tokens/s",
        "prefill ms",
        "x its hf",
        "range",
        "x deepest",
        "range",
    )
    print_table(title, columns, [row_of(result, results) for result in results])
    write_json(
        out,
        {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "results": [
                asdict(result) | {"contestant": label(result.contestant)} for result in results
            ],
            "environment": describe_environment(),
        },
    )


def describe(directory: Path, threads: int) -> Contestant:
    record = read_record(directory)
    stored = record.quantise or record.dtype
    return Contestant(directory, record.name, record.format, stored, record.layers, threads)


def label(contestant: Contestant) -> str:
    return f"{contestant.layers} layers, {contestant.form} {contestant.stored}"


def compete(
    contestants: list[Contestant], rounds: int, prompt_tokens: int, new_tokens: int
) -> list[Result]:
    workers = [start(contestant, prompt_tokens, new_tokens) for contestant in contestants]
    results = [Result(contestant, [], []) for contestant in contestants]
    try:
        with progress("Generating", rounds * len(workers)) as advance:
            for _ in range(rounds):
                for worker, result in zip(workers, results, strict=True):
                    timing = json.loads(ask(worker))
                    result.tokens_per_s.append((new_tokens - 1) / timing["decode_s"])
                    result.prefill_s.append(timing["prefill_s"])
                    advance(1)
    finally:
        for worker in workers:
            worker.kill()
    return results


def start(contestant: Contestant, prompt_tokens: int, new_tokens: int) -> subprocess.Popen[str]:
    arguments = [contestant.form, str(contestant.directory)]
    arguments += [str(number) for number in (contestant.threads, prompt_tokens, new_tokens)]
    command = [sys.executable, "-m", "benchmarks.generation_worker"]
    if contestant.form == GGUF.name:
        command = LLAMA_CPP.python_command(str(Path(__file__).with_name("llama_cpp_worker.py")))
    worker = subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(contestant.threads), "HF_HUB_OFFLINE": "1"},
    )
    while (line := read_line(worker)) != "ready":
        say(line)
    return worker


def ask(worker: subprocess.Popen[str]) -> str:
    assert worker.stdin is not None
    print(file=worker.stdin, flush=True)
    return read_line(worker)


def read_line(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{worker.args!r} ended; run it by hand to see why.")
    return line.strip()


def row_of(result: Result, results: list[Result]) -> tuple[str, ...]:
    own = result.contestant
    peers = [other for other in results if other.contestant.threads == own.threads]
    baseline = [
        other
        for other in peers
        if (other.contestant.form, other.contestant.model) == ("hf", own.model)
    ]
    same = [
        other
        for other in peers
        if (other.contestant.form, other.contestant.stored) == (own.form, own.stored)
    ]
    deepest = max(same, key=lambda other: other.contestant.layers)
    return (
        label(own),
        str(own.threads),
        f"{median(result.tokens_per_s):.1f}",
        f"{1000 * median(result.prefill_s):.0f}",
        *ratio_cells(result, baseline[0] if baseline else None),
        *ratio_cells(result, deepest if deepest is not result else None),
    )


def ratio_cells(result: Result, other: Result | None) -> tuple[str, str]:
    if other is None:
        return "-", "-"
    ratios = [own / base for own, base in zip(result.tokens_per_s, other.tokens_per_s, strict=True)]
    return f"{median(ratios):.2f}", f"{min(ratios):.2f}-{max(ratios):.2f}"


if __name__ == "__main__":
    typer.run(main)
