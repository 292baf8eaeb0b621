"""What pruning holds in memory by arithmetic, as gradmap.costs.steps is what it multiplies. torch
is not needed."""

from __future__ import annotations

from gradmap.costs.steps import (
    BF16_BYTES,
    DEFAULT_SIZE,
    STEP_SAMPLES,
    CalibrationSize,
    Hardware,
    low_rank_parameters,
)
from gradmap.costs.timing import Pruning
from gradmap.model.shape import Shape
from gradmap.model.sublayers import PIECES

FLOAT32_BYTES, FLOAT64_BYTES = 4, 8
# What a selection by repairs holds in every layer, or sublayer, in hidden states. Of a token that
# it fits on: what the dense model gives, and what enters and is added now. Of one that it measures
# on: the last two, and again behind the layer that leads and behind the one that is tried, which
# are half of the layers each.
FIT_STATES, MEASURE_STATES = 3, 4
# Numbers that training keeps of a token in each layer for its backward pass, over the widths of the
# layer's maps.
KEPT_WIDTHS = 2
# Of what is trained: itself, its gradients, AdamW's two moments, and the best so far.
TRAINED_COPIES = 5
# As gradmap.model.batching's for a CPU: where a sample keeps more, layers are run again.
MUCH_KEPT_BYTES = 3 << 27
# Python, torch, transformers and what they keep, as measured.
RUNTIME_BYTES = 0.8e9


def model_bytes(shape: Shape, hardware: Hardware) -> float:
    """Bytes of the weights in memory. A head that is multiplied in another dtype parts from its
    embedding."""
    shared = shape.tied and hardware.weight_bytes == hardware.state_bytes
    of_token = hardware.state_bytes + (0 if shared else hardware.weight_bytes)
    return (
        shape.layers * shape.layer_parameters * hardware.weight_bytes
        + shape.head_parameters * of_token
    )


def prune_bytes(shape: Shape, hardware: Hardware, pruning: Pruning) -> float:
    """Bytes at the peak of `gradmap prune`: what a selection by repairs keeps of its samples, or
    what training keeps for its backward pass, and a refit."""
    size, pieces = pruning.size, PIECES[pruning.unit] * shape.layers
    states = pieces * shape.width * hardware.state_bytes
    select = (
        FIT_STATES * size.select_fit_tokens + MEASURE_STATES * size.select_measure_tokens
    ) * states
    trained = kept_numbers(shape, pruning.remove, STEP_SAMPLES * size.tokens)
    needed = [
        select if pruning.selector == "repair" else 0.0,
        trained * FLOAT32_BYTES if pruning.compensator == "distil" else 0.0,
        repair_bytes(shape)
        if pruning.compensator in ("distil", "refit") and not shape.experts
        else 0.0,
    ]
    return RUNTIME_BYTES + model_bytes(shape, hardware) + max(needed)


def heal_bytes(
    shape: Shape, hardware: Hardware, remove: int, tokens: int, rank: int | None
) -> float:
    """Bytes that `gradmap heal` needs: beside the weights, the factors or, without a rank, updates
    of all weights and the updated ones; and what training keeps of one sample of so many tokens for
    its backward pass: what enters each layer, and all of one layer, where all of each would be
    much. More goes at once where there is more memory."""
    trained = (
        update_bytes(shape, hardware, remove)
        if rank is None
        else TRAINED_COPIES * FLOAT32_BYTES * low_rank_parameters(shape, remove, rank)
    )
    kept = kept_numbers(shape, remove, tokens)
    if FLOAT32_BYTES * kept > MUCH_KEPT_BYTES:
        kept = kept_numbers(shape, shape.layers - 1, tokens)
        kept += tokens * (shape.layers - remove) * shape.width
    return RUNTIME_BYTES + model_bytes(shape, hardware) + trained + FLOAT32_BYTES * kept


def update_bytes(shape: Shape, hardware: Hardware, remove: int) -> float:
    """Bytes of updates of all weights in training, and of the updated weights."""
    of_weight = TRAINED_COPIES * FLOAT32_BYTES + hardware.weight_bytes
    return of_weight * (shape.layers - remove) * shape.layer_parameters


def kept_numbers(shape: Shape, remove: int, tokens: int) -> float:
    """What training keeps of so many tokens for its backward pass."""
    widths = KEPT_WIDTHS * (shape.map_inputs + shape.map_outputs)
    return tokens * (shape.layers - remove) * widths


def repair_bytes(shape: Shape) -> float:
    """Bytes of a refit while it is solved. Of the down projection's inputs, k x k: the Gram matrix,
    the same regularised, its factor, and the copy of it that torch solves with; d x k: what is
    missing by inputs, a copy, the solution."""
    return (4 * shape.inner**2 + 3 * shape.width * shape.inner) * FLOAT64_BYTES


def streamed_bytes(shape: Shape, size: CalibrationSize = DEFAULT_SIZE) -> float:
    """Bytes of one layer, and of the hidden states between all layers. With a GPU they are of the
    CPU's memory, and the layer is the next one: that which runs is on the GPU."""
    return BF16_BYTES * (
        shape.layer_parameters + (shape.layers + 1) * size.all_tokens * shape.width
    )
