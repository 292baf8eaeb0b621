"""The requests of a load, summed up over its blocks. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loadtest.cells import grouped
from loadtest.metrics import METRICS, LoadSummary, RequestMetrics, Sent, describe, measure, window_s
from loadtest.records import RequestRecord
from loadtest.slo import Slo


def summarise_load(
    records: Sequence[RequestRecord], load: str, slos: Sequence[Slo] = ()
) -> LoadSummary:
    """Summarises the records of one arm at one load, over all its blocks. load: its name."""
    metrics = [measure(record) for record in records if record.error is None]
    good = sum(meets_all(request, slos) for request in metrics)
    sent = Sent(records, metrics, _seconds(records), good if slos else None)
    computed: dict[str, Any] = {metric.key: metric.summarise(sent) for metric in METRICS}
    return LoadSummary(
        load=load,
        requests=len(records),
        errors=len(records) - len(metrics),
        send_lag_s=describe([request.send_lag_s for request in metrics]),
        request_throughput=sent.rate(len(metrics)),
        meets_slos=meets_slos(sent, slos) if slos else None,
        **computed,
    )


def _seconds(records: Sequence[RequestRecord]) -> float:
    """How long the blocks took together."""
    windows_s = [window_s(block) for block in grouped(records, lambda record: record.pair).values()]
    return sum(length_s for length_s in windows_s if length_s is not None)


def meets_slos(sent: Sent, slos: Sequence[Slo]) -> bool:
    """Whether so many of the requests as each SLO says are within its limit.

    A request without a value, as of TPOT if all its tokens came at once, is within no limit.
    """
    for slo in slos:
        values = slo.of.values(sent.metrics)
        if len(values) < len(sent.records) or not slo.met_by(values):
            return False
    return True


def meets_all(request: RequestMetrics, slos: Sequence[Slo]) -> bool:
    """Whether one request is within the limit of every SLO."""
    return all(slo.holds(request) for slo in slos)
