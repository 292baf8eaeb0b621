r"""GradMAP's stage 2 in closed form against its Adam, on the same activations and objective
(Eq. 10-12).

    python -m benchmarks.compensation --model DIR [--gguf-file NAME] --calibration SPEC \
        [--remove 26,25,20,7,14,27,13,5] [--samples 128] [--epochs 10] [--rounds 3]

Activations are collected once and are not timed: both need them. Timed are, in turn in every round,
the Gram matrices and the solution, and every epoch of Adam (learning rate 1e-3, one sample a step).
The objective is Adam's own: the mean over samples of the squared error, plus 1e-3 times the squared
distance of W' from I.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from gradmap.cli import quiet_libraries
from gradmap.common.console import print_table, say
from gradmap.common.environment import describe_environment
from gradmap.common.files import write_json
from gradmap.data.calibration import build_calibration
from gradmap.methods.compensation import Pruned
from gradmap.methods.features import Fit, all_features
from gradmap.methods.gradmap.adam import errors_of_output, objective, train_projection
from gradmap.methods.gradmap.projection import mean_drift
from gradmap.methods.least_squares import ridge_sums, solve_ridge
from gradmap.methods.ridge import REGULARISATION
from gradmap.model.batching import Batches, forward_batch
from gradmap.model.checkpoint import open_checkpoint
from gradmap.model.layered import LayeredModel
from gradmap.model.loading import load_model, load_tokenizer
from gradmap.model.sublayers import Pair, Part, Sublayer


@dataclass(frozen=True)
class Round:
    """What one round measured: seconds, and values of the objective; Adam's after every epoch."""

    closed_form_s: float
    closed_form: float
    adam_s: list[float]
    adam: list[float]


def main(
    model: Annotated[str, typer.Option()],
    calibration: Annotated[str, typer.Option()],
    gguf_file: str | None = None,
    remove: str = "26,25,20,7,14,27,13,5",
    samples: int = 128,
    tokens: int = 128,
    epochs: int = 10,
    rounds: int = 3,
    out: Path = Path("out/benchmark/compensation.json"),
) -> None:
    quiet_libraries()
    checkpoint = open_checkpoint(model, gguf_file)
    drawn = build_calibration(
        load_tokenizer(checkpoint.directory), calibration, samples, tokens, seed=42
    )
    removed = tuple(map(Pair.parse, remove.split(",")))
    loaded = load_model(checkpoint, "float32")
    batches = Batches(forward_batch(drawn.input_ids, loaded.device))
    pruned = Pruned(LayeredModel.of(loaded), drawn, removed, batches)
    drift = mean_drift(pruned)
    layer = max(drift, key=drift.__getitem__)
    ffn = Sublayer(layer, Part.FFN)
    added, missing = all_features(pruned, Fit(ffn, goal=ffn), {})
    untouched = missing.square().mean().item()
    say(f"Layer {layer} drifted most; objective without a correction: {untouched:.4g}")
    measured = [measure(added, missing, epochs) for _ in range(rounds)]
    described = [asdict(found) for found in measured]
    write_json(
        out,
        {
            "environment": describe_environment(),
            "layer": layer,
            "none": untouched,
            "rounds": described,
        },
    )
    report(measured, untouched)


def measure(added: Tensor, missing: Tensor, epochs: int) -> Round:
    """One round. added (N, T, f): the features of the layer's output. missing (N, T, d): what it
    lacks to the dense model's."""
    started = time.perf_counter()
    gram, cross = ridge_sums(added, missing, None)
    update = solve_ridge(gram, cross, REGULARISATION * missing.numel())
    closed_form_s = time.perf_counter() - started
    exact, wanted = added.double(), missing.double()
    adam_s, adam = [], []
    training = train_projection(
        torch.zeros_like(update).float(), errors_of_output(added, missing), len(added), epochs, 0
    )
    for _ in range(epochs):
        started = time.perf_counter()
        trained = next(training).double()
        adam_s.append(time.perf_counter() - started)
        adam.append(objective(trained, exact @ trained.mT - wanted).item())
    return Round(closed_form_s, objective(update, exact @ update.mT - wanted).item(), adam_s, adam)


def report(rounds: list[Round], untouched: float) -> None:
    rows = [("no correction", f"{untouched:.4g}", "", "")]
    exact_s = statistics.median(found.closed_form_s for found in rounds)
    rows.append(("closed form", f"{rounds[0].closed_form:.4g}", f"{exact_s:.3f}", ""))
    for epoch in range(len(rounds[0].adam)):
        until_s = [sum(found.adam_s[: epoch + 1]) for found in rounds]
        ratios = [s / found.closed_form_s for s, found in zip(until_s, rounds, strict=True)]
        seconds = statistics.median(until_s)
        spread = f"{statistics.median(ratios):.0f}x ({min(ratios):.0f}-{max(ratios):.0f})"
        rows.append(
            (f"Adam, {epoch + 1} epochs", f"{rounds[0].adam[epoch]:.4g}", f"{seconds:.2f}", spread)
        )
    print_table("Stage 2", ("", "objective", "s (median)", "times the closed form's"), rows)


if __name__ == "__main__":
    typer.run(main)
