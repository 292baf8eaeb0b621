"""Selectors of methods that merge the removed layers into others (gradmap.methods.merge)."""

from __future__ import annotations

from itertools import pairwise

from gradmap.common.errors import UserError
from gradmap.methods.gradpruner import layer_importances
from gradmap.methods.mka import layer_similarities
from gradmap.methods.selection import Advance, Selection, Subject
from gradmap.methods.simple import FixedOrderScorer


class SimilarityScorer:
    """MKA: the layer goes that is most like the one before it. The first has none before it, and
    stays."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        calibration = subject.calibration
        self._similarities = layer_similarities(
            subject.model, subject.architecture, calibration.input_ids, calibration.seed
        )

    def work(self, alive: int) -> int:
        return 1

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        alive = self._subject.alive(so_far.removal_order)
        advance(1)
        return {
            layer: -float(self._similarities[before, layer]) for before, layer in pairwise(alive)
        }


def from_the_end(subject: Subject) -> FixedOrderScorer:
    """MKA as it was released: the last two layers are merged again and again, and the merged
    weights are lost."""
    return FixedOrderScorer(subject.layers[::-1], subject.layers)


class InitialGradientScorer:
    """GradPruner: the layer goes whose weights matter least in the first steps of fine-tuning."""

    def __init__(self, subject: Subject) -> None:
        """Raises UserError if the layers are not in memory."""
        if subject.streamed:
            raise UserError(
                "--selector gradpruner needs all weights in memory; leave out --stream, or use "
                "gradient."
            )
        self._subject = subject
        calibration = subject.calibration
        self._importances = layer_importances(
            subject.model, subject.architecture, calibration.fit_ids, calibration.seed
        )

    def work(self, alive: int) -> int:
        return 1

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        alive = self._subject.alive(so_far.removal_order)
        advance(1)
        return {layer: self._importances[layer] for layer in alive}
