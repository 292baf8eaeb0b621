"""Nothing looks hung: what goes on is said again whenever it was silent for a while, with an honest
guess of the rest.

`Pace` and `Heartbeat.beat` decide; they are told the time. The thread in `Heartbeat.during` only
waits and asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread

INTERVAL_S = 10.0
# The pace that counts is that of this last share of the time so far.
RECENT_SHARE = 0.25


class Pace:
    """How far counted work has come, and how long the rest takes. Times are seconds since it began.

    The rest is expected to go on as it went of late. So neither a slow first unit counts for long,
    nor what an interrupted run had done before; and a search that skips most of its candidates is
    expected to skip again.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        # When how much was done: from just before the recent share of the time until now.
        self._marks: deque[tuple[float, int]] = deque([(0.0, 0)])

    def advance(self, n: int, elapsed_s: float) -> None:
        """Counts n units, done or found to be needless."""
        if n == 0:
            return
        self.done += n
        self._marks.append((elapsed_s, self.done))
        while len(self._marks) > 2 and self._marks[1][0] <= (1 - RECENT_SHARE) * elapsed_s:
            self._marks.popleft()

    def eta_s(self, elapsed_s: float) -> float | None:
        """Seconds that the rest will take; None if nothing tells, or if it should have been done by
        now."""
        (first_s, before), (last_s, done) = self._marks[0], self._marks[-1]
        if done == before:
            return None
        rest_s = (last_s - first_s) / (done - before) * (self.total - done)
        left_s = last_s + rest_s - elapsed_s
        return left_s if left_s > 0 else None

    def describe_eta(self, elapsed_s: float) -> str:
        """`ETA 40 s`, or nothing."""
        eta_s = self.eta_s(elapsed_s)
        return "" if eta_s is None else f"ETA {describe_s(eta_s)}"

    def describe(self, elapsed_s: float) -> str:
        """`3/212, 87 s so far, ETA 40 s`."""
        parts = (
            f"{self.done}/{self.total}",
            f"{describe_s(elapsed_s)} so far",
            self.describe_eta(elapsed_s),
        )
        return ", ".join(filter(None, parts))


def describe_s(seconds: float) -> str:
    """`87 s`, `12 min` or `3.4 h`."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Heartbeat:
    """Says what goes on whenever nothing was said for `interval_s`: of activities inside each
    other, the innermost.

    clock: seconds, from any start.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._interval_s, self._clock = say, interval_s, clock
        self._lines: list[Callable[[], str]] = []
        self._spoke_s = clock()
        # So that no line comes when its activity has ended.
        self._lock = Lock()

    def spoke(self) -> None:
        """Notes that something else was said just now."""
        self._spoke_s = self._clock()

    @property
    def wait_s(self) -> float:
        """Seconds that it may still be silent."""
        return max(0.0, self._spoke_s + self._interval_s - self._clock())

    def beat(self) -> None:
        """Says what goes on, if it was silent for long enough."""
        with self._lock:
            if self._lines and self.wait_s == 0:
                self._say(self._lines[-1]())
                self.spoke()

    def watch(self, stopped: Callable[[float], bool]) -> None:
        """Beats until `stopped`, which waits for so many seconds, says so."""
        while not stopped(self.wait_s):
            self.beat()

    @contextmanager
    def during(self, describe: Callable[[float], str]) -> Iterator[None]:
        """Beats, from another thread, while the block runs. describe: from its seconds so far to
        the line."""
        started_s = self._clock()

        def line() -> str:
            return describe(self._clock() - started_s)

        # What was said before it began is none of its business.
        if not self._lines:
            self.spoke()
        stop = Event()
        thread = Thread(target=self.watch, args=(stop.wait,), daemon=True)
        self._lines.append(line)
        thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._lines.remove(line)
            stop.set()
            thread.join()
