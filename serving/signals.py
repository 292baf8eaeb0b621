"""SIGTERM and ctrl-C, from the first moment on: process 1 of a container loses a signal that it has no handler for."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from types import FrameType
from typing import Protocol

Handler = Callable[[int, FrameType | None], None]


class Killable(Protocol):
    def kill(self) -> None: ...


class EndAsked(BaseException):
    """SIGTERM, where there is nothing yet that takes time to stop."""


@contextmanager
def ending_at_once() -> Iterator[None]:
    """While this block runs, SIGTERM raises EndAsked in it."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise EndAsked

    with _handling(handle, signal.SIGTERM):
        yield


class Stop:
    """What signals have asked for. The first one drains, a second ctrl-C ends everything at once."""

    def __init__(self) -> None:
        self.event = Event()
        self.interrupted = False

    @contextmanager
    def on_signals(self, servers: Sequence[Killable]) -> Iterator[None]:
        """Listens to signals while this block runs."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.event.is_set():
                for one in servers:
                    one.kill()
            self.interrupted |= number == signal.SIGINT
            self.event.set()

        with _handling(handle, signal.SIGTERM, signal.SIGINT):
            yield


@contextmanager
def _handling(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
