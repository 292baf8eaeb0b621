r"""What choosing layers costs: gradient scores as the paper computes them, ours, and other methods'
passes.

    python -m benchmarks.importance --model DIR [--gguf-file NAME] --calibration SPEC \
        [--samples 8] [--rounds 2]
    # LLaMA-2-7B's shape, bfloat16, on a GPU
    python -m benchmarks.importance --random-7b [--samples 128]

A run removes `--remove` layers one after another, scoring the smaller model each time. Every run is
a process of its own (so that its peak memory is its own), and the methods take turns, round after
round. All of them use the same samples; but for `repair`, which fits on some and measures on the
others, cost is proportional to their number. Timed is the choosing alone, after a warm-up on two
samples. FLOPs of matrix products are counted before, in a process apart, for counting takes time:
once for each method, in the first dtype that it runs in.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import torch
import typer
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.flops import counted
from benchmarks.random_model import make_random_llama
from benchmarks.scaling import LLAMA_2_7B
from gradmap.cli import quiet_libraries
from gradmap.common.console import print_table, say
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.data.calibration import Calibration, build_calibration
from gradmap.methods.gradmap.scores import GradientScorer, gradient_scores_reference
from gradmap.methods.repair import RepairScorer
from gradmap.methods.selection import (
    ReducedModelScorer,
    Scorer,
    Selection,
    Subject,
    select,
)
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.layerwise import losses_from, record_layer_calls, sample_losses
from gradmap.model.loading import load_model, load_tokenizer
from gradmap.model.precision import computing_in, weights_dtype
from gradmap.model.sublayers import Pair, Unit

BATCH_SIZE = 4  # of the methods that only run forward
# The loss of a block that may not go: no other is as high, and it is a number.
STAYS = torch.finfo(torch.float64).max


@dataclass(frozen=True)
class Run:
    """One method that chose all layers. seconds: of all decisions. peak_bytes: of the process,
    beyond what it held once the model was loaded. flop: of the method's matrix products, counted in
    another run."""

    method: str
    dtype: str
    seconds: float
    model_bytes: int
    peak_bytes: int
    removal_order: list[int | str]
    first_scores: list[float]
    flop: int


@torch.inference_mode()
def run_forward(model: LayeredModel, input_ids: Tensor) -> Tensor:
    """The floor: no score at all, the last layer goes. input_ids (N, T) -> (L,) float64, as for all
    measures here."""
    for batch in input_ids.split(BATCH_SIZE):
        _whole_losses(model, batch)
    return -torch.arange(len(model.layers), dtype=torch.float64)


@torch.inference_mode()
def score_by_block_influence(model: LayeredModel, input_ids: Tensor) -> Tensor:
    """ShortGPT: 1 - cos(input, output) of every layer, one forward pass. input_ids (N, T) ->
    (L,) float64."""
    layers = model.layers
    totals = torch.zeros(len(layers), dtype=torch.float64)
    for batch in input_ids.split(BATCH_SIZE):
        hidden, calls = record_layer_calls(model, batch.to(model.device))
        for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
            leaving = call.run(layer, hidden)
            totals[index] += (1 - torch.cosine_similarity(hidden, leaving, dim=-1)).sum().item()
            hidden = leaving
    return totals


@torch.inference_mode()
def score_by_loss_as_released(model: LayeredModel, input_ids: Tensor) -> Tensor:
    """SLEB: the loss without each block in turn, from whole forward passes. The first and last
    block stay. input_ids (N, T) -> (L,) float64."""
    count = len(model.layers)
    losses = torch.full((count,), STAYS, dtype=torch.float64)
    for candidate in range(1, count - 1):
        total = 0.0
        with model.without([Pair.of_layer(candidate)]):
            for batch in input_ids.split(BATCH_SIZE):
                total += _whole_losses(model, batch).sum().item()
        losses[candidate] = total
    return losses


def _whole_losses(model: LayeredModel, ids: Tensor) -> Tensor:
    """The loss of each sample (b,) for ids (b, T), from a whole forward pass."""
    logits = model.network(input_ids=ids.to(model.device), use_cache=False).logits
    return sample_losses(logits, ids)


@torch.inference_mode()
def score_by_loss_with_prefixes(model: LayeredModel, input_ids: Tensor) -> Tensor:
    """SLEB, each candidate from the hidden state that enters it on. input_ids (N, T) -> (L,)
    float64."""
    layers = list(model.layers)
    losses = torch.full((len(layers),), STAYS, dtype=torch.float64)
    losses[1:-1] = 0
    for batch in input_ids.split(BATCH_SIZE):
        ids = batch.to(model.device)
        entering, calls = record_layer_calls(model, ids)
        for candidate in range(len(layers) - 1):
            if candidate > 0:
                hidden = entering
                behind = slice(candidate + 1, None)
                for layer, call in zip(layers[behind], calls[behind], strict=True):
                    hidden = call.run(layer, hidden)
                losses[candidate] += losses_from(model, hidden, ids).sum().item()
            entering = calls[candidate].run(layers[candidate], entering)
    return losses


def score_as_written(model: LayeredModel, input_ids: Tensor) -> Tensor:
    """The paper's Eq. 7, every gradient formed. input_ids (N, T) -> (L,) float64."""
    return gradient_scores_reference(model, input_ids)


