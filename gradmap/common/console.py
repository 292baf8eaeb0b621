"""What people see: messages and progress on stderr, summary tables and one JSON line on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from gradmap.common.heartbeat import Heartbeat, Pace, describe_s
from gradmap.common.processes import is_main_process
from gradmap.common.quoting import visible

# One for all, so that messages come above what is shown live, and several live things below each
# other.
STDERR = Console(stderr=True, highlight=False, markup=False, emoji=False)


def say(message: str) -> None:
    """Prints one line to stderr, unwrapped when stderr is not a terminal. Of several processes, the
    first one does."""
    if not is_main_process():
        return
    STDERR.print(visible(message), soft_wrap=True)
    _HEARTBEAT.spoke()


_HEARTBEAT = Heartbeat(say)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. A bar with ETA on a terminal; elsewhere a line when it starts, ends, and
    every 10 s."""
    pace, started_s = Pace(total), time.monotonic()

    def advance(n: int) -> None:
        pace.advance(n, time.monotonic() - started_s)

    if _is_live():
        counted = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), _Line(pace.describe_eta))
        with Progress(
            TextColumn("{task.description}", markup=False), *counted, console=STDERR
        ) as bar:
            task = bar.add_task(description, total=total)

            def advance_bar(n: int) -> None:
                advance(n)
                bar.advance(task, n)

            yield advance_bar
        return
    say(f"{description}: 0/{total}")
    with heartbeat(lambda elapsed_s: f"{description}: {pace.describe(elapsed_s)}"):
        yield advance
    say(f"{description}: {pace.done}/{total} in {time.monotonic() - started_s:.1f} s")


@contextmanager
def waiting(what: str | Callable[[], str]) -> Iterator[None]:
    """Names what takes its time and cannot be counted: on a terminal while it lasts, elsewhere
    every 10 s.

    Where it is quick, nothing is said. what: may change in the meantime.
    """
    if _is_live():
        with Progress(
            SpinnerColumn(), _Line(so_far(what)), console=STDERR, transient=True
        ) as spinner:
            spinner.add_task("", total=None)
            yield
        return
    with heartbeat(so_far(what)):
        yield


def importing() -> AbstractContextManager[None]:
    """Names, as `waiting` does, the imports that a command begins with: of torch and transformers,
    which take ten seconds."""
    return waiting("Importing torch and transformers")


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Says `what` at once, for it is seldom quick, and then as `waiting` does."""
    say(what)
    with waiting(what):
        yield


@contextmanager
def heartbeat(describe: Callable[[float], str]) -> Iterator[None]:
    """Says `describe(seconds so far)` after every 10 s of silence, and nothing on a terminal. Also
    a decorator.

    Of such blocks inside each other, the innermost is what is said.
    """
    if sys.stderr.isatty() or not is_main_process():
        yield
        return
    with _HEARTBEAT.during(describe):
        yield


def so_far(what: str | Callable[[], str]) -> Callable[[float], str]:
    """A function from the seconds that have passed to `what, 20 s so far`."""
    return lambda elapsed_s: (
        f"{what if isinstance(what, str) else what()}, {describe_s(elapsed_s)} so far"
    )


def _is_live() -> bool:
    return sys.stderr.isatty() and is_main_process()


class _Line(ProgressColumn):
    """Text that follows from the seconds so far."""

    def __init__(self, describe: Callable[[float], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._describe = describe

    def render(self, task: Task) -> Text:
        return Text(self._describe(task.elapsed or 0.0))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a summary table to stdout; the first column is left-aligned, the others
    right-aligned."""
    if not is_main_process():
        return
    table = Table(title=visible(title), title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(visible(column), justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*map(visible, row))
    wide_enough_for_logs = None if sys.stdout.isatty() else 120
    Console(width=wide_enough_for_logs, markup=False).print(table)


def print_json_line(value: Any) -> None:
    """Prints one JSON object as the last line of stdout (`--json`)."""
    if is_main_process():
        print(json.dumps(value), flush=True)
