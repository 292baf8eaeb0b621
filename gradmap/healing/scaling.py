"""What more tokens would bring: a law fitted to the curve of one healing.

The law is that of fine-tuning from a model that knows something already (a power of the tokens, an
offset and a floor; Hestness et al. 2017, arXiv 1712.00409; Hernandez et al. 2021, arXiv 2102.01293)
with two changes for the learning rate, since looks in the middle of a cosine are no ends of shorter
runs: tokens count as much as their rate (Tissue et al. 2024, arXiv 2408.11029), and a high rate
adds what its fall takes away again.

    L = scale * (floor + (1 - floor) * ((S + offset) / (1 + offset)) ** -exponent)
              * (1 + annealing * (rate - last rate))

S is the area under the rate so far, as a share of that of the whole run; the first look has S = 0.
One curve does not tell four shapes apart, so none is chosen: all of a grid count, by how well they
fit, and the interval covers them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradmap.healing.trainer import LAST_RATE, rate_at
from gradmap.pruning.plan import HealingPoint

Floats = NDArray[np.float64]

# Looks behind the first. With fewer, the interval is that of the grid and not of the run.
FEWEST_LOOKS = 4
COVERAGE = 0.9
# Prior of the looks' scatter about the law, relative: its size, and how many looks it is worth.
SCATTER, SCATTER_LOOKS = 0.02, 4
# Standard deviation of how far runs end from the law, relative and for each doubling
# (docs/healing.md has the runs).
LAW_ERROR = 0.05
DRAWS = 20_000
# How much more is looked forward to.
MORE = {2: "twice the tokens", 4: "four times the tokens"}


@dataclass(frozen=True)
class Forecast:
    """Held-out divergence (nats per token) that a run with `times` the tokens would end with, and
    the ends of a 90% interval."""

    times: int
    divergence: float
    low: float
    high: float

    def describe(self) -> str:
        return f"{self.divergence:#.3g} ({self.low:#.3g}-{self.high:#.3g})"

    @property
    def title(self) -> str:
        return MORE[self.times]


@dataclass(frozen=True)
class _Shapes:
    """(K,) each: the shapes that a law may have."""

    floor: Floats
    offset: Floats
    exponent: Floats
    annealing: Floats

    @classmethod
    def grid(cls) -> _Shapes:
        axes = (
            (np.arange(24) + 0.5) / 24,
            np.geomspace(0.005, 10, 24),
            np.geomspace(0.1, 1, 12),
            np.linspace(0, 0.3, 10),
        )
        return cls(*(axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")))

    def of(self, chosen: NDArray[np.int_]) -> _Shapes:
        return _Shapes(
            self.floor[chosen],
            self.offset[chosen],
            self.exponent[chosen],
            self.annealing[chosen],
        )

    def logarithms(self, areas: Floats, rates: Floats) -> Floats:
        """(N,), (N,) -> (N, K): of the law without its scale."""
        areas, rates = areas[:, None], rates[:, None]
        power = ((areas + self.offset) / (1 + self.offset)) ** -self.exponent
        above = 1 + self.annealing * (rates - LAST_RATE)
        logarithms: Floats = np.log(self.floor + (1 - self.floor) * power) + np.log(above)
        return logarithms


@dataclass(frozen=True)
class _Law:
    """(DRAWS,) each: shapes as likely as they are, with their scales (logarithms) and how a look
    scatters about them (variances of logarithms)."""

    shapes: _Shapes
    scales: Floats
    variances: Floats

    def forecast(self, times: int) -> Forecast:
        ends = self.shapes.logarithms(np.array([float(times)]), np.array([LAST_RATE]))[0]
        law_variance = (LAW_ERROR * math.log2(times)) ** 2
        spread = np.sqrt(self.variances + law_variance)
        scattered = np.random.default_rng(1).standard_normal(DRAWS)
        drawn = np.exp(self.scales + ends + spread * scattered)
        tail = (1 - COVERAGE) / 2
        low, middle, high = np.quantile(drawn, [tail, 0.5, 1 - tail])
        return Forecast(times, float(middle), float(low), float(high))


def forecasts(curve: Sequence[HealingPoint]) -> list[Forecast]:
    """What longer runs would end with, by the curve of one that is over.

    None at all where that cannot be said: with fewer than four looks behind the first, or where
    training has not helped.
    """
    divergences = np.array([point.held_out_divergence for point in curve])
    if len(curve) <= FEWEST_LOOKS or divergences.min() <= 0 or divergences[-1] >= divergences[0]:
        return []
    spent = [point.tokens / curve[-1].tokens for point in curve]
    areas = np.array([_area(share) for share in spent]) / _area(1.0)
    # Nothing is trained yet at the first look, so no rate has added anything.
    rates = np.array([LAST_RATE, *map(rate_at, spent[1:])])
    law = _fitted(np.log(divergences), areas, rates)
    return [law.forecast(times) for times in MORE]


def _area(spent: float) -> float:
    """Under the learning rate, until a share of the budget is spent."""
    middles = (np.arange(200) + 0.5) / 200
    return spent * float(np.mean([rate_at(spent * middle) for middle in middles]))


def _fitted(logarithms: Floats, areas: Floats, rates: Floats) -> _Law:
    """To the looks, (N,) each.

    The scale has a flat prior, and the scatter about the law a scaled inverse chi-square one; both
    are integrated over (Gelman et al. 2013, Bayesian Data Analysis, 3.2).
    """
    shapes = _Shapes.grid()
    apart = logarithms[:, None] - shapes.logarithms(areas, rates)
    scales = apart.mean(axis=0)
    squares = SCATTER_LOOKS * SCATTER**2 + ((apart - scales) ** 2).sum(axis=0)
    freedom = SCATTER_LOOKS + len(logarithms) - 1
    weights = (squares / squares.min()) ** (-freedom / 2)

    generator = np.random.default_rng(0)
    chosen = generator.choice(len(weights), DRAWS, p=weights / weights.sum())
    variances = squares[chosen] / generator.chisquare(freedom, DRAWS)
    of_the_scale = 1 / len(logarithms)
    return _Law(shapes.of(chosen), scales[chosen], (1 + of_the_scale) * variances)
