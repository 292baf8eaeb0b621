"""SIGTERM ends a command as ctrl-C does: what is open is closed, what is half done goes, what we
started ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def raising_signals() -> Iterator[list[int]]:
    """While the block runs, SIGTERM and SIGINT raise Terminated and KeyboardInterrupt in the main
    thread, once.

    Yields what has come, for libraries catch exceptions and raise others. What follows the first
    one would cut its tidying short, and a stage gets several: from the terminal or the container,
    and from who started it. Only ctrl-C a second time still does, for who insists. A signal that
    this process was started to ignore stays so. To be called in the main thread.
    """
    owner, received = os.getpid(), list[int]()

    def end(number: int, frame: FrameType | None) -> NoReturn:
        # A fork of us, by a library, has nothing to tidy that is not ours.
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if signal.SIGINT in heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    ends = (signal.SIGTERM, signal.SIGINT)
    heeded = [number for number in ends if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heeded}
    try:
        yield received
    finally:
        # Else this process is about to end, and goes on ignoring what would cut that short.
        if not received:
            for number, handler in before.items():
                signal.signal(number, handler)
