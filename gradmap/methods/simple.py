"""Orders of removal that measure nothing: the user's own, from the end, and chance, the baseline of
baselines. And no repair."""

from __future__ import annotations

import random

from gradmap.common.errors import UserError
from gradmap.costs.timing import no_seconds
from gradmap.methods.base import Compensator, Job, Selector
from gradmap.methods.compensation import Compensation, Pruned
from gradmap.methods.options import ManualOptions
from gradmap.methods.selection import FixedOrder, Selection, Subject
from gradmap.model.layered import Advance
from gradmap.model.sublayers import Pair, are_neighbours


def listed(subject: Subject, options: ManualOptions) -> FixedOrder:
    """The order of `--layers`."""
    return FixedOrder(options.layers)


def require_layers(job: Job, options: ManualOptions) -> None:
    """Raises UserError unless the order names what is there when it is removed."""
    order = options.layers
    if not order:
        raise UserError("--layers is the order of removal for --selector manual; give both.")
    shifted = [pair for pair in order if not pair.is_layer]
    if shifted and job.unit == "layer":
        raise UserError(f"--layers names {shifted[0]}, which is no layer; give --unit pair.")
    if not are_neighbours(job.layers, order):
        what = "layers" if job.unit == "layer" else "layers, or neighbours in what is left,"
        raise UserError(
            f"--layers must name distinct {what} between 0 and {job.layers - 1}, in order of "
            f"removal, such as {'21,22' if job.unit == 'layer' else 'M20+A21,22'}."
        )


class RandomScorer:
    """Numbers drawn with the seed of the calibration; the same for the same candidate."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def work(self, alive: int) -> int:
        return 1

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        advance(1)
        seed = self._subject.calibration.seed
        return {
            pair: random.Random(f"{seed} {pair}").random()
            for pair in self._subject.candidates(so_far.removal_order)
        }


def from_the_end(subject: Subject) -> FixedOrder:
    """The last layer, and the last of those that are left, and so on."""
    return FixedOrder([Pair.of_layer(layer) for layer in reversed(subject.layers)])


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
    about="by chance, drawn with the seed of the calibration",
    make=RandomScorer,
    score_label="random number",
    seconds=no_seconds,
)
LAST = Selector(
    name="last",
    about="the last layer, and again the last of those that are left",
    paper="Reassessing Layer Pruning (arXiv 2411.15558)",
    make=from_the_end,
    score_label="distance from the end",
    seconds=no_seconds,
)
NONE = Compensator(
    name="none", about="no repair, for comparison", run=leave_as_it_is, seconds=no_seconds
)
