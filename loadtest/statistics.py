"""Speed-ups with intervals and the verdict. Pure functions; the unit of every interval is the pair
of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from gradmap.common.verdict import Judgement, Verdict
from loadtest.cells import Cells
from loadtest.loads import ClosedLoop, Load, closed_loops
from loadtest.metrics import BY_NAME, COMPARED, E2EL, MAIN, TPOT, Metric
from loadtest.options import PAIRS_FOR_A_VERDICT
from loadtest.records import RequestRecord

CONFIDENCE = 0.95
# The one that the verdict is about, at the lowest concurrency.
VERDICT_METRIC = TPOT
# Pairs whose ratios differ by less were not measured: clocks and servers scatter by far more.
LEAST_WIDTH = 1e-9
# Of what a request gains between its first and its last token, end-to-end latency must have so
# much.
LEAST_SHARE = 0.5

# The requests of two blocks that are compared: the baseline's, the candidate's.
Pair = tuple[Sequence[RequestRecord], Sequence[RequestRecord]]


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster the candidate is: geometric mean over pairs, and its 95% interval.

    low and high are None with a single pair. ratios: one per pair of blocks.
    """

    value: float
    low: float | None
    high: float | None
    ratios: tuple[float, ...]


def pair_ratio(
    baseline: Sequence[RequestRecord], candidate: Sequence[RequestRecord], metric: Metric
) -> float:
    """How many times better the candidate is, of two blocks: above 1, it is faster."""
    ratio = metric.stand_for(baseline) / metric.stand_for(candidate)
    return ratio if metric.better == "lower" else 1 / ratio


def speed_up(ratios: Sequence[float]) -> SpeedUp:
    """Combines the ratios of the pairs, on their logarithms."""
    low, center, high = interval(np.log(ratios).tolist())
    if low is None or high is None:
        return SpeedUp(math.exp(center), None, None, tuple(ratios))
    return SpeedUp(math.exp(center), math.exp(low), math.exp(high), tuple(ratios))


def interval(values: Sequence[float]) -> tuple[float | None, float, float | None]:
    """Mean of one value per pair within Student's t interval; of a single value there is none.

    A bootstrap over so few blocks is too narrow: at 3 to 6 pairs its 95% interval covers well under
    95%.
    """
    center = float(np.mean(values))
    if len(values) < 2:
        return None, center, None
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    margin = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return center - margin, center, center + margin


def compute_speed_ups(cells: Cells, arm: str, against: str, load: Load) -> dict[str, SpeedUp]:
    """How much faster `arm` is than `against` at one load; name of a metric -> speed-up."""
    blocks = _blocks_of_pairs(cells, arm, against, load)
    speed_ups = {}
    for metric in COMPARED:
        if metric.in_open_loop or isinstance(load, ClosedLoop):
            ratios = [pair_ratio(baseline, own, metric) for baseline, own in blocks]
            speed_ups[metric.name] = speed_up(ratios)
    return speed_ups


def _blocks_of_pairs(cells: Cells, arm: str, against: str, load: Load) -> list[Pair]:
    """For every pair that `arm` has, the requests of `against` and its own."""
    baseline = cells.pairs(against, load.name)
    own = cells.pairs(arm, load.name)
    return [(baseline[pair].requests, own[pair].requests) for pair in own]


def headline(
    by_load: Mapping[str, dict[str, SpeedUp]], loads: Sequence[Load]
) -> dict[str, SpeedUp]:
    """The main metrics, the verdict's first: of requests at the lowest concurrency, of throughput
    at the highest."""
    closed = closed_loops(loads)
    lowest, highest = closed[0], closed[-1]
    speed_ups = {}
    for metric in sorted(MAIN, key=lambda metric: metric is not VERDICT_METRIC):
        load = lowest if metric.of_request else highest
        speed_ups[metric.name] = by_load[load.name][metric.name]
    return speed_ups


def find_losses(now: Mapping[str, SpeedUp], before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Speed-ups that are surely lower than they were: the intervals do not overlap. `before`: as
    report.json has it."""
    losses = []
    for name, value in now.items():
        low = before.get(name, {}).get("low")
        if low is not None and value.high is not None and value.high < low:
            values = f"{value.value:.2f}x, was {before[name]['value']:.2f}x"
            losses.append(f"{BY_NAME[name].label} speed-up {values}")
    return losses


def find_held_back(cells: Cells, arm: str, against: str, load: Load) -> str | None:
    """What is wrong where TPOT gains what end-to-end latency does not; None where nothing is, or
    one pair cannot tell.

    A server that holds tokens back before it sends the first moves their time from TPOT into TTFT,
    and seems faster.
    """
    blocks = _blocks_of_pairs(cells, arm, against, load)
    decoding = [_decoding_s(baseline) - _decoding_s(own) for baseline, own in blocks]
    whole = [E2EL.stand_for(baseline) - E2EL.stand_for(own) for baseline, own in blocks]
    missing = [LEAST_SHARE * gained - kept for gained, kept in zip(decoding, whole, strict=True)]
    gained_ms, kept_ms = 1000 * float(np.mean(decoding)), 1000 * float(np.mean(whole))
    low = interval(missing)[0]
    if gained_ms <= 0 or low is None or low <= 0:
        return None
    gains = (
        f"a request is {gained_ms:.1f} ms faster after its first token and {kept_ms:.1f} ms from "
        "end to end"
    )
    return (
        f"{gains}: TPOT gains what end-to-end latency does not, so that tokens were held back "
        "before the first"
    )


def _decoding_s(records: Sequence[RequestRecord]) -> float:
    """The median time of a block's requests from the first token to the last one."""
    times_s = [record.chunk_times_s for record in records]
    return float(np.median([arrivals_s[-1] - arrivals_s[0] for arrivals_s in times_s]))


def judge(speed_up: SpeedUp, required: float) -> Judgement:
    """PASS if the whole interval is at or above `required`, FAIL if it is below, else INCONCLUSIVE.

    Fewer than six pairs can fail but not pass. Nothing is concluded from numbers that are not
    finite, nor from pairs that do not scatter at all.
    """
    low, high = speed_up.low, speed_up.high
    if low is None or high is None:
        return Judgement(Verdict.INCONCLUSIVE, "one pair of blocks has no interval")
    if not all(map(math.isfinite, (speed_up.value, low, high, required))):
        return Judgement(Verdict.INVALID, "the TPOT speed-up is no finite number")
    described = f"TPOT speed-up {speed_up.value:.2f}x, 95% interval {low:.2f}-{high:.2f}"
    if high - low < LEAST_WIDTH * high:
        return Judgement(
            Verdict.INCONCLUSIVE,
            f"{described}, has no width: pairs that are all the same prove nothing",
        )
    if high < required:
        return Judgement(Verdict.FAIL, f"{described}, is below the required {required:.2f}x")
    if low < required:
        return Judgement(
            Verdict.INCONCLUSIVE, f"{described}, contains the required {required:.2f}x"
        )
    pairs = len(speed_up.ratios)
    if pairs < PAIRS_FOR_A_VERDICT:
        reason = (
            f"{described}, is above the required {required:.2f}x, but {pairs} pairs are too few "
            "for a PASS"
        )
        return Judgement(Verdict.INCONCLUSIVE, f"{reason} (it takes {PAIRS_FOR_A_VERDICT})")
    return Judgement(Verdict.PASS, f"{described}, is above the required {required:.2f}x")
