"""What choosing layers costs: gradient scores as the paper computes them, ours, and other methods' passes.

    python -m benchmarks.importance --model DIR [--gguf-file NAME] --calibration SPEC [--samples 8] [--rounds 2]
    python -m benchmarks.importance --random-7b [--samples 128]          # LLaMA-2-7B's shape, bfloat16, on a GPU

A run removes `--remove` layers one after another, scoring the smaller model each time. Every run is a process of its
own (so that its peak memory is its own), and the methods take turns, round after round. All of them use the same
samples, cost being proportional to their number. Timed is the choosing alone, after a warm-up on one sample.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import torch
import typer
from scipy.stats import spearmanr
from torch import Tensor

from gradmap.architectures import Architecture, architecture_of, without_layers
from gradmap.batching import Batches
from gradmap.calibration import build_calibration
from gradmap.checkpoint import load_model, load_tokenizer, open_checkpoint
from gradmap.cli import quiet_libraries
from gradmap.console import print_table, say
from gradmap.environment import describe_environment
from gradmap.files import write_json
from gradmap.importance import fitting_batches, layer_scores, layer_scores_reference
from gradmap.layerwise import losses_from, record_layer_calls, sample_losses
from gradmap.precision import computing_in

BATCH_SIZE = 4  # of the methods that only run forward
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}

# The scores of the layers alive; the lowest goes. Of a model, without the layers removed before.
Score = Callable[[Any, Architecture, Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """seconds: of all decisions. peak_bytes: of the process, beyond what it held once the model was loaded."""

    method: str
    dtype: str
    seconds: float
    model_bytes: int
    peak_bytes: int
    removal_order: list[int]
    first_scores: list[float]


def ours() -> Score:
    """Measures how many samples fit once in a run, as `gradmap prune` does."""
    batches: list[Batches] = []

    def score(model: Any, architecture: Architecture, input_ids: Tensor) -> Tensor:
        if not batches:
            batches.append(fitting_batches(model, architecture, input_ids, False))
        return layer_scores(model, architecture, input_ids, batches[0])

    return score


@torch.inference_mode()
def run_forward(model: Any, architecture: Architecture, input_ids: Tensor) -> Tensor:
    """The floor: no score at all, the last layer goes."""
    for batch in input_ids.split(BATCH_SIZE):
        sample_losses(model(input_ids=batch.to(model.device), use_cache=False).logits, batch)
    return -torch.arange(len(architecture.layer_list(model)), dtype=torch.float64)


@torch.inference_mode()
def score_by_block_influence(model: Any, architecture: Architecture, input_ids: Tensor) -> Tensor:
    """ShortGPT: 1 - cos(input, output) of every layer, one forward pass."""
    layers = architecture.layer_list(model)
    totals = torch.zeros(len(layers), dtype=torch.float64)
    for batch in input_ids.split(BATCH_SIZE):
        hidden, calls = record_layer_calls(model, layers, batch.to(model.device))
        for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
            leaving = call.run(layer, hidden)
            totals[index] += (1 - torch.cosine_similarity(hidden, leaving, dim=-1)).sum().item()
            hidden = leaving
    return totals


@torch.inference_mode()
def score_by_loss_as_released(model: Any, architecture: Architecture, input_ids: Tensor) -> Tensor:
    """SLEB: the loss without each block in turn, from whole forward passes. The first and last block stay."""
    count = len(architecture.layer_list(model))
    losses = torch.full((count,), torch.inf, dtype=torch.float64)
    for candidate in range(1, count - 1):
        with without_layers(model, architecture, [candidate]):
            losses[candidate] = sum(
                sample_losses(model(input_ids=batch.to(model.device), use_cache=False).logits, batch).sum().item()
                for batch in input_ids.split(BATCH_SIZE)
            )
    return losses


@torch.inference_mode()
def score_by_loss_with_prefixes(model: Any, architecture: Architecture, input_ids: Tensor) -> Tensor:
    """SLEB, each candidate from the hidden state that enters it on."""
    layers = list(architecture.layer_list(model))
    losses = torch.full((len(layers),), torch.inf, dtype=torch.float64)
    losses[1:-1] = 0
    for batch in input_ids.split(BATCH_SIZE):
        ids = batch.to(model.device)
        entering, calls = record_layer_calls(model, layers, ids)
        for candidate in range(len(layers) - 1):
            if candidate > 0:
                hidden = entering
                for layer, call in zip(layers[candidate + 1 :], calls[candidate + 1 :], strict=True):
                    hidden = call.run(layer, hidden)
                losses[candidate] += losses_from(model, layers, hidden, ids).sum().item()
            entering = calls[candidate].run(layers[candidate], entering)
    return losses


METHODS: dict[str, Score] = {
    "naive": layer_scores_reference,
    "ours": ours(),
    "forward only": run_forward,
    "ShortGPT": score_by_block_influence,
    "SLEB, prefix caching": score_by_loss_with_prefixes,
    "SLEB as released": score_by_loss_as_released,
}
DEFAULT_RUNS = [
    *(f"{method}@float32" for method in METHODS),
    *(f"{method}@autocast" for method in METHODS if method != "naive"),
    "ours@bfloat16",
]


def main(
    model: str | None = None,
    gguf_file: str | None = None,
    calibration: Annotated[str, typer.Option(help="Text source, see gradmap/texts.py.")] = "wikipedia",
    random_7b: bool = False,
    run: Annotated[list[str] | None, typer.Option(help="METHOD@DTYPE; all if none is given.")] = None,
    remove: int = 8,
    samples: int = 8,
    tokens: int = 128,
    rounds: int = 2,
    out: Path = Path("out/benchmark/importance.json"),
    worker: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    if worker:
        assert run is not None
        print(json.dumps(asdict(_measure(run[0], model, gguf_file, calibration, remove, samples, tokens))))
        return
    names = run or (["naive@bfloat16", "ours@bfloat16", "forward only@bfloat16"] if random_7b else DEFAULT_RUNS)
    source = [] if random_7b else ["--model", model or "", "--calibration", calibration]
    source += ["--gguf-file", gguf_file] if gguf_file else []
    common = [*source, f"--remove={remove}", f"--samples={samples}", f"--tokens={tokens}", "--worker"]
    runs: list[Run] = []
    for number in range(rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.importance", *common, "--run", name]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            runs.append(Run(**json.loads(finished.stdout.splitlines()[-1])))
            say(f"round {number + 1}/{rounds}, {name}: {runs[-1].seconds:.1f} s, {runs[-1].removal_order}")
    size = {"remove": remove, "samples": samples, "tokens": tokens}
    write_json(out, {"environment": describe_environment(), **size, "runs": [asdict(one) for one in runs]})
    _print(runs, names, samples)


def _measure(
    name: str, path: str | None, gguf_file: str | None, calibration: str, remove: int, samples: int, tokens: int
) -> Run:
    quiet_libraries()
    method, _, dtype = name.partition("@")
    if path is None:
        model, architecture, input_ids = _random_7b(samples, tokens)
    else:
        checkpoint = open_checkpoint(path, gguf_file)
        tokenizer = load_tokenizer(checkpoint.directory)
        input_ids = build_calibration(tokenizer, calibration, max(2, samples), tokens, seed=42).input_ids[:samples]
        model, architecture = load_model(checkpoint, dtype), architecture_of(checkpoint.config)
    for parameter in model.parameters():
        parameter.sum()  # mapped weights are in memory only once they were read
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of loading
    held = psutil.Process().memory_info().rss
    with computing_in(dtype, model):
        METHODS[method](model, architecture, input_ids[:1])
        started = time.perf_counter()
        order, first_scores = _choose(METHODS[method], model, architecture, input_ids, remove)
        seconds = time.perf_counter() - started
    if model.device.type == "cuda":
        held, peak = 0, torch.cuda.max_memory_allocated()
    else:
        status = Path("/proc/self/status").read_text()
        peak = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Run(method, dtype, seconds, weights, peak - held, order, first_scores)


def _choose(
    score: Score, model: Any, architecture: Architecture, input_ids: Tensor, remove: int
) -> tuple[list[int], list[float]]:
    """The removal order (original indices), and the scores of the whole model."""
    alive = list(range(len(architecture.layer_list(model))))
    removed: list[int] = []
    first_scores: list[float] = []
    for _ in range(remove):
        with without_layers(model, architecture, removed):
            scores = score(model, architecture, input_ids)
        first_scores = first_scores or scores.tolist()
        removed.append(alive.pop(int(scores.argmin())))
    return removed, first_scores


def _random_7b(samples: int, tokens: int) -> tuple[Any, Architecture, Tensor]:
    """Weights do not matter for speed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, **LLAMA_2_7B)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return (
        model.eval().requires_grad_(False),
        architecture_of(config.to_dict()),
        torch.randint(32000, (samples, tokens)),
    )


