"""A load test of two models of LLaMA-2-7B's shape on one GPU, for the drill of benchmarks.llama_7b.

Needs 30 GB of disk, and a GPU of 80 GB. Weights are random, and nothing is repaired: only sizes
matter here. The tokenizer is another model's, whose vocabulary the model gets. What is there
already is not done again. Both models are served at once, each from half of the GPU, and the load
test asks one at a time.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.fold import write_random_model
from benchmarks.scaling import LLAMA_2_7B
from gradmap.common.children import run_process
from gradmap.common.console import print_table, say
from gradmap.common.loopback import own_transport
from gradmap.common.reading import read_json
from gradmap.costs.steps import Hardware, decode_speed_up, prefill_speed_up
from gradmap.costs.timing import token_seconds
from gradmap.model.shape import Shape
from gradmap.model.sublayers import Pair
from serving.ports import free_port

READY_TIMEOUT_S = 600


def load_test_both(
    directory: Path,
    tokenizer: Path,
    calibration: str,
    removed: Sequence[Pair],
    prompt_tokens: int,
    pairs: int,
) -> dict[str, Any]:
    """The load test's report, and the vocabulary of the models."""
    dense, plan, pruned, loaded = (
        directory / name for name in ("dense", "plan", "vllm", "loadtest")
    )
    vocabulary = write_random_model(dense, LLAMA_2_7B.layers, tokenizer)
    choice = (
        "--selector",
        "manual",
        "--layers",
        ",".join(map(str, removed)),
        "--remove",
        len(removed),
    )
    quick = (
        "--compensator",
        "none",
        "--dtype",
        "bfloat16",
        "--samples",
        2,
        "--calibration",
        calibration,
    )
    once(plan / "plan.json", "prune", "--model", dense, *choice, *quick, "--out", plan)
    artifact = ("--plan", plan, "--format", "vllm", "--no-check-vllm", "--out", directory)
    once(pruned / "config.json", "export", "--model", dense, *artifact)
    with two_models(dense, pruned, directory) as urls:
        load = ("--vocabulary", vocabulary, "--prompt-tokens", prompt_tokens, "--pairs", pairs)
        once(
            loaded / "report.json",
            "loadtest",
            "--dense",
            urls[0],
            "--pruned",
            urls[1],
            *load,
            "--out",
            loaded,
        )
    return {"vocabulary": vocabulary, "report": read_json(loaded / "report.json")}


def once(made: Path, *command: str | int | Path) -> None:
    """Runs a command of gradmap's, unless what it makes is there. Raises RuntimeError if it is not
    made."""
    if made.exists():
        return
    started = time.perf_counter()
    code, _ = run_process([sys.executable, "-m", "gradmap", *map(str, command)])
    if not made.exists():
        raise RuntimeError(f"gradmap {command[0]} ended with code {code}; see above")
    say(f"{command[0]} took {time.perf_counter() - started:.0f} s")


@contextmanager
def two_models(dense: Path, pruned: Path, directory: Path) -> Iterator[tuple[str, str]]:
    """Serves both, and yields their URLs once both are ready."""
    port, admin_port = free_port(), free_port()
    command = [
        sys.executable,
        "-m",
        "gradmap",
        "serve",
        str(dense),
        "--compare",
        str(pruned),
        "--no-verify",
    ]
    command += [
        "--port",
        str(port),
        "--admin-port",
        str(admin_port),
        "--log",
        str(directory / "vllm.log"),
    ]
    server = subprocess.Popen(command)
    try:
        wait_until_ready(f"http://127.0.0.1:{admin_port}/readyz", server)
        yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    with httpx.Client(transport=own_transport(url)) as client:
        while time.monotonic() < deadline and server.poll() is None:
            with suppress(httpx.TransportError):
                if client.get(url).status_code == 200:
                    return
            time.sleep(0.5)
    raise RuntimeError("gradmap-serve did not become ready; see above")


def print_both(measured: dict[str, Any], hardware: Hardware | None, remove: int) -> None:
    shape = replace(LLAMA_2_7B, vocabulary=measured["vocabulary"])
    columns = ("", "measured", "predicted", "predicted / measured - 1")
    print_table("Both models served", columns, rows_of(measured["report"], shape, hardware, remove))


def rows_of(
    report: dict[str, Any], shape: Shape, hardware: Hardware | None, remove: int
) -> list[tuple[str, ...]]:
    """Rows of what was measured, what was predicted for it, and how far that was off; times only
    for known hardware."""
    rows: list[tuple[str, float, float]] = []
    if hardware is not None:
        tpot_s = report["arms"]["dense"]["concurrency_1"]["tpot_s"]["median"]
        rows.append(
            (
                "dense, a token of one stream (ms)",
                1000 * tpot_s,
                1000 * token_seconds(shape, hardware),
            )
        )
    for name, load in report["candidates"]["pruned"]["loads"].items():
        rows.append(
            (f"TPOT speed-up, {name}", load["tpot"]["value"], decode_speed_up(shape, remove))
        )
        rows.append(
            (f"TTFT speed-up, {name}", load["ttft"]["value"], prefill_speed_up(shape, remove))
        )
    return [
        (name, f"{found:.2f}", f"{predicted:.2f}", f"{predicted / found - 1:+.0%}")
        for name, found, predicted in rows
    ]
