"""Of processes that are not our own children."""

import time
from collections.abc import Iterable

import psutil


def ended(numbers: Iterable[int]) -> bool:
    """Whether the processes end; what waits to be reaped by another has."""
    numbers = list(numbers)
    deadline = time.monotonic() + 30
    while any(
        psutil.pid_exists(one) and psutil.Process(one).status() != psutil.STATUS_ZOMBIE
        for one in numbers
    ):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
