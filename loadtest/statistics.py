"""Speed-ups with intervals and the verdict. Pure functions; the unit of every interval is the pair of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from gradmap.verdict import Judgement, Verdict
from loadtest.loads import Load
from loadtest.metrics import measure, output_throughput, values_of
from loadtest.records import BlockRecord, Measurements, RequestRecord
from loadtest.settings import PAIRS_FOR_A_VERDICT

CONFIDENCE = 0.95
METRICS = ("tpot", "ttft", "e2el", "output_throughput")
MAX_SEND_LAG_S = 0.05
MAX_CLIENT_CPU = 0.9
# Of the mean number of requests in flight in a closed loop, to its concurrency.
MIN_IN_FLIGHT = 0.95


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
    """The number that stands for one block: the median TTFT, TPOT or E2EL of its requests (s), or its tokens/s."""
    if metric == "output_throughput":
        throughput = output_throughput(records)
        assert throughput is not None
        return throughput
    return float(np.median(values_of([measure(record) for record in records], metric)))


def pair_ratio(baseline: Sequence[RequestRecord], candidate: Sequence[RequestRecord], metric: str) -> float:
    """Baseline over candidate for times, candidate over baseline for throughput: above 1, the candidate is faster."""
    ratio = block_metric(baseline, metric) / block_metric(candidate, metric)
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


def compute_speed_ups(records: Sequence[RequestRecord], arm: str, against: str, load: Load) -> dict[str, SpeedUp]:
    """How much faster `arm` is than `against` at one load; metric -> speed-up.

    In an open loop, throughput is what arrives and no property of the server, so that it is left out.
    """
    of_load = [record for record in records if record.load == load.name]
    pairs = sorted({record.pair for record in of_load if record.arm == arm})
    metrics = [metric for metric in METRICS if not (load.is_open and metric == "output_throughput")]
    return {
        metric: speed_up(
            [pair_ratio(_block(of_load, against, pair), _block(of_load, arm, pair), metric) for pair in pairs]
        )
        for metric in metrics
    }


def headline(by_load: Mapping[str, dict[str, SpeedUp]], loads: Sequence[Load]) -> dict[str, SpeedUp]:
    """TTFT and TPOT at the lowest concurrency, output throughput at the highest."""
    closed = sorted((load for load in loads if not load.is_open), key=lambda load: load.level)
    lowest, highest = (by_load[load.name] for load in (closed[0], closed[-1]))
    return {"tpot": lowest["tpot"], "ttft": lowest["ttft"], "output_throughput": highest["output_throughput"]}


def find_faults(measured: Measurements, loads: Sequence[Load], expected: int) -> list[str]:
    """Reasons why nothing may be concluded from what was measured; empty if it is sound."""
    records, blocks = measured.requests, measured.blocks
    faults = [*_missing_or_failed(records, expected), *_slow_client(records, blocks), *_lost_tokens(records, blocks)]
    return [*faults, *_idle_client(records, loads)]


def _missing_or_failed(records: Sequence[RequestRecord], expected: int) -> list[str]:
    faults = []
    if len(records) != expected:
        faults.append(f"{len(records)} of {expected} requests were recorded")
    failed = [record for record in records if record.error is not None]
    if failed:
        faults.append(f"{len(failed)} of {len(records)} requests failed (the first: {failed[0].error})")
    return faults


def _slow_client(records: Sequence[RequestRecord], blocks: Sequence[BlockRecord]) -> list[str]:
    """A load generator that cannot keep up measures itself."""
    faults = []
    lags_s = [record.sent_s - record.scheduled_s for record in records if record.scheduled_s is not None]
    lag_s = float(np.percentile(lags_s, 99)) if lags_s else 0.0
    if lag_s > MAX_SEND_LAG_S:
        faults.append(f"requests were sent late (p99 {1000 * lag_s:.0f} ms, at most {1000 * MAX_SEND_LAG_S:.0f})")
    busiest = max((block.client_cpu for block in blocks), default=0.0)
    if busiest > MAX_CLIENT_CPU:
        limit = f"at most {100 * MAX_CLIENT_CPU:.0f}%"
        faults.append(f"the load generator was busy {100 * busiest:.0f}% of the time ({limit})")
    return faults


def _idle_client(records: Sequence[RequestRecord], loads: Sequence[Load]) -> list[str]:
    """In a closed loop, so many requests are in flight as its concurrency says, until the last one is sent.

    By Little's law their mean number is the time that requests took together over the time that passed.
    """
    for load in (load for load in loads if not load.is_open):
        of_load = [record for record in records if record.load == load.name]
        for arm, pair in sorted({(record.arm, record.pair) for record in of_load}):
            in_flight = mean_in_flight(_block(of_load, arm, pair))
            if in_flight is not None and in_flight < MIN_IN_FLIGHT * load.level:
                where = f"{arm}, pair {pair + 1}, {load.label}"
                return [f"only {in_flight:.2f} requests were in flight on average ({where}): the client paused"]
    return []


def mean_in_flight(records: Sequence[RequestRecord]) -> float | None:
    """From the first to the last time that a request was sent; None if all were sent at once."""
    first_s, last_s = min(record.sent_s for record in records), max(record.sent_s for record in records)
    if first_s == last_s:
        return None
    return sum(min(record.ended_s, last_s) - record.sent_s for record in records) / (last_s - first_s)


def _lost_tokens(records: Sequence[RequestRecord], blocks: Sequence[BlockRecord]) -> list[str]:
    """Tokens that the server made and the client did not see, or somebody else did."""
    for block in blocks:
        of_block = [record for record in _block(records, block.arm, block.pair) if record.load == block.load]
        seen = sum(record.completion_tokens for record in of_block)
        if block.server_tokens is not None and block.server_tokens != seen:
            where = f"{block.arm}, pair {block.pair + 1}, {block.load}"
            return [f"the server generated {block.server_tokens} tokens and {seen} arrived ({where})"]
    return []


def find_losses(now: Mapping[str, SpeedUp], before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Speed-ups that are surely lower than they were: the intervals do not overlap. `before`: as report.json has it."""
    losses = []
    for metric, value in now.items():
        low = before.get(metric, {}).get("low")
        if low is not None and value.high is not None and value.high < low:
            values = f"{value.value:.2f}x, was {before[metric]['value']:.2f}x"
            losses.append(f"{metric.replace('_', ' ')} speed-up {values}")
    return losses


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
