"""Whether anything may be concluded from what was measured. Pure functions: records in, reasons
against it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from loadtest.cells import Cells
from loadtest.loads import ClosedLoop
from loadtest.metrics import TTFT, count_tokens, measure
from loadtest.records import Cell, RequestRecord
from loadtest.settings import LoadTestSettings, schedule

MAX_SEND_LAG_S = 0.05
MAX_CLIENT_CPU = 0.9
# Of the mean number of requests in flight in a closed loop, to its concurrency.
MIN_IN_FLIGHT = 0.95
# No model makes 5,000 tokens a second for one request: tokens that follow each other faster were
# held back.
BURST_S = 0.0002


def find_faults(cells: Cells, settings: LoadTestSettings) -> list[str]:
    """Reasons why nothing may be concluded from what was measured; empty if it is sound."""
    expected = _expected_requests(settings)
    faults = [*_missing(cells, expected), *_failed(cells), *_slow_client(cells)]
    faults += [*_lost_tokens(cells), *_idle_client(cells, settings)]
    # what did not happen has no times
    return faults or list(_bursts(cells, expected))


def _expected_requests(settings: LoadTestSettings) -> dict[Cell, int]:
    expected = {}
    for block in schedule(settings):
        for load in settings.loads:
            expected[Cell(block.arm, block.pair, load.name)] = settings.requests_at(load)
    return expected


def _missing(cells: Cells, expected: Mapping[Cell, int]) -> list[str]:
    """What should have been measured and was not; also what was and should not."""
    found = {cell: len(of_cell.requests) for cell, of_cell in cells.by_cell.items()}
    if sum(found.values()) != sum(expected.values()):
        return [f"{sum(found.values())} of {sum(expected.values())} requests were recorded"]
    for cell in (*expected, *found):
        counts = found.get(cell, 0), expected.get(cell, 0)
        if counts[0] != counts[1]:
            return [f"{counts[0]} of {counts[1]} requests were recorded in {cell}"]
    for cell in expected:
        if len(cells.at(cell).blocks) != 1:
            return [f"how busy the load generator was is not recorded in {cell}"]
    return []


def _failed(cells: Cells) -> Iterator[str]:
    errors = [record.error for record in _requests(cells)]
    failed = [error for error in errors if error is not None]
    if failed:
        yield f"{len(failed)} of {len(errors)} requests failed (the first: {failed[0]})"


def _slow_client(cells: Cells) -> Iterator[str]:
    """A load generator that cannot keep up measures itself."""
    lags_s = []
    for record in _requests(cells):
        if record.scheduled_s is not None:
            lags_s.append(record.sent_s - record.scheduled_s)
    lag_s = float(np.percentile(lags_s, 99)) if lags_s else 0.0
    if lag_s > MAX_SEND_LAG_S:
        limits = f"p99 {1000 * lag_s:.0f} ms, at most {1000 * MAX_SEND_LAG_S:.0f}"
        yield f"requests were sent late ({limits})"
    blocks = [block for of_cell in cells.by_cell.values() for block in of_cell.blocks]
    busiest = max((block.client_cpu for block in blocks), default=0.0)
    if busiest > MAX_CLIENT_CPU:
        limit = f"at most {100 * MAX_CLIENT_CPU:.0f}%"
        yield f"the load generator was busy {100 * busiest:.0f}% of the time ({limit})"


def _idle_client(cells: Cells, settings: LoadTestSettings) -> list[str]:
    """In a closed loop, so many requests are in flight as its concurrency says, until the last one
    is sent.

    By Little's law their mean number is the time that requests took together over the time that
    passed.
    """
    closed = {load.name: load for load in settings.loads if isinstance(load, ClosedLoop)}
    for cell, of_cell in cells.by_cell.items():
        if cell.load not in closed or not of_cell.requests:
            continue
        load, in_flight = closed[cell.load], mean_in_flight(of_cell.requests)
        if in_flight is not None and in_flight < MIN_IN_FLIGHT * load.level:
            where = f"{cell.arm}, pair {cell.pair + 1}, {load.label}"
            seen = f"only {in_flight:.2f} requests were in flight on average ({where})"
            return [f"{seen}: the client paused"]
    return []


def mean_in_flight(records: Sequence[RequestRecord]) -> float | None:
    """From the first to the last time that a request was sent; None if all were sent at once."""
    first_s = min(record.sent_s for record in records)
    last_s = max(record.sent_s for record in records)
    if first_s == last_s:
        return None
    together_s = sum(min(record.ended_s, last_s) - record.sent_s for record in records)
    return together_s / (last_s - first_s)


def _lost_tokens(cells: Cells) -> list[str]:
    """Tokens that the server made and the client did not see, or somebody else did."""
    for cell, of_cell in cells.by_cell.items():
        seen = count_tokens(of_cell.requests)
        for block in of_cell.blocks:
            if block.server_tokens is not None and block.server_tokens != seen:
                made = f"the server generated {block.server_tokens} tokens and {seen} arrived"
                return [f"{made} ({cell})"]
    return []


def _bursts(cells: Cells, expected: Mapping[Cell, int]) -> Iterator[str]:
    """A server, or a proxy, that sends everything at the end hides how long a token takes: all of
    it is in the TTFT."""
    for cell in expected:
        records = cells.at(cell).requests
        tpot_s = float(np.median([measure(record).tpot_s or 0.0 for record in records]))
        if tpot_s < BURST_S:
            burst = f"tokens arrived in a burst, {1e6 * tpot_s:.0f} microseconds apart ({cell})"
            yield f"{burst}: the server or a proxy holds them back, so that TPOT means nothing"
            return
        if TTFT.stand_for(records) <= 0:
            yield f"first tokens arrived when their requests were sent ({cell}), which cannot be"
            return


def _requests(cells: Cells) -> list[RequestRecord]:
    return [record for of_cell in cells.by_cell.values() for record in of_cell.requests]
