"""Orders of removal that measure nothing: the user's own, and chance, the baseline of baselines."""

from __future__ import annotations

import random
from collections.abc import Sequence

from gradmap.common.errors import UserError
from gradmap.methods.selection import Advance, Selection, Subject


class FixedOrderScorer:
    """A layer's score is its place in the given order; layers that are not in it stay."""

    def __init__(self, order: Sequence[int], layers: range) -> None:
        """Raises UserError unless the order names distinct layers of the model."""
        if not order or len(set(order)) < len(order) or not set(order) <= set(layers):
            raise UserError(
                f"--layers must name distinct layers between 0 and {layers[-1]}, in order of "
                "removal, such as 21,22."
            )
        self._order = tuple(order)

    def work(self, alive: int) -> int:
        return 1

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        removed = so_far.removal_order
        advance(1)
        return {
            layer: float(place) for place, layer in enumerate(self._order) if layer not in removed
        }


def listed(subject: Subject) -> FixedOrderScorer:
    """The order of `--layers`."""
    return FixedOrderScorer(subject.order, subject.layers)


def shuffled(subject: Subject) -> FixedOrderScorer:
    """An order drawn with the seed of the calibration."""
    order = random.Random(subject.calibration.seed).sample(subject.layers, len(subject.layers))
    return FixedOrderScorer(order, subject.layers)
