"""Whether anything may be concluded from what was measured. Pure functions: records in, reasons
against it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from loadtest.loads import Load
from loadtest.metrics import measure
from loadtest.records import BlockRecord, Measurements, RequestRecord
from loadtest.settings import LoadTestSettings, schedule

MAX_SEND_LAG_S = 0.05
MAX_CLIENT_CPU = 0.9
# Of the mean number of requests in flight in a closed loop, to its concurrency.
MIN_IN_FLIGHT = 0.95
# No model makes 5,000 tokens a second for one request: tokens that follow each other faster were
# held back.
BURST_S = 0.0002

# arm, pair, load
Place = tuple[str, int, str]


def find_faults(measured: Measurements, settings: LoadTestSettings) -> list[str]:
    """Reasons why nothing may be concluded from what was measured; empty if it is sound."""
    expected = {
        (block.arm, block.pair, load.name): settings.requests_at(load)
        for block in schedule(settings)
        for load in settings.loads
    }
    records, blocks = measured.requests, measured.blocks
    faults = [*_missing(measured, expected), *_failed(records), *_slow_client(records, blocks)]
    faults += [*_lost_tokens(records, blocks), *_idle_client(records, settings.loads)]
    # what did not happen has no times
    return faults or list(_bursts(records, expected))


def _missing(measured: Measurements, expected: dict[Place, int]) -> list[str]:
    """What should have been measured and was not; also what was and should not."""
    records = Counter((record.arm, record.pair, record.load) for record in measured.requests)
    if records != expected:
        if records.total() != sum(expected.values()):
            return [f"{records.total()} of {sum(expected.values())} requests were recorded"]
        place = next(
            place for place in (*expected, *records) if records[place] != expected.get(place, 0)
        )
        return [
            f"{records[place]} of {expected.get(place, 0)} requests were recorded in "
            f"{_where(place)}"
        ]
    blocks = Counter((block.arm, block.pair, block.load) for block in measured.blocks)
    unknown = next((place for place in expected if blocks[place] != 1), None)
    return (
        []
        if unknown is None
        else [f"how busy the load generator was is not recorded in {_where(unknown)}"]
    )


def _failed(records: Sequence[RequestRecord]) -> list[str]:
    failed = [record for record in records if record.error is not None]
    return (
        [f"{len(failed)} of {len(records)} requests failed (the first: {failed[0].error})"]
        if failed
        else []
    )


def _slow_client(records: Sequence[RequestRecord], blocks: Sequence[BlockRecord]) -> list[str]:
    """A load generator that cannot keep up measures itself."""
    faults = []
    lags_s = [
        record.sent_s - record.scheduled_s for record in records if record.scheduled_s is not None
    ]
    lag_s = float(np.percentile(lags_s, 99)) if lags_s else 0.0
    if lag_s > MAX_SEND_LAG_S:
        faults.append(
            f"requests were sent late (p99 {1000 * lag_s:.0f} ms, at most "
            f"{1000 * MAX_SEND_LAG_S:.0f})"
        )
    busiest = max((block.client_cpu for block in blocks), default=0.0)
    if busiest > MAX_CLIENT_CPU:
        limit = f"at most {100 * MAX_CLIENT_CPU:.0f}%"
        faults.append(f"the load generator was busy {100 * busiest:.0f}% of the time ({limit})")
    return faults


def _idle_client(records: Sequence[RequestRecord], loads: Sequence[Load]) -> list[str]:
    """In a closed loop, so many requests are in flight as its concurrency says, until the last one
    is sent.

    By Little's law their mean number is the time that requests took together over the time that
    passed.
    """
    for load in (load for load in loads if not load.is_open):
        of_load = [record for record in records if record.load == load.name]
        for arm, pair in sorted({(record.arm, record.pair) for record in of_load}):
            in_flight = mean_in_flight(_of(of_load, (arm, pair, load.name)))
            if in_flight is not None and in_flight < MIN_IN_FLIGHT * load.level:
                where = f"{arm}, pair {pair + 1}, {load.label}"
                return [
                    f"only {in_flight:.2f} requests were in flight on average ({where}): the "
                    "client paused"
                ]
    return []


def mean_in_flight(records: Sequence[RequestRecord]) -> float | None:
    """From the first to the last time that a request was sent; None if all were sent at once."""
    first_s, last_s = (
        min(record.sent_s for record in records),
        max(record.sent_s for record in records),
    )
    if first_s == last_s:
        return None
    return sum(min(record.ended_s, last_s) - record.sent_s for record in records) / (
        last_s - first_s
    )


def _lost_tokens(records: Sequence[RequestRecord], blocks: Sequence[BlockRecord]) -> list[str]:
    """Tokens that the server made and the client did not see, or somebody else did."""
    for block in blocks:
        place = (block.arm, block.pair, block.load)
        seen = sum(record.completion_tokens for record in _of(records, place))
        if block.server_tokens is not None and block.server_tokens != seen:
            return [
                f"the server generated {block.server_tokens} tokens and {seen} arrived "
                f"({_where(place)})"
            ]
    return []


def _bursts(records: Sequence[RequestRecord], expected: dict[Place, int]) -> Iterator[str]:
    """A server, or a proxy, that sends everything at the end hides how long a token takes: all of
    it is in the TTFT."""
    for place in expected:
        metrics = [measure(record) for record in _of(records, place)]
        tpot_s = float(np.median([one.tpot_s or 0.0 for one in metrics]))
        if tpot_s < BURST_S:
            burst = (
                f"tokens arrived in a burst, {1e6 * tpot_s:.0f} microseconds apart "
                f"({_where(place)})"
            )
            yield f"{burst}: the server or a proxy holds them back, so that TPOT means nothing"
            return
        if float(np.median([one.ttft_s for one in metrics])) <= 0:
            where = _where(place)
            yield f"first tokens arrived when their requests were sent ({where}), which cannot be"
            return


def _of(records: Sequence[RequestRecord], place: Place) -> list[RequestRecord]:
    return [record for record in records if (record.arm, record.pair, record.load) == place]


def _where(place: Place) -> str:
    arm, pair, load = place
    return f"{arm}, pair {pair + 1}, {load}"
