"""LLaMA-2-7B's shape, from scores to two served models on one GPU, beside what benchmarks.scaling predicts for them.

    python -m benchmarks.llama_7b --tokenizer DIR --calibration SPEC [--directory out/benchmark/llama-7b] [--no-serve]

Needs 30 GB of disk in --directory, and a GPU of 80 GB; without one there are no predictions of times. Weights are
random: only sizes matter here. The tokenizer is that of DIR, whose vocabulary the model gets. What is there already
is not done again. Both models are served at once, each from half of the GPU, and the load test asks one at a time.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.fold import write_random_model
from benchmarks.scaling import HARDWARE, SHAPES
from gradmap.console import print_table, say
from gradmap.costs import (
    Hardware,
    decode_speed_up,
    default_seconds,
    prefill_speed_up,
    score_seconds,
    token_seconds,
)
from gradmap.environment import describe_environment
from gradmap.files import read_json, write_json
from gradmap.shape import Shape
from gradmap.stages import run_process
from serving.server import free_port

GRADMAP, BEST = "gradmap", "best"
LLAMA_7B = next(shape for shape in SHAPES if shape.name == "Llama-2-7B")
READY_TIMEOUT_S = 600


def main(
    tokenizer: Annotated[Path, typer.Option(help="A model directory with a tokenizer.")],
    calibration: Annotated[str, typer.Option(help="Text source, see gradmap/texts.py.")],
    directory: Path = Path("out/benchmark/llama-7b"),
    layers: int = 32,
    remove: int = 8,
    samples: int = 128,
    serve: bool = True,
    prompt_tokens: int = 1024,
    pairs: int = 6,
) -> None:
    dense, pruned, loaded = directory / "dense", directory / "vllm", directory / "loadtest"
    vocabulary = write_random_model(dense, layers, tokenizer)
    for preset in (GRADMAP, BEST):
        choice = ("--preset", preset, "--remove", remove, "--samples", samples, "--dtype", "bfloat16")
        plan = directory / preset
        once(plan / "plan.json", "prune", "--model", dense, *choice, "--calibration", calibration, "--out", plan)
    artifact = ("--plan", directory / BEST, "--format", "vllm", "--no-check-vllm", "--out", directory)
    once(pruned / "config.json", "export", "--model", dense, *artifact)
    measured = {preset: read_json(directory / preset / "plan.json")["timings_s"] for preset in (GRADMAP, BEST)}
    if serve:
        with two_models(dense, pruned, directory) as urls:
            load = ("--vocabulary", vocabulary, "--prompt-tokens", prompt_tokens, "--pairs", pairs)
            arms = ("--dense", urls[0], "--pruned", urls[1])
            once(loaded / "report.json", "loadtest", *arms, *load, "--out", loaded)
        measured["loadtest"] = read_json(loaded / "report.json")
    environment = describe_environment()
    write_json(directory.with_suffix(".json"), {"environment": environment, "measured": measured})
    shape = replace(LLAMA_7B, layers=layers, vocabulary=vocabulary)
    hardware = next((one for one in HARDWARE if one.name in environment.get("gpu", "")), None)
    columns = ("", "measured", "predicted", "predicted / measured - 1")
    title = f"{LLAMA_7B.name}'s shape, {remove} of {layers} layers removed"
    print_table(title, columns, rows_of(measured, shape, hardware, remove))


def once(made: Path, *command: str | int | Path) -> None:
    """Runs a command of gradmap's, unless what it makes is there."""
    if made.exists():
        return
    started = time.perf_counter()
    code, _ = run_process([sys.executable, "-m", "gradmap", *map(str, command)])
    if not made.exists():
        raise typer.Exit(code)
    say(f"{command[0]} took {time.perf_counter() - started:.0f} s")


@contextmanager
def two_models(dense: Path, pruned: Path, directory: Path) -> Iterator[tuple[str, str]]:
    """Serves both, and yields their URLs once both are ready."""
    port, admin_port = free_port(), free_port()
    command = [sys.executable, "-m", "gradmap", "serve", str(dense), "--compare", str(pruned), "--no-verify"]
    command += ["--port", str(port), "--admin-port", str(admin_port), "--log", str(directory / "vllm.log")]
    server = subprocess.Popen(command)
    try:
        wait_until_ready(f"http://127.0.0.1:{admin_port}/readyz", server)
        yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit("gradmap-serve did not become ready; see above.")


def rows_of(measured: dict[str, Any], shape: Shape, hardware: Hardware | None, remove: int) -> list[tuple[str, ...]]:
    """What was measured, what was predicted for it, and how far that was off; times only for known hardware."""
    rows: list[tuple[str, float, float]] = []
    if hardware is not None:
        default_s = sum(measured[BEST].values())
        rows.append(("the paper's scores (s)", measured[GRADMAP]["select"], score_seconds(shape, hardware, remove)))
        rows.append(("the default, selection and repair (s)", default_s, default_seconds(shape, hardware, remove)))
    if report := measured.get("loadtest"):
        if hardware is not None:
            tpot_s = report["arms"]["dense"]["concurrency_1"]["tpot_s"]["median"]
            rows.append(("dense, a token of one stream (ms)", 1000 * tpot_s, 1000 * token_seconds(shape, hardware)))
        loads = report["candidates"]["pruned"]["loads"]
        for name, load in loads.items():
            rows.append((f"TPOT speed-up, {name}", load["tpot"]["value"], decode_speed_up(shape, remove)))
            rows.append((f"TTFT speed-up, {name}", load["ttft"]["value"], prefill_speed_up(shape, remove)))
    return [
        (name, f"{found:.2f}", f"{predicted:.2f}", f"{predicted / found - 1:+.0%}") for name, found, predicted in rows
    ]


if __name__ == "__main__":
    typer.run(main)
