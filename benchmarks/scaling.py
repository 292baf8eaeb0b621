"""What pruning costs and brings by arithmetic: FLOPs and bytes, from 1B to 405B, on given hardware.

    python -m benchmarks.scaling            prints the tables of docs/scaling.md

Nothing is measured here. docs/scaling.md says where these predictions were held against
measurements.
"""

from __future__ import annotations

import math
from dataclasses import replace

import typer

from gradmap.costs.footprint import (
    heal_bytes,
    repair_bytes,
    streamed_bytes,
    update_bytes,
)
from gradmap.costs.steps import (
    BF16_BYTES,
    Hardware,
    decode_speed_up,
    prefill_speed_up,
    refit_flops,
    score_flops,
    selection_flops,
    sleb_flops,
    training_flops,
)
from gradmap.costs.timing import (
    healing_seconds,
    score_seconds,
    token_seconds,
    writing_seconds,
)
from gradmap.methods.costs import default_seconds
from gradmap.model.shape import Shape

LLAMA_2_7B = Shape("Llama-2-7B", 4096, 11008, 32, 1, 32000)
LLAMA_3_8B = Shape("Llama-3.1-8B", 4096, 14336, 32, 8 / 32, 128256)
SHAPES = (
    Shape("Llama-3.2-1B", 2048, 8192, 16, 8 / 32, 128256, tied=True),
    LLAMA_2_7B,
    LLAMA_3_8B,
    Shape("Llama-2-13B", 5120, 13824, 40, 1, 32000),
    Shape("Llama-3.1-70B", 8192, 28672, 80, 8 / 64, 128256),
    Shape("Llama-3.1-405B", 16384, 53248, 126, 8 / 128, 128256),
)
SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 30, 3 / 9, 49152, tied=True)
H100 = Hardware("H100", 989e12, 3.35e12, 80e9)
EIGHT_H100 = replace(H100, name="8 x H100", devices=8)
HARDWARE = (
    Hardware("A40", 149.7e12, 0.696e12, 48e9),
    H100,
    EIGHT_H100,
)
HEALING_HARDWARE = (H100, EIGHT_H100)
# What is healed in the table, and how long samples are.
HEALED, HEALED_TOKENS = 1e8, 2048
HEALERS = {"rank 64": 64, "all weights": None}
# So that seconds are FLOPs.
ONE_FLOP_A_SECOND = Hardware("one FLOP/s", 1.0, math.inf, math.inf, efficiency=1.0)


def describe_shape(shape: Shape) -> str:
    remove = round(shape.layers / 4)
    cells = [
        f"{shape.parameters(shape.layers) / 1e9:.1f} B",
        f"{remove} of {shape.layers}",
        f"{sleb_flops(shape, remove) / score_flops(shape, remove):.1f}x",
        f"{streamed_bytes(shape) / 1e9:.1f} GB",
        f"{repair_bytes(shape) / 1e9:.1f} GB",
        f"{prefill_speed_up(shape, remove):.2f}x",
        f"{decode_speed_up(shape, remove):.2f}x",
    ]
    return f"| {shape.name} | {' | '.join(cells)} |"


def describe_time(shape: Shape, hardware: Hardware) -> str:
    """The predicted times: stage 1, the default's selection and repair, and a token of one stream,
    dense; or that the model does not fit."""
    if BF16_BYTES * shape.parameters(shape.layers) > 0.92 * hardware.memory * hardware.devices:
        return "does not fit"
    remove = round(shape.layers / 4)
    score_s, default_s = (
        score_seconds(shape, hardware, remove),
        default_seconds(shape, hardware, remove),
    )
    return f"{score_s:,.0f} s, {default_s:,.0f} s, {1000 * token_seconds(shape, hardware):.1f} ms"


def describe_healing(shape: Shape, hardware: Hardware, rank: int | None) -> str:
    """The predicted speed of `gradmap heal` and the memory of each GPU; without a rank, of all
    weights. What is of the layers' size is shared (`--shard`): their weights, and what is trained
    of all of them."""
    remove = round(shape.layers / 4)
    speed = 1 / healing_seconds(shape, hardware, remove, 1, rank)
    shared = BF16_BYTES * shape.layers * shape.layer_parameters
    if rank is None:
        shared += update_bytes(shape, hardware, remove)
    alone = heal_bytes(shape, hardware, remove, HEALED_TOKENS, rank)
    of_each = alone - shared * (1 - 1 / hardware.devices)
    hours = HEALED / speed / 3600
    needed = f"{of_each / 1e9:.0f} GB"
    if of_each > hardware.memory:
        needed += ", does not fit"
    return f"{speed:,.0f} tokens/s, {hours:,.1f} h ({needed})"


def describe_checked() -> str:
    """The predictions that docs/scaling.md holds against measurements, as multiples of stage 1 for
    12 of SmolLM2's 30 layers."""
    scores = score_flops(SMOLLM2, 12)
    steps = {
        "selection of 12": selection_flops(SMOLLM2, 12),
        "SLEB's of 12": sleb_flops(SMOLLM2, 12),
        "refit of 8 in 3 runs": refit_flops(SMOLLM2, 8, runs=3),
        "training of 8": training_flops(SMOLLM2, 8),
        "writing": writing_seconds(SMOLLM2, ONE_FLOP_A_SECOND),
    }
    return "SmolLM2 / stage 1: " + ", ".join(
        f"{step} {flops / scores:.2f}" for step, flops in steps.items()
    )


def main() -> None:
    columns = "parameters | removed | SLEB / scores | streaming | repair | prefill | decode"
    print(f"| model | {columns} |\n|---{'|---:' * 7}|")
    for shape in SHAPES:
        print(describe_shape(shape))
    print(
        f"\n| model | {' | '.join(hardware.name for hardware in HARDWARE)} "
        f"|\n|---{'|---:' * len(HARDWARE)}|"
    )
    for shape in SHAPES:
        print(
            f"| {shape.name} | "
            f"{' | '.join(describe_time(shape, hardware) for hardware in HARDWARE)} |"
        )
    print(f"\n| model | trained | {' | '.join(gpus.name for gpus in HEALING_HARDWARE)} |")
    print("|---|---" + "|---:" * len(HEALING_HARDWARE) + "|")
    for shape in SHAPES:
        for trained, rank in HEALERS.items():
            cells = [describe_healing(shape, gpus, rank) for gpus in HEALING_HARDWARE]
            print(f"| {shape.name} | {trained} | {' | '.join(cells)} |")
    print(f"\n{describe_checked()}")


if __name__ == "__main__":
    typer.run(main)
