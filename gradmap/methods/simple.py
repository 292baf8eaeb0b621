"""Orders of removal that measure nothing: the user's own, and chance, the baseline of baselines.
And no repair."""

from __future__ import annotations

import random

from gradmap.common.errors import UserError
from gradmap.costs.timing import no_seconds
from gradmap.methods.base import Compensator, Job, Selector
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.options import ManualOptions
from gradmap.methods.selection import FixedScores, Subject


def listed(subject: Subject, options: ManualOptions) -> FixedScores:
    """The order of `--layers`."""
    return FixedScores.of_order(options.layers)


def require_layers(job: Job, options: ManualOptions) -> None:
    """Raises UserError unless the order names distinct layers of the model."""
    order = options.layers
    if not order:
        raise UserError("--layers is the order of removal for --selector manual; give both.")
    if len(set(order)) < len(order) or not set(order) <= set(range(job.layers)):
        raise UserError(
            f"--layers must name distinct layers between 0 and {job.layers - 1}, in order of "
            "removal, such as 21,22."
        )


def shuffled(subject: Subject) -> FixedScores:
    """An order drawn with the seed of the calibration."""
    generator = random.Random(subject.calibration.seed)
    return FixedScores.of_order(generator.sample(subject.layers, len(subject.layers)))


def leave_as_it_is(pruned: Pruned) -> Compensation:
    """No corrections."""
    return Compensation()


MANUAL = Selector(
    name="manual",
    about="in the order of your own `--layers`",
    make=listed,
    options=ManualOptions,
    check=require_layers,
    score_label="place in the order",
    seconds=no_seconds,
)
RANDOM = Selector(
    name="random",
    about="in an order drawn with the seed of the calibration",
    make=shuffled,
    score_label="place in a random order",
    seconds=no_seconds,
)
NONE = Compensator(
    name="none", about="no repair, for comparison", run=leave_as_it_is, seconds=no_seconds
)
