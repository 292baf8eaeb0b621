"""How requests arrive: so many in flight (closed loop), or so many a second, whatever the server does (open loop)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate

CONCURRENCY = "concurrency"
ARRIVALS = ("poisson", "constant", "burst")
# Gaps of a burst are gamma distributed; with this shape they vary twice as much as Poisson's, whose shape is 1.
BURST_SHAPE = 0.25


@dataclass(frozen=True)
class Load:
    """pattern: `concurrency`, with level requests in flight; or one of ARRIVALS, with level requests a second."""

    pattern: str
    level: float

    @property
    def name(self) -> str:
        return f"{self.pattern}_{self.level:g}"

    @property
    def label(self) -> str:
        return f"{self.pattern} {self.level:g}" + ("/s" if self.is_open else "")

    @property
    def is_open(self) -> bool:
        return self.pattern != CONCURRENCY


def arrival_times(load: Load, count: int, seed: str) -> list[float]:
    """When each request of an open loop is due, in seconds from the first one.

    Stretched so that the mean gap is exactly 1 / level: the rate is the same in every block.
    """
    generator = random.Random(seed)
    draw = {
        "poisson": lambda: generator.expovariate(1.0),
        "constant": lambda: 1.0,
        "burst": lambda: generator.gammavariate(BURST_SHAPE, 1 / BURST_SHAPE),
    }[load.pattern]
    gaps = [draw() for _ in range(count - 1)]
    scale = len(gaps) / load.level / sum(gaps) if gaps else 0.0
    return [0.0, *(scale * time for time in accumulate(gaps))]
