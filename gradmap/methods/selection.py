"""Which layers go, and in which order: score, remove the lowest, score the smaller model again
(Algorithm 1, stage 1).

How layers are scored is a selector's business (gradmap.methods.base).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gradmap.common.console import progress
from gradmap.common.distributed import share_of
from gradmap.common.errors import UserError
from gradmap.common.finite import require_finite_scores
from gradmap.data.calibration import Calibration
from gradmap.model.layered import Advance, LayeredModel
from gradmap.model.sublayers import (
    PIECES,
    Pair,
    Sublayer,
    Unit,
    candidates,
    sublayers_left,
)


@dataclass(frozen=True)
class Step:
    """One decision: the score of everything that could go, and what it removed."""

    scores: dict[Pair, float]
    removed: tuple[Pair, ...]


@dataclass(frozen=True)
class Selection:
    """The outcome of stage 1. The removal order is nested: its first k entries are the choice for
    k."""

    steps: tuple[Step, ...]

    @property
    def removal_order(self) -> tuple[Pair, ...]:
        return tuple(pair for step in self.steps for pair in step.removed)

    def first(self, count: int) -> Selection:
        """The selection of the first `count`, which is what a run for `count` would have chosen."""
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

    protected: layers that stay, with both sublayers. streamed: whether only one layer of it is in
    memory at a time. count: how many units go, for a selector that chooses them all at once.
    """

    model: LayeredModel
    calibration: Calibration
    protected: frozenset[int] = frozenset()
    streamed: bool = False
    count: int = 1
    unit: Unit = "layer"

    @property
    def layers(self) -> range:
        return range(len(self.model.layers))

    def left(self, removed: Sequence[Pair]) -> list[Sublayer]:
        return sublayers_left(len(self.model.layers), removed)

    def candidates(self, removed: Sequence[Pair] = ()) -> list[Pair]:
        """What could go next, protected or not, front to back."""
        return candidates(self.left(removed), self.unit)


class Scorer(Protocol):
    """Scores what could go: the lowest goes first. It leaves the model whole."""

    def work(self, alive: int) -> int:
        """What scoring that many layers takes, in the units that `score` tells `advance`."""
        ...

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        """Scores the model without what is gone: of all that may go."""
        ...


# Scores (C,) of all candidates of a model as it is now, by unit, from samples (N, T).
Measure = Callable[[LayeredModel, Tensor, Unit, Advance], Tensor]


def scores_of_units(of_pieces: Tensor, unit: Unit) -> Tensor:
    """The sums of the pieces that go together: (P,) -> (C,), each candidate's."""
    return of_pieces.unfold(0, PIECES[unit], 1).sum(dim=-1)


class ReducedModelScorer:
    """Measures the model without what is gone, in one pass of all samples through all layers."""

    def __init__(self, subject: Subject, measure: Measure) -> None:
        self._subject, self._measure = subject, measure

    def work(self, alive: int) -> int:
        return alive * len(share_of(self._subject.calibration.input_ids)[0])

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        subject, removed = self._subject, so_far.removal_order
        with subject.model.without(removed):
            scores = self._measure(
                subject.model, subject.calibration.input_ids, subject.unit, advance
            )
        return dict(zip(subject.candidates(removed), scores.tolist(), strict=True))


@dataclass(frozen=True)
class FixedOrder:
    """A score is the place in an order of removal; what is not in it stays."""

    order: Sequence[Pair]

    def work(self, alive: int) -> int:
        return 1

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        removed = so_far.removal_order
        advance(1)
        places = {pair: float(place) for place, pair in enumerate(self.order)}
        return {pair: place for pair, place in places.items() if pair not in removed}


@dataclass(frozen=True)
class FixedScores:
    """Scores that removals do not change, of each sublayer; what goes together has their sum."""

    subject: Subject
    scores: Mapping[Sublayer, float]

    def work(self, alive: int) -> int:
        return 1

    def score(self, so_far: Selection, advance: Advance) -> dict[Pair, float]:
        advance(1)
        return {
            pair: self.scores[pair.first] + self.scores[pair.second]
            for pair in self.subject.candidates(so_far.removal_order)
        }


def select(
    make_scorer: Callable[[], Scorer],
    subject: Subject,
    count: int,
    *,
    one_shot: bool,
    done: Sequence[Step],
    record: Callable[[Step], None],
) -> Selection:
    """Chooses `count` units, one a round, or all of them by the first scores with `one_shot`.

    make_scorer: not called if nothing is left to decide. done: decisions of an interrupted run,
    which are not made again. record: told of every new one.
    Raises UserError if too few may go, or a score is not finite.
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
            require_finite_scores({pair.words: score for pair, score in scores.items()})
            may_go = {
                pair: score for pair, score in scores.items() if not pair.is_in(subject.protected)
            }
            lowest = lowest_apart(may_go, count // rounds)
            steps.append(Step(scores, lowest))
            record(steps[-1])
    return Selection(tuple(steps)).first(count)


def lowest_apart(scores: Mapping[Pair, float], count: int) -> tuple[Pair, ...]:
    """So many of the lowest, of which no two share a sublayer. Raises UserError if there are not so
    many."""
    chosen: list[Pair] = []
    gone: set[Sublayer] = set()
    for pair in sorted(scores, key=scores.__getitem__):
        if len(chosen) < count and gone.isdisjoint(pair):
            chosen.append(pair)
            gone.update(pair)
    if len(chosen) < count:
        at_once = " at once" if count > 1 else ""
        raise UserError(
            f"Only {len(chosen)} layers may still be removed{at_once}; protect fewer, or remove "
            "fewer."
        )
    return tuple(chosen)
