"""How the requests of an open loop arrive. A law is declared here, and nowhere else."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

# Gaps of a burst are gamma distributed; with this shape they vary twice as much as Poisson's, whose
# shape is 1.
BURST_SHAPE = 0.25

# Name of a law -> draws the gap between two requests, in any unit.
ARRIVALS: dict[str, Callable[[random.Random], float]] = {
    "poisson": lambda generator: generator.expovariate(1.0),
    "constant": lambda generator: 1.0,
    "burst": lambda generator: generator.gammavariate(BURST_SHAPE, 1 / BURST_SHAPE),
}
DEFAULT_ARRIVALS = "poisson"

if TYPE_CHECKING:
    Arrivals = str
else:
    Arrivals = Literal[tuple(ARRIVALS)]  # for pydantic, which reads it when the program runs


def arrival_times(law: str, rate: float, count: int, seed: str) -> list[float]:
    """When each of `count` requests is due, in seconds from the first one.

    Stretched so that the mean gap is exactly 1 / rate: it is the same in every block.
    """
    generator = random.Random(seed)
    gaps = [ARRIVALS[law](generator) for _ in range(count - 1)]
    scale = len(gaps) / rate / sum(gaps) if gaps else 0.0
    return [0.0, *(scale * time for time in accumulate(gaps))]
