"""SIGTERM and ctrl-C while servers run, which end in an order of their own."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from types import FrameType
from typing import Protocol


class Killable(Protocol):
    def kill(self) -> None: ...


class Stop:
    """The end that signals have asked for. The first one drains, a second ctrl-C ends everything at
    once."""

    def __init__(self) -> None:
        self.event = Event()
        self.interrupted = False

    @contextmanager
    def on_signals(self, servers: Sequence[Killable]) -> Iterator[None]:
        """Listens to signals while this block runs."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.event.is_set():
                for server in servers:
                    server.kill()
            self.interrupted |= number == signal.SIGINT
            self.event.set()

        before = {
            number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, former in before.items():
                signal.signal(number, former)
