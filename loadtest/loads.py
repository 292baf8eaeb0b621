"""How much is asked of a server at once: so many requests in flight (closed loop), or so many a
second, whatever the server does (open loop)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter

from loadtest.arrivals import DEFAULT_ARRIVALS, Arrivals

# Of the search for the highest rate: requests a second, and by how much the bounds may differ in
# the end.
LOWEST_RATE, HIGHEST_RATE = 0.25, 1024.0
PRECISION = 1.1
# A closed loop is sustained for at least so many full rounds.
ROUNDS = 2


@dataclass(frozen=True)
class ClosedLoop:
    """level: requests in flight; each is followed by the next as soon as it has ended.

    pattern: what a closed loop is called in files.
    """

    pattern: Literal["concurrency"] = field(default="concurrency", kw_only=True)
    level: int

    @property
    def name(self) -> str:
        return f"{self.pattern}_{self.level:g}"

    @property
    def label(self) -> str:
        return f"{self.pattern} {self.level:g}"

    def enough_requests(self, open_loop_s: float) -> float:
        """How many requests it takes for the load to be sustained."""
        return ROUNDS * self.level


@dataclass(frozen=True)
class OpenLoop:
    """pattern: the law by which requests arrive, one of ARRIVALS; level: how many a second."""

    pattern: Arrivals
    level: float

    @property
    def name(self) -> str:
        return f"{self.pattern}_{self.level:g}"

    @property
    def label(self) -> str:
        return f"{self.pattern} {self.level:g}/s"

    def enough_requests(self, open_loop_s: float) -> float:
        """How many requests it takes for the load to last `open_loop_s` seconds."""
        return self.level * open_loop_s


Load: TypeAlias = ClosedLoop | OpenLoop


def list_loads(
    concurrency: Sequence[int], rates: Sequence[float], arrivals: str
) -> tuple[Load, ...]:
    """Closed loops, then open ones, each once."""
    closed = [ClosedLoop(level) for level in sorted(set(concurrency))]
    opened = [OpenLoop(arrivals, rate) for rate in sorted(set(rates))]
    return (*closed, *opened)


def closed_loops(loads: Sequence[Load]) -> list[ClosedLoop]:
    """The closed loops among these, from the lowest concurrency to the highest."""
    closed = [load for load in loads if isinstance(load, ClosedLoop)]
    return sorted(closed, key=lambda load: load.level)


def load_labels(report: Mapping[str, Any]) -> dict[str, str]:
    """Name of every load of a report.json -> how people read it, such as `poisson 4/s`."""
    loads = TypeAdapter(tuple[Load, ...]).validate_python(report["settings"]["loads"])
    return {load.name: load.label for load in loads}


def search_load(rate: float) -> OpenLoop:
    """What the search for the highest rate sends, at one of the rates that it tries."""
    return OpenLoop(DEFAULT_ARRIVALS, rate)


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
