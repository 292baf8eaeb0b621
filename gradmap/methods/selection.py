"""Which layers go, and in which order: score, remove the lowest, score the smaller model again
(Algorithm 1, stage 1).

How layers are scored is a selector's business (gradmap.methods.base).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gradmap.common.console import progress
from gradmap.common.distributed import share_of
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite_scores
from gradmap.data.calibration import Calibration
from gradmap.model.layered import Advance, LayeredModel


@dataclass(frozen=True)
class Step:
    """One decision: the score of every layer that could go, and the layers it removed (original
    indices)."""

    scores: dict[int, float]
    removed: tuple[int, ...]


@dataclass(frozen=True)
class Selection:
    """The outcome of stage 1. The removal order is nested: its first k entries are the choice for k
    layers."""

    steps: tuple[Step, ...]

    @property
    def removal_order(self) -> tuple[int, ...]:
        return tuple(layer for step in self.steps for layer in step.removed)

    def first(self, count: int) -> Selection:
        """The selection of the first `count` layers, which is what a run for `count` layers would
        have chosen."""
        steps: list[Step] = []
        for step in self.steps:
            removed = step.removed[:count]
            count -= len(removed)
            if removed:
                steps.append(Step(step.scores, removed))
        return Selection(tuple(steps))


@dataclass(frozen=True)
class Subject:
    """What is scored: the model, whole, and the samples to score it on.

    protected: layers that stay. streamed: whether only one layer of it is in memory at a time.
    count: how many layers go, for a selector that chooses them all at once.
    """

    model: LayeredModel
    calibration: Calibration
    protected: frozenset[int] = frozenset()
    streamed: bool = False
    count: int = 1

    @property
    def layers(self) -> range:
        return range(len(self.model.layers))

    def alive(self, removed: Collection[int]) -> list[int]:
        return [layer for layer in self.layers if layer not in removed]


class LayerScorer(Protocol):
    """Scores layers: the lowest goes first. It leaves the model whole."""

    def work(self, alive: int) -> int:
        """What scoring that many layers takes, in the units that `score` tells `advance`."""
        ...

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        """Scores the model without the layers that are gone: original index -> score, for all that
        may go."""
        ...


# Scores (L,) of all layers that a model has now, from samples (N, T).
Measure = Callable[[LayeredModel, Tensor, Advance], Tensor]


class ReducedModelScorer:
    """Measures the model without the layers that are gone, in one pass of all samples through all
    layers."""

    def __init__(self, subject: Subject, measure: Measure) -> None:
        self._subject, self._measure = subject, measure

    def work(self, alive: int) -> int:
        return alive * len(share_of(self._subject.calibration.input_ids)[0])

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        model = self._subject.model
        with model.without(so_far.removal_order):
            scores = self._measure(model, self._subject.calibration.input_ids, advance)
        return dict(zip(self._subject.alive(so_far.removal_order), scores.tolist(), strict=True))


@dataclass(frozen=True)
class FixedScores:
    """Scores that removals do not change, by layer; layers without one stay."""

    scores: Mapping[int, float]

    @classmethod
    def of_order(cls, order: Sequence[int]) -> FixedScores:
        """A layer's score is its place in the order of removal."""
        return cls({layer: float(place) for place, layer in enumerate(order)})

    def work(self, alive: int) -> int:
        return 1

    def score(self, so_far: Selection, advance: Advance) -> dict[int, float]:
        removed = so_far.removal_order
        advance(1)
        return {layer: score for layer, score in self.scores.items() if layer not in removed}


def select(
    make_scorer: Callable[[], LayerScorer],
    subject: Subject,
    count: int,
    *,
    one_shot: bool,
    done: Sequence[Step],
    record: Callable[[Step], None],
) -> Selection:
    """Chooses `count` layers, one a round, or all of them by the first scores with `one_shot`.

    make_scorer: not called if nothing is left to decide. done: decisions of an interrupted run,
    which are not made again. record: told of every new one.
    Raises UserError if too few layers may go, or a score is not finite.
    """
    rounds = 1 if one_shot else count
    steps = list(done)
    ahead = range(len(steps), rounds)
    if not ahead:
        return Selection(tuple(steps)).first(count)
    scorer = make_scorer()
    with progress(
        "Scoring layers", sum(scorer.work(len(subject.layers) - gone) for gone in ahead)
    ) as advance:
        for _ in ahead:
            scores = scorer.score(Selection(tuple(steps)), advance)
            require_finite_scores(scores)
            candidates = [layer for layer in scores if layer not in subject.protected]
            if len(candidates) < count // rounds:
                raise UserError(
                    f"Only {len(candidates)} layers may still be removed; protect fewer, or remove "
                    "fewer."
                )
            lowest = sorted(candidates, key=scores.__getitem__)[: count // rounds]
            steps.append(Step(scores, tuple(lowest)))
            record(steps[-1])
    return Selection(tuple(steps)).first(count)