def _print(runs: Sequence[Run], names: Sequence[str], samples: int) -> None:
    """Medians over rounds; ratios to other runs of the same round, with their range."""
    per_name = {name: [one for one in runs if f"{one.method}@{one.dtype}" == name] for name in names}
    naive = per_name[names[0]]

    def times(longer: Sequence[Run], shorter: Sequence[Run]) -> str:
        ratios = [one.seconds / other.seconds for one, other in zip(longer, shorter, strict=True)]
        return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

    rows = []
    for name, own in per_name.items():
        ours_in_dtype = per_name.get(f"ours@{own[0].dtype}")
        gradient = own[0].method in ("naive", "ours")
        correlation = spearmanr(naive[0].first_scores, own[0].first_scores).statistic if gradient else None
        error = max(abs(one / base - 1) for one, base in zip(own[0].first_scores, naive[0].first_scores, strict=True))
        rows.append(
            (
                name,
                f"{median(one.seconds for one in own) / samples:.2f}",
                times(naive, own),
                times(own, ours_in_dtype) if ours_in_dtype else "",
                f"{max(one.peak_bytes for one in own) / 1e9:.2f}",
                f"{error:.1e}, {correlation:.4f}" if gradient else "",
                " ".join(map(str, own[0].removal_order)) if own[0].method != "forward only" else "",
            )
        )
    columns = ("run", "s / sample", f"{names[0]} / it", "it / ours", "peak GB", "score error, rank corr.", "removed")
    print_table("Choosing layers", columns, rows)


if __name__ == "__main__":
    typer.run(main)
