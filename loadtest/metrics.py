"""Metrics from raw records, by the field's definitions. Pure functions.

TTFT  time to first token        t_1 - t_send E2EL  end-to-end latency         t_n - t_send TPOT
time per output token      (E2EL - TTFT) / (n - k), where the first chunk brought k of the n tokens,
for n > k ITL   inter-token latency        the pooled gaps between arrivals In an open loop,
latencies count from when a request was due, not from when it was sent: what a client that could not
keep up would hide otherwise ("coordinated omission").

output throughput                tokens that arrived / length of the window
attainment                       requests that meet every SLO / requests; failed ones do not
goodput                          requests that meet every SLO / length of the window
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.records import RequestRecord
from loadtest.slo import Slo

PERCENTILES = (50, 90, 95, 99)
# A percentile is printed only if at least this many samples lie beyond it.
SAMPLES_BEYOND = 10


@dataclass(frozen=True)
class RequestMetrics:
    """One successful request. Times in seconds; itl_s has a gap for each chunk after the first,
    tpot_s needs one.

    ttft_s, e2el_s: from when it was due in an open loop, from when it was sent in a closed one.
    send_lag_s: between.
    """

    ttft_s: float
    e2el_s: float
    tpot_s: float | None
    itl_s: tuple[float, ...]
    send_lag_s: float


@dataclass(frozen=True)
class Distribution:
    """Mean and percentiles (linear interpolation); a percentile with too few samples beyond it is
    None."""

    count: int
    mean: float
    median: float
    percentiles: dict[str, float | None]


@dataclass(frozen=True)
class LoadSummary:
    """All requests of one arm at one load. Times in seconds; throughput in tokens/s, goodput in
    requests/s.

    Rates are over time summed over the blocks, so that pauses between blocks do not count.
    attainment, goodput, meets_slos: None without SLOs.
    """

    load: str
    requests: int
    errors: int
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    e2el_s: Distribution | None
    send_lag_s: Distribution | None
    output_throughput: float | None
    request_throughput: float | None
    goodput: float | None
    attainment: float | None
    meets_slos: bool | None


def measure(record: RequestRecord) -> RequestMetrics:
    """Metrics of a request without error."""
    assert record.error is None
    first_s, last_s = record.chunk_times_s[0], record.chunk_times_s[-1]
    steps = record.completion_tokens - record.chunk_tokens[0]
    origin_s = record.sent_s if record.scheduled_s is None else record.scheduled_s
    return RequestMetrics(
        ttft_s=first_s - origin_s,
        e2el_s=last_s - origin_s,
        tpot_s=(last_s - first_s) / steps if steps > 0 else None,
        itl_s=tuple(np.diff(record.chunk_times_s).tolist()),
        send_lag_s=record.sent_s - origin_s,
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


def window_s(records: Sequence[RequestRecord]) -> float | None:
    """Length of one block: first send to last arrival, in seconds. None if nothing arrived."""
    arrivals = [record.chunk_times_s[-1] for record in records if record.chunk_times_s]
    return max(arrivals) - min(record.sent_s for record in records) if arrivals else None


def output_throughput(records: Sequence[RequestRecord]) -> float | None:
    """Tokens per second of one block."""
    length_s = window_s(records)
    return sum(record.completion_tokens for record in records) / length_s if length_s else None


def summarise_load(
    records: Sequence[RequestRecord], load: str, slos: Sequence[Slo] = ()
) -> LoadSummary:
    """Summarises the records of one arm at one load, over all its blocks."""
    metrics = [measure(record) for record in records if record.error is None]
    blocks = [
        [record for record in records if record.pair == pair]
        for pair in sorted({r.pair for r in records})
    ]
    seconds = sum(length_s for block in blocks if (length_s := window_s(block)) is not None)

    def rate(amount: int) -> float | None:
        return amount / seconds if seconds else None

    good = sum(meets_all(one, slos) for one in metrics)
    # a request without a value, as of TPOT if all its tokens came at once, is within no limit
    told = [values_of(metrics, slo.metric) for slo in slos]
    met = all(
        len(values) == len(records) and slo.met_by(values)
        for slo, values in zip(slos, told, strict=True)
    )
    return LoadSummary(
        load=load,
        requests=len(records),
        errors=len(records) - len(metrics),
        ttft_s=describe(values_of(metrics, "ttft")),
        tpot_s=describe(values_of(metrics, "tpot")),
        itl_s=describe([gap for one in metrics for gap in one.itl_s]),
        e2el_s=describe(values_of(metrics, "e2el")),
        send_lag_s=describe([one.send_lag_s for one in metrics]),
        output_throughput=rate(sum(record.completion_tokens for record in records)),
        request_throughput=rate(len(metrics)),
        goodput=rate(good) if slos else None,
        attainment=good / len(records) if slos and records else None,
        meets_slos=met if slos else None,
    )


def values_of(metrics: Sequence[RequestMetrics], name: str) -> list[float]:
    """Of `ttft`, `tpot` or `e2el`, in seconds, for the requests that have it."""
    values = [getattr(one, f"{name}_s") for one in metrics]
    return [value for value in values if value is not None]


def meets_all(metrics: RequestMetrics, slos: Sequence[Slo]) -> bool:
    """Whether one request is within the limit of every SLO."""
    told = [(getattr(metrics, f"{slo.metric}_s"), slo.limit_s) for slo in slos]
    return all(value is not None and value <= limit_s for value, limit_s in told)
