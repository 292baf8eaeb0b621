"""The streaming fold against `cp` of the same bytes, on a random checkpoint of LLaMA-2-7B's shape
(13.5 GB in bf16).

    python -m benchmarks.fold [--directory DIR] [--rounds 3] [--layers 32]

Needs three times the checkpoint's size on the disk of DIR. Each round folds (8 of 32 layers
dropped, W' folded into one down projection, into shards of 5 GB, hashed, fsynced) and copies the
folded files with `cp` and `sync -f`, in turn; once with the input dropped from the page cache
(cold), once with it in there as far as memory allows (warm).
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from export.safetensors_writer import write_safetensors
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.common.reading import read_json
from gradmap.model.model_files import INDEX_NAME
from gradmap.model.safetensors_reader import TensorSpec

SHARD_BYTES = 5 * 10**9
# Prints the seconds from after Python's imports, which no longer checkpoint makes longer, to the
# end of the last fsync.
FOLD = """
import sys, time, torch
from pathlib import Path
from export.fold import plan_fold, write_folded
from gradmap.model.architectures import architecture_of
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.corrections import Place, Projection
from gradmap.model.sublayers import Pair
from gradmap.common.files import atomic_directory
started = time.perf_counter()
checkpoint = open_checkpoint(sys.argv[1])
layers, width = checkpoint.config["num_hidden_layers"], checkpoint.config["hidden_size"]
removed = [Pair.of_layer(layers // 2 + number) for number in range(layers // 4)]
changes = {Place(layers - 1, "mlp.down_proj"): (Projection(torch.eye(width, dtype=torch.float64)),)}
folded = plan_fold(checkpoint, architecture_of(checkpoint.config), removed, changes, torch.bfloat16)
with atomic_directory(Path(sys.argv[2]), "model.safetensors") as directory:
    write_folded(directory, folded, int(sys.argv[3]))
print(time.perf_counter() - started)
"""


@dataclass(frozen=True)
class Round:
    """Seconds to write `bytes`, with the input dropped from the page cache (cold) or read before
    (warm)."""

    temperature: str
    bytes: int
    fold_s: float
    cp_s: float


def main(
    directory: Annotated[Path, typer.Option(help="Where to work; it must have the space.")] = Path(
        "out/benchmark"
    ),
    rounds: int = 3,
    layers: int = 32,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the checkpoint for other experiments.")
    ] = False,
) -> None:
    source = directory / f"llama-7b-shape-{layers}"
    if not (source / "config.json").exists():
        write_random_checkpoint(source, layers)
    folded, copied = directory / "folded", directory / "copied"
    results = []
    for temperature in ("cold", "warm"):
        for number in range(rounds):
            prepare = evict if temperature == "cold" else read_through
            fold_s = measure(fold, prepare, source, folded)
            copy_s = measure(copy, prepare, folded, copied)
            written = sum(path.stat().st_size for path in folded.iterdir())
            results.append(Round(temperature, written, fold_s, copy_s))
            print(
                f"{temperature} {number}: fold {written / fold_s / 1e9:.2f} GB/s, cp "
                f"{written / copy_s / 1e9:.2f} GB/s"
            )
    for temperature in ("cold", "warm"):
        ratios = [
            result.cp_s / result.fold_s for result in results if result.temperature == temperature
        ]
        print(
            f"{temperature}: fold at {statistics.median(ratios):.0%} of cp ({min(ratios):.0%} to "
            f"{max(ratios):.0%})"
        )
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak resident memory of a child: {peak_bytes / 1e9:.2f} GB")
    rows = [asdict(result) for result in results]
    write_json(
        directory / "fold.json",
        {"results": rows, "peak_bytes": peak_bytes, **describe_environment()},
    )
    for path in (folded, copied) if keep else (folded, copied, source):
        shutil.rmtree(path)


def write_random_checkpoint(directory: Path, layers: int, vocabulary: int = 32000) -> None:
    """Writes a Llama of 7B's shape in bf16. The same random block fills all weights: only sizes
    matter here."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()
        }
    block = (0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))).bfloat16()
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[TensorSpec]] = [[]]
    for name, shape in shapes.items():
        if sum(spec.bytes for spec in shards[-1]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(TensorSpec(name, torch.bfloat16, shape))
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / name, specs, fill(specs, block))
        weight_map |= {spec.name: name for spec in specs}
    write_json(directory / INDEX_NAME, {"metadata": {}, "weight_map": weight_map})
    (directory / "config.json").write_text(json.dumps(config.to_dict()))


def write_random_model(directory: Path, layers: int, tokenizer: Path) -> int:
    """Writes a random checkpoint with the tokenizer of another model directory, unless it is there.
    Returns its vocabulary."""
    vocabulary = int(read_json(tokenizer / "config.json")["vocab_size"])
    if not (directory / "config.json").exists():
        write_random_checkpoint(directory, layers, vocabulary)
        for path in tokenizer.glob("tokenizer*"):
            shutil.copy(path, directory)
    return vocabulary


def fill(specs: list[TensorSpec], block: Tensor) -> Iterator[Tensor]:
    """A tensor of each spec's shape: ones for a vector, else the block (n,) again and again."""
    for spec in specs:
        if len(spec.shape) == 1:
            yield torch.ones(spec.shape, dtype=block.dtype)
        else:
            count = spec.bytes // block.itemsize
            repeats = -(-count // len(block))
            yield block.repeat(repeats)[:count].reshape(spec.shape)


def fold(source: Path, target: Path) -> float:
    command = [sys.executable, "-c", FOLD, str(source), str(target), str(SHARD_BYTES)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return float(result.stdout)


def copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "--recursive", str(source), str(target)], check=True)
    subprocess.run(["sync", "--file-system", str(target)], check=True)
    return time.perf_counter() - started


def measure(
    work: Callable[[Path, Path], float], prepare: Callable[[Path], None], source: Path, target: Path
) -> float:
    """Seconds until the written bytes are on the disk."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    prepare(source)
    return work(source, target)


def evict(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


if __name__ == "__main__":
    typer.run(main)
