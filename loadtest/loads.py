"""How requests arrive: so many in flight (closed loop), or so many a second, whatever the server
does (open loop)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from gradmap.common.errors import UserError

CONCURRENCY = "concurrency"
Arrivals = Literal["poisson", "constant", "burst"]
ARRIVALS: tuple[str, ...] = get_args(Arrivals)
# Gaps of a burst are gamma distributed; with this shape they vary twice as much as Poisson's, whose
# shape is 1.
BURST_SHAPE = 0.25
# Of the search for the highest rate: requests a second, and by how much the bounds may differ in
# the end.
LOWEST_RATE, HIGHEST_RATE = 0.25, 1024.0
PRECISION = 1.1


@dataclass(frozen=True)
class Load:
    """pattern: `concurrency`, with level requests in flight; or one of ARRIVALS, with level
    requests a second."""

    pattern: str
    level: float

    @property
    def name(self) -> str:
        return f"{self.pattern}_{self.level:g}"

    @property
    def label(self) -> str:
        return readable(self.name)

    @property
    def is_open(self) -> bool:
        return self.pattern != CONCURRENCY


def readable(name: str) -> str:
    """Of Load.name: `poisson_4` -> `poisson 4/s`, `concurrency_8` -> `concurrency 8`."""
    pattern, _, level = name.partition("_")
    return f"{pattern} {level}" + ("" if pattern == CONCURRENCY else "/s")


def parse_loads(
    concurrency: Sequence[int] | None, rates: Sequence[float] | None, arrivals: str | None
) -> tuple[Load, ...]:
    """Closed loops, of one request at a time and of eight if nothing is said; then open ones.
    Raises UserError for unknown arrivals."""
    arrivals = arrivals or "poisson"
    if arrivals not in ARRIVALS:
        raise UserError(f"--arrivals {arrivals} is unknown; known are {', '.join(ARRIVALS)}.")
    closed = [Load(CONCURRENCY, level) for level in sorted(set(concurrency or (1, 8)))]
    return (*closed, *(Load(arrivals, rate) for rate in sorted(set(rates or ()))))


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


def find_highest_rate(meets: Callable[[float], bool]) -> float:
    """The highest rate that meets the objectives, as far as was tried; 0 if LOWEST_RATE does not.

    Doubles the rate until it is too high, then halves the gap, in proportion, until it is within
    PRECISION.
    """
    if not meets(LOWEST_RATE):
        return 0.0
    good, bad = LOWEST_RATE, 2 * LOWEST_RATE
    while meets(bad):
        good, bad = bad, 2 * bad
        if bad > HIGHEST_RATE:
            return good
    while bad / good > PRECISION:
        middle = float(f"{(good * bad) ** 0.5:.4g}")
        good, bad = (middle, bad) if meets(middle) else (good, middle)
    return good
