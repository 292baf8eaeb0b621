"""Metrics from raw records, by the field's definitions. A metric is declared here, and nowhere
else: what runs, draws and writes takes it from METRICS. Pure functions.

    TTFT  time to first token     t_1 - t_send
    E2EL  end-to-end latency      t_n - t_send
    TPOT  time per output token   (E2EL - TTFT) / (n - k), where the first chunk brought k of the n
                                  tokens, for n > k
    ITL   inter-token latency     the pooled gaps between arrivals

    output throughput   tokens that arrived / length of the window
    attainment          requests that meet every SLO / requests; failed ones do not
    goodput             requests that meet every SLO / length of the window

In an open loop, latencies count from when a request was due, not from when it was sent: what a
client that could not keep up would hide otherwise ("coordinated omission").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from loadtest.records import RequestRecord

PERCENTILES = (50, 90, 95, 99)
# A percentile is printed only if at least this many samples lie beyond it.
SAMPLES_BEYOND = 10
# In names of files' keys, of what is in seconds.
SECONDS = "_s"


@dataclass(frozen=True)
class RequestMetrics:
    """What one request without error took. Times are seconds, and those of its tokens count from
    when it was due in an open loop, from when it was sent in a closed one."""

    record: RequestRecord

    @property
    def ttft_s(self) -> float:
        return self.record.chunk_times_s[0] - self._origin_s

    @property
    def e2el_s(self) -> float:
        return self.record.chunk_times_s[-1] - self._origin_s

    @property
    def tpot_s(self) -> float | None:
        """None if all tokens came at once."""
        times_s = self.record.chunk_times_s
        steps = self.record.completion_tokens - self.record.chunk_tokens[0]
        return (times_s[-1] - times_s[0]) / steps if steps > 0 else None

    @property
    def itl_s(self) -> tuple[float, ...]:
        """A gap for each chunk after the first."""
        return tuple(later - earlier for earlier, later in pairwise(self.record.chunk_times_s))

    @property
    def send_lag_s(self) -> float:
        """By how much it was sent after it was due."""
        return self.record.sent_s - self._origin_s

    @property
    def _origin_s(self) -> float:
        due_s = self.record.scheduled_s
        return self.record.sent_s if due_s is None else due_s


def measure(record: RequestRecord) -> RequestMetrics:
    """Metrics of a request without error."""
    assert record.error is None
    return RequestMetrics(record)


@dataclass(frozen=True)
class Sent:
    """All requests of one arm at one load. metrics: of those without error. seconds: summed over
    the blocks, so that pauses between them do not count. good: how many met every SLO; None without
    SLOs."""

    records: Sequence[RequestRecord]
    metrics: Sequence[RequestMetrics]
    seconds: float
    good: int | None

    def rate(self, amount: int | None) -> float | None:
        """So many a second; None if nothing arrived."""
        return amount / self.seconds if self.seconds and amount is not None else None

    @property
    def attainment(self) -> float | None:
        return None if self.good is None or not self.records else self.good / len(self.records)


@dataclass(frozen=True)
class Metric:
    """A metric, by what it is called and computed from.

    key: in report.json. label: the field's name. unit: in which it is shown, factor: to it, from
    the unit in files. better: which values are. main: whether it is shown where there is room for a
    few. in_open_loop: whether it says something of a server there.

    of_request: the value of a request, if it has one; of_gaps: its several values; of_load: the
    value of all requests together. Each metric has one of these. of_block: the number that stands
    for a block where models are compared; by default the median over its requests.
    """

    key: str
    label: str
    unit: str
    factor: float
    better: Literal["lower", "higher"]
    main: bool = False
    in_open_loop: bool = True
    of_request: Callable[[RequestMetrics], float | None] | None = None
    of_gaps: Callable[[RequestMetrics], Sequence[float]] | None = None
    of_load: Callable[[Sent], float | None] | None = None
    of_block: Callable[[Sequence[RequestRecord]], float | None] | None = None

    @property
    def name(self) -> str:
        """The key without its unit, as SLOs and speed-ups have it."""
        return self.key.removesuffix(SECONDS)

    @property
    def title(self) -> str:
        """The heading of its numbers: of a distribution, its median is shown."""
        what = self.label if self.of_load else f"{self.label} median"
        return f"{what} ({self.unit})"

    def values(self, metrics: Sequence[RequestMetrics]) -> list[float]:
        """Its values, of the requests that have some."""
        if self.of_gaps is not None:
            return [gap for request in metrics for gap in self.of_gaps(request)]
        assert self.of_request is not None
        values = map(self.of_request, metrics)
        return [value for value in values if value is not None]

    def summarise(self, sent: Sent) -> Distribution | float | None:
        """What report.json has of it."""
        return self.of_load(sent) if self.of_load else describe(self.values(sent.metrics))

    def stand_for(self, records: Sequence[RequestRecord]) -> float:
        """The number by which a block is compared, of which no request failed."""
        if self.of_block is None:
            return float(np.median(self.values([measure(record) for record in records])))
        number = self.of_block(records)
        assert number is not None
        return number


def window_s(records: Sequence[RequestRecord]) -> float | None:
    """Length of one block: first send to last arrival, in seconds. None if nothing arrived."""
    arrivals = [record.chunk_times_s[-1] for record in records if record.chunk_times_s]
    return max(arrivals) - min(record.sent_s for record in records) if arrivals else None


def count_tokens(records: Sequence[RequestRecord]) -> int:
    return sum(record.completion_tokens for record in records)


def output_throughput(records: Sequence[RequestRecord]) -> float | None:
    """Tokens per second of one block."""
    length_s = window_s(records)
    return count_tokens(records) / length_s if length_s else None


TTFT = Metric(
    "ttft_s", "TTFT", "ms", 1e3, "lower", main=True, of_request=lambda request: request.ttft_s
)
TPOT = Metric(
    "tpot_s", "TPOT", "ms", 1e3, "lower", main=True, of_request=lambda request: request.tpot_s
)
E2EL = Metric("e2el_s", "E2EL", "ms", 1e3, "lower", of_request=lambda request: request.e2el_s)
# In an open loop, throughput is what arrives.
OUTPUT_THROUGHPUT = Metric(
    "output_throughput",
    "output throughput",
    "tokens/s",
    1.0,
    "higher",
    main=True,
    in_open_loop=False,
    of_load=lambda sent: sent.rate(count_tokens(sent.records)),
    of_block=output_throughput,
)
ATTAINMENT = Metric(
    "attainment",
    "requests within the SLOs",
    "%",
    1e2,
    "higher",
    of_load=lambda sent: sent.attainment,
)
METRICS = (
    TTFT,
    TPOT,
    Metric("itl_s", "ITL", "ms", 1e3, "lower", of_gaps=lambda request: request.itl_s),
    E2EL,
    OUTPUT_THROUGHPUT,
    Metric(
        "goodput", "goodput", "requests/s", 1.0, "higher", of_load=lambda sent: sent.rate(sent.good)
    ),
    ATTAINMENT,
)
MAIN = tuple(metric for metric in METRICS if metric.main)
# Of which a request has one value, so that it can be within a limit or not.
OF_REQUESTS = tuple(metric for metric in METRICS if metric.of_request)
# Of which a block has one, so that it can be compared.
COMPARED = tuple(metric for metric in METRICS if metric.of_request or metric.of_block)
BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class Distribution:
    """Mean and percentiles (linear interpolation); a percentile with too few samples beyond it is
    None."""

    count: int
    mean: float
    median: float
    percentiles: dict[str, float | None]


def describe(values: Sequence[float]) -> Distribution | None:
    """Summarises raw samples; None if there are none."""
    if not values:
        return None
    percentiles: dict[str, float | None] = {}
    for percentile in PERCENTILES:
        enough = len(values) * (100 - percentile) >= SAMPLES_BEYOND * 100
        percentiles[f"p{percentile}"] = float(np.percentile(values, percentile)) if enough else None
    return Distribution(len(values), float(np.mean(values)), float(np.median(values)), percentiles)


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
