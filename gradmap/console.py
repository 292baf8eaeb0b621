"""What people see: messages and progress on stderr, summary tables and one JSON line on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from gradmap.processes import is_main_process

PLAIN_LINE_INTERVAL_S = 10.0


def say(message: str) -> None:
    """Prints one line to stderr, unwrapped when stderr is not a terminal. Of several processes, the first one does."""
    if not is_main_process():
        return
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(message)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. A bar with ETA on a terminal; elsewhere a line when it starts, ends, and every 10 s."""
    if sys.stderr.isatty() and is_main_process():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total)
            yield lambda n: bar.advance(task, n)
        return
    lines = _ProgressLines(description, total)
    yield lines.advance
    lines.finish()


class _ProgressLines:
    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done = description, total, 0
        self.started = self.last_line = time.monotonic()
        say(f"{description}: 0/{total}")

    def advance(self, n: int) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.last_line >= PLAIN_LINE_INTERVAL_S and 0 < self.done < self.total:
            self.last_line = now
            eta_s = (now - self.started) / self.done * (self.total - self.done)
            say(f"{self.description}: {self.done}/{self.total}, ETA {eta_s:.0f} s")

    def finish(self) -> None:
        say(f"{self.description}: {self.done}/{self.total} in {time.monotonic() - self.started:.1f} s")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a summary table to stdout; the first column is left-aligned, the others right-aligned."""
    if not is_main_process():
        return
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    wide_enough_for_logs = None if sys.stdout.isatty() else 120
    Console(width=wide_enough_for_logs, markup=False).print(table)


def print_json_line(value: Any) -> None:
    """Prints one JSON object as the last line of stdout (`--json`)."""
    if is_main_process():
        print(json.dumps(value), flush=True)
