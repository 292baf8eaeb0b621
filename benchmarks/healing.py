r"""What `gradmap heal` takes and holds at the shape of a model that is not at hand.

    python -m benchmarks.healing [--shape Llama-3.2-1B] [--train low-rank] [--tokens 512] \
        [--step-tokens 1024] [--steps 2] [--dtype auto] [--out healing.json]

Weights and samples are random: time and memory do not depend on them. A quarter of the layers is
removed, the last ones. The peak is of training, the process's resident memory or, on a GPU, what
was allocated there; beside it stand the weights, and what gradmap.costs.footprint says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

from benchmarks.random_model import make_random_llama
from benchmarks.scaling import ONE_FLOP_A_SECOND, SHAPES, SMOLLM2
from gradmap.common.console import print_table
from gradmap.common.environment import describe_environment
from gradmap.common.errors import UserError
from gradmap.common.files import write_json
from gradmap.costs.footprint import FLOAT32_BYTES, heal_bytes
from gradmap.data.calibration import Calibration
from gradmap.healing.heal import student_of
from gradmap.healing.options import HealOptions
from gradmap.healing.tracking import untracked
from gradmap.healing.trainer import Trainer
from gradmap.methods.compensation import Pruned
from gradmap.model.batching import Batches, forward_batch
from gradmap.model.precision import (
    AUTOCAST,
    computing_in,
    fastest_dtype,
    prepare_for_autocast,
    weights_dtype,
)
from gradmap.model.shape import Shape
from gradmap.model.sublayers import Pair

KNOWN = {shape.name: shape for shape in (SMOLLM2, *SHAPES)}
HELD_OUT = 2


@dataclass
class RandomSamples:
    """In place of texts: (n, T), as many as are asked for."""

    vocabulary: int
    tokens: int

    def draw(self, samples: int) -> Tensor:
        return torch.randint(self.vocabulary, (samples, self.tokens))


def main(
    shape: str = "Llama-3.2-1B",
    train: Literal["low-rank", "full"] = "low-rank",
    tokens: int = 512,
    step_tokens: int = 1024,
    steps: int = 2,
    dtype: str = "auto",
    device: str = "cpu",
    out: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
) -> None:
    if shape not in KNOWN:
        raise UserError(f"Unknown shape {shape}; use one of {', '.join(KNOWN)}.")
    options = HealOptions(
        text=["file:none.txt"],
        train=train,
        tokens=tokens,
        step_tokens=step_tokens,
        budget_tokens=steps * step_tokens,
        held_out=HELD_OUT,
    )
    computed = fastest_dtype("bfloat16", device) if dtype == "auto" else dtype
    found = measure(KNOWN[shape], options, computed, device)
    print_table(f"Healing {shape}", ("", "value"), [(key, f"{found[key]}") for key in found])
    if out is not None:
        write_json(out, found | {"environment": describe_environment()})


def measure(shape: Shape, options: HealOptions, dtype: str, device: str) -> dict[str, Any]:
    trainer = make_trainer(shape, options, dtype, device)
    network, remove = trainer.pruned.model.network, len(trainer.pruned.removed)
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in network.parameters()}
    _forget_peak(device)
    with computing_in(dtype, network):
        trainer.run(lambda _: None, untracked)
    first, last = trainer.progress.curve[0], trainer.progress.curve[-1]
    state_bytes = FLOAT32_BYTES if dtype == AUTOCAST else weights_dtype(dtype).itemsize
    hardware = replace(ONE_FLOP_A_SECOND, state_bytes=state_bytes)
    predicted = heal_bytes(shape, hardware, remove, options.tokens, options.trained_rank)
    return {
        "removed": f"{remove} of {shape.layers}",
        "train": options.train,
        "dtype": dtype,
        "tokens per second": round(last.tokens / (last.seconds - first.seconds), 1),
        "weights (GB)": round(sum(weights.values()) / 1e9, 2),
        "peak (GB)": round(_peak_bytes(device) / 1e9, 2),
        "predicted (GB)": round(predicted / 1e9, 2),
    }


def make_trainer(shape: Shape, options: HealOptions, dtype: str, device: str) -> Trainer:
    model = make_random_llama(shape, weights_dtype(dtype), device)
    if dtype == AUTOCAST:
        prepare_for_autocast(model.network)
    held_out = torch.randint(shape.vocabulary, (HELD_OUT, options.tokens))
    calibration = Calibration("", options.seed, held_out, None, held_out=HELD_OUT)
    kept = shape.layers - round(shape.layers / 4)
    removed = tuple(Pair.of_layer(layer) for layer in range(kept, shape.layers))
    batches = Batches(forward_batch(held_out, model.device))
    pruned = Pruned(model, calibration, removed, batches)
    student = student_of(pruned, {}, options, torch.bfloat16)
    samples: Any = RandomSamples(shape.vocabulary, options.tokens)
    return Trainer(pruned, student, samples, options)


def _forget_peak(device: str) -> None:
    """What made the model is not counted."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    typer.run(main)
