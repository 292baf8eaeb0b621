"""What healing multiplies, takes and holds, against what is counted and by what it depends on."""

from dataclasses import replace

import pytest
import torch

from benchmarks.flops import counted
from gradmap.costs.footprint import (
    FLOAT32_BYTES,
    MUCH_KEPT_BYTES,
    heal_bytes,
    kept_numbers,
)
from gradmap.costs.steps import healing_flops
from gradmap.costs.timing import healing_seconds
from gradmap.healing.heal import student_of
from gradmap.healing.options import HealOptions
from gradmap.healing.trainer import Trainer
from gradmap.model.batching import CPU_ACTIVATION_BYTES
from tests.gradmap.costs.test_costs import HARDWARE, SIZE, deep, pruned  # noqa: F401
from tests.gradmap.healing.known_samples import KnownSamples
from tests.gradmap.removals import pairs


@pytest.mark.parametrize("train", ["low-rank", "full"])
def test_a_round_of_training_multiplies_what_is_said(deep, train):  # noqa: F811
    pico, shape = deep
    repaired, rank, removed = pruned(pico, pairs(6)), 4, 1
    options = HealOptions(
        text=["file:none.txt"],
        tokens=SIZE.tokens,
        step_tokens=SIZE.all_tokens,
        budget_tokens=SIZE.all_tokens,
        train=train,
        rank=rank,
    )
    student = student_of(repaired, {}, options, torch.float32)
    samples = KnownSamples(repaired.calibration.input_ids)
    trainer = Trainer(repaired, student, samples, options)
    assert counted(trainer._round) == pytest.approx(
        healing_flops(shape, removed, SIZE.all_tokens, options.trained_rank), rel=0.03
    )


def test_time_and_memory_grow_with_what_is_to_be_done(deep):  # noqa: F811
    _, shape = deep
    seconds = healing_seconds(shape, HARDWARE, 2, 1000, 8)
    assert healing_seconds(shape, HARDWARE, 2, 2000, 8) == pytest.approx(2 * seconds)
    assert healing_seconds(shape, HARDWARE, 3, 1000, 8) < seconds
    assert healing_seconds(shape, HARDWARE, 2, 1000, 16) > seconds
    twice = replace(HARDWARE, flops=2 * HARDWARE.flops)
    assert healing_seconds(shape, twice, 2, 1000, 8) == pytest.approx(seconds / 2)
    held = heal_bytes(shape, HARDWARE, 2, 128, 8)
    factors = 8 * (shape.layers - 2) * (shape.map_inputs + shape.map_outputs)
    # themselves, their gradients, two moments, and the best
    assert heal_bytes(shape, HARDWARE, 2, 128, 16) - held == 5 * FLOAT32_BYTES * factors
    assert heal_bytes(shape, HARDWARE, 2, 256, 8) > held
    # a sample of which much would be kept is run again, layer by layer
    assert MUCH_KEPT_BYTES == CPU_ACTIVATION_BYTES
    most = int(MUCH_KEPT_BYTES / FLOAT32_BYTES / kept_numbers(shape, 2, 1))
    short, long = most - 1, most + 1
    assert heal_bytes(shape, HARDWARE, 2, long, 8) < heal_bytes(shape, HARDWARE, 2, short, 8)
    weights = (shape.layers - 2) * shape.layer_parameters
    added = heal_bytes(shape, HARDWARE, 2, 128, None) - held
    # and the updated weights
    of_weight = 5 * FLOAT32_BYTES + HARDWARE.weight_bytes
    assert added == pytest.approx(of_weight * weights - 5 * FLOAT32_BYTES * factors)
