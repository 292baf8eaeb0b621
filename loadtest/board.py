"""What people see of a load test while it runs: a live table on a terminal, plain lines
elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median

from rich.live import Live
from rich.table import Table

from gradmap.common.console import STDERR, heartbeat, say
from gradmap.common.heartbeat import Pace, describe_s
from loadtest.loads import Load
from loadtest.metrics import MAIN, OF_REQUESTS, Metric, RequestMetrics, measure, window_s
from loadtest.records import RequestRecord

REFRESHES_PER_S = 4
# What of a load is seen while it runs.
LIVE = tuple(metric for metric in OF_REQUESTS if metric in MAIN)
# What a session spends its time on.
START, LOAD = "start", "load"


class Ahead:
    """How long the rest of a session takes. Servers that start take longer than loads, so that each
    has a pace of its own. Times are seconds."""

    def __init__(self, starts: int, loads: int) -> None:
        self._paces = {START: Pace(starts), LOAD: Pace(loads)}
        self._spent_s = {START: 0.0, LOAD: 0.0}

    def done(self, kind: str, seconds: float) -> None:
        """Counts a start or a load that took so long."""
        self._spent_s[kind] += seconds
        self._paces[kind].advance(1, self._spent_s[kind])

    def eta_s(self, kind: str, so_far_s: float) -> float | None:
        """kind: what has been going on for `so_far_s`. None if nothing tells, or if it should have
        been done by now."""
        total_s = 0.0
        for part, pace in self._paces.items():
            if pace.done == pace.total:
                continue
            rest_s = pace.eta_s(self._spent_s[part] + (so_far_s if part == kind else 0.0))
            if rest_s is None:
                return None
            total_s += rest_s
        return total_s


class Board:
    """Rate, TTFT and TPOT of every load that ran or runs, and how long the rest will take.

    starts, loads: how many there are in all; those of the search for the highest rate are not known
    beforehand.
    """

    def __init__(self, starts: int, loads: int) -> None:
        self._ahead = Ahead(starts, loads)
        self._started_s = self._turned_s = time.monotonic()
        self._rows: dict[tuple[str, str], tuple[str, ...]] = {}
        self._now = ""

    @contextmanager
    def showing(self) -> Iterator[None]:
        """On a terminal, shows the table until the end."""
        live = Live(get_renderable=self._table, console=STDERR, refresh_per_second=REFRESHES_PER_S)
        with live if sys.stderr.isatty() else nullcontext():
            yield

    def started(self) -> None:
        """A server has, since the last load ended."""
        self._turn(START)

    @contextmanager
    def load(self, arm: str, stay: str, load: Load, count: int) -> Iterator[LoadProgress]:
        """Shows a load of `count` requests while the block runs; elsewhere than on a terminal, as
        lines.

        stay: which block this is, such as `pair 2`.
        """
        self._now = f"{arm}, {stay}, {load.label}"
        progress = LoadProgress(self, arm, load, count)
        with heartbeat(lambda _: self._line(progress)):
            yield progress
        self._turn(LOAD)
        if not sys.stderr.isatty():
            say(self._line(progress))

    def update(self, arm: str, load: Load, cells: tuple[str, ...]) -> None:
        self._rows[arm, load.label] = cells

    def _line(self, progress: LoadProgress) -> str:
        requests, rate, *medians, failed = progress.cells
        parts = [f"{requests} requests", f"{rate}/s"]
        for metric, value in zip(LIVE, medians, strict=True):
            parts.append(f"{metric.label} {value} {metric.unit}")
        line = f"{self._now}: {', '.join(parts)}, {failed} failed"
        return f"{line}   {self._describe_eta()}".rstrip()

    def _turn(self, kind: str) -> None:
        """Counts what ends now."""
        now_s = time.monotonic()
        self._ahead.done(kind, now_s - self._turned_s)
        self._turned_s = now_s

    def _describe_eta(self) -> str:
        eta_s = self._ahead.eta_s(LOAD, time.monotonic() - self._turned_s)
        return "" if eta_s is None else f"ETA {describe_s(eta_s)}"

    def _table(self) -> Table:
        title = f"{self._now}   {time.monotonic() - self._started_s:.0f} s   {self._describe_eta()}"
        table = Table(title=title, title_justify="left")
        table.add_column("load")
        medians = [f"{metric.label} ({metric.unit})" for metric in LIVE]
        for column in ("requests", "requests/s", *medians, "failed"):
            table.add_column(column, justify="right")
        for (arm, load), cells in self._rows.items():
            table.add_row(f"{arm}, {load}", *cells)
        return table


class LoadProgress:
    """One load while it runs. Told of all its records so far."""

    def __init__(self, board: Board, arm: str, load: Load, count: int) -> None:
        self._board, self._arm, self._load, self._count = board, arm, load, count
        self.cells = describe_progress((), count)

    def update(self, records: Sequence[RequestRecord]) -> None:
        self.cells = describe_progress(records, self._count)
        self._board.update(self._arm, self._load, self.cells)


def describe_progress(records: Sequence[RequestRecord], count: int) -> tuple[str, ...]:
    """Requests so far of `count`, requests a second, medians of LIVE, failed requests."""
    metrics = [measure(record) for record in records if record.error is None]
    length_s = window_s(records) if records else None
    rate = f"{len(records) / length_s:.2f}" if length_s else "-"
    medians = [_median(metric, metrics) for metric in LIVE]
    return (f"{len(records)}/{count}", rate, *medians, str(len(records) - len(metrics)))


def _median(metric: Metric, metrics: Sequence[RequestMetrics]) -> str:
    values = metric.values(metrics)
    return f"{metric.factor * median(values):.1f}" if values else "-"
