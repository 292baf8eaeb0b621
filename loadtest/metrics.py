"""Metrics from raw records, by the field's definitions. Pure functions.

TTFT  time to first token        t_1 - t_send
E2EL  end-to-end latency         t_n - t_send
TPOT  time per output token      (E2EL - TTFT) / (n - 1), for n >= 2
ITL   inter-token latency        the pooled gaps between arrivals
output throughput                tokens that arrived / length of the window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.records import RequestRecord

PERCENTILES = (50, 90, 95, 99)
# A percentile is printed only if at least this many samples lie beyond it.
SAMPLES_BEYOND = 10


@dataclass(frozen=True)
class RequestMetrics:
    """One successful request. Times in seconds; itl_s has one gap per chunk after the first."""

    ttft_s: float
    e2el_s: float
    tpot_s: float | None
    itl_s: tuple[float, ...]


@dataclass(frozen=True)
class Distribution:
    """Mean and percentiles (linear interpolation); a percentile with too few samples beyond it is None."""

    count: int
    mean: float
    median: float
    percentiles: dict[str, float | None]


@dataclass(frozen=True)
class LoadSummary:
    """All requests of one arm at one concurrency. Times in seconds, throughput in tokens/s.

    Throughput is tokens over time summed over the blocks, so that pauses between blocks do not count.
    """

    concurrency: int
    requests: int
    errors: int
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2el_s: Distribution | None
    output_throughput: float | None


def measure(record: RequestRecord) -> RequestMetrics:
    """Metrics of a request without error."""
    assert record.error is None
    first_s, last_s = record.chunk_times_s[0], record.chunk_times_s[-1]
    steps = record.completion_tokens - 1
    return RequestMetrics(
        ttft_s=first_s - record.sent_s,
        e2el_s=last_s - record.sent_s,
        tpot_s=(last_s - first_s) / steps if steps > 0 else None,
        itl_s=tuple(np.diff(record.chunk_times_s).tolist()),
    )


def describe(values: Sequence[float]) -> Distribution | None:
    """Summarises raw samples; None if there are none."""
    if not values:
        return None
    percentiles: dict[str, float | None] = {}
    for percentile in PERCENTILES:
        enough = len(values) * (100 - percentile) >= SAMPLES_BEYOND * 100
        percentiles[f"p{percentile}"] = float(np.percentile(values, percentile)) if enough else None
    return Distribution(len(values), float(np.mean(values)), float(np.median(values)), percentiles)


def output_throughput(records: Sequence[RequestRecord]) -> float | None:
    """Tokens per second of one block: all tokens that arrived, over first send to last arrival."""
    arrived = [record for record in records if record.chunk_times_s]
    if not arrived:
        return None
    window_s = max(record.chunk_times_s[-1] for record in arrived) - min(record.sent_s for record in records)
    return sum(record.completion_tokens for record in arrived) / window_s


def summarise_load(records: Sequence[RequestRecord], concurrency: int) -> LoadSummary:
    """Summarises the records of one arm at one concurrency, over all its blocks."""
    metrics = [measure(record) for record in records if record.error is None]
    return LoadSummary(
        concurrency=concurrency,
        requests=len(records),
        errors=sum(record.error is not None for record in records),
        ttft_s=describe([one.ttft_s for one in metrics]),
        tpot_s=describe([one.tpot_s for one in metrics if one.tpot_s is not None]),
        itl_s=describe([gap for one in metrics for gap in one.itl_s]),
        e2el_s=describe([one.e2el_s for one in metrics]),
        output_throughput=_pooled_throughput(records),
    )


def _pooled_throughput(records: Sequence[RequestRecord]) -> float | None:
    blocks = [[record for record in records if record.pair == pair] for pair in sorted({r.pair for r in records})]
    rates = [(output_throughput(block), sum(record.completion_tokens for record in block)) for block in blocks]
    seconds = sum(tokens / rate for rate, tokens in rates if rate)
    return sum(tokens for _, tokens in rates) / seconds if seconds else None
