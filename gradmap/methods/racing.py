"""A race between removals: a layer that is clearly worse than the best so far is not measured on
all samples.

Losses of different models on the same samples rise and fall together, so that their difference is
known from few samples where each loss is not (racing, Maron & Moore 1994; paired, as in F-Race,
Birattari et al. 2002).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gradmap.model.sublayers import Pair

# Standard errors of the mean difference.
CLEARLY = 3.0
# By this share of it, a layer's cost may have fallen when others were removed since it was measured
# or estimated. `benchmarks.racing` measured these constants (SmolLM2, three seeds, 32 samples in
# random order, 4 at a time). Costs of the best layers fell by up to 20% from a first to a second
# round, where a race that ignored it missed the best one in 64% of cases, at 0.009 nats per token.
# With these, 24%, 6% and 10% of all measurements of three rounds are made, and 6%, 0.3% and 4% of
# races end with another layer than the lowest mean's, which costs 0.002 nats more, a quarter of the
# standard error of such a difference (0.6 in the second round).
MAY_FALL = 0.2


def laps(samples: int, length: int) -> Iterator[slice]:
    """The samples that are measured from one comparison to the next, so many at a time."""
    for start in range(0, samples, length):
        yield slice(start, min(start + length, samples))


@dataclass
class Race:
    """One round. samples: how many there are to measure on. best: the losses, on all of them, of
    the layer that leads, (n,), if one does."""

    samples: int
    best: Tensor | None = None

    @property
    def best_mean(self) -> float:
        return math.inf if self.best is None else float(self.best.mean())

    def run(
        self,
        untried: Sequence[Pair],
        before: Mapping[Pair, float],
        base: float,
        measure: Callable[[Sequence[Pair]], Sequence[Tensor]],
        at_once: int = 1,
    ) -> dict[Pair, float]:
        """What each layer costs beyond `base`: estimated if it was given up, as before if it was
        not tried.

        untried: in the order in which they are tried, by which their costs before may not fall.
        before: what each cost in the round before. measure: gives the losses (m,) of so many layers
        `at_once`.
        """
        costs = dict(before)

        def may_lead(layer: Pair) -> bool:
            return self.best_mean - base >= before[layer] - MAY_FALL * abs(before[layer])

        for place in range(0, len(untried), at_once):
            group = untried[place : place + at_once]
            if not may_lead(group[0]):
                break
            for layer, losses in zip(group, measure(group), strict=True):
                if may_lead(layer):  # else one process alone would not have tried it
                    costs[layer] = self.enter(losses) - base
        return costs

    def is_behind(self, losses: Tensor) -> bool:
        """Whether a layer with these losses (m,) does not lead."""
        return len(losses) < self.samples or float(losses.mean()) >= self.best_mean

    def is_lost(self, losses: Tensor) -> bool:
        """Whether a layer with these losses (m,) on the first samples is beyond chance worse than
        the leader."""
        return self.best is not None and is_clearly_worse(losses, self.best)

    def enter(self, losses: Tensor) -> float:
        """Takes note of the losses (m,) of a layer; returns their mean over all samples.

        If not all were measured: what two layers differ by on the first samples is taken for what
        they differ by on all.
        """
        if not self.is_behind(losses):
            self.best = losses
        assert self.best is not None, "the first one is measured on all samples"
        return self.best_mean + mean_difference(losses, self.best)[0]


def is_clearly_worse(losses: Tensor, best: Tensor) -> bool:
    """Whether losses (m,) are beyond chance above `best` (n,) on the same samples, the first m."""
    if not 1 < len(losses) < len(best):
        return False
    difference, error = mean_difference(losses, best)
    return difference > CLEARLY * error


def mean_difference(losses: Tensor, best: Tensor) -> tuple[float, float]:
    """By how much the mean of losses is above that of `best` (n,), estimated from the first m, and
    its standard error.

    What is asked is the mean over these n samples and no others, so that the error goes to zero
    with the n - m that are not measured yet: s sqrt(1/m - 1/n). losses: (m,), 1 < m.
    """
    differences = losses - best[: len(losses)]
    error = (
        0.0
        if len(losses) == len(best)
        else float(differences.std()) * math.sqrt(1 / len(losses) - 1 / len(best))
    )
    return float(differences.mean()), error
