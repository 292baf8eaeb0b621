"""What people see of a load test while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median

from rich.live import Live
from rich.table import Table

from gradmap.console import STDERR, heartbeat, say
from gradmap.heartbeat import Pace
from loadtest.loads import Load
from loadtest.metrics import measure, values_of, window_s
from loadtest.records import RequestRecord

REFRESHES_PER_S = 4


class Board:
    """Rate, TTFT and TPOT of every load that ran or runs, and how long the rest will take.

    loads_in_all: how many loads the session has; those of the search for the highest rate are not known beforehand.
    """

    def __init__(self, loads_in_all: int) -> None:
        self._pace = Pace(loads_in_all)
        self._started_s = time.monotonic()
        self._rows: dict[tuple[str, str], tuple[str, ...]] = {}
        self._now = ""

    @contextmanager
    def showing(self) -> Iterator[None]:
        """On a terminal, shows the table until the end."""
        live = Live(get_renderable=self._table, console=STDERR, refresh_per_second=REFRESHES_PER_S)
        with live if sys.stderr.isatty() else nullcontext():
            yield

    @contextmanager
    def load(self, arm: str, stay: str, load: Load, count: int) -> Iterator[LoadProgress]:
        """Shows a load of `count` requests while the block runs; elsewhere than on a terminal, as lines.

        stay: which block this is, such as `pair 2`.
        """
        self._now = f"{arm}, {stay}, {load.label}"
        progress = LoadProgress(self, arm, load, count)
        with heartbeat(lambda _: self._line(progress)):
            yield progress
        self._pace.advance(1, self._passed_s)
        if not sys.stderr.isatty():
            say(self._line(progress))

    def update(self, arm: str, load: Load, cells: tuple[str, ...]) -> None:
        self._rows[arm, load.label] = cells

    def _line(self, progress: LoadProgress) -> str:
        requests, rate, ttft, tpot, failed = progress.cells
        line = f"{self._now}: {requests} requests, {rate}/s, TTFT {ttft} ms, TPOT {tpot} ms, {failed} failed"
        return f"{line}   {self._pace.describe_eta(self._passed_s)}".rstrip()

    @property
    def _passed_s(self) -> float:
        return time.monotonic() - self._started_s

    def _table(self) -> Table:
        title = f"{self._now}   {self._passed_s:.0f} s   {self._pace.describe_eta(self._passed_s)}"
        table = Table(title=title, title_justify="left")
        for column in ("load", "requests", "requests/s", "TTFT (ms)", "TPOT (ms)", "failed"):
            table.add_column(column, justify="left" if column == "load" else "right")
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
    """Requests so far of `count`, requests a second, medians of TTFT and TPOT (ms), failed requests."""
    metrics = [measure(record) for record in records if record.error is None]
    length_s = window_s(records) if records else None
    rate = f"{len(records) / length_s:.2f}" if length_s else "-"
    medians = [values_of(metrics, name) for name in ("ttft", "tpot")]
    shown = [f"{1000 * median(values):.1f}" if values else "-" for values in medians]
    return (f"{len(records)}/{count}", rate, *shown, str(len(records) - len(metrics)))