# What scores the layers of a subject.
Method = Callable[[Subject], Scorer]


def measured_by(measure: Callable[[LayeredModel, Tensor], Tensor]) -> Method:
    def measure_layers(
        model: LayeredModel, input_ids: Tensor, unit: Unit, advance: Advance
    ) -> Tensor:
        return measure(model, input_ids)

    return lambda subject: ReducedModelScorer(subject, measure_layers)


METHODS: dict[str, Method] = {
    "naive": measured_by(score_as_written),
    "ours": GradientScorer,
    "repair": RepairScorer,
    "forward only": measured_by(run_forward),
    "ShortGPT": measured_by(score_by_block_influence),
    "SLEB, prefix caching": measured_by(score_by_loss_with_prefixes),
    "SLEB as released": measured_by(score_by_loss_as_released),
}
IN_FLOAT32 = [f"{method}@float32" for method in METHODS]
IN_AUTOCAST = [f"{method}@autocast" for method in METHODS if method != "naive"]
DEFAULT_RUNS = [*IN_FLOAT32, *IN_AUTOCAST, "ours@bfloat16"]


def main(
    model: str | None = None,
    gguf_file: str | None = None,
    calibration: Annotated[
        str, typer.Option(help="Text source, see gradmap/data/text_specs.py.")
    ] = "wikipedia",
    random_7b: bool = False,
    run: Annotated[
        list[str] | None, typer.Option(help="METHOD@DTYPE; all if none is given.")
    ] = None,
    remove: int = 8,
    samples: int = 8,
    tokens: int = 128,
    rounds: int = 2,
    out: Path = Path("out/benchmark/importance.json"),
    worker: Annotated[bool, typer.Option(hidden=True)] = False,
    count: Annotated[bool, typer.Option("--count", hidden=True)] = False,
) -> None:
    if worker:
        assert run is not None
        method, _, dtype = run[0].partition("@")
        subject = _subject_of(model, gguf_file, calibration, dtype, samples, tokens)
        with computing_in(dtype, subject.model.network):
            measure = _count if count else _time
            print(json.dumps(measure(METHODS[method], subject, remove)))
        return
    names = run or (
        ["naive@bfloat16", "ours@bfloat16", "forward only@bfloat16"] if random_7b else DEFAULT_RUNS
    )
    source = [] if random_7b else ["--model", model or "", "--calibration", calibration]
    source += ["--gguf-file", gguf_file] if gguf_file else []
    common = [*source, f"--remove={remove}", f"--samples={samples}", f"--tokens={tokens}"]
    first_names = {name.partition("@")[0]: name for name in reversed(names)}
    flops = {
        method: _in_a_process(name, *common, "--count")["flop"]
        for method, name in first_names.items()
    }
    runs: list[Run] = []
    for number in range(rounds):
        for name in names:
            method, _, dtype = name.partition("@")
            runs.append(Run(method, dtype, **_in_a_process(name, *common), flop=flops[method]))
            say(
                f"round {number + 1}/{rounds}, {name}: {runs[-1].seconds:.1f} s, "
                f"{runs[-1].removal_order}"
            )
    size = {"remove": remove, "samples": samples, "tokens": tokens}
    write_json(
        out, {"environment": describe_environment(), **size, "runs": list(map(asdict, runs))}
    )
    _print(runs, names, samples)


