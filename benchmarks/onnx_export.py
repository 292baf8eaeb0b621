"""Our ONNX export against optimum's, of the same checkpoint: what each costs, and what its graph is
worth.

    make consumers
    python -m benchmarks.onnx_export out/demo/hf [--rounds 3] [--consumers .venv-consumers]

Each round exports with both, in turn; each checks its graph in ONNX Runtime before it ends. Then
both graphs are loaded by the same onnxruntime, compared with transformers in float32, and generate
in turn (benchmarks.generation).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.generation import Contestant, Result, compete
from gradmap.common.children import peak_bytes, run_process
from gradmap.common.console import print_table, say
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.common.reading import read_json
from gradmap.runtimes.onnx_session import ONNX_FILE, OnnxCausalLM

OURS, OPTIMUM = "ours", "optimum"


@dataclass(frozen=True)
class Export:
    """The cost of one export: seconds, CPU seconds of all its processes, and the peak memory
    (bytes) of the largest."""

    seconds: float
    cpu_s: float
    peak_bytes: int


def main(
    checkpoint: Annotated[
        Path, typer.Argument(help="A directory that gradmap export wrote, format hf.")
    ],
    rounds: int = 3,
    consumers: Path = Path(".venv-consumers"),
    out: Path = Path("out/benchmark/onnx_export.json"),
) -> None:
    exports: dict[str, list[Export]] = {OURS: [], OPTIMUM: []}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as temporary:  # /tmp may be memory
        commands = commands_for(checkpoint, consumers, Path(temporary))
        graphs = {OURS: Path(temporary, OURS, "onnx"), OPTIMUM: Path(temporary, OPTIMUM)}
        for number in range(rounds):
            for name, command in commands.items():
                say(f"Round {number + 1} of {rounds}: {name}")
                shutil.rmtree(Path(temporary, name), ignore_errors=True)
                exports[name].append(timed(command))
        sizes = {name: size_of(graph) for name, graph in graphs.items()}
        errors = {name: largest_error(checkpoint, graph) for name, graph in graphs.items()}
        layers = read_json(checkpoint / "config.json")["num_hidden_layers"]
        contestants = [
            Contestant(graph, "pruned", "onnx", name, layers, 1) for name, graph in graphs.items()
        ]
        speeds = dict(
            zip(graphs, compete(contestants, rounds, prompt_tokens=128, new_tokens=64), strict=True)
        )
    generated = {
        name: {"tokens_per_s": speed.tokens_per_s, "prefill_s": speed.prefill_s}
        for name, speed in speeds.items()
    }
    described = {name: list(map(asdict, of_name)) for name, of_name in exports.items()}
    result = {"exports": described, "bytes": sizes, "largest_error": errors, "generated": generated}
    write_json(out, {"environment": describe_environment(), **result})
    columns = (
        "",
        "export (s)",
        "CPU (s)",
        "peak (GB)",
        "graph (MB)",
        "largest error",
        "prefill (ms)",
        "tokens/s",
    )
    rows = [row(name, exports[name], sizes[name], errors[name], speeds[name]) for name in graphs]
    print_table(
        f"ONNX export of {layers} layers, float32: medians of {rounds} rounds (range)",
        columns,
        rows,
    )


def commands_for(checkpoint: Path, consumers: Path, out: Path) -> dict[str, list[str]]:
    ours = [
        sys.executable,
        "-m",
        "gradmap",
        "export",
        "--model",
        str(checkpoint),
        "--format",
        "onnx",
    ]
    theirs = [str(consumers / "bin" / "optimum-cli"), "export", "onnx", "--model", str(checkpoint)]
    theirs += [
        "--task",
        "text-generation-with-past",
        "--library",
        "transformers",
        str(out / OPTIMUM),
    ]
    return {OURS: [*ours, "--out", str(out / OURS)], OPTIMUM: theirs}


def timed(command: Sequence[str]) -> Export:
    started = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    code, usage = run_process(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    if code != 0:
        raise SystemExit(f"{' '.join(command)} ended with code {code}; run it by hand to see why.")
    return Export(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak_bytes(usage))


def size_of(graph: Path) -> int:
    """Bytes, with those of a graph whose weights are in files beside it."""
    return sum(file.stat().st_size for file in graph.glob(f"{ONNX_FILE}*"))


@torch.inference_mode()
def largest_error(checkpoint: Path, graph: Path) -> float:
    """Largest difference of a logit from transformers', over 128 random tokens."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 200, (1, 128), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    logits, _ = OnnxCausalLM(graph).step(ids.numpy(), None)
    difference: Tensor = model(ids).logits - torch.from_numpy(logits)
    return difference.abs().max().item()


def row(
    name: str, exports: Sequence[Export], size: int, error: float, speed: Result
) -> tuple[str, ...]:
    seconds = [export.seconds for export in exports]
    cpu_s = median(export.cpu_s for export in exports)
    peak = max(export.peak_bytes for export in exports)
    rates = speed.tokens_per_s
    return (
        name,
        f"{median(seconds):.0f} ({min(seconds):.0f}-{max(seconds):.0f})",
        f"{cpu_s:.0f}",
        f"{peak / 1e9:.1f}",
        f"{size / 1e6:.0f}",
        f"{error:.1e}",
        f"{1000 * median(speed.prefill_s):.0f}",
        f"{median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})",
    )


if __name__ == "__main__":
    typer.run(main)
