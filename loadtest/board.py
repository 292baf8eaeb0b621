"""What people see of a load test while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median

from rich.console import Console
from rich.live import Live
from rich.table import Table

from gradmap.console import PLAIN_LINE_INTERVAL_S, say
from loadtest.loads import Load
from loadtest.metrics import measure, values_of, window_s
from loadtest.records import RequestRecord

REFRESHES_PER_S = 4


class Board:
    """Rate, TTFT and TPOT of every load that ran or runs, and how long the rest will take.

    loads_in_all: how many loads the session has; those of the search for the highest rate are not known beforehand.
    """

    def __init__(self, loads_in_all: int) -> None:
        self._in_all, self._ended = loads_in_all, 0
        self._started_s = time.monotonic()
        self._rows: dict[tuple[str, str], tuple[str, ...]] = {}
        self._now = ""

    @contextmanager
    def showing(self) -> Iterator[None]:
        """On a terminal, shows the table until the end."""
        live = Live(get_renderable=self._table, console=Console(stderr=True), refresh_per_second=REFRESHES_PER_S)
        with live if sys.stderr.isatty() else nullcontext():
            yield

    def load(self, arm: str, stay: str, load: Load, count: int) -> LoadProgress:
        """Begins a load of `count` requests. stay: which block this is, such as `pair 2`."""
        self._now = f"{arm}, {stay}, {load.label}"
        return LoadProgress(self, arm, load, self._now, count)

    def update(self, arm: str, load: Load, cells: tuple[str, ...]) -> None:
        self._rows[arm, load.label] = cells

    def end_load(self) -> str:
        """Counts a load as done; returns how long the rest will take, as text."""
        self._ended += 1
        return self._remaining()

    def _remaining(self) -> str:
        if not 0 < self._ended < self._in_all:
            return ""
        eta_s = (time.monotonic() - self._started_s) / self._ended * (self._in_all - self._ended)
        return f"ETA {eta_s:.0f} s"

    def _table(self) -> Table:
        passed_s = time.monotonic() - self._started_s
        table = Table(title=f"{self._now}   {passed_s:.0f} s   {self._remaining()}", title_justify="left")
        for column in ("load", "requests", "requests/s", "TTFT (ms)", "TPOT (ms)", "failed"):
            table.add_column(column, justify="left" if column == "load" else "right")
        for (arm, load), cells in self._rows.items():
            table.add_row(f"{arm}, {load}", *cells)
        return table


class LoadProgress:
    """One load while it runs. Told of all its records so far; elsewhere than on a terminal, prints a line at times."""

    def __init__(self, board: Board, arm: str, load: Load, label: str, count: int) -> None:
        self._board, self._arm, self._load, self._label, self._count = board, arm, load, label, count
        self._last_line_s = time.monotonic()

    def update(self, records: Sequence[RequestRecord]) -> None:
        cells = describe_progress(records, self._count)
        self._board.update(self._arm, self._load, cells)
        if not sys.stderr.isatty() and time.monotonic() - self._last_line_s >= PLAIN_LINE_INTERVAL_S:
            self._last_line_s = time.monotonic()
            say(self._line(cells))

    def end(self, records: Sequence[RequestRecord]) -> None:
        self.update(records)
        remaining = self._board.end_load()
        if not sys.stderr.isatty():
            say(f"{self._line(describe_progress(records, self._count))}   {remaining}".rstrip())

    def _line(self, cells: tuple[str, ...]) -> str:
        requests, rate, ttft, tpot, failed = cells
        return f"{self._label}: {requests} requests, {rate}/s, TTFT {ttft} ms, TPOT {tpot} ms, {failed} failed"


def describe_progress(records: Sequence[RequestRecord], count: int) -> tuple[str, ...]:
    """Requests so far of `count`, requests a second, medians of TTFT and TPOT (ms), failed requests."""
    metrics = [measure(record) for record in records if record.error is None]
    length_s = window_s(records) if records else None
    rate = f"{len(records) / length_s:.2f}" if length_s else "-"
    medians = [values_of(metrics, name) for name in ("ttft", "tpot")]
    shown = [f"{1000 * median(values):.1f}" if values else "-" for values in medians]
    return (f"{len(records)}/{count}", rate, *shown, str(len(records) - len(metrics)))
