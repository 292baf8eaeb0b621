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
from loadtest.loads import Load
from loadtest.metrics import measure, output_throughput, values_of
from loadtest.records import RequestRecord
from loadtest.settings import PAIRS_FOR_A_VERDICT

CONFIDENCE = 0.95
METRICS = ("tpot", "ttft", "e2el", "output_throughput")
# Pairs whose ratios differ by less were not measured: clocks and servers scatter by far more.
LEAST_WIDTH = 1e-9
# Of what a request gains between its first and its last token, end-to-end latency must have so
# much.
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster the candidate is: geometric mean over pairs, and its 95% interval.

    low and high are None with a single pair. ratios: one per pair of blocks.
    """

    value: float
    low: float | None
    high: float | None
    ratios: tuple[float, ...]


def block_metric(records: Sequence[RequestRecord], metric: str) -> float:
    """The number that stands for one block: the median TTFT, TPOT or E2EL of its requests (s), or
    its tokens/s."""
    if metric == "output_throughput":
        throughput = output_throughput(records)
        assert throughput is not None
        return throughput
    return float(np.median(values_of([measure(record) for record in records], metric)))


def pair_ratio(
    baseline: Sequence[RequestRecord], candidate: Sequence[RequestRecord], metric: str
) -> float:
    """Baseline over candidate for times, candidate over baseline for throughput: above 1, the
    candidate is faster."""
    ratio = block_metric(baseline, metric) / block_metric(candidate, metric)
    return 1 / ratio if metric == "output_throughput" else ratio


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


def compute_speed_ups(
    records: Sequence[RequestRecord], arm: str, against: str, load: Load
) -> dict[str, SpeedUp]:
    """How much faster `arm` is than `against` at one load; metric -> speed-up.

    In an open loop, throughput is what arrives and no property of the server, so that it is left
    out.
    """
    of_load = [record for record in records if record.load == load.name]
    pairs = sorted({record.pair for record in of_load if record.arm == arm})
    metrics = [metric for metric in METRICS if not (load.is_open and metric == "output_throughput")]
    return {
        metric: speed_up(
            [
                pair_ratio(_block(of_load, against, pair), _block(of_load, arm, pair), metric)
                for pair in pairs
            ]
        )
        for metric in metrics
    }


def main_load(loads: Sequence[Load]) -> Load:
    """The one that the verdict is about: the lowest concurrency."""
    return min((load for load in loads if not load.is_open), key=lambda load: load.level)


def headline(
    by_load: Mapping[str, dict[str, SpeedUp]], loads: Sequence[Load]
) -> dict[str, SpeedUp]:
    """TTFT and TPOT at the lowest concurrency, output throughput at the highest."""
    busiest = max((load for load in loads if not load.is_open), key=lambda load: load.level)
    lowest, highest = by_load[main_load(loads).name], by_load[busiest.name]
    return {
        "tpot": lowest["tpot"],
        "ttft": lowest["ttft"],
        "output_throughput": highest["output_throughput"],
    }


def find_losses(now: Mapping[str, SpeedUp], before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Speed-ups that are surely lower than they were: the intervals do not overlap. `before`: as
    report.json has it."""
    losses = []
    for metric, value in now.items():
        low = before.get(metric, {}).get("low")
        if low is not None and value.high is not None and value.high < low:
            values = f"{value.value:.2f}x, was {before[metric]['value']:.2f}x"
            losses.append(f"{metric.replace('_', ' ')} speed-up {values}")
    return losses


def find_held_back(
    records: Sequence[RequestRecord], arm: str, against: str, load: Load
) -> str | None:
    """What is wrong where TPOT gains what end-to-end latency does not; None where nothing is, or
    one pair cannot tell.

    A server that holds tokens back before it sends the first moves their time from TPOT into TTFT,
    and seems faster.
    """
    of_load = [record for record in records if record.load == load.name]
    pairs = sorted({record.pair for record in of_load if record.arm == arm})
    blocks = [(_block(of_load, against, pair), _block(of_load, arm, pair)) for pair in pairs]
    decoding, whole = (
        [spent(dense) - spent(own) for dense, own in blocks] for spent in (_decoding_s, _whole_s)
    )
    missing = [LEAST_SHARE * gained - kept for gained, kept in zip(decoding, whole, strict=True)]
    gained_ms, kept_ms = (1000 * float(np.mean(gains)) for gains in (decoding, whole))
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
    return float(
        np.median([record.chunk_times_s[-1] - record.chunk_times_s[0] for record in records])
    )


def _whole_s(records: Sequence[RequestRecord]) -> float:
    return block_metric(records, "e2el")


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


def _block(records: Sequence[RequestRecord], arm: str, pair: int) -> list[RequestRecord]:
    return [record for record in records if (record.arm, record.pair) == (arm, pair)]
