"""Speed-ups with intervals and the verdict. Pure functions; the unit of every interval is the pair of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from gradmap.verdict import Judgement, Verdict
from loadtest.metrics import measure, output_throughput
from loadtest.records import RequestRecord

CONFIDENCE = 0.95
PAIRS_FOR_A_VERDICT = 6
METRICS = ("tpot", "ttft", "output_throughput")


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster the pruned model is: geometric mean over pairs, and its 95% interval.

    low and high are None with a single pair. ratios: one per pair of blocks.
    """

    value: float
    low: float | None
    high: float | None
    ratios: tuple[float, ...]


def block_metric(records: Sequence[RequestRecord], metric: str) -> float:
    """The number that stands for one block: the median TTFT or TPOT of its requests (s), or its tokens/s."""
    if metric == "output_throughput":
        throughput = output_throughput(records)
        assert throughput is not None
        return throughput
    measured = [measure(record) for record in records]
    values = [one.tpot_s if metric == "tpot" else one.ttft_s for one in measured]
    return float(np.median([value for value in values if value is not None]))


def pair_ratio(dense: Sequence[RequestRecord], pruned: Sequence[RequestRecord], metric: str) -> float:
    """Dense over pruned for times, pruned over dense for throughput: above 1, the pruned model is faster."""
    ratio = block_metric(dense, metric) / block_metric(pruned, metric)
    return 1 / ratio if metric == "output_throughput" else ratio


def speed_up(ratios: Sequence[float]) -> SpeedUp:
    """Combines the ratios of the pairs; Student's t interval on their logarithms.

    A bootstrap over so few blocks is too narrow: at 3 to 6 pairs its 95% interval covers well under 95%.
    """
    logs = np.log(ratios)
    center = float(logs.mean())
    if len(logs) < 2:
        return SpeedUp(math.exp(center), None, None, tuple(ratios))
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs)))
    return SpeedUp(math.exp(center), math.exp(center - margin), math.exp(center + margin), tuple(ratios))


def compute_speed_ups(records: Sequence[RequestRecord]) -> dict[str, SpeedUp]:
    """TTFT and TPOT at the lowest concurrency, output throughput at the highest; metric -> speed-up."""
    levels = sorted({record.concurrency for record in records})
    at_level = {"tpot": levels[0], "ttft": levels[0], "output_throughput": levels[-1]}
    speed_ups = {}
    for metric in METRICS:
        relevant = [record for record in records if record.concurrency == at_level[metric]]
        pairs = sorted({record.pair for record in relevant})
        ratios = [
            pair_ratio(_block(relevant, "dense", pair), _block(relevant, "pruned", pair), metric) for pair in pairs
        ]
        speed_ups[metric] = speed_up(ratios)
    return speed_ups


def find_faults(records: Sequence[RequestRecord], expected: int) -> list[str]:
    """Reasons why nothing may be concluded from the records; empty if they are sound."""
    failed = [record for record in records if record.error is not None]
    faults = []
    if len(records) != expected:
        faults.append(f"{len(records)} of {expected} requests were recorded")
    if failed:
        faults.append(f"{len(failed)} of {len(records)} requests failed (the first: {failed[0].error})")
    return faults


def judge(speed_up: SpeedUp, required: float) -> Judgement:
    """PASS if the whole interval is at or above `required`, FAIL if it is below, else INCONCLUSIVE.

    Fewer than six pairs can fail but not pass.
    """
    if speed_up.low is None or speed_up.high is None:
        return Judgement(Verdict.INCONCLUSIVE, "one pair of blocks has no interval")
    interval = f"TPOT speed-up {speed_up.value:.2f}x, 95% interval {speed_up.low:.2f}-{speed_up.high:.2f}"
    pairs = len(speed_up.ratios)
    if speed_up.high < required:
        return Judgement(Verdict.FAIL, f"{interval}, is below the required {required:.2f}x")
    if speed_up.low < required:
        return Judgement(Verdict.INCONCLUSIVE, f"{interval}, contains the required {required:.2f}x")
    if pairs < PAIRS_FOR_A_VERDICT:
        reason = f"{interval}, is above the required {required:.2f}x, but {pairs} pairs are too few for a PASS"
        return Judgement(Verdict.INCONCLUSIVE, f"{reason} (it takes {PAIRS_FOR_A_VERDICT})")
    return Judgement(Verdict.PASS, f"{interval}, is above the required {required:.2f}x")


def _block(records: Sequence[RequestRecord], arm: str, pair: int) -> list[RequestRecord]:
    return [record for record in records if (record.arm, record.pair) == (arm, pair)]