def _in_a_process(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.importance", *arguments, "--worker", "--run", name]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def _subject_of(
    path: str | None, gguf_file: str | None, calibration: str, dtype: str, samples: int, tokens: int
) -> Subject:
    """The model and its samples; a random one of LLaMA-2-7B's shape without a path."""
    quiet_libraries()
    if path is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = make_random_llama(LLAMA_2_7B, weights_dtype(dtype), device)
        return Subject(model, Calibration("random", 0, torch.randint(32000, (samples, tokens))))
    checkpoint = open_checkpoint(path, gguf_file)
    drawn = build_calibration(
        load_tokenizer(checkpoint.directory), calibration, samples, tokens, seed=42
    )
    return Subject(LayeredModel.of(load_model(checkpoint, dtype)), drawn)


def _count(method: Method, subject: Subject, remove: int) -> dict[str, int]:
    return {"flop": counted(lambda: _choose(method, subject, remove))}


def _time(method: Method, subject: Subject, remove: int) -> dict[str, Any]:
    """The fields of a Run, but for its names and FLOPs."""
    model = subject.model.network
    # mapped weights are in memory only once they were read
    for parameter in model.parameters():
        parameter.sum()
    # forgets the peak of loading
    Path("/proc/self/clear_refs").write_text("5")
    held = psutil.Process().memory_info().rss
    two_samples = replace(subject.calibration, input_ids=subject.calibration.input_ids[:2])
    _choose(method, replace(subject, calibration=two_samples), 1)
    started = time.perf_counter()
    selection = _choose(method, subject, remove)
    seconds = time.perf_counter() - started
    if model.device.type == "cuda":
        held, peak = 0, torch.cuda.max_memory_allocated()
    else:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * next(
            int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")
        )
    return {
        "seconds": seconds,
        "model_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "peak_bytes": peak - held,
        "removal_order": [pair.written for pair in selection.removal_order],
        "first_scores": list(selection.steps[0].scores.values()),
    }


def _choose(method: Method, subject: Subject, remove: int) -> Selection:
    return select(
        partial(method, subject),
        subject,
        remove,
        one_shot=False,
        done=(),
        record=lambda step: None,
    )


def _print(runs: Sequence[Run], names: Sequence[str], samples: int) -> None:
    """Prints medians over rounds; ratios to other runs of the same round, with their range."""
    per_name: dict[str, list[Run]] = {name: [] for name in names}
    for run in runs:
        per_name[f"{run.method}@{run.dtype}"].append(run)
    naive = per_name[names[0]]

    def times(longer: Sequence[Run], shorter: Sequence[Run]) -> str:
        ratios = [long.seconds / short.seconds for long, short in zip(longer, shorter, strict=True)]
        return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

    rows = []
    for name, own in per_name.items():
        first = own[0]
        ours_in_dtype = per_name.get(f"ours@{first.dtype}")
        comparable = {first.method, naive[0].method} <= {"naive", "ours"}
        agreement = ""
        if comparable:
            agreement = describe_agreement(first.first_scores, naive[0].first_scores)
        seconds = median(run.seconds for run in own)
        peak = max(run.peak_bytes for run in own)
        removed = " ".join(map(str, first.removal_order))
        rows.append(
            (
                name,
                f"{seconds / samples:.2f}",
                times(naive, own),
                times(own, ours_in_dtype) if ours_in_dtype else "",
                f"{first.flop / 1e12:.2f}",
                f"{peak / 1e9:.2f}",
                agreement,
                removed if first.method != "forward only" else "",
            )
        )
    against = (f"{names[0]} / it", "it / ours")
    columns = (
        "run",
        "s / sample",
        *against,
        "TFLOP",
        "peak GB",
        "score error, rank corr.",
        "removed",
    )
    print_table("Choosing layers", columns, rows)


def describe_agreement(scores: Sequence[float], true: Sequence[float]) -> str:
    """The largest relative error, and the correlation of the ranks."""
    error = max(abs(score / base - 1) for score, base in zip(scores, true, strict=True))
    return f"{error:.1e}, {spearmanr(true, scores).statistic:.4f}"


if __name__ == "__main__":
    typer.run(main)
