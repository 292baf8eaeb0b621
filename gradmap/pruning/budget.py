"""How many calibration samples this machine manages in the minutes that there are."""

from __future__ import annotations

from dataclasses import replace

from gradmap.common.console import say
from gradmap.common.errors import UserError
from gradmap.common.processes import process_count
from gradmap.costs.speed import measure_hardware
from gradmap.costs.steps import CalibrationSize, Hardware
from gradmap.costs.timing import Pruning
from gradmap.methods.costs import repair_seconds, select_seconds
from gradmap.model.architectures import architecture_of
from gradmap.model.checkpoint import Checkpoint
from gradmap.model.loading import resolve_device
from gradmap.model.shape import Shape
from gradmap.pruning.settings import PruneSettings

# A budget does not go below so many samples: with fewer, a refit has fewer tokens than the weights
# of a row.
LEAST_SAMPLES = 16


def samples_within_budget(checkpoint: Checkpoint, settings: PruneSettings, dtype: str) -> int:
    """How many of the samples this machine is estimated to choose and repair with in the budget;
    says so if it is not all. With samples shrinks what is fitted, measured and trained on.

    dtype: what is computed in. Raises UserError if the costs of the methods, or the model's sizes,
    are not known.
    """
    if process_count() > 1:
        raise UserError(
            "--budget-minutes measures one process, and several must agree; give --samples."
        )
    minutes = settings.budget_minutes
    assert minutes is not None
    hardware = measure_hardware(checkpoint.config, dtype, resolve_device(settings.device))
    shape, pruning = (
        Shape.of_config(checkpoint.config, checkpoint.name),
        _pruning_costs(checkpoint, settings),
    )
    samples = affordable_samples(shape, hardware, pruning, 60 * minutes)
    if samples < settings.samples:
        say(
            f"Within {minutes:g} minutes this machine is estimated to manage {samples} of "
            f"{settings.samples} samples"
        )
    return samples


def _pruning_costs(checkpoint: Checkpoint, settings: PruneSettings) -> Pruning:
    return Pruning(
        settings.remove,
        settings.selector,
        settings.compensator,
        CalibrationSize(settings.samples, settings.tokens),
        settings.one_shot,
        correctable=architecture_of(checkpoint.config).is_fitted,
        unit=settings.unit,
    )


def affordable_samples(shape: Shape, hardware: Hardware, pruning: Pruning, budget_s: float) -> int:
    """How many of the samples can be chosen and repaired with in so many seconds: all, three
    quarters, half, and so on, but LEAST_SAMPLES at least. Raises UserError for methods whose costs
    are not known."""
    samples = pruning.size.samples
    while True:
        size = replace(pruning.size, samples=samples)
        parts = [
            cost(shape, hardware, replace(pruning, size=size))
            for cost in (select_seconds, repair_seconds)
        ]
        seconds = [part for part in parts if part is not None]
        if len(seconds) < len(parts):
            raise UserError(
                f"What {pruning.selector} and {pruning.compensator} cost is not known, so that no "
                "budget can be kept; leave out --budget-minutes, and give --samples."
            )
        if sum(seconds) <= budget_s or samples <= LEAST_SAMPLES:
            return samples
        samples = max(LEAST_SAMPLES, samples * 3 // 4)
